//! Konnectivity's integration tests, which take the program of the agent as a flag: its own server
//! and client library against Culvert's agent.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use tokio::task::spawn_blocking;
use tun_rs::DeviceBuilder;

use crate::support::{
    konnectivity::{go, has_go},
    network::{namespace, replace_file},
};

/// Number of tests in the pinned version.
const TESTS: usize = 26;
/// A test of the client library alone, of which both results are right: it cancels the context of a
/// tunnel and expects one of two errors, whichever Go's HTTP client meets first. On a busy machine it
/// is now and then the other one.
const RACES: &str = "TestProxyHandle_TunnelContextCancelled_GRPC";
/// Maximum number of runs of that test.
const RACE_RUNS: usize = 5;
/// Time for all of them, as a flag of Go's test programs. One waits for a minute.
const TIME_OUT: &str = "-test.timeout=5m";

/// A program that starts the agent with these flags before those of the test.
fn agent(folder: &Path) -> io::Result<PathBuf> {
    let program = folder.join("proxy-agent");
    // One test dials the unspecified address, which the egress policy denies by default.
    let script = format!(
        "#!/bin/sh\nexec {} agent --egress-exempt=:: \"$@\"\n",
        env!("CARGO_BIN_EXE_culvert-loadtest")
    );
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

/// The lines of the log by which Go's test programs report results.
fn results(output: &Output) -> String {
    let log = String::from_utf8_lossy(&output.stdout);
    let lines = log.lines().filter(|line| {
        let line = line.trim_start();
        line.starts_with("---") || line.contains("_test.go:") || line.starts_with("panic:")
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn konnectivitys_integration_tests_pass_with_the_agent() {
    if !has_go() {
        return;
    }
    let Some(host) = namespace() else { return };
    let tests = "sigs.k8s.io/apiserver-network-proxy/tests";
    let suite = go("konnectivity", &["test", "-c"], "konnectivity-suite", &[tests]);
    let folder = tempfile::tempdir().unwrap();
    let agent = agent(folder.path()).unwrap();
    let working_directory = folder.path().to_owned();
    let run = move |only: Option<&str>| {
        host.run(|| {
            // Without a network, a name that does not exist would be one that cannot be looked up.
            replace_file("/etc/nsswitch.conf", "hosts: files\n")?;
            // Tests dial an address of this network, from which nothing comes back.
            let _nowhere = DeviceBuilder::new().ipv4("198.18.0.1", 15, None).build_sync()?;
            Command::new(&suite)
                .args(["-test.v", TIME_OUT])
                .args(only.map(|test| format!("-test.run=^{test}$")))
                .arg(format!("-agent-path={}", agent.display()))
                .current_dir(&working_directory)
                .output()
        })
    };
    let runs = move || -> io::Result<(Output, bool)> {
        let all = run(None)?;
        let failed = format!("--- FAIL: {RACES} ");
        let lost_race = results(&all).contains(&failed);
        let passes = || run(Some(RACES)).is_ok_and(|output| output.status.success());
        let passed_later = lost_race && (1..RACE_RUNS).any(|_| passes());
        Ok((all, passed_later))
    };
    let (output, passed_later) = spawn_blocking(runs).await.unwrap().unwrap();
    let results = results(&output);
    let passed = results.lines().filter(|line| line.starts_with("--- PASS")).count();
    let is_complete = match passed_later {
        true => passed + 1 == TESTS,
        false => output.status.success() && passed == TESTS,
    };
    assert!(is_complete, "{passed} of {TESTS} passed:\n{results}");
}
