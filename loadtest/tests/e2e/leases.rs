//! Servers that publish Leases, and agents that count servers by them, of Culvert and Konnectivity.

use crate::support::{
    deployment::{
        Deployment,
        Implementation::{self, Culvert, Konnectivity},
        KNOWN_SERVERS, can_run,
    },
    eventually,
    kube_api::KubeApi,
    within,
};
use culvert_loadtest::{
    frontend::Protocol,
    process::{Process, Signal},
};
use rstest::rstest;
use serde_json::{Value, json};

const OWN: &str = "konnectivity-proxy-server-the-server";
const CULLED: &str = "konnectivity_network_proxy_server_culled_leases_count";
const JSON: &str = "--kube-api-content-type=application/json";

fn labels() -> Value {
    json!({ "k8s-app": "konnectivity-server" })
}

/// Runs a test with a deployment without a server yet, unless the implementation needs Go and such
/// tests are skipped.
async fn with_api(implementation: Implementation, test: impl AsyncFnOnce(Deployment, KubeApi)) {
    if can_run(&[implementation]).await {
        let deployment = Deployment::without_server(Protocol::Connect);
        let api = KubeApi::start(&deployment.certificates).await;
        within(test(deployment, api)).await;
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_publishes_renews_and_deletes_its_lease(
    #[values(Culvert, Konnectivity)] implementation: Implementation,
) {
    with_api(implementation, async |mut deployment, api| {
        let flags = ["--enable-lease-controller", JSON, &api.flag()];
        deployment.start_server(implementation, &flags).await;
        eventually("the Lease is there", async || api.lease(OWN).is_some()).await;
        let mut lease = api.lease(OWN).unwrap();
        let first = lease["spec"]["renewTime"].clone();
        eventually("it is renewed", async || {
            api.lease(OWN).is_some_and(|lease| lease["spec"]["renewTime"] != first)
        })
        .await;
        deployment.server().signal(Signal::Terminate).await.unwrap();
        assert!(deployment.server().ended().await.unwrap().success());
        assert_eq!(api.lease(OWN), None);
        assert_eq!(lease["metadata"]["labels"], labels());
        assert!(lease["spec"]["renewTime"].take().is_string(), "{lease}");
        // The same for both implementations.
        let spec = json!({
            "holderIdentity": "the-server", "leaseDurationSeconds": 30, "renewTime": null,
        });
        assert_eq!(lease["spec"], spec);
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_server_removes_leases_of_its_set_that_have_expired(
    #[values(Culvert, Konnectivity)] implementation: Implementation,
) {
    with_api(implementation, async |mut deployment, api| {
        api.put_lease("expired", labels(), 31);
        api.put_lease("holds", labels(), 0);
        api.put_lease("others", json!({ "k8s-app": "something-else" }), 1000);
        let flags = ["--enable-lease-controller", JSON, &api.flag()];
        deployment.start_server(implementation, &flags).await;
        eventually("it is removed", async || api.lease("expired").is_none()).await;
        eventually("it is counted", async || deployment.server_metric(CULLED).await == 1.0).await;
        assert!(api.lease("holds").is_some());
        assert!(api.lease("others").is_some());
    })
    .await;
}

/// An agent that counts the Leases of this API, at a server that reports one server.
async fn counting(
    deployment: &Deployment,
    api: &KubeApi,
    implementation: Implementation,
    more: &[&str],
) -> Process {
    let kubeconfig = api.flag();
    let mut flags = vec!["--count-server-leases", JSON, &kubeconfig];
    flags.extend(more);
    deployment.start_agent(implementation, "agent", &flags).await
}

async fn until_known(agent: &Process, servers: f64) {
    let known = async || agent.metric(KNOWN_SERVERS).await.unwrap() == servers;
    eventually(&format!("{servers} servers are known"), known).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_counts_leases_as_they_come_expire_and_go(
    #[values(Culvert, Konnectivity)] implementation: Implementation,
) {
    with_api(implementation, async |mut deployment, api| {
        deployment.start_server(Culvert, &[]).await;
        api.put_lease("one", labels(), 0);
        api.put_lease("two", labels(), 0);
        api.put_lease("expired", labels(), 31);
        api.put_lease("others", json!({ "k8s-app": "something-else" }), 0);
        let agent = counting(&deployment, &api, implementation, &[]).await;
        until_known(&agent, 2.0).await;
        api.put_lease("three", labels(), 27);
        until_known(&agent, 3.0).await;
        // It expires in three seconds, which is seen when another one is renewed.
        eventually("it has expired", async || {
            api.put_lease("two", labels(), 0);
            agent.metric(KNOWN_SERVERS).await.unwrap() == 2.0
        })
        .await;
        api.put_lease("three", labels(), 0);
        until_known(&agent, 3.0).await;
        api.remove_lease("one");
        api.remove_lease("two");
        until_known(&agent, 1.0).await;
        api.remove_lease("three");
        until_known(&agent, 1.0).await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_the_larger_count_uses_the_servers_count_too(
    #[values(Culvert, Konnectivity)] implementation: Implementation,
) {
    with_api(implementation, async |mut deployment, api| {
        deployment.start_server(Culvert, &["--server-count=3"]).await;
        api.put_lease("one", labels(), 0);
        let agent =
            counting(&deployment, &api, implementation, &["--server-count-source=max"]).await;
        until_known(&agent, 3.0).await;
        for name in ["two", "three", "four"] {
            api.put_lease(name, labels(), 0);
        }
        until_known(&agent, 4.0).await;
    })
    .await;
}

/// A Konnectivity agent waits for its first list before it connects.
#[tokio::test(flavor = "multi_thread")]
async fn a_culvert_agent_serves_while_leases_cannot_be_listed() {
    with_api(Culvert, async |mut deployment, api| {
        deployment.start_server(Culvert, &["--server-count=2"]).await;
        api.put_lease("one", labels(), 0);
        api.refuse(Some("leases is forbidden"));
        let agent = counting(&deployment, &api, Culvert, &[]).await;
        until_known(&agent, 2.0).await;
        eventually("the agent logs it", async || agent.log().contains("leases is forbidden")).await;
        let refused = "konnectivity_network_proxy_agent_lease_lists_total\
                       {http_response_code=\"403\",reason=\"Forbidden\"}";
        assert!(agent.metric(refused).await.unwrap() > 0.0);
        api.refuse(None);
        until_known(&agent, 1.0).await;
    })
    .await;
}
