//! Files that are replaced while a server and an agent serve a stream.

use std::{fs, time::Duration};

use culvert_loadtest::{
    certificates::Certificates,
    frontend::{self, FrontendKind, Protocol},
    process::Signal,
    rig::{Rig, Running},
    targets,
};
use culvert_process::faults::CertificatePair;
use culvert_transport::tls::certificates;
use culvert_wire::CloseCode;
use rstest::rstest;
use tokio::io::AsyncWriteExt as _;

use crate::support::{
    Carrier::{self, Quic, Tcp},
    LOG_AS_JSON,
    agent::tunnel,
    deployment::{Deployment, Implementation::Culvert},
    echo, eventually,
    kube_api::{ACCOUNT, AUDIENCE, KubeApi, jwt},
    rig, within,
};

/// The certificate in a file, in DER.
fn leaf(pair: &CertificatePair) -> Vec<u8> {
    certificates(&pair.certificate).unwrap()[0].to_vec()
}

/// The certificate that the rig's server shows to agents now.
async fn shown_to_agents(rig: &Running) -> Vec<u8> {
    tunnel(rig).await.peer_certificates().unwrap()[0].to_vec()
}

/// Number of agents that were refused in their handshake.
fn refused(rig: &Running) -> f64 {
    ["handshake", "lost"]
        .map(|reason| {
            rig.server.metric(&format!("culvert_server_join_failures_total{{reason=\"{reason}\"}}"))
        })
        .iter()
        .sum()
}

#[rstest]
#[tokio::test]
async fn a_renewed_certificate_is_shown_to_new_agents_and_streams_go_on(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let mut rig = rig(FrontendKind::ConnectUnix, carrier).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut stream = rig.dial(target.address()).await.unwrap();
        echo(&mut stream, b"before").await.unwrap();
        let old = leaf(&rig.certificates().server());
        assert_eq!(shown_to_agents(&rig).await, old);

        rig.certificates().renew("server").unwrap();
        rig.server.files.look().await;
        let new = leaf(&rig.certificates().server());
        assert_ne!(new, old);
        assert_eq!(shown_to_agents(&rig).await, new);
        echo(&mut stream, b"after").await.unwrap();
        rig.add_agent("late").unwrap();
        rig.until_joined(2).await.unwrap();
        let file = rig.certificates().server().certificate;
        let labels = format!("{{file=\"{}\",result=\"ok\"}}", file.display());
        assert_eq!(rig.server.metric(&format!("culvert_server_reload_total{labels}")), 1.0);
        let labels = format!("{{file=\"{}\"}}", file.display());
        let expiry = format!("culvert_server_certificate_expiry_seconds{labels}");
        assert!(rig.server.metric(&expiry) > 86_400.0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_pair_that_does_not_match_leaves_the_old_one_in_use(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(FrontendKind::ConnectUnix, carrier).start().await.unwrap();
        let pair = rig.certificates().server();
        let (old, key) = (leaf(&pair), fs::read(&pair.key).unwrap());
        rig.certificates().renew("server").unwrap();
        fs::write(&pair.key, key).unwrap();
        rig.server.files.look().await;
        assert_eq!(shown_to_agents(&rig).await, old);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_renewed_certificate_is_shown_to_new_frontends_and_those_of_an_old_ca_are_refused(
    #[values(FrontendKind::ConnectTls, FrontendKind::GrpcTls)] kind: FrontendKind,
) {
    within(async {
        let rig = rig(kind, Quic).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut stream = rig.dial(target.address()).await.unwrap();
        echo(&mut stream, b"before").await.unwrap();
        let alpn: &[u8] = match kind.protocol() {
            Protocol::Connect => b"http/1.1",
            Protocol::Grpc => b"h2",
        };
        rig.certificates().renew("server").unwrap();
        rig.server.files.look().await;
        let tls = frontend::tls(&rig, alpn).await.unwrap();
        let shown = tls.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        assert_eq!(shown, leaf(&rig.certificates().server()));
        echo(&mut stream, b"after").await.unwrap();

        // A new CA for clients; the frontend keeps its certificate of the old one, and trusts both.
        let others = Certificates::generate().unwrap();
        let ca = fs::read(rig.certificates().ca()).unwrap();
        fs::copy(others.ca(), rig.certificates().ca()).unwrap();
        rig.server.files.look().await;
        fs::write(rig.certificates().ca(), ca).unwrap();
        rig.dial(target.address()).await.unwrap_err();
        echo(&mut stream, b"still").await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn agents_of_an_old_ca_are_refused_and_those_of_the_new_one_join(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let mut rig = rig(FrontendKind::ConnectUnix, carrier).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut stream = rig.dial(target.address()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let old_ca = folder.path().join("old-ca.crt");
        fs::copy(rig.certificates().ca(), &old_ca).unwrap();
        let others = Certificates::generate().unwrap();
        fs::copy(others.ca(), rig.certificates().ca()).unwrap();
        rig.server.files.look().await;

        // The server's own certificate is of the old CA still.
        let mut config = rig.agent_config("old").unwrap();
        config.servers.ca = old_ca.clone();
        rig.add_agent_with(&config).unwrap();
        eventually("the agent is refused", async || refused(&rig) > 0.0).await;
        let mut config = rig.agent_config("new").unwrap();
        config.servers.ca = old_ca;
        config.servers.certificate = Some(others.agent());
        rig.add_agent_with(&config).unwrap();
        rig.until_joined(2).await.unwrap();
        let scrape = rig.server.scrape();
        assert!(scrape.contains("agent_id=\"new\""), "{scrape}");
        assert!(!scrape.contains("agent_id=\"old\""), "{scrape}");
        echo(&mut stream, b"of the first agent").await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_comes_back_with_its_new_certificate_and_ca(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = Rig::new().carrier(carrier).start().await.unwrap();
        let first = rig.server.backends.all()[0].clone();
        rig.certificates().replace_by(&Certificates::generate().unwrap()).unwrap();
        rig.server.files.look().await;
        first.tunnel.close(CloseCode::DONE, "come again");
        let shown = leaf(&rig.certificates().agent());
        eventually("the agent shows its new certificate", async || {
            let tunnels = rig.server.backends.all();
            let mut shows = tunnels.iter().filter_map(|backend| backend.tunnel.peer_certificates());
            shows.any(|chain| chain[0].to_vec() == shown)
        })
        .await;
    })
    .await;
}

/// Server and agent as processes, and the port for Konnectivity agents.
#[rstest]
#[tokio::test]
async fn sighup_has_both_processes_read_their_files_at_once(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let mut deployment = Deployment::start(Culvert, Protocol::Connect, &LOG_AS_JSON).await;
        let transport = format!("--transport={carrier}");
        let flags = [&LOG_AS_JSON[..], &[&transport]].concat();
        let mut agent = deployment.start_agent(Culvert, "agent", &flags).await;
        let (_target, mut stream) = deployment.open_echo().await;

        for name in ["server", "agent"] {
            deployment.certificates.renew(name).unwrap();
        }
        deployment.server().signal(Signal::Reload).await.unwrap();
        agent.signal(Signal::Reload).await.unwrap();
        for process in [deployment.server(), &mut agent] {
            let reloaded = process.until_logged("a changed file was read again").await.unwrap();
            assert!(
                reloaded["subject"].as_str().unwrap().contains("culvert loadtest"),
                "{reloaded}"
            );
            process.until_logged("the files were looked at on request").await.unwrap();
        }
        let tls = deployment.connect_as_konnectivity_agent().await;
        let shown = tls.get_ref().1.peer_certificates().unwrap()[0].to_vec();
        assert_eq!(shown, leaf(&deployment.certificates.server()));
        echo(&mut stream, b"still").await.unwrap();

        // Bad contents are reported at once, and each time.
        fs::write(deployment.certificates.ca(), "no certificate").unwrap();
        for _ in 0..2 {
            for process in [deployment.server(), &mut agent] {
                process.signal(Signal::Reload).await.unwrap();
                let event = "a changed file cannot be used, the last good one stays in use";
                let failed = process.until_logged(event).await.unwrap();
                let error = failed["error"].as_str().unwrap();
                assert!(error.contains("ca.crt: holds no certificate"), "{error}");
            }
        }
        echo(&mut stream, b"and still").await.unwrap();
    })
    .await;
}

/// A tunnel that began after the secret was replaced is known to a server that was started with the
/// new one: the agent notices the restart by a reset.
#[tokio::test]
async fn a_server_that_restarts_with_its_replaced_reset_key_resets_later_tunnels() {
    within(async {
        let mut deployment = Deployment::without_server(Protocol::Connect);
        let secret = deployment.certificates.folder().join("reset");
        fs::write(&secret, "the old secret").unwrap();
        let flag = format!("--reset-key-file={}", secret.display());
        deployment.start_server(Culvert, &[&LOG_AS_JSON[..], &[&flag]].concat()).await;
        fs::write(&secret, "the new secret").unwrap();
        deployment.server().signal(Signal::Reload).await.unwrap();
        deployment.server().until_logged("a changed file was read again").await.unwrap();
        let flags = [&LOG_AS_JSON[..], &["--transport=quic"]].concat();
        let mut agent = deployment.start_agent(Culvert, "agent", &flags).await;
        let (_frontend, mut socket, _target) = deployment.both_ends().await;
        agent.freeze().await.unwrap();
        deployment.server().restart().await.unwrap();
        deployment.server().until_logged("culvert-server runs").await.unwrap();
        agent.signal(Signal::Thaw).await.unwrap();
        // The agent may have noticed already, by a ping that was not answered.
        let _ = socket.write_all(b"?").await;
        let gone = agent.until_logged("server gone").await.unwrap();
        assert!(gone["reason"].as_str().unwrap().contains("no longer knows"), "{gone}");
    })
    .await;
}

/// The kube-apiserver of the first kubeconfig accepts connections and does not answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_kubeconfig_with_another_address_is_used_when_the_old_one_does_not_answer() {
    within(async {
        let mut deployment = Deployment::without_server(Protocol::Connect);
        let silent = KubeApi::start(&deployment.certificates).await;
        silent.delay_answers(Duration::from_secs(3600));
        let flags = silent.token_flags();
        let flags = flags.each_ref().map(String::as_str);
        deployment.start_server(Culvert, &flags).await;
        let api = KubeApi::start(&deployment.certificates).await;
        let good = jwt(&serde_json::json!({ "sub": "good" }));
        api.accept(&good, ACCOUNT, AUDIENCE);
        let token = deployment.certificates.folder().join("token");
        fs::write(&token, good).unwrap();
        let flag = format!("--service-account-token-path={}", token.display());
        let _agent = deployment.spawn_agent_without_certificate(Culvert, "agent", [flag]).await;
        deployment.until_joined(1).await;
    })
    .await;
}

/// At the start of both, and over each side's own CA file.
#[tokio::test]
async fn a_ca_file_with_a_bad_block_is_used_without_it() {
    within(async {
        let mut deployment = Deployment::without_server(Protocol::Connect);
        let bad = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let ca = fs::read_to_string(deployment.certificates.ca()).unwrap();
        fs::write(deployment.certificates.ca(), bad.to_owned() + &ca).unwrap();
        deployment.start_server(Culvert, &LOG_AS_JSON).await;
        let mut agent = deployment.start_agent(Culvert, "agent", &LOG_AS_JSON).await;
        for process in [deployment.server(), &mut agent] {
            let warning = process.until_logged("a part of a file is left out").await.unwrap();
            let fault = warning["fault"].as_str().unwrap();
            assert!(fault.contains("ca.crt: block 1: "), "{fault}");
        }
        deployment.open_echo().await;
    })
    .await;
}
