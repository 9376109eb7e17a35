//! Dials that fail, in the words users know, and dials that nobody waits for any more.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    net::{Ipv4Addr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use common::{agent, metric, within};
use culvert_loadtest::{
    frontend::{Door, connect::ConnectError},
    rig::Running,
    targets,
};
use culvert_wire::dial::{DialRequest, StreamKind};
use socket2::{Domain, Socket, Type};

/// What the frontend was told.
async fn refusal(door: Door, rig: &Running, target: impl ToString) -> String {
    match door.dial(rig, target).await {
        Err(ConnectError::Refused(refused)) => refused.answer,
        other => panic!("{door:?}: {other:?}"),
    }
}

/// Asserts status (where there is one) and text of a refusal.
#[track_caller]
fn assert_refusal(door: Door, answer: &str, status: &str, text: &str) {
    if door.is_grpc() {
        assert_eq!(answer, text, "{door:?}");
    } else {
        let head = "Connection: close\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n";
        assert_eq!(answer, format!("HTTP/1.1 {status}\r\n{head}{text}"), "{door:?}");
    }
}

fn failures(rig: &Running, reason: &str) -> f64 {
    let scrape = rig.server.metrics.render(&rig.server.backends);
    let name = "konnectivity_network_proxy_server_dial_failure_count";
    metric(&scrape, &format!("{name}{{reason=\"{reason}\"}}"))
}

/// A port whose owner never accepts and whose queue is full: connecting to it takes for ever.
struct Silent {
    listener: Socket,
    _fillers: Vec<TcpStream>,
}

impl Silent {
    fn start() -> Self {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let mut fillers = Vec::new();
        while let Ok(filler) = TcpStream::connect_timeout(&address, Duration::from_millis(100)) {
            fillers.push(filler);
        }
        Self { listener, _fillers: fillers }
    }

    fn address(&self) -> String {
        self.listener.local_addr().unwrap().as_socket().unwrap().to_string()
    }
}

#[tokio::test]
async fn a_refused_target_is_told_in_gos_words() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let answer = refusal(door, &rig, closed).await;
            let text = format!("dial tcp {closed}: connect: connection refused");
            assert_refusal(door, &answer, "502 Bad Gateway", &text);
            assert!(failures(&rig, "error_response") > 0.9);
        })
        .await;
    }
}

#[tokio::test]
async fn an_unresolvable_target_is_told_in_gos_words() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let answer = refusal(door, &rig, "no-such-host.invalid:80").await;
            let reason = if answer.contains("server misbehaving") {
                "server misbehaving" // a host without a resolver cannot know better
            } else {
                "no such host"
            };
            let text = format!("dial tcp: lookup no-such-host.invalid: {reason}");
            assert_refusal(door, &answer, "502 Bad Gateway", &text);
        })
        .await;
    }
}

#[tokio::test]
async fn an_unroutable_target_is_told_in_gos_words() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            // TCP to a multicast address has no route, on any host, and sends nothing.
            let answer = refusal(door, &rig, "224.0.0.1:80").await;
            let text = "dial tcp 224.0.0.1:80: connect: network is unreachable";
            assert_refusal(door, &answer, "502 Bad Gateway", text);
        })
        .await;
    }
}

#[tokio::test]
async fn a_silent_target_times_out_in_gos_words() {
    for door in Door::ALL {
        within(async {
            let limit = Duration::from_millis(300);
            let rig = door.rig().agent_dial_timeout(limit).start().await.unwrap();
            let silent = Silent::start();
            let answer = refusal(door, &rig, silent.address()).await;
            let text = format!("dial tcp {}: i/o timeout", silent.address());
            assert_refusal(door, &answer, "504 Gateway Timeout", &text);
        })
        .await;
    }
}

#[tokio::test]
async fn an_address_that_is_none_is_told_in_gos_words() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let answer = refusal(door, &rig, "127.0.0.1").await;
            let text = "dial tcp: address 127.0.0.1: missing port in address";
            assert_refusal(door, &answer, "502 Bad Gateway", text);
        })
        .await;
    }
}

#[tokio::test]
async fn without_an_agent_the_dial_fails_at_once() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let answer = refusal(door, &rig, "127.0.0.1:80").await;
            if door.is_grpc() {
                assert_eq!(answer, "No agent available");
            } else {
                assert_eq!(
                    answer,
                    "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\n\
                     currently no tunnels available: No agent available"
                );
            }
            assert!(failures(&rig, "no_agent") > 0.9);
        })
        .await;
    }
}

#[tokio::test]
async fn an_agent_that_never_answers_costs_the_deadline_and_no_more() {
    for door in Door::ALL {
        within(async {
            let limit = Duration::from_millis(300);
            let rig = door.rig().agents(0).dial_timeout(limit).start().await.unwrap();
            let (tunnel, _control) = agent::joined(&rig, "silent").await;
            rig.until_joined(1).await.unwrap();
            let started = Instant::now();
            let answer = refusal(door, &rig, "127.0.0.1:80").await;
            assert!(started.elapsed() < Duration::from_secs(5));
            if door.is_grpc() {
                assert_eq!(answer, "timed out waiting for backend dial");
            } else {
                let text = "Backend dial timeout: timed out waiting for backend dial\r\n";
                assert_refusal(door, &answer, "504 Gateway Timeout", text);
            }
            // The agent is told, so it can give the target up.
            let (send, mut recv) = tunnel.accept().await.unwrap();
            recv.failed().await;
            send.stopped().await.unwrap().unwrap();
        })
        .await;
    }
}

/// A frontend that knows says so, and the agent is told.
#[tokio::test]
async fn what_a_frontend_declares_reaches_the_agent() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let (tunnel, _control) = agent::joined(&rig, "curious").await;
            rig.until_joined(1).await.unwrap();
            let mut frontend = tokio::net::UnixStream::connect(rig.uds()).await.unwrap();
            let head = "CONNECT node:10250 HTTP/1.1\r\nCulvert-Kind: exec\r\n\
                    Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n\r\n";
            tokio::io::AsyncWriteExt::write_all(&mut frontend, head.as_bytes()).await.unwrap();
            let (_send, mut recv) = tunnel.accept().await.unwrap();
            let request: DialRequest = recv.read_frame(4096).await.unwrap().message().unwrap();
            assert_eq!(request.target.to_string(), "node:10250");
            assert_eq!(request.kind, StreamKind::EXEC);
            assert_eq!(request.timeout_millis, 10_000);
            assert!(request.trace.unwrap().traceparent.starts_with("00-4bf92f"));
        })
        .await;
    }
}

#[tokio::test]
async fn a_frontend_that_leaves_while_dialing_ends_the_dial_at_the_agent() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let (tunnel, _control) = agent::joined(&rig, "silent").await;
            rig.until_joined(1).await.unwrap();
            let accepted = async {
                let (send, mut recv) = tunnel.accept().await.unwrap();
                recv.read_frame(4096).await.unwrap();
                (send, recv)
            };
            let (send, mut recv) = tokio::select! {
                dialed = door.dial(&rig, "127.0.0.1:80") => panic!("answered: {dialed:?}"),
                stream = accepted => stream, // and the frontend is dropped
            };
            recv.failed().await;
            send.stopped().await.unwrap().unwrap();
            common::eventually("no dial is pending", || {
                let scrape = rig.server.metrics.render(&rig.server.backends);
                let pending = "konnectivity_network_proxy_server_pending_backend_dials";
                metric(&scrape, pending) < 0.5
            })
            .await;
        })
        .await;
    }
}

/// The agent gives up the connection attempt itself, not only the stream.
#[tokio::test]
async fn an_abandoned_dial_leaves_nothing_at_the_agent() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let silent = Silent::start();
            let before = std::fs::read_dir("/proc/self/fd").unwrap().count();
            {
                let dialing = door.dial(&rig, silent.address());
                let pending = common::eventually("the dial is pending", || {
                    let scrape = rig.server.metrics.render(&rig.server.backends);
                    let open = "culvert_server_tunnel_open_streams{agent_id=\"agent-0\"}";
                    metric(&scrape, open) > 0.5
                        && std::fs::read_dir("/proc/self/fd").unwrap().count() >= before + 3
                });
                tokio::select! {
                    dialed = dialing => panic!("answered: {dialed:?}"),
                    () = pending => {}
                }
            }
            common::eventually("every descriptor is closed", || {
                std::fs::read_dir("/proc/self/fd").unwrap().count() <= before
            })
            .await;
        })
        .await;
    }
}

#[tokio::test]
async fn an_agent_takes_no_more_streams_than_it_may_carry() {
    for door in Door::CONNECT_UNIX.into_iter().chain(Door::GRPC_UNIX) {
        within(async {
            let rig = door.rig().max_streams(2).start().await.unwrap();
            let echo = targets::echo().await.unwrap();
            let first = door.dial(&rig, echo.address()).await.unwrap();
            let second = door.dial(&rig, echo.address()).await.unwrap();
            let answer = refusal(door, &rig, echo.address()).await;
            let text = "agent agent-0 has too many open streams";
            assert_refusal(door, &answer, "502 Bad Gateway", text);
            drop(first);
            drop(second);
            common::eventually("places are given back", || {
                let scrape = rig.server.metrics.render(&rig.server.backends);
                metric(&scrape, "culvert_server_tunnel_open_streams{agent_id=\"agent-0\"}") < 0.5
            })
            .await;
            door.dial(&rig, echo.address()).await.unwrap();
        })
        .await;
    }
}
