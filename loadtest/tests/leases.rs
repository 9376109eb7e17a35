//! ServerTunnels that are counted by their Leases: servers that publish them and agents that count them, of both
//! makes. Where there is no Go to build Konnectivity's programs these say so and are skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{
    kube_api::KubeApi,
    mixed::{Daemon, KNOWN_SERVERS, Make, Site, until},
    within,
};
use culvert_loadtest::peer::Frontend;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const MAKES: [Make; 2] = [Make::Culvert, Make::Konnectivity];
const OWN: &str = "konnectivity-proxy-server-the-server";
const CULLED: &str = "konnectivity_network_proxy_server_culled_leases_count";
const JSON: &str = "--kube-api-content-type=application/json";

fn labels() -> Value {
    json!({ "k8s-app": "konnectivity-server" })
}

async fn site() -> Option<(Site, KubeApi)> {
    let site = Site::idle(Frontend::Connect).await?;
    let api = KubeApi::start(&site.certificates).await;
    Some((site, api))
}

/// Runs a test with each make, at a site where no server runs yet.
async fn with_each(mut test: impl AsyncFnMut(Make, Site, KubeApi)) {
    for make in MAKES {
        let Some((site, api)) = site().await else { return };
        println!("{make:?}");
        within(test(make, site, api)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_publishes_renews_and_takes_back_its_lease() {
    let mut published = Vec::new();
    with_each(async |make, mut site, api| {
        let flags = ["--enable-lease-controller", JSON, &api.flag()];
        site.start_server(make, &flags).await;
        until("the Lease is there", async || api.lease(OWN).is_some()).await;
        let mut lease = api.lease(OWN).unwrap();
        let first = lease["spec"]["renewTime"].clone();
        until("it is renewed", async || {
            api.lease(OWN).is_some_and(|lease| lease["spec"]["renewTime"] != first)
        })
        .await;
        site.server.signal(Signal::SIGTERM);
        assert!(site.server.ended().await.success());
        assert_eq!(api.lease(OWN), None);
        assert!(lease["spec"]["renewTime"].take().is_string(), "{lease}");
        assert_eq!(lease["metadata"]["labels"], labels());
        published.push(lease["spec"].take());
    })
    .await;
    // None where the test was skipped.
    for pair in published.windows(2) {
        assert_eq!(pair[0], pair[1], "both makes say the same");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_removes_leases_of_its_set_that_have_expired() {
    with_each(async |make, mut site, api| {
        api.put_lease("expired", labels(), 31);
        api.put_lease("holds", labels(), 0);
        api.put_lease("others", json!({ "k8s-app": "something-else" }), 1000);
        let flags = ["--enable-lease-controller", JSON, &api.flag()];
        site.start_server(make, &flags).await;
        until("it is removed", async || api.lease("expired").is_none()).await;
        until("it is counted", async || site.server.metric(CULLED).await == 1.0).await;
        assert!(api.lease("holds").is_some());
        assert!(api.lease("others").is_some());
    })
    .await;
}

/// An agent that counts the Leases of this API, at a server that says that there is one server.
async fn counting(site: &Site, api: &KubeApi, make: Make, more: &[&str]) -> Daemon {
    let kubeconfig = api.flag();
    let mut flags = vec!["--count-server-leases", JSON, &kubeconfig];
    flags.extend(more);
    site.start_agent(make, "agent", &flags).await
}

async fn until_known(agent: &Daemon, servers: f64) {
    let known = async || agent.metric(KNOWN_SERVERS).await == servers;
    until(&format!("{servers} servers are known"), known).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_counts_leases_as_they_come_expire_and_go() {
    with_each(async |make, mut site, api| {
        site.start_server(Make::Culvert, &[]).await;
        api.put_lease("one", labels(), 0);
        api.put_lease("two", labels(), 0);
        api.put_lease("expired", labels(), 31);
        api.put_lease("others", json!({ "k8s-app": "something-else" }), 0);
        let agent = counting(&site, &api, make, &[]).await;
        until_known(&agent, 2.0).await;
        api.put_lease("three", labels(), 27);
        until_known(&agent, 3.0).await;
        // It expires in three seconds, which is seen when another one is renewed.
        until("it has expired", async || {
            api.put_lease("two", labels(), 0);
            agent.metric(KNOWN_SERVERS).await == 2.0
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

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_takes_the_larger_count_hears_the_servers_too() {
    with_each(async |make, mut site, api| {
        site.start_server(Make::Culvert, &["--server-count=3"]).await;
        api.put_lease("one", labels(), 0);
        let agent = counting(&site, &api, make, &["--server-count-source=max"]).await;
        until_known(&agent, 3.0).await;
        for name in ["two", "three", "four"] {
            api.put_lease(name, labels(), 0);
        }
        until_known(&agent, 4.0).await;
    })
    .await;
}

/// Konnectivity's waits for its first list before it connects.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_of_ours_serves_while_leases_cannot_be_listed() {
    let Some((mut site, api)) = site().await else { return };
    within(async {
        site.start_server(Make::Culvert, &["--server-count=2"]).await;
        api.put_lease("one", labels(), 0);
        api.refuse(Some("leases is forbidden"));
        let agent = counting(&site, &api, Make::Culvert, &[]).await;
        until_known(&agent, 2.0).await;
        until("the agent tells", async || agent.log().contains("leases is forbidden")).await;
        let refused = "konnectivity_network_proxy_agent_lease_lists_total\
                       {http_response_code=\"403\",reason=\"Forbidden\"}";
        assert!(agent.metric(refused).await > 0.0);
        api.refuse(None);
        until_known(&agent, 1.0).await;
    })
    .await;
}
