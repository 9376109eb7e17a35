//! Agents that claim what agents of another identity have.

use culvert_loadtest::{frontend::Protocol::Connect, process::Process, targets};
use rstest::rstest;

use super::tokens::Guarded;
use crate::support::{
    LOG_AS_JSON,
    deployment::{
        Deployment,
        Implementation::{self, Culvert, Konnectivity},
        can_run,
    },
    echo, eventually,
    kube_api::{ACCOUNT, AUDIENCE, jwt},
    within,
};

/// Connections of an agent to targets since its start.
const DIALS: &str = "culvert_agent_streams_total";
const CONFLICTS: &str = "culvert_server_identity_conflicts_total";
const VICTIM: [&str; 1] = ["--agent-identifiers=ipv4=127.0.0.1"];

/// Flags of an agent with a certificate of this name.
fn with_certificate(deployment: &Deployment, name: &str) -> [String; 2] {
    let pair = deployment.certificates.issue(name).unwrap();
    let (certificate, key) = (pair.certificate.display(), pair.key.display());
    [format!("--agent-cert={certificate}"), format!("--agent-key={key}")]
}

async fn start(
    deployment: &Deployment,
    implementation: Implementation,
    name: &str,
    certificate: &str,
    more: &[&str],
) -> Process {
    let certificate = with_certificate(deployment, certificate);
    let more = more.iter().map(|flag| (*flag).to_owned()).chain(certificate);
    deployment.spawn_agent(implementation, name, true, more).await
}

/// Dials ten times; every dial works.
async fn dial_ten_times(deployment: &Deployment) {
    let target = targets::echo().await.unwrap();
    for _ in 0..10 {
        let mut connection = deployment.dial(target.address()).await.unwrap();
        echo(&mut connection, b"through").await.unwrap();
    }
}

async fn conflicts(deployment: &Deployment, reason: &str) -> f64 {
    deployment.server_metric(&format!("{CONFLICTS}{{reason=\"{reason}\"}}")).await
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_the_identifier_of_another_agent_gets_none_of_its_dials(
    #[values(Culvert, Konnectivity)] implementation: Implementation,
) {
    if !can_run(&[implementation]).await {
        return;
    }
    within(async {
        let flags = [&["--proxy-strategies=destHost"], &LOG_AS_JSON[..]].concat();
        let mut deployment = Deployment::start(Culvert, Connect, &flags).await;
        let victim = start(&deployment, Culvert, "victim", "agent", &VICTIM).await;
        deployment.until_host_is_served().await;
        let claims = ["--agent-identifiers=ipv4=127.0.0.1&host=other"];
        let _stranger = start(&deployment, implementation, "other", "stranger", &claims).await;
        let refused = async || conflicts(&deployment, "identifier_held").await >= 1.0;
        eventually("the stranger is there", refused).await;
        dial_ten_times(&deployment).await;
        assert_eq!(victim.metric(DIALS).await.unwrap(), 10.0);
        let event = "an agent does not get an identifier";
        let event = deployment.server().until_logged(event).await.unwrap();
        assert_eq!(event["agent_id"], "other");
        assert_eq!(event["identifier"], "127.0.0.1");
        // A renewed certificate of the same subject is the same agent's.
        let renewed = start(&deployment, Culvert, "renewed", "agent", &VICTIM).await;
        renewed.until_ok("/readyz").await.unwrap();
        let newest_serves = async || {
            dial_ten_times(&deployment).await;
            renewed.metric(DIALS).await.unwrap() >= 10.0
        };
        eventually("the newest of the same identity has the dials", newest_serves).await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_with_the_id_of_another_agent_does_not_join_until_that_one_has_left(
    #[values(Culvert, Konnectivity)] implementation: Implementation,
) {
    if !can_run(&[implementation]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &[]).await;
        let victim = start(&deployment, Culvert, "node-1", "agent", &[]).await;
        deployment.until_joined(1).await;
        // As its id, but its log is a file of its own.
        let id = ["--agent-id=node-1"];
        let stranger = start(&deployment, implementation, "stranger", "stranger", &id).await;
        let refused = async || conflicts(&deployment, "id_held").await >= 2.0;
        eventually("the stranger was refused", refused).await;
        dial_ten_times(&deployment).await;
        assert_eq!(victim.metric(DIALS).await.unwrap(), 10.0);
        drop(victim);
        stranger.until_ok("/readyz").await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_has_the_name_of_its_node_where_the_server_asks_for_it() {
    within(async {
        let flags = ["--agent-identity=node"];
        let deployment = Deployment::start(Culvert, Connect, &flags).await;
        let _other = start(&deployment, Culvert, "node-2", "system:node:node-1", &[]).await;
        let refused = async || conflicts(&deployment, "id_not_proven").await >= 1.0;
        eventually("the id is refused", refused).await;
        assert_eq!(deployment.ready_backends().await, 0.0);
        let _node = start(&deployment, Culvert, "node-1", "system:node:node-1", &[]).await;
        deployment.until_joined(1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_has_the_addresses_of_its_node_and_the_routes_that_the_list_allows() {
    within(async {
        let flags = ["--agent-identity=node", "--agent-identity-allow=node-1=default-route"];
        let guarded = Guarded::start_with(Culvert, &flags).await;
        guarded.api.put_node("node-1", &["127.0.0.1"]);
        guarded.api.put_node("node-2", &["127.0.0.2"]);
        let not_proven = "identifier_not_proven";
        for (node, expected) in [("node-1", 1.0), ("node-2", 4.0)] {
            let token = jwt(&serde_json::json!({ "sub": node }));
            guarded.api.accept_on_node(&token, ACCOUNT, AUDIENCE, node);
            let file = guarded.deployment.certificates.folder().join(format!("{node}.token"));
            std::fs::write(&file, &token).unwrap();
            let flags = [
                format!("--service-account-token-path={}", file.display()),
                "--agent-identifiers=ipv4=127.0.0.1&default-route=true&cidr=10.0.0.0/8".into(),
            ];
            let agent = guarded.deployment.spawn_agent_without_certificate(Culvert, node, flags);
            let agent = agent.await;
            agent.until_ok("/readyz").await.unwrap();
            let counted = async || conflicts(&guarded.deployment, not_proven).await == expected;
            eventually("what is not proven is counted", counted).await;
        }
    })
    .await;
}
