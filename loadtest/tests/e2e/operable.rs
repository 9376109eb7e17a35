//! Health, readiness, metrics, and the start of a process, as an operator sees them.

use std::{net::SocketAddr, process::Stdio};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    LOG_AS_JSON, agent,
    deployment::{Deployment, Implementation},
    eventually, rig, within,
};
use culvert_loadtest::{
    frontend::{FrontendKind::ConnectUnix, Protocol, connect::ESTABLISHED},
    http, targets,
};
use culvert_wire::version::REVISION;
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    process::Command,
};

/// Status and body of a GET.
async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let http::Response { status, body } = http::get(address, path).await.unwrap();
    (status, body)
}

#[rstest]
#[tokio::test]
async fn readiness_follows_the_tunnel_on_both_sides(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let mut rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
        let health = rig.server.health;
        assert_eq!(get(health, "/healthz").await, (200, "ok".into()));
        let (status, body) = get(health, "/readyz").await;
        assert_eq!(status, 500);
        assert_eq!(body, "no connection to any proxy agent");
        rig.add_agent("agent-0").unwrap();
        rig.until_joined(1).await.unwrap();
        assert_eq!(get(health, "/readyz").await, (200, "ok".into()));
        let agent = rig.agents()[0].health;
        eventually("the agent knows it", async || rig.agents()[0].servers.is_connected()).await;
        assert_eq!(get(agent, "/readyz").await, (200, "ok".into()));
        rig.stop_server().await.unwrap();
        eventually("the agent knows it", async || !rig.agents()[0].servers.is_connected()).await;
        let (status, body) = get(agent, "/readyz").await;
        assert_eq!(status, 503);
        assert!(body.contains("[-]server-connected failed: no servers connected"), "{body}");
        assert_eq!(get(agent, "/healthz").await.0, 200);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn metrics_are_served_on_health_and_admin_ports(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let mut frontend = rig.dial(echo.address()).await.unwrap();
        frontend.write(b"x").await.unwrap();
        frontend.read_count(1).await.unwrap();
        let tunnel = format!("agent_id=\"agent-0\",transport=\"{carrier}\"");
        for address in [rig.server.health, rig.server.admin] {
            let (_, scrape) = get(address, "/metrics").await;
            for name in [
                "konnectivity_network_proxy_server_dial_duration_seconds_count 1",
                "konnectivity_network_proxy_server_established_connections 1",
                "konnectivity_network_proxy_server_ready_backends{proxy_strategy=\"default\"} 1",
                "culvert_server_stream_bytes_total{direction=\"to_agent\"} 1",
                &format!("culvert_server_tunnel_rtt_seconds{{{tunnel}}} "),
                &format!("culvert_server_tunnel_cwnd_bytes{{{tunnel}}} "),
                "culvert_server_tunnel_lost_packets_total{agent_id=\"agent-0\"",
                "culvert_server_tunnel_mtu_bytes{agent_id=\"agent-0\"",
                "culvert_server_udp_buffer_bytes{direction=\"receive\"} ",
            ] {
                assert!(scrape.contains(name), "{name} is not in\n{scrape}");
            }
        }
        let (_, scrape) = get(rig.agents()[0].health, "/metrics").await;
        let tunnel = format!("server_id=\"server-0\",transport=\"{carrier}\"");
        for name in [
            "konnectivity_network_proxy_agent_open_server_connections 1",
            "konnectivity_network_proxy_agent_open_endpoint_connections 1",
            &format!("culvert_agent_tunnel_rtt_seconds{{{tunnel}}} "),
        ] {
            assert!(scrape.contains(name), "{name} is not in\n{scrape}");
        }
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agents_series_go_with_it(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
        let (tunnel, _control) = agent::joined(&rig, "short-lived").await;
        rig.until_joined(1).await.unwrap();
        assert!(rig.server.scrape().contains("short-lived"));
        tunnel.close(culvert_wire::CloseCode::DONE, "bye");
        rig.until_joined(0).await.unwrap();
        eventually("no series names it", async || !rig.server.scrape().contains("short-lived"))
            .await;
    })
    .await;
}

/// An operator follows one dial through both logs, and sees which versions talk to each other.
#[tokio::test]
async fn both_logs_name_a_dials_trace_and_the_peers_revision() {
    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    within(async {
        let mut deployment =
            Deployment::start(Implementation::Culvert, Protocol::Connect, &LOG_AS_JSON).await;
        let mut agent =
            deployment.start_agent(Implementation::Culvert, "agent", &LOG_AS_JSON).await;
        let joined = deployment.server().until_logged("agent connected").await.unwrap();
        assert_eq!(joined["software"], culvert_process::version::software("culvert-agent"));
        assert_eq!(joined["revision"], REVISION);
        let joined = agent.until_logged("server connected").await.unwrap();
        assert_eq!(joined["revision"], REVISION);

        let echo = targets::echo().await.unwrap();
        let mut socket = UnixStream::connect(deployment.socket()).await.unwrap();
        let head = format!(
            "CONNECT {} HTTP/1.1\r\nHost: a\r\ntraceparent: {PARENT}\r\n\r\n",
            echo.address()
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut answer = [0; ESTABLISHED.len()];
        socket.read_exact(&mut answer).await.unwrap();
        assert_eq!(answer, ESTABLISHED.as_bytes());
        let spliced = deployment.server().until_logged("spliced").await.unwrap();
        socket.shutdown().await.unwrap();
        let ended = agent.until_logged("ended").await.unwrap();
        assert_eq!((&spliced["trace"], &ended["trace"]), (&PARENT.into(), &PARENT.into()));
        assert_eq!(spliced["dial"], ended["dial"]);
    })
    .await;
}

/// Exit code and standard error of a side started with these arguments.
async fn run(args: &[&str]) -> (Option<i32>, String) {
    let ended = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    (ended.status.code(), String::from_utf8_lossy(&ended.stderr).into_owned())
}

#[tokio::test]
async fn an_unknown_flag_and_faulty_values_end_with_1_and_name_the_flags() {
    within(async {
        for side in ["server", "agent"] {
            let (code, text) = run(&[side, "--no-such-flag=1"]).await;
            assert_eq!(code, Some(1), "{text}");
            assert!(text.contains("--no-such-flag"), "{text}");
        }
        let (code, text) = run(&["server", "--agent-port=80", "--health-port=50000"]).await;
        assert_eq!(code, Some(1));
        for flag in ["--agent-port", "--health-port", "--cluster-cert"] {
            assert!(text.contains(flag), "{flag} is not in {text}");
        }
    })
    .await;
}
