//! Metrics of Culvert and of Konnectivity after the same work: dashboards and alerts go on working.

use std::collections::{BTreeMap, BTreeSet};

use culvert_loadtest::{
    frontend::Protocol::{self, Connect, Grpc},
    process::Process,
    targets,
};

use crate::support::{
    deployment::{
        Deployment,
        Implementation::{self, Culvert, Konnectivity},
        OPEN_SERVERS, OPEN_TARGETS, can_run,
    },
    echo, eventually, within,
};

/// What differs, by the begin of its series or of its family, and the row of
/// `docs/konnectivity.md` that says so.
const DIFFERENCES: [(&str, &str); 7] = [
    ("go_", "`go_*`"),
    ("konnectivity_network_proxy_server_frontend_write_duration_seconds_count", WRITES),
    ("konnectivity_network_proxy_server_stream_packets_total{packet_type=\"DIAL_R", NO_ADDRESS),
    ("konnectivity_network_proxy_agent_stream_packets_total{packet_type=\"DIAL_R", NO_ADDRESS),
    ("konnectivity_network_proxy_agent_endpoint_dial_failure_total", NO_ADDRESS),
    ("konnectivity_network_proxy_server_stream_errors_total{code=\"Canceled\"", ERRORS),
    ("konnectivity_network_proxy_server_connection_duration_seconds", DURATIONS),
];
const WRITES: &str = "`frontend_write_duration_seconds`";
const NO_ADDRESS: &str = "a target that is no address";
const ERRORS: &str = "`stream_errors_total`";
const DURATIONS: &str = "`connection_duration_seconds`";

/// One family of a scrape.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Family {
    kind: String,
    help: String,
    /// Names of the labels of each series, without `le`.
    labels: BTreeSet<Vec<String>>,
    /// Bounds of a histogram, as they are spelled.
    bounds: BTreeSet<String>,
}

/// A scrape: its families by name, and the values of its series but buckets, with sorted labels.
#[derive(Clone, Debug, Default)]
struct Scrape {
    families: BTreeMap<String, Family>,
    values: BTreeMap<String, f64>,
}

impl Scrape {
    fn parse(text: &str) -> Self {
        let mut scrape = Self::default();
        let mut current = String::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# ") {
                let mut words = rest.splitn(3, ' ');
                let (what, name, text) = (words.next(), words.next(), words.next());
                let (name, text) = (name.unwrap().to_owned(), text.unwrap_or_default().to_owned());
                let family = scrape.families.entry(name.clone()).or_default();
                match what {
                    Some("HELP") => family.help = text,
                    Some("TYPE") => family.kind = text,
                    _ => panic!("{line}"),
                }
                current = name;
            } else {
                scrape.add(&current, line);
            }
        }
        scrape
    }

    /// The series alone that have these texts.
    fn only(&self, family: &str, label: &str) -> Self {
        let is_wanted = |series: &String| series.contains(family) && series.contains(label);
        let values = self.values.iter().filter(|(series, _)| is_wanted(series));
        let values = values.map(|(series, value)| (series.clone(), *value)).collect();
        Self { values, ..Self::default() }
    }

    fn add(&mut self, family: &str, line: &str) {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.trim_end_matches('}').split_once('{').unwrap_or((series, ""));
        assert!(name.starts_with(family), "{line} of {family}");
        let mut labels: Vec<_> = labels
            .split(',')
            .filter_map(|label| label.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        labels.sort();
        let family = self.families.get_mut(family).unwrap();
        let bound = labels.iter().find(|(name, _)| name == "le").map(|(_, bound)| bound.clone());
        labels.retain(|(name, _)| name != "le");
        family.labels.insert(labels.iter().map(|(name, _)| name.clone()).collect());
        match bound {
            Some(bound) => drop(family.bounds.insert(bound)),
            None if !name.ends_with("_sum") => {
                let labels: Vec<_> =
                    labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
                let series = match &*labels {
                    [] => name.to_owned(),
                    labels => format!("{name}{{{}}}", labels.join(",")),
                };
                self.values.insert(series, value.parse().unwrap());
            }
            None => {}
        }
    }
}

/// Everything in which a scrape of Culvert differs from one of Konnectivity: the family or series,
/// and how.
fn differences(konnectivity: &Scrape, culvert: &Scrape) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (name, family) in &konnectivity.families {
        match culvert.families.get(name) {
            None => found.push((name.clone(), "is missing".to_owned())),
            Some(other) if other != family => {
                found.push((name.clone(), format!("is {other:?}, not {family:?}")));
            }
            Some(_) => {}
        }
    }
    let is_shared = |series: &&String| series.starts_with("konnectivity_network_proxy_");
    let series: BTreeSet<_> =
        konnectivity.values.keys().chain(culvert.values.keys()).filter(is_shared).collect();
    for series in series {
        let value = |scrape: &Scrape| scrape.values.get(series).copied();
        // A series of Konnectivity begins with its first event.
        let [theirs, ours] = [konnectivity, culvert].map(|it| value(it).unwrap_or_default());
        #[expect(clippy::float_cmp, reason = "counts are exact")]
        if theirs != ours {
            found.push((series.clone(), format!("is {ours}, not {theirs}")));
        }
    }
    found
}

/// Scrapes of a server and an agent after the work of the test, while a connection is open; and what
/// they count of the loss of each other.
async fn worked(implementation: Implementation, frontend: Protocol) -> Vec<Scrape> {
    let mut deployment = Deployment::start(implementation, frontend, &[]).await;
    let agent = deployment.start_agent(implementation, "agent", &[]).await;
    deployment.until_joined(1).await;
    let target = targets::echo().await.unwrap();
    let mut open = deployment.dial(target.address()).await.unwrap();
    for _ in 0..3 {
        deployment.touch(&target).await.unwrap();
    }
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    deployment.dial(closed).await.unwrap_err();
    deployment.dial("127.0.0.1").await.unwrap_err();
    echo(&mut open, b"alive").await.unwrap();
    eventually("one connection is left", async || {
        agent.metric(OPEN_TARGETS).await.unwrap() == 1.0
            && frontends(&deployment, frontend).await == 1.0
    })
    .await;
    let worked = [scrape(deployment.server()).await, scrape(&agent).await];
    let lost = lost(deployment, agent, implementation).await;
    worked.into_iter().chain(lost).collect()
}

async fn scrape(process: &Process) -> Scrape {
    Scrape::parse(&process.get("/metrics").await.unwrap().body)
}

/// What the server counts when an agent is killed, and another agent when the server is.
async fn lost(
    mut deployment: Deployment,
    mut agent: Process,
    implementation: Implementation,
) -> [Scrape; 2] {
    let other = deployment.start_agent(implementation, "other", &[]).await;
    deployment.until_joined(2).await;
    agent.kill().await.unwrap();
    deployment.until_joined(1).await;
    let server = scrape(deployment.server()).await.only("stream_errors_total", "from_agent");
    deployment.server().kill().await.unwrap();
    let is_alone = async || other.metric(OPEN_SERVERS).await.unwrap() == 0.0;
    eventually("the agent has no server", is_alone).await;
    let agent = scrape(&other).await;
    let errors = agent.only("stream_errors_total", "");
    let failures = agent.only("server_connection_failure_count", "").values;
    let values = errors.values.into_iter().chain(failures).collect();
    [server, Scrape { values, ..Scrape::default() }]
}

/// Open connections of frontends.
async fn frontends(deployment: &Deployment, frontend: Protocol) -> f64 {
    let series = match frontend {
        Grpc => "grpc_connections{service_method=\"Proxy\"}",
        Connect => "http_connections",
    };
    deployment.server_metric(&format!("konnectivity_network_proxy_server_{series}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_konnectivitys_but_for_the_differences_that_the_documents_list() {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    let document = std::fs::read_to_string(
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/konnectivity.md"),
    )
    .unwrap();
    let mut seen = BTreeSet::new();
    for frontend in [Grpc, Connect] {
        within(async {
            let (theirs, ours) =
                tokio::join!(worked(Konnectivity, frontend), worked(Culvert, frontend));
            let losses = theirs[2..].iter().flat_map(|scrape| scrape.values.values());
            assert_eq!(losses.filter(|value| **value > 0.0).count(), 3, "{theirs:?}");
            let found: Vec<_> = theirs
                .iter()
                .zip(&ours)
                .flat_map(|(theirs, ours)| differences(theirs, ours))
                .collect();
            let mut unexpected = Vec::new();
            for (name, how) in found {
                match DIFFERENCES.iter().find(|(begin, _)| name.starts_with(begin)) {
                    Some(listed) => drop(seen.insert(listed)),
                    None => unexpected.push(format!("{frontend:?}: {name} {how}")),
                }
            }
            assert!(unexpected.is_empty(), "{unexpected:#?}");
        })
        .await;
    }
    let stale: Vec<_> = DIFFERENCES.iter().filter(|listed| !seen.contains(listed)).collect();
    assert!(stale.is_empty(), "not found: {stale:#?}");
    for (begin, row) in &DIFFERENCES {
        assert!(document.contains(&format!("\n| {row} |")), "no row {row:?} for {begin}");
    }
}
