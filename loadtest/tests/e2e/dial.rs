//! Dials that fail, with the texts that users know from Go, and dials that are abandoned.

use std::{net::TcpListener, time::Duration};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    agent, eventually, rig,
    silent_target::SilentTarget,
    within,
};
use culvert_loadtest::{
    frontend::{
        FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
        Protocol,
        connect::ConnectError,
    },
    rig::Running,
    targets,
};
use culvert_wire::dial::{DialRequest, StreamKind};
use rstest::rstest;
use tokio::time::timeout;

/// The answer to a dial that is refused.
async fn refusal(rig: &Running, target: impl ToString) -> String {
    match rig.dial(target).await {
        Err(ConnectError::Refused(refused)) => refused.answer,
        other => panic!("{other:?}"),
    }
}

/// Asserts status (where there is one) and text of a refusal.
#[track_caller]
fn assert_refusal(rig: &Running, answer: &str, status: &str, text: &str) {
    if rig.frontend().protocol() == Protocol::Grpc {
        assert_eq!(answer, text);
    } else {
        let head = "Connection: close\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n";
        assert_eq!(answer, format!("HTTP/1.1 {status}\r\n{head}{text}"));
    }
}

#[rstest]
#[tokio::test]
async fn a_refused_connection_is_reported_with_gos_text(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let answer = refusal(&rig, closed).await;
        let text = format!("dial tcp {closed}: connect: connection refused");
        assert_refusal(&rig, &answer, "502 Bad Gateway", &text);
        assert_eq!(rig.server.dial_failures("error_response"), 1.0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_unresolvable_name_is_reported_with_gos_text(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let answer = refusal(&rig, "no-such-host.invalid:80").await;
        let reason = if answer.contains("server misbehaving") {
            "server misbehaving" // on a host without a resolver
        } else {
            "no such host"
        };
        let text = format!("dial tcp: lookup no-such-host.invalid: {reason}");
        assert_refusal(&rig, &answer, "502 Bad Gateway", &text);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_unreachable_network_is_reported_with_gos_text(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let exempt = "--egress-exempt=224.0.0.0/4";
        let rig = rig(frontend, carrier).agent_flag(exempt).start().await.unwrap();
        // TCP to a multicast address has no route, on any host, and sends nothing.
        let answer = refusal(&rig, "224.0.0.1:80").await;
        let text = "dial tcp 224.0.0.1:80: connect: network is unreachable";
        assert_refusal(&rig, &answer, "502 Bad Gateway", text);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_target_that_the_egress_policy_denies_is_refused_with_the_rule(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).agent_flag("--egress-deny=127.0.0.2:1-65535");
        let rig = rig.start().await.unwrap();
        for (target, address, rule) in [
            ("169.254.169.254:80", "169.254.169.254:80", "link-local"),
            ("[::ffff:127.0.0.2]:443", "[::ffff:127.0.0.2]:443", "deny 127.0.0.2:1-65535"),
        ] {
            let answer = refusal(&rig, target).await;
            let text = format!("dial tcp {address}: refused by the agent's egress policy ({rule})");
            assert_refusal(&rig, &answer, "502 Bad Gateway", &text);
        }
        assert_eq!(rig.server.dial_failures("error_response"), 2.0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_silent_target_times_out_with_gos_text(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).agent_flag("--dial-timeout=300ms").start().await.unwrap();
        let silent = SilentTarget::start();
        let answer = refusal(&rig, silent.address()).await;
        let text = format!("dial tcp {}: i/o timeout", silent.address());
        assert_refusal(&rig, &answer, "504 Gateway Timeout", &text);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_address_without_a_port_is_reported_with_gos_text(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let answer = refusal(&rig, "127.0.0.1").await;
        let text = "dial tcp: address 127.0.0.1: missing port in address";
        assert_refusal(&rig, &answer, "502 Bad Gateway", text);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn without_an_agent_the_dial_of_a_new_server_fails_at_its_deadline(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier)
            .agents(0)
            .server_flag("--backend-dial-timeout=300ms")
            .start()
            .await
            .unwrap();
        let answer = refusal(&rig, "127.0.0.1:80").await;
        let head = match rig.frontend().protocol() {
            Protocol::Grpc => "",
            Protocol::Connect => {
                "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\n\
                 currently no tunnels available: "
            }
        };
        let cause = "none has joined this server; no agent is connected; this server started ";
        let expected = format!("{head}No agent available: {cause}");
        assert!(answer.starts_with(&expected), "{answer}");
        assert_eq!(rig.server.dial_failures("no_agent"), 1.0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_that_never_answers_fails_the_dial_at_its_deadline(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier)
            .agents(0)
            .server_flag("--backend-dial-timeout=300ms")
            .start()
            .await
            .unwrap();
        let (tunnel, _control) = agent::joined(&rig, "silent").await;
        rig.until_joined(1).await.unwrap();
        let answer = refusal(&rig, "127.0.0.1:80").await;
        let cause = match carrier {
            // The agent's QUIC acknowledges the request.
            Quic => "silent answers over quic, but sent no reply",
            _ => "silent sent no reply over tcp",
        };
        let text = format!("timed out waiting for backend dial: {cause}");
        if rig.frontend().protocol() == Protocol::Grpc {
            assert_eq!(answer, text);
        } else {
            let text = format!("Backend dial timeout: {text}\r\n");
            assert_refusal(&rig, &answer, "504 Gateway Timeout", &text);
        }
        // The stream is reset, so the agent can stop connecting.
        let (send, mut recv) = tunnel.accept().await.unwrap();
        recv.failed().await;
        send.stopped().await.unwrap().unwrap();
    })
    .await;
}

/// A client may send hints with its request, and the agent gets them.
#[rstest]
#[tokio::test]
async fn the_hints_of_a_request_reach_the_agent(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
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

#[rstest]
#[tokio::test]
async fn a_frontend_that_leaves_while_dialing_ends_the_dial_at_the_agent(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).agents(0).start().await.unwrap();
        let (tunnel, _control) = agent::joined(&rig, "silent").await;
        rig.until_joined(1).await.unwrap();
        let accepted = async {
            let (send, mut recv) = tunnel.accept().await.unwrap();
            recv.read_frame(4096).await.unwrap();
            (send, recv)
        };
        let (send, mut recv) = tokio::select! {
            dialed = rig.dial("127.0.0.1:80") => panic!("answered: {dialed:?}"),
            stream = accepted => stream, // drops the dial
        };
        recv.failed().await;
        send.stopped().await.unwrap().unwrap();
        eventually("no dial is pending", async || rig.server.pending_dials() == 0.0).await;
    })
    .await;
}

/// The agent abandons the attempt to connect, not only the stream.
#[rstest]
#[tokio::test]
async fn an_abandoned_dial_ends_the_attempt_to_connect(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        // Otherwise the attempt would end by itself before the kernel ends it after two minutes.
        let rig = rig(ConnectUnix, carrier)
            .server_flag("--backend-dial-timeout=10m")
            .agent_flag("--dial-timeout=10m");
        let rig = rig.start().await.unwrap();
        let silent = SilentTarget::start();
        assert_eq!(silent.attempts(), 0);
        {
            let dialing = rig.dial(silent.address());
            let connecting = eventually("the agent connects", async || {
                rig.server.open_streams("agent-0") == 1.0 && silent.attempts() == 1
            });
            tokio::select! {
                dialed = dialing => panic!("answered: {dialed:?}"),
                () = connecting => {}
            }
        }
        let ended = eventually("the agent does not connect any more", async || {
            rig.server.open_streams("agent-0") == 0.0 && silent.attempts() == 0
        });
        timeout(Duration::from_secs(60), ended).await.expect("the agent still connects");
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_carries_no_more_streams_than_its_maximum(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier)
            .server_flag("--max-streams-per-agent=2")
            .agent_flag("--max-streams=2")
            .start()
            .await
            .unwrap();
        let echo = targets::echo().await.unwrap();
        let first = rig.dial(echo.address()).await.unwrap();
        let second = rig.dial(echo.address()).await.unwrap();
        let answer = refusal(&rig, echo.address()).await;
        let text = "agent agent-0 has too many open streams";
        assert_refusal(&rig, &answer, "502 Bad Gateway", text);
        drop(first);
        drop(second);
        eventually("permits are given back", async || rig.server.open_streams("agent-0") == 0.0)
            .await;
        rig.dial(echo.address()).await.unwrap();
    })
    .await;
}
