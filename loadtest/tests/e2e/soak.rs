//! The soak command, for some seconds.

use std::process::{Command, Stdio};

use crate::support::network::has_namespaces;
use serde_json::Value;

#[test]
fn a_soak_reports_its_disturbances_and_what_every_process_holds() {
    if !has_namespaces() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("report.json");
    let mut soak = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"));
    soak.args(["soak", "--minutes=0.1", "--seed=4", "--json"]).arg(&json);
    let output = soak.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.ends_with("passed\n"), "{text}");

    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!((&report["seed"], &report["failed"]), (&4.into(), &0.into()));
    let disturbances = report["disturbances"].as_array().unwrap();
    assert!(!disturbances.is_empty(), "{report}");
    let operations = |phase: &Value| phase["ok"].as_u64().unwrap();
    let phases = report["phases"].as_object().unwrap();
    assert!(phases.values().map(operations).sum::<u64>() >= 50, "{report}");
    let resources = report["resources"].as_array().unwrap();
    for process in ["server-steady", "server-grpc", "agent-steady", "agent-of-restarted"] {
        let of_process = resources.iter().filter(|row| row["process"] == process);
        let zero: Vec<_> = of_process.clone().filter(|row| row["first"] == 0).collect();
        assert_eq!((of_process.count(), zero.len()), (7, 0), "{process}: {zero:?}");
    }
}
