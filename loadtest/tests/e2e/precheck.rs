//! `precheck` of both programs.

use std::process::Output;

use culvert_loadtest::{
    flags::{AgentFlags, Ports, ServerFlags},
    frontend::Protocol::Connect,
    process::free_port,
};
use serde_json::Value;
use tokio::process::Command;

use crate::support::{
    deployment::{Deployment, Implementation::Culvert},
    within,
};

async fn precheck(side: &str, args: Vec<String>) -> (Option<i32>, Vec<Value>) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"))
        .args([side, "precheck", "--json"])
        .args(args)
        .output()
        .await
        .unwrap();
    let steps = serde_json::from_slice(&stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&stderr)));
    (status.code(), steps)
}

/// The result of the step whose name begins so.
fn result<'a>(steps: &'a [Value], name: &str) -> &'a str {
    let begins = |step: &&Value| step["step"].as_str().unwrap().starts_with(name);
    let found = steps.iter().find(begins).unwrap_or_else(|| panic!("no {name} in {steps:?}"));
    found["result"].as_str().unwrap()
}

fn agent_args(deployment: &Deployment) -> Vec<String> {
    let flags = AgentFlags {
        certificates: &deployment.certificates,
        shows_certificate: true,
        id: Some("agent"),
        server: deployment.tunnel(),
        admin_port: free_port().unwrap(),
        health_port: free_port().unwrap(),
    };
    flags.args()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_checks_the_path_to_its_server() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        let args = agent_args(&deployment);
        let (code, steps) = precheck("agent", args.clone()).await;
        assert_eq!(code, Some(1), "{steps:?}");
        assert_eq!(result(&steps, "TCP (TLS) to 127.0.0.1"), "failed");
        deployment.start_server(Culvert, &[]).await;
        let (code, steps) = precheck("agent", args).await;
        assert_eq!(code, Some(0), "{steps:?}");
        for step in [
            "files",
            "certificate",
            "certificate of the server",
            "name resolution",
            "UDP (QUIC) to 127.0.0.1",
            "TCP (TLS) to 127.0.0.1",
            "path MTU to 127.0.0.1",
        ] {
            assert_eq!(result(&steps, step), "ok", "{step} in {steps:?}");
        }
        assert_eq!(result(&steps, "HTTPS proxy"), "skipped");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_of_flags_and_files_are_steps() {
    within(async {
        let deployment = Deployment::without_server(Connect);
        let mut args = agent_args(&deployment);
        args.push("--dial-timeout=0s".into());
        args.push("--max-streams=0".into());
        let (code, steps) = precheck("agent", args).await;
        assert_eq!(code, Some(1));
        let faults: Vec<_> = steps.iter().filter(|step| step["result"] == "failed").collect();
        assert_eq!(faults.len(), 2, "{steps:?}");
        assert!(faults.iter().all(|step| step["step"] == "flags"), "{faults:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_checks_its_ports_files_and_folders() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        let args = |deployment: &Deployment, health| {
            let ports =
                Ports { tunnel: deployment.tunnel().port(), admin: free_port().unwrap(), health };
            let flags = ServerFlags {
                certificates: &deployment.certificates,
                socket: &deployment.socket(),
                frontend: Connect,
                address: std::net::Ipv4Addr::LOCALHOST.into(),
                ports,
                id: "server",
                count: 1,
            };
            flags.args()
        };
        let (code, steps) = precheck("server", args(&deployment, free_port().unwrap())).await;
        assert_eq!(code, Some(0), "{steps:?}");
        for step in [
            "files",
            "certificate of --cluster-cert",
            "port of --agent-port (UDP)",
            "folder of --uds-name",
        ] {
            assert_eq!(result(&steps, step), "ok", "{step} in {steps:?}");
        }
        assert_eq!(result(&steps, "kube-apiserver"), "skipped");
        deployment.start_server(Culvert, &[]).await;
        let mut again = args(&deployment, free_port().unwrap());
        again.push("--operator-socket=/nowhere/operator.sock".into());
        let (code, steps) = precheck("server", again).await;
        assert_eq!(code, Some(1), "{steps:?}");
        assert_eq!(result(&steps, "port of --agent-port (UDP)"), "failed");
        assert_eq!(result(&steps, "port of --agent-port (TCP)"), "failed");
        assert_eq!(result(&steps, "folder of --operator-socket"), "failed");
    })
    .await;
}
