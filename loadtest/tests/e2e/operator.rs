//! The operator's commands.

use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Output,
};

use culvert_loadtest::{frontend::Protocol::Connect, process::Signal, targets};
use culvert_process::version::VERSION;
use serde_json::Value;
use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::support::{
    deployment::{
        Deployment,
        Implementation::{Culvert, Konnectivity},
        can_run,
    },
    echo, eventually, within,
};

/// Keeps an agent to one tunnel. With both carriers TCP wins the first race on a machine that is busy,
/// and QUIC replaces it later: then there are two tunnels for a while, and only the first is drained.
const ONE_CARRIER: &str = "--transport=quic";

/// Runs a command of the server's program.
async fn run(socket: &Path, args: &[&str]) -> Output {
    run_of("server", socket, args).await
}

/// Runs a command of the program of one side.
async fn run_of(side: &str, socket: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"))
        .arg(side)
        .args(args)
        .env("CULVERT_OPERATOR_SOCKET", socket)
        .output()
        .await
        .unwrap()
}

/// What a command prints that succeeds.
async fn printed(socket: &Path, args: &[&str]) -> String {
    let output = run(socket, args).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What a command reports that fails.
async fn failure(socket: &Path, args: &[&str]) -> String {
    let output = run(socket, args).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// The JSON that a command prints.
async fn json(socket: &Path, args: &[&str]) -> Value {
    serde_json::from_str(&printed(socket, args).await).unwrap()
}

/// The list of agents.
async fn agents(socket: &Path) -> Vec<Value> {
    json(socket, &["agents", "--json"]).await.as_array().unwrap().clone()
}

/// The list of streams, once the server has counted this many bytes from the target of each and waits
/// for more: it counts them after the client may have read them.
async fn streams_with(socket: &Path, args: &[&str], from_target: u64) -> Value {
    let mut list = Value::Null;
    eventually("the bytes are counted", async || {
        list = json(socket, &[&["streams", "--json"], args].concat()).await;
        list["streams"].as_array().unwrap().iter().all(|stream| {
            stream["bytes_from_target"] == from_target && stream["receiving"] == "input"
        })
    })
    .await;
    list
}

/// A deployment whose server has an operator's socket.
async fn operated() -> (Deployment, PathBuf) {
    operated_with(&[]).await
}

/// The same with more flags.
async fn operated_with(more: &[&str]) -> (Deployment, PathBuf) {
    let mut deployment = Deployment::without_server(Connect);
    let socket = deployment.certificates.folder().join("operator.sock");
    let flag = format!("--operator-socket={}", socket.display());
    deployment.start_server(Culvert, &[&[flag.as_str()], more].concat()).await;
    (deployment, socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_lists_agents_and_sends_one_away() {
    within(async {
        let (mut deployment, socket) = operated().await;
        let flags = ["--agent-identifiers=host=node-1", ONE_CARRIER];
        let agent = deployment.start_agent(Culvert, "agent", &flags).await;
        let _other = deployment.start_agent(Culvert, "other", &[ONE_CARRIER]).await;
        deployment.until_joined(2).await;
        let listed = agents(&socket).await;
        assert_eq!(listed.len(), 2, "{listed:?}");
        let found = listed.iter().find(|entry| entry["agent"] == "agent").unwrap();
        assert_eq!(found["identity"], "certificate \"CN=culvert loadtest agent\"");
        assert_eq!(found["identifiers"][0], "host=node-1");
        assert_eq!((&found["state"], &found["duplicate"]), (&"used".into(), &false.into()));
        let software = found["software"].as_str().unwrap();
        assert!(software.starts_with(&format!("culvert-agent {VERSION}")), "{software}");
        let table = printed(&socket, &["agents"]).await;
        assert!(table.starts_with("AGENT") && table.lines().count() == 3, "{table}");
        assert!(table.contains(software), "{table}");
        let series = format!("culvert_server_agents_by_version{{version=\"{software}\"}}");
        assert_eq!(deployment.server().metric(&series).await.unwrap(), 2.0);

        let target = targets::echo().await.unwrap();
        let mut streams = Vec::new();
        while !is_used(&socket, "agent").await {
            let mut stream = deployment.dial(target.address()).await.unwrap();
            echo(&mut stream, b"before").await.unwrap();
            streams.push(stream);
        }
        printed(&socket, &["evict", "agent"]).await;
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
        let unknown = failure(&socket, &["evict", "unknown"]).await;
        assert!(unknown.contains("no such agent is connected"), "{unknown}");
    })
    .await;
}

/// Whether the agent has a stream.
async fn is_used(socket: &Path, agent: &str) -> bool {
    agents(socket).await.iter().any(|entry| entry["agent"] == agent && entry["streams"] != 0)
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_listed_with_their_agent_target_and_bytes() {
    within(async {
        let (deployment, socket) = operated().await;
        let _agent = deployment.start_agent(Culvert, "agent", &[]).await;
        deployment.until_joined(1).await;
        assert_eq!(json(&socket, &["streams", "--json"]).await["total"], 0);
        let target = targets::echo().await.unwrap();
        let mut streams = Vec::new();
        for _ in 0..3 {
            let mut stream = deployment.dial(target.address()).await.unwrap();
            echo(&mut stream, b"twelve bytes").await.unwrap();
            streams.push(stream);
        }
        let list = streams_with(&socket, &[], 12).await;
        assert_eq!((&list["total"], list["streams"].as_array().unwrap().len()), (&3.into(), 3));
        let stream = &list["streams"][0];
        assert_eq!(stream["peer"], "agent");
        assert_eq!(stream["target"], target.address().to_string());
        assert_eq!(
            (&stream["bytes_to_target"], &stream["bytes_from_target"]),
            (&12.into(), &12.into())
        );
        assert_eq!((&stream["sending"], &stream["receiving"]), (&"input".into(), &"input".into()));
        let table = printed(&socket, &["streams", "--limit=2"]).await;
        assert!(table.starts_with("DIAL") && table.ends_with("1 more, see --limit\n"), "{table}");
        assert!(table.contains("12B"), "{table}");
        let one = json(&socket, &["streams", "--agent=agent", "--limit=1", "--json"]).await;
        assert_eq!((&one["total"], one["streams"].as_array().unwrap().len()), (&3.into(), 1));
        assert_eq!(json(&socket, &["streams", "--agent=other", "--json"]).await["total"], 0);
        let refused = failure(&socket, &["streams", "--limit=20001"]).await;
        assert!(refused.contains("--limit") && refused.contains("up to 20000"), "{refused}");
        drop(streams);
        eventually("the streams are gone", async || {
            json(&socket, &["streams", "--json"]).await["total"] == 0
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_read_is_shown_with_what_it_waits_for() {
    within(async {
        let (deployment, socket) = operated().await;
        let _agent = deployment.start_agent(Culvert, "agent", &[]).await;
        deployment.until_joined(1).await;
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let _frontend = deployment.dial(target.address()).await.unwrap();
        let mut target = accepted.recv().await.unwrap();
        // More than all windows and sockets take: the client never reads.
        let _writing = culvert_transport::task::owned(async move {
            let chunk = vec![0; 1 << 16];
            while target.write_all(&chunk).await.is_ok() {}
        });
        eventually("the client has to read", async || {
            let top = json(&socket, &["top", "--once", "--json"]).await;
            top[0]["waits_for"] == "client to read"
        })
        .await;
        let table = printed(&socket, &["top", "--once"]).await;
        assert!(table.starts_with("1 stream\nDIAL") && table.contains("client to read"), "{table}");
        let missing = failure(Path::new("/nowhere"), &["top"]).await;
        assert!(missing.contains("--operator-socket"), "{missing}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_agent_keeps_its_streams_and_gets_no_new_ones() {
    within(async {
        let (deployment, socket) = operated().await;
        let _agent = deployment.start_agent(Culvert, "agent", &[ONE_CARRIER]).await;
        deployment.until_joined(1).await;
        let target = targets::echo().await.unwrap();
        let mut before = deployment.dial(target.address()).await.unwrap();
        let _other = deployment.start_agent(Culvert, "other", &[ONE_CARRIER]).await;
        deployment.until_joined(2).await;
        let unknown = failure(&socket, &["drain", "--agent=unknown"]).await;
        assert!(unknown.contains("no such agent is connected"), "{unknown}");
        printed(&socket, &["drain", "--agent=agent"]).await;
        let mut after = Vec::new();
        for _ in 0..20 {
            after.push(deployment.dial(target.address()).await.unwrap());
        }
        echo(&mut before, b"goes on").await.unwrap();
        let streams = json(&socket, &["streams", "--agent=agent", "--json"]).await;
        assert_eq!(streams["total"], 1);
        let listed = agents(&socket).await;
        let found = listed.iter().find(|entry| entry["agent"] == "agent").unwrap();
        assert_eq!(found["state"], "draining");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_server_ends_as_at_sigterm() {
    within(async {
        let (mut deployment, socket) = operated().await;
        let agent = deployment.start_agent(Culvert, "agent", &[]).await;
        deployment.until_joined(1).await;
        printed(&socket, &["drain"]).await;
        let ended = deployment.server().ended().await.unwrap();
        assert_eq!(ended.code(), Some(0));
        assert!(!socket.exists());
        eventually("the agent knows", async || agent.log().contains("the server stops")).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_during_a_drain_begins_the_grace_period_and_the_second_one_ends_the_server() {
    within(async {
        let grace = "--graceful-shutdown-timeout=1h";
        let (mut deployment, socket) = operated_with(&[grace]).await;
        let _agent = deployment.start_agent(Culvert, "agent", &[]).await;
        deployment.until_joined(1).await;
        let (_target, mut connection) = deployment.open_echo().await;
        printed(&socket, &["drain"]).await;
        let graces =
            |deployment: &Deployment| deployment.server_log().matches("grace_seconds=3600").count();
        eventually("the drain begins", async || graces(&deployment) == 1).await;
        deployment.server().signal(Signal::Terminate).await.unwrap();
        eventually("the grace period begins", async || graces(&deployment) == 2).await;
        echo(&mut connection, b"goes on").await.unwrap();
        deployment.server().signal(Signal::Terminate).await.unwrap();
        assert_eq!(deployment.server().ended().await.unwrap().code(), Some(1));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn konnectivity_agents_and_their_streams_are_listed() {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let (deployment, socket) = operated().await;
        let _agent = deployment.start_agent(Konnectivity, "agent", &[]).await;
        deployment.until_joined(1).await;
        let listed = agents(&socket).await;
        assert_eq!((&listed[0]["agent"], &listed[0]["carrier"]), (&"agent".into(), &"grpc".into()));
        assert!(listed[0]["software"].as_str().unwrap().contains("grpc-go"), "{listed:?}");
        let target = targets::echo().await.unwrap();
        let mut stream = deployment.dial(target.address()).await.unwrap();
        echo(&mut stream, b"bytes").await.unwrap();
        let list = streams_with(&socket, &["--agent=agent"], 5).await;
        assert_eq!(list["streams"][0]["carrier"], "grpc");
        assert_eq!(list["streams"][0]["bytes_from_target"], 5);
        assert_eq!(list["tunnels"][0]["rtt_millis"], Value::Null);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_live_agents_with_one_id_are_reported() {
    within(async {
        // Also by a server that sends no keep-alives of its own.
        let (deployment, socket) = operated_with(&["--tunnel-keep-alive-interval=0s"]).await;
        let _one = deployment.start_agent(Culvert, "agent", &[ONE_CARRIER]).await;
        let _two = deployment.start_agent(Culvert, "agent", &[ONE_CARRIER]).await;
        let duplicates = "culvert_server_duplicate_agents";
        eventually("the id is counted", async || deployment.server_metric(duplicates).await == 1.0)
            .await;
        let table = printed(&socket, &["agents"]).await;
        assert_eq!(table.matches("used, duplicate id").count(), 2, "{table}");
        let event = "several live agents have one id";
        eventually("the id is logged", async || deployment.server_log().contains(event)).await;
    })
    .await;
}

/// The JSON that a command of the agent's program prints.
async fn agent_json(socket: &Path, args: &[&str]) -> Value {
    let output = run_of("agent", socket, args).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_shows_its_servers_proofs_policy_and_memory() {
    within(async {
        let (deployment, _) = operated().await;
        let socket = deployment.certificates.folder().join("agent.sock");
        let flag = format!("--operator-socket={}", socket.display());
        let flags = [flag.as_str(), ONE_CARRIER, "--egress-deny=10.9.0.0/16,10.8.0.0/16:22"];
        let _agent = deployment.start_agent(Culvert, "agent", &flags).await;
        deployment.until_joined(1).await;
        let target = targets::echo().await.unwrap();
        let mut stream = deployment.dial(target.address()).await.unwrap();
        echo(&mut stream, b"twelve bytes").await.unwrap();
        let status = agent_json(&socket, &["status", "--json"]).await;
        assert_eq!((&status["agent"], &status["server_count"]), (&"agent".into(), &1.into()));
        let server = &status["servers"][0];
        assert_eq!((&server["carrier"], &server["state"]), (&"quic".into(), &"used".into()));
        assert_eq!(server["address"], deployment.tunnel().to_string());
        assert_eq!(server["streams"], 1);
        assert!(server["rtt_millis"].as_f64().unwrap() > 0.0, "{server}");
        assert!(server["mtu"].as_u64().unwrap() >= 1200, "{server}");
        let software = server["software"].as_str().unwrap();
        assert!(software.starts_with(&format!("culvert-server {VERSION}")), "{software}");
        assert_eq!(status["quic"]["in_use"], true);
        assert_eq!(status["identity"]["certificate"], "CN=culvert loadtest agent");
        assert!(status["identity"]["certificate_expires"].as_str().unwrap().ends_with('Z'));
        assert_eq!(status["identity"]["token_expires"], Value::Null);
        assert_eq!(status["egress"]["source"], "built-in rules, flags");
        assert_eq!(status["egress"]["deny"], 2);
        assert!(status["memory"]["limit_bytes"].as_u64().unwrap() > 0);
        let text = run_of("agent", &socket, &["status"]).await;
        let text = String::from_utf8(text.stdout).unwrap();
        for part in ["servers  1 of 1", "quic     in use; no failure", "SERVER", "expires in"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        let mut list = Value::Null;
        eventually("the bytes are counted", async || {
            list = agent_json(&socket, &["streams", "--json"]).await;
            list["streams"][0]["bytes_from_target"] == 12
        })
        .await;
        let stream = &list["streams"][0];
        assert_eq!(stream["target"], target.address().to_string());
        assert_eq!(stream["bytes_to_target"], 12);
        assert_eq!(stream["bytes_from_target"], 12);
        let missing = run_of("agent", Path::new("/nowhere"), &["status"]).await;
        assert_eq!(missing.status.code(), Some(1));
        let text = String::from_utf8(missing.stderr).unwrap();
        assert!(text.contains("--operator-socket"), "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_says_why_quic_is_not_in_use() {
    within(async {
        let (deployment, _) = operated().await;
        let socket = deployment.certificates.folder().join("agent.sock");
        let flag = format!("--operator-socket={}", socket.display());
        let flags = [flag.as_str(), "--transport=tcp"];
        let _agent = deployment.start_agent(Culvert, "agent", &flags).await;
        deployment.until_joined(1).await;
        let status = agent_json(&socket, &["status", "--json"]).await;
        assert_eq!(status["servers"][0]["carrier"], "tcp");
        assert_eq!(status["servers"][0]["mtu"], Value::Null);
        assert_eq!(status["quic"]["in_use"], false);
        let text = run_of("agent", &socket, &["status"]).await;
        let text = String::from_utf8(text.stdout).unwrap();
        assert!(text.contains("quic     not in use: --transport=tcp"), "{text}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_has_no_commands() {
    within(async {
        let mut deployment = Deployment::without_server(Connect);
        deployment.start_server(Culvert, &[]).await;
        for path in ["/agents", "/streams", "/drain"] {
            assert_eq!(deployment.server().get(path).await.unwrap().status, 404);
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_cannot_be_reached_is_reported_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("operator.sock");
    let missing = failure(&path, &["agents"]).await;
    assert!(missing.contains("does the process have --operator-socket"), "{missing}");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    // Root may connect all the same, and then waits for an answer.
    if fs::metadata(&path).unwrap().uid() != 0 {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o000)).unwrap();
        let denied = failure(&path, &["streams"]).await;
        assert!(denied.contains("run this as the user of the process"), "{denied}");
    }
    drop(listener);
    let refused = failure(&path, &["drain"]).await;
    assert!(refused.contains("no process listens there"), "{refused}");
}
