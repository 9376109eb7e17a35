//! Comparisons as an operator runs them: their reports, and what they leave behind.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use culvert_loadtest::report::{Report, Run};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::process::Command;

use crate::support::{Carrier, eventually, network::has_namespaces};

/// A scenario that takes a second and has a goal for each outcome.
const SHORT: &str = r#"
title = "A second of keystrokes and a download"
peers = ["culvert-connect", "direct"]
congestion = ["CONGESTION"]
warmup_seconds = 0.5
seconds = 1.0
seeds = 1

[link.each_way]
rate_mbit = 50
delay_ms = 10

[[workload]]
name = "keys"
kind = "echo"
sessions = 4
size = 64
interval_ms = 50

[[workload]]
name = "bulk"
kind = "download"

[[goal]]
measure = "keys.errors"
at_most = 0

[[goal]]
measure = "keys.p50"
at_most = 1
"#;

/// The scenario as a file, with one of the congestion controls that the kernel allows here.
fn scenario(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("short.toml");
    fs::write(&path, text.replace("CONGESTION", congestion())).unwrap();
    path
}

fn congestion() -> &'static str {
    let allowed = fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap();
    if allowed.contains("cubic") { "cubic" } else { "bbr" }
}

fn compare(scenario: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"));
    command.arg("compare").arg("--scenario").arg(scenario);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command
}

#[tokio::test]
async fn a_comparison_reports_measurements_and_fails_on_missed_goals() {
    if !has_namespaces() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (json, html) = (folder.path().join("report.json"), folder.path().join("report.html"));
    let mut command = compare(&scenario(folder.path(), SHORT));
    command.arg("--json").arg(&json).arg("--html").arg(&html).arg("--check");
    assert_eq!(command.status().await.unwrap().code(), Some(2));

    let reports: Vec<Report> = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let [report] = reports.try_into().unwrap();
    let peers: Vec<_> = report.runs.iter().map(|run| run.peer.trim_end_matches("-bbr")).collect();
    assert_eq!(peers, ["culvert-connect", "direct"]);
    for run in &report.runs {
        assert_eq!(run.failure, None);
        let [keys, bulk] = &run.workloads[..] else { panic!("{:?}", run.workloads) };
        let latency = keys.latency.as_ref().unwrap();
        assert!(latency.p50 >= 20.0, "{}", latency.p50);
        // 4 sessions, 20 a second: never more; a tenth of that on a busy machine.
        assert!((8..=84).contains(&latency.count), "{}", latency.count);
        let mbit = bulk.mbit_per_second.unwrap();
        assert!((4.0..51.0).contains(&mbit), "{mbit}");
        assert!(run.link.unwrap().bytes > run.payload_bytes);
        assert_eq!(run.server.is_some(), run.peer.starts_with("culvert"));
    }
    let reached: Vec<_> = report.goals.iter().map(|goal| goal.reached).collect();
    assert_eq!(reached, [true, false]);
    assert!(fs::read_to_string(html).unwrap().contains("<svg"));
}

/// Two sessions of an agent that may leave QUIC, on a link that rejects UDP from some time on.
const REJECTED: &str = r#"
title = "UDP is rejected"
peers = ["culvert-connect"]
congestion = ["CONGESTION"]
server_flags = ["--tunnel-idle-timeout=1s", "--tunnel-keep-alive-interval=300ms"]
agent_flags = ["--transport=auto", "--tunnel-idle-timeout=1s", "--tunnel-keep-alive-interval=300ms"]
warmup_seconds = 0.5
seconds = SECONDS
seeds = 1

[link.each_way]
delay_ms = 5

[[workload]]
name = "keys"
kind = "echo"
sessions = 2
size = 64
interval_ms = 50

[[event]]
link = "reject-udp"
EVENT
"#;

/// Runs that scenario.
async fn rejected(seconds: &str, event: &str) -> Run {
    let text = REJECTED.replace("SECONDS", seconds).replace("EVENT", event);
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let mut command = compare(&scenario(folder.path(), &text));
    assert!(command.arg("--json").arg(&json).status().await.unwrap().success());
    let mut reports: Vec<Report> = serde_json::from_slice(&fs::read(json).unwrap()).unwrap();
    let run = reports.remove(0).runs.remove(0);
    assert_eq!(run.failure, None);
    run
}

#[tokio::test]
async fn an_event_at_the_start_comes_before_the_agents_first_tunnel() {
    if !has_namespaces() {
        return;
    }
    let run = rejected("0.5", "at = \"start\"").await;
    let carriers: Vec<_> = run.carriers.iter().map(|carried| carried.carrier).collect();
    assert_eq!(carriers, [Carrier::Tcp]);
    assert!(run.ready_seconds.unwrap() > 0.0);
    assert_eq!(run.events[0].what, "UDP rejected from the start");
    assert!(run.events[0].switch.is_none());
    assert!(run.workloads[0].errors.is_empty(), "{:?}", run.workloads[0].errors);
}

#[tokio::test]
async fn a_switch_of_carrier_is_timed_from_the_event_that_caused_it() {
    if !has_namespaces() {
        return;
    }
    let run = rejected("8.0", "at = 0.5\nswitches_to = \"tcp\"").await;
    let carriers: Vec<_> = run.carriers.iter().map(|carried| carried.carrier).collect();
    assert_eq!(carriers, [Carrier::Quic, Carrier::Tcp]);
    let switch = run.events[0].switch.unwrap();
    assert_eq!(Some(switch.to), run.events[0].switches_to);
    assert!((0.0..7.5).contains(&switch.seconds), "{}", switch.seconds);
    // An event is timed by its schedule here, and by when it happened there.
    let seen = run.carriers[1].second - run.events[0].second;
    assert!((switch.seconds - seen).abs() < 1.0, "{} and {seen}", switch.seconds);
}

#[tokio::test]
async fn a_comparison_that_is_killed_leaves_no_process_and_no_namespace() {
    if !has_namespaces() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let long = SHORT.replace("seconds = 1.0", "seconds = 60.0");
    let mut child = compare(&scenario(folder.path(), &long)).spawn().unwrap();
    let parent = i32::try_from(child.id().unwrap()).unwrap();
    // Server and agent, each in its own namespace.
    let mut started = Vec::new();
    eventually("server and agent run", async || {
        started = children(parent);
        started.len() == 2
    })
    .await;
    let namespaces: HashSet<_> =
        started.iter().map(|id| fs::read_link(format!("/proc/{id}/ns/net")).unwrap()).collect();
    assert_eq!(namespaces.len(), 2);
    kill(Pid::from_raw(parent), Signal::SIGKILL).unwrap();
    child.wait().await.unwrap();
    eventually("both have ended", async || started.iter().all(|id| !is_alive(*id))).await;
    let left = |id: i32| fs::read_link(format!("/proc/{id}/ns/net"));
    let in_use: HashSet<_> = processes().filter_map(|id| left(id).ok()).collect();
    assert!(namespaces.is_disjoint(&in_use));
}

#[tokio::test]
async fn a_comparison_that_a_signal_ends_leaves_no_files() {
    if !has_namespaces() {
        return;
    }
    let (folder, temporary) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let long = scenario(folder.path(), &SHORT.replace("seconds = 1.0", "seconds = 60.0"));
    for (signal, code) in [(Signal::SIGTERM, 143), (Signal::SIGINT, 130), (Signal::SIGHUP, 129)] {
        let mut child = compare(&long).env("TMPDIR", temporary.path()).spawn().unwrap();
        let parent = i32::try_from(child.id().unwrap()).unwrap();
        eventually("server and agent run", async || children(parent).len() == 2).await;
        let files = || fs::read_dir(temporary.path()).unwrap().flatten();
        let made: Vec<_> = files().map(|entry| entry.metadata().unwrap().mode() & 0o777).collect();
        assert_eq!(made, [0o700], "one folder, of its owner alone");
        kill(Pid::from_raw(parent), signal).unwrap();
        assert_eq!(child.wait().await.unwrap().code(), Some(code), "{signal}");
        assert_eq!(files().count(), 0, "{signal}");
    }
}

#[tokio::test]
async fn a_report_that_cannot_be_written_is_found_out_before_the_first_run() {
    let folder = tempfile::tempdir().unwrap();
    let scenario = scenario(folder.path(), SHORT);
    let ended = compare(&scenario)
        .args(["--html", "/nowhere/report.html"])
        .stderr(Stdio::piped())
        .output()
        .await
        .unwrap();
    let text = String::from_utf8(ended.stderr).unwrap();
    assert!(!ended.status.success());
    assert!(text.starts_with("culvert-loadtest: cannot write /nowhere/report.html"), "{text}");
    let none = compare(&scenario).arg("--seeds=0").output().await.unwrap();
    assert!(!none.status.success(), "no run at all");
}

#[tokio::test]
async fn a_demo_with_loss_shows_peers_side_by_side() {
    if !has_namespaces() {
        return;
    }
    let mut demo = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"));
    demo.args(["demo", "--loss=1", "--delay=10ms", "--seconds=2", "--peer=culvert-connect"]);
    let ended = demo.stdin(Stdio::null()).kill_on_drop(true).output().await.unwrap();
    let text = String::from_utf8(ended.stdout).unwrap();
    assert!(ended.status.success(), "{text}");
    let line = text.lines().find(|line| line.contains("Culvert")).unwrap();
    let cell = line.split(['│', '┆']).map(str::trim).find(|cell| cell.ends_with(" ms")).unwrap();
    let median: f64 = cell.trim_end_matches(" ms").parse().unwrap();
    assert!(median >= 20.0, "the path takes 20 ms: {text}");
    assert!(!text.contains("Konnectivity") && !text.contains('\x1b'), "{text}");
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Servers and agents that this process has started.
fn children(parent: i32) -> Vec<i32> {
    let is_side = |id: &i32| {
        let args = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let side = args.split(|byte| *byte == 0).nth(1);
        matches!(side, Some(b"server" | b"agent"))
    };
    processes().filter(|id| stat(*id).is_some_and(|(_, of)| of == parent)).filter(is_side).collect()
}

fn is_alive(id: i32) -> bool {
    stat(id).is_some_and(|(state, _)| state != 'Z')
}

/// A process's state and parent.
fn stat(id: i32) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}
