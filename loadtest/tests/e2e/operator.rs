//! The operator's commands.

use std::{path::Path, process::Output};

use culvert_loadtest::{frontend::Protocol::Connect, targets};
use serde_json::Value;
use tokio::process::Command;

use crate::support::{
    deployment::{Deployment, Implementation::Culvert},
    echo, eventually, within,
};

/// Runs a command of the server's program.
async fn run(socket: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"))
        .arg("server")
        .args(args)
        .env("CULVERT_OPERATOR_SOCKET", socket)
        .output()
        .await
        .unwrap()
}

/// The list of agents.
async fn agents(socket: &Path) -> Vec<Value> {
    let output = run(socket, &["agents", "--json"]).await;
    assert_eq!(output.status.code(), Some(0));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_lists_agents_and_sends_one_away() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        let socket = deployment.certificates.folder().join("operator.sock");
        let flag = format!("--operator-socket={}", socket.display());
        deployment.start_server(Culvert, &[&flag]).await;
        let identifiers = ["--agent-identifiers=host=node-1"];
        let agent = deployment.start_agent(Culvert, "agent", &identifiers).await;
        let _other = deployment.start_agent(Culvert, "other", &[]).await;
        deployment.until_joined(2).await;
        let listed = agents(&socket).await;
        assert_eq!(listed.len(), 2, "{listed:?}");
        let found = listed.iter().find(|entry| entry["agent"] == "agent").unwrap();
        assert_eq!(found["identity"], "certificate \"CN=culvert loadtest agent\"");
        assert_eq!(found["identifiers"][0], "host=node-1");
        assert_eq!(found["state"], "used");
        let table = run(&socket, &["agents"]).await;
        let table = String::from_utf8(table.stdout).unwrap();
        assert!(table.starts_with("AGENT") && table.lines().count() == 3, "{table}");

        let target = targets::echo().await.unwrap();
        let mut streams = Vec::new();
        while !is_used(&socket, "agent").await {
            let mut stream = deployment.dial(target.address()).await.unwrap();
            echo(&mut stream, b"before").await.unwrap();
            streams.push(stream);
        }
        let output = run(&socket, &["evict", "agent"]).await;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let drains = async || agent.log().contains("the server drains");
        eventually("the agent is asked to drain", drains).await;
        for stream in &mut streams {
            echo(stream, b"has its time").await.unwrap();
        }
        drop(streams);
        let reason = "an operator sent the agent away";
        eventually("the agent is sent away", async || agent.log().contains(reason)).await;
        // Its proof is as good as before.
        deployment.until_joined(2).await;
        let unknown = run(&socket, &["evict", "unknown"]).await;
        assert_eq!(unknown.status.code(), Some(1));
        let text = String::from_utf8(unknown.stderr).unwrap();
        assert!(text.contains("no such agent is connected"), "{text}");
    })
    .await;
}

/// Whether the agent has a stream.
async fn is_used(socket: &Path, agent: &str) -> bool {
    agents(socket).await.iter().any(|entry| entry["agent"] == agent && entry["streams"] != 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_has_no_commands() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        deployment.start_server(Culvert, &[]).await;
        let answer = deployment.server().get("/agents").await.unwrap();
        assert_eq!(answer.status, 404);
        let output = run(Path::new("/nowhere"), &["agents"]).await;
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("--operator-socket"), "{text}");
    })
    .await;
}
