//! What Konnectivity's manifests may have and Culvert must take: each test runs with both.

use std::{net::SocketAddr, path::Path, process::Command, sync::Arc};

use culvert_konnectivity::ALPN_H2;
use culvert_loadtest::{frontend::Protocol::Connect, targets};
use culvert_transport::tls::{Identity, KeyExchange, authorities, certificates};
use culvert_wire::version::ALPN;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair};
use rstest::rstest;
use rustls::{ClientConfig, ProtocolVersion, ServerConfig, SupportedProtocolVersion, version};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};
use tokio_util::task::AbortOnDropHandle;

use crate::support::{
    deployment::{
        Deployment,
        Implementation::{self, Culvert, Konnectivity},
        can_run,
    },
    eventually, has_program, within,
};

/// Starts a server and an agent with more flags, and waits until a dial works.
async fn with_flags([agent, server]: [Implementation; 2], [of_agent, of_server]: [&[&str]; 2]) {
    if !can_run(&[agent, server]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(server, Connect, of_server).await;
        let _agent = deployment.start_agent(agent, "agent", of_agent).await;
        deployment.until_joined(1).await;
        let echo = targets::echo().await.unwrap();
        deployment.touch(&echo).await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_with_identifiers_that_match_nothing_and_with_too_many(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    let hosts: Vec<_> = (0..80).map(|number| format!("host=node-{number}")).collect();
    let long = format!("host={}", "x".repeat(300));
    for identifiers in [
        "ipv4=$(HOST_IP)&host=",
        "ipv4=10.0.0.1,fd00::1&default-route=yes",
        &hosts.join("&"),
        &long,
    ] {
        let flag = format!("--agent-identifiers={identifiers}");
        with_flags([agent, server], [&[&flag], &[]]).await;
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn words_that_belong_to_no_flag_are_ignored(
    #[values(Culvert, Konnectivity)] implementation: Implementation,
) {
    let of_agent = ["--sync-forever", "true", "--warn-on-channel-limit", "false"];
    let of_server = ["--delete-existing-uds-file", "true", "word"];
    let flags: [&[&str]; 2] = [&of_agent, &of_server];
    with_flags([implementation; 2], flags).await;
}

/// As `openssl req -x509` makes it: the certificate of a CA is that of the server, and its own CA.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_certificate_of_a_ca_is_accepted_of_a_server(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    let folder = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let file = |name: &str, contents: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, contents).unwrap();
        path.display().to_string()
    };
    let certificate = file("ca.crt", params.self_signed(&key).unwrap().pem());
    let key = file("ca.key", key.serialize_pem());
    let of_agent = [&*format!("--ca-cert={certificate}")];
    let of_server = [&*format!("--cluster-cert={certificate}"), &*format!("--cluster-key={key}")];
    with_flags([agent, server], [&of_agent, &of_server]).await;
}

/// Connects to the port for agents with these versions of TLS and this protocol.
async fn connect(
    deployment: &Deployment,
    versions: &[&'static SupportedProtocolVersion],
    protocol: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let tls = client_tls(deployment, versions, protocol);
    let socket = TcpStream::connect(deployment.tunnel()).await.unwrap();
    let name = deployment.tunnel().ip().into();
    TlsConnector::from(tls).connect(name, socket).await
}

/// TLS of an agent with these versions and this protocol.
fn client_tls(
    deployment: &Deployment,
    versions: &[&'static SupportedProtocolVersion],
    protocol: &[u8],
) -> Arc<ClientConfig> {
    let pair = deployment.certificates.agent();
    let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
    let roots = authorities(&certificates(&deployment.certificates.ca()).unwrap()).unwrap();
    let mut tls = ClientConfig::builder_with_provider(KeyExchange::Hybrid.provider())
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(identity.chain, identity.key)
        .unwrap();
    tls.alpn_protocols = vec![protocol.to_vec()];
    Arc::new(tls)
}

/// A relay before the port for agents that has TLS 1.2 alone, and Konnectivity's protocol, on both
/// sides: its address.
async fn tls_1_2_relay(deployment: &Deployment) -> (SocketAddr, AbortOnDropHandle<()>) {
    let pair = deployment.certificates.server();
    let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
    let mut tls = ServerConfig::builder_with_provider(KeyExchange::Classic.provider())
        .with_protocol_versions(&[&version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(identity.chain, identity.key)
        .unwrap();
    tls.alpn_protocols = vec![ALPN_H2.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let connector = TlsConnector::from(client_tls(deployment, &[&version::TLS12], ALPN_H2));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, server) = (listener.local_addr().unwrap(), deployment.tunnel());
    let relaying = culvert_transport::task::owned(async move {
        let mut relayed = JoinSet::new();
        while let Ok((agent, _)) = listener.accept().await {
            let (acceptor, connector) = (acceptor.clone(), connector.clone());
            relayed.spawn(async move {
                // An agent may give up.
                let Ok(mut agent) = acceptor.accept(agent).await else { return };
                let socket = TcpStream::connect(server).await.unwrap();
                let mut server = connector.connect(server.ip().into(), socket).await.unwrap();
                let _ = copy_bidirectional(&mut agent, &mut server).await;
            });
        }
    });
    (address, relaying)
}

#[rstest]
#[case::agent(Konnectivity, Culvert)]
#[case::server(Culvert, Konnectivity)]
#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_peer_with_tls_1_2_alone_is_used(
    #[case] agent: Implementation,
    #[case] server: Implementation,
) {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(server, Connect, &[]).await;
        let (relay, _relaying) = tls_1_2_relay(&deployment).await;
        let port = format!("--proxy-server-port={}", relay.port());
        let _agent = deployment.start_agent(agent, "agent", &[&port]).await;
        let target = targets::echo().await.unwrap();
        deployment.until_dials_work(&target).await;
    })
    .await;
}

/// Runs openssl in a folder.
fn openssl(folder: &Path, args: &str) -> String {
    let words = args.split_whitespace();
    let output = Command::new("openssl").args(words).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "openssl {args}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// `openssl x509 -req` without extensions makes certificates of version 1.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_a_certificate_of_version_1_joins_unless_certificates_are_strict(
    #[values(Culvert, Konnectivity)] agent: Implementation,
) {
    if !has_program("openssl") || !can_run(&[agent]).await {
        return;
    }
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        let folder = deployment.certificates.folder().to_owned();
        for args in [
            "ecparam -name prime256v1 -genkey -noout -out v1-ca.key",
            "req -x509 -new -key v1-ca.key -subj /CN=agents -days 2 -out v1-ca.crt",
            "ecparam -name prime256v1 -genkey -noout -out v1.key",
            "req -new -key v1.key -subj /CN=node-1 -out v1.csr",
            "x509 -req -in v1.csr -CA v1-ca.crt -CAkey v1-ca.key -CAcreateserial -days 2 -out v1.crt",
        ] {
            openssl(&folder, args);
        }
        let text = openssl(&folder, "x509 -in v1.crt -noout -text");
        assert!(text.contains("Version: 1 (0x0)"), "{text}");
        let ca = format!("--cluster-ca-cert={}", folder.join("v1-ca.crt").display());
        deployment.start_server(Culvert, &[&ca]).await;
        let pair = ["cert", "key"].map(|what| {
            let file = if what == "cert" { "v1.crt" } else { "v1.key" };
            format!("--agent-{what}={}", folder.join(file).display())
        });
        let flags: Vec<_> = pair.iter().map(String::as_str).collect();
        let joined = deployment.start_agent(agent, "agent", &flags).await;
        deployment.touch(&targets::echo().await.unwrap()).await.unwrap();
        drop(joined);

        deployment.server().kill().await.unwrap();
        deployment.start_server(Culvert, &[&ca, "--strict-certificates"]).await;
        let _refused = deployment.spawn_agent(agent, "refused", true, pair).await;
        let refusals = "culvert_server_join_failures_total{reason=\"handshake\"}";
        let is_refused = async || deployment.server_metric(refusals).await >= 1.0;
        eventually("the agent is refused", is_refused).await;
        assert_eq!(deployment.ready_backends().await, 0.0);
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn agents_may_use_tls_1_2_unless_the_server_asks_for_1_3(
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    if !can_run(&[server]).await {
        return;
    }
    within(async {
        for (flag, expected) in [
            ("--tls-min-version=VersionTLS12", Some(ProtocolVersion::TLSv1_2)),
            ("--tls-min-version=VersionTLS13", None),
        ] {
            let deployment = Deployment::start(server, Connect, &[flag]).await;
            let connected = connect(&deployment, &[&version::TLS12], ALPN_H2).await;
            let found = connected.ok().and_then(|stream| stream.get_ref().1.protocol_version());
            assert_eq!(found, expected, "{flag}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_of_culvert_needs_tls_1_3() {
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &[]).await;
        let refused = "culvert_server_join_failures_total{reason=\"handshake\"}";
        let _stream = connect(&deployment, &[&version::TLS12], ALPN).await.unwrap();
        let is_refused = async || deployment.server_metric(refused).await == 1.0;
        eventually("the tunnel is refused", is_refused).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cipher_suite_that_is_not_listed_is_not_used() {
    let flag = "--cipher-suites=TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256";
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &[flag]).await;
        // The certificates are of ECDSA.
        connect(&deployment, &[&version::TLS12], ALPN_H2).await.unwrap_err();
        connect(&deployment, &[&version::TLS13], ALPN_H2).await.unwrap();
    })
    .await;
}

/// Go's strict FIPS mode refuses key exchanges and suites that are not approved.
#[rstest]
#[case::agent(Konnectivity, Culvert)]
#[case::server(Culvert, Konnectivity)]
#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_process_in_fips_mode_finds_a_key_exchange(
    #[case] agent: Implementation,
    #[case] server: Implementation,
) {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    let fips = ["env".to_owned(), "GODEBUG=fips140=only".to_owned()];
    let under = |implementation| match implementation {
        Konnectivity => &fips[..],
        Culvert => &[],
    };
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        deployment.start_server_under(under(server), server, &[]).await;
        let _agent = deployment.spawn_agent_under(under(agent), agent, "agent", true, []).await;
        deployment.until_joined(1).await;
    })
    .await;
}

/// What a firewall does with a ClientHello that does not fit its first packet.
#[derive(Clone, Copy, Debug)]
enum Large {
    Reset,
    Drop,
}

/// Forwards connections whose ClientHello fits a packet to `to`; the port, and the task's owner.
async fn firewall(to: SocketAddr, large: Large) -> (u16, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            connections.spawn(async move {
                let mut head = [0; 5];
                while socket.peek(&mut head).await.unwrap() < head.len() {
                    tokio::task::yield_now().await;
                }
                let length = head.len() + usize::from(u16::from_be_bytes([head[3], head[4]]));
                match large {
                    _ if length <= 1400 => {
                        let mut server = TcpStream::connect(to).await.unwrap();
                        let _ = copy_bidirectional(&mut socket, &mut server).await;
                    }
                    // Closed with bytes unread.
                    Large::Reset => drop(socket),
                    Large::Drop => {
                        let _ = socket.readable().await;
                        std::future::pending::<()>().await;
                    }
                }
            });
        }
    });
    (port, tasks)
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_through_a_firewall_that_decides_on_the_first_packet(
    #[values(Large::Reset, Large::Drop)] large: Large,
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    if !can_run(&[server]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(server, Connect, &[]).await;
        let (port, _firewall) = firewall(deployment.tunnel(), large).await;
        let port = format!("--proxy-server-port={port}");
        let agent = deployment.start_agent(Culvert, "agent", &["--transport=tcp", &port]).await;
        deployment.until_joined(1).await;
        let warning = "a handshake succeeds only with a classical key exchange";
        assert!(agent.log().contains(warning));
    })
    .await;
}
