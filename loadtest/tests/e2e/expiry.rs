//! Proofs of identity that expire while their agents are connected.

use culvert_loadtest::{frontend::Protocol::Connect, process::Signal, targets};
use culvert_process::kubernetes::Timestamp;
use serde_json::json;

use super::tokens::Guarded;
use crate::support::{
    deployment::{Deployment, Implementation::Culvert},
    echo, eventually,
    kube_api::{ACCOUNT, AUDIENCE, jwt},
    within,
};

/// A token of this name that expires in so many seconds.
fn expiring(name: &str, seconds: i64) -> String {
    jwt(&json!({ "sub": name, "exp": Timestamp::now().as_second() + seconds }))
}

/// Tunnels that the server has lost for this reason.
async fn lost(deployment: &Deployment, reason: &str) -> f64 {
    let series = format!("culvert_server_tunnels_lost_total{{reason=\"{reason}\"}}");
    deployment.server_metric(&series).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_rotates_renews_the_proof_on_the_same_tunnel() {
    within(async {
        let guarded = Guarded::start(Culvert).await;
        let (first, second) = (expiring("first", 2), expiring("second", 3600));
        guarded.api.accept(&first, ACCOUNT, AUDIENCE);
        guarded.api.accept(&second, ACCOUNT, AUDIENCE);
        let (mut agent, file) = guarded.start_agent_with(Culvert, "agent", &first).await;
        guarded.deployment.until_joined(1).await;
        let target = targets::echo().await.unwrap();
        let mut stream = guarded.deployment.dial(target.address()).await.unwrap();
        echo(&mut stream, b"before").await.unwrap();
        std::fs::write(file, &second).unwrap();
        agent.signal(Signal::Reload).await.unwrap();
        let series = "culvert_server_proof_renewals_total{result=\"accepted\"}";
        let renewed = async || guarded.deployment.server_metric(series).await == 1.0;
        eventually("the proof is renewed", renewed).await;
        echo(&mut stream, b"after").await.unwrap();
        assert_eq!(guarded.deployment.server_metric("culvert_server_tunnels").await, 1.0);
    })
    .await;
}

/// The server waits for a minute beyond the expiry, because clocks differ.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_expires_drains_its_agent_and_ends_the_tunnel() {
    within(async {
        let guarded = Guarded::start(Culvert).await;
        let token = expiring("first", 1);
        guarded.api.accept(&token, ACCOUNT, AUDIENCE);
        let (agent, _) = guarded.start_agent_with(Culvert, "agent", &token).await;
        guarded.deployment.until_joined(1).await;
        let target = targets::echo().await.unwrap();
        let mut stream = guarded.deployment.dial(target.address()).await.unwrap();
        let drains = async || agent.log().contains("the server drains");
        eventually("the agent is asked to drain", drains).await;
        echo(&mut stream, b"has its time").await.unwrap();
        assert_eq!(lost(&guarded.deployment, "unauthenticated").await, 0.0);
        guarded.api.refuse(Some("for the next attempt"));
        stream.close().await.unwrap();
        let ended = async || lost(&guarded.deployment, "unauthenticated").await == 1.0;
        eventually("the tunnel has ended", ended).await;
        let reason = "the proof of the agent's identity has expired";
        eventually("the agent logs why", async || agent.log().contains(reason)).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_leads_to_a_new_tunnel_and_no_stream_is_cut() {
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &[]).await;
        // A tunnel over TCP would be replaced by one over QUIC.
        let mut agent = deployment.start_agent(Culvert, "agent", &["--transport=quic"]).await;
        deployment.until_joined(1).await;
        let target = targets::echo().await.unwrap();
        let mut stream = deployment.dial(target.address()).await.unwrap();
        echo(&mut stream, b"before").await.unwrap();
        deployment.certificates.renew("agent").unwrap();
        agent.signal(Signal::Reload).await.unwrap();
        let two = async || deployment.server_metric("culvert_server_tunnels").await == 2.0;
        eventually("there is another tunnel", two).await;
        echo(&mut stream, b"after").await.unwrap();
        stream.close().await.unwrap();
        let one = async || deployment.server_metric("culvert_server_tunnels").await == 1.0;
        eventually("the old tunnel has ended", one).await;
        assert_eq!(lost(&deployment, "superseded").await, 1.0);
        let switches = agent.log();
        assert!(switches.contains("renewed"), "{switches}");
    })
    .await;
}
