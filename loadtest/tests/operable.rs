//! What an operator sees: health, readiness, metrics, and how a process behaves at start.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{net::SocketAddr, process::Stdio};

use common::{agent, within};
use culvert_loadtest::{frontend::Door, targets};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
};

/// Status line and body of a GET.
async fn get(address: SocketAddr, path: &str) -> (String, String) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[tokio::test]
async fn readiness_follows_the_tunnel_on_both_sides() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let mut rig = door.rig().agents(0).start().await.unwrap();
            let health = rig.server.health;
            assert_eq!(get(health, "/healthz").await, ("HTTP/1.1 200 OK".into(), "ok".into()));
            let (status, body) = get(health, "/readyz").await;
            assert_eq!(status, "HTTP/1.1 500 Internal Server Error");
            assert_eq!(body, "no connection to any proxy agent");
            rig.add_agent("agent-0").unwrap();
            rig.until_joined(1).await.unwrap();
            assert_eq!(get(health, "/readyz").await, ("HTTP/1.1 200 OK".into(), "ok".into()));
            let agent = rig.agents()[0].health;
            common::eventually("the agent knows it", || rig.agents()[0].servers.is_connected())
                .await;
            assert_eq!(get(agent, "/readyz").await, ("HTTP/1.1 200 OK".into(), "ok".into()));
            rig.stop_server().await.unwrap();
            common::eventually("the agent knows it", || !rig.agents()[0].servers.is_connected())
                .await;
            let (status, body) = get(agent, "/readyz").await;
            assert_eq!(status, "HTTP/1.1 503 Service Unavailable");
            assert!(body.contains("[-]server-connected failed: no servers connected"), "{body}");
            assert_eq!(get(agent, "/healthz").await.0, "HTTP/1.1 200 OK");
        })
        .await;
    }
}

#[tokio::test]
async fn metrics_are_served_on_health_and_admin_ports() {
    for (door, transport) in Door::CONNECT_UNIX.into_iter().zip(["quic", "tcp"]) {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let echo = targets::echo().await.unwrap();
            let mut frontend = door.dial(&rig, echo.address()).await.unwrap();
            frontend.write(b"x").await.unwrap();
            frontend.read_count(1).await.unwrap();
            let tunnel = format!("agent_id=\"agent-0\",transport=\"{transport}\"");
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
            let tunnel = format!("server_id=\"server-0\",transport=\"{transport}\"");
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
}

#[tokio::test]
async fn an_agents_series_go_with_it() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let (tunnel, _control) = agent::joined(&rig, "short-lived").await;
            rig.until_joined(1).await.unwrap();
            let scrape = || rig.server.metrics.render(&rig.server.backends);
            assert!(scrape().contains("short-lived"));
            tunnel.close(culvert_wire::CloseCode::DONE, "bye");
            rig.until_joined(0).await.unwrap();
            common::eventually("no series names it", || !scrape().contains("short-lived")).await;
        })
        .await;
    }
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
