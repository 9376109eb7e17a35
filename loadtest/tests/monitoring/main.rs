//! Debian's Prometheus with real servers and agents, of which each job has one fault: its alerts fire
//! and no others, and no panel of the dashboard is empty. Without Prometheus the test is skipped.
//!
//! A program of its own, because its fifty processes need the machine for themselves.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod faults;
mod prometheus;
mod site;
#[path = "../support/mod.rs"]
mod support;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use culvert_loadtest::{certificates::Certificates, targets};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    task::{JoinSet, LocalSet},
    time::{Instant, interval, timeout},
};

use self::{
    faults::{Bench, Fault, WITH_STRACE},
    prometheus::{Prometheus, RANGE, Target},
    site::Site,
};
use crate::support::{
    echo, has_program,
    kube_api::jwt,
    repository::{DASHBOARD, RULES, alerts, read},
    within,
};

/// The job without a fault.
const HEALTHY: &str = "healthy";
/// Alerts that no fault here causes, and why. `promtool` tests their rules.
const NOT_LIVE: [(&str, &str); 1] =
    [("CulvertPanicked", "no input makes a task panic, or it would be mended")];
/// The alert that a busy machine causes in any job. It counts where it is expected.
const OF_A_BUSY_MACHINE: &str = "CulvertDialsSlow";
/// Time for all alerts to fire, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);
/// Time between two looks at Prometheus, which sends no event.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Names of alerts by fault.
type Firing = BTreeMap<String, BTreeSet<String>>;

/// Two servers that each agent has a tunnel to, and connections of all kinds.
async fn healthy(bench: &Bench) -> Fault {
    let site = Site::new(&bench.certificates, HEALTHY);
    let other = Site::new(&bench.certificates, "healthy_other");
    let set = format!("--server-addresses=healthy={},healthy_other={}", site.tunnel, other.tunnel);
    let flags = ["--server-count=2", &set];
    let servers = [site.server(&flags).await, other.server(&flags).await];
    let mut agents = Vec::new();
    for id in ["healthy-1", "healthy-2"] {
        let file = site.file(&format!("{id}.token"));
        let now = culvert_process::kubernetes::Timestamp::now().as_second();
        std::fs::write(&file, jwt(&json!({ "iat": now, "exp": now + 3600 }))).unwrap();
        let flag = format!("--service-account-token-path={}", file.display());
        agents.push(site.agent(id, &[flag]).await);
    }
    for server in &servers {
        server.until_joined(2).await;
    }
    let targets = servers.iter().chain(&agents).map(|node| node.target.clone()).collect();
    Fault::of(targets, async move {
        let target = targets::echo().await.unwrap();
        let mut open = [
            site.dial(target.address()).await.unwrap(),
            other.dial(target.address()).await.unwrap(),
        ];
        let _kept = (servers, agents);
        let mut ticks = interval(LOOK_INTERVAL);
        loop {
            for (site, connection) in [&site, &other].into_iter().zip(&mut open) {
                echo(connection, &[7; 10_000]).await.unwrap();
                let mut short = site.dial(target.address()).await.unwrap();
                echo(&mut short, b"short").await.unwrap();
            }
            ticks.tick().await;
        }
    })
}

/// All that fired since the start.
async fn fired(prometheus: &Prometheus) -> Firing {
    let expr = "count by (job, alertname) (count_over_time(ALERTS{alertstate=\"firing\"}[10m]))";
    let mut firing = Firing::new();
    for (labels, _) in prometheus.query(expr).await {
        let job = labels["job"].as_str().unwrap();
        let fault = job.split('/').next().unwrap().to_owned();
        firing.entry(fault).or_default().insert(labels["alertname"].as_str().unwrap().into());
    }
    firing
}

/// The queries of the dashboard with values for its variables, by panel.
fn queries(dashboard: &Value) -> Vec<(String, String, String)> {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let substituted = |expr: &Value| {
        let expr = expr.as_str().unwrap().replace("$__rate_interval", RANGE);
        let expr = expr.replace("$job", &format!("{HEALTHY}/.*"));
        expr.replace("$cluster", ".*").replace("$server", ".*").replace("$agent", ".*")
    };
    panels
        .flat_map(|panel| {
            let title = panel["title"].as_str().unwrap();
            let unit = panel["fieldConfig"]["defaults"]["unit"].as_str().unwrap_or_default();
            let targets = panel["targets"].as_array().into_iter().flatten();
            targets.map(move |target| (title.into(), unit.into(), substituted(&target["expr"])))
        })
        .collect()
}

/// Every query has a value, which is printed to be looked at.
async fn no_panel_is_empty(prometheus: &Prometheus) {
    let dashboard = serde_json::from_str(&read(DASHBOARD)).unwrap();
    let queries = queries(&dashboard);
    assert!(queries.len() > 50, "{} queries", queries.len());
    let mut empty = Vec::new();
    for (title, unit, expr) in queries {
        assert!(!expr.contains('$'), "{expr}");
        let values = prometheus.query(&expr).await;
        println!("--- {title} ({unit}): {expr}");
        for (labels, value) in values.iter().take(12) {
            println!("    {value} {labels}");
        }
        if !values.iter().any(|(_, value)| value.is_finite()) {
            empty.push((title, expr));
        }
    }
    assert!(empty.is_empty(), "without a value: {empty:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_fires_its_alerts_and_no_panel_is_empty() {
    if has_program("prometheus") {
        within(LocalSet::new().run_until(run())).await;
    }
}

async fn run() {
    let begun = Instant::now();
    let certificates = Arc::new(Certificates::generate().unwrap());
    let common = Site::new(&certificates, "common");
    let _server = common.server(&["--proxy-strategies=destHost,default"]).await;
    let (known, prometheus) = watch::channel(None);
    let bench = Bench { certificates, common, prometheus };

    let mut expected = Firing::new();
    let mut preparing = JoinSet::new();
    let can_trace = has_program("strace");
    let entries = faults::all(&bench).into_iter();
    for (name, alerts, prepare) in entries.filter(|(name, ..)| can_trace || *name != WITH_STRACE) {
        let alerts = alerts.iter().map(|alert| (*alert).to_owned()).collect();
        expected.insert(name.to_owned(), alerts);
        preparing.spawn_local(async move { (name, prepare.await) });
    }
    let mut faults = preparing.join_all().await;
    faults.push((HEALTHY, healthy(&bench).await));
    println!("{:?}: all faults are prepared", begun.elapsed());

    let scraped: Vec<(&str, Vec<Target>)> =
        faults.iter().map(|(name, fault)| (*name, fault.targets.clone())).collect();
    let prometheus = Arc::new(Prometheus::start(&scraped).await);
    known.send_replace(Some(prometheus.clone()));
    println!("{:?}: all processes are scraped", begun.elapsed());

    let mut injecting = JoinSet::new();
    for (_, fault) in faults {
        injecting.spawn_local(fault.inject);
    }
    let mut looks = interval(LOOK_INTERVAL);
    let all_fire = async {
        loop {
            if let Some(ended) = injecting.try_join_next() {
                ended.expect("a fault cannot be injected");
            }
            let fired = fired(&prometheus).await;
            let has_fired = |(fault, alerts): (&String, &BTreeSet<String>)| {
                fired.get(fault).is_some_and(|fired| fired.is_superset(alerts))
            };
            if expected.iter().all(has_fired) {
                return;
            }
            looks.tick().await;
        }
    };
    // What is missing then is reported below, together with what is too much.
    let _ = timeout(PATIENCE, all_fire).await;
    println!("{:?}: all alerts fire", begun.elapsed());
    let mut fired = fired(&prometheus).await;
    for (fault, alerts) in &mut fired {
        if !expected.get(fault).is_some_and(|alerts| alerts.contains(OF_A_BUSY_MACHINE)) {
            alerts.remove(OF_A_BUSY_MACHINE);
        }
    }
    fired.retain(|_, alerts| !alerts.is_empty());
    assert_eq!(fired, expected);
    no_panel_is_empty(&prometheus).await;
}

#[test]
fn every_alert_has_a_fault_or_a_reason_why_not() {
    let (_, prometheus) = watch::channel(None);
    let certificates = Arc::new(Certificates::generate().unwrap());
    let common = Site::new(&certificates, "common");
    let entries = faults::all(&Bench { certificates, common, prometheus });
    let live = entries.iter().flat_map(|(_, alerts, _)| alerts.iter().copied());
    let named: BTreeSet<_> = live.chain(NOT_LIVE.map(|(alert, _)| alert)).collect();
    let rules = alerts(&read(RULES), "severity: ");
    let rules: BTreeSet<_> = rules.keys().map(String::as_str).collect();
    assert_eq!(named, rules);
}
