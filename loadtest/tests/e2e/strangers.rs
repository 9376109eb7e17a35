//! Peers that are not admitted: they cost little, end soon, and keep no agent out.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use culvert_konnectivity::{ALPN_H2, CONNECT};
use culvert_loadtest::{frontend::FrontendKind::ConnectUnix, rig::Running};
use culvert_transport::TunnelLost;
use culvert_wire::{
    CloseCode,
    control::{ControlMessage, Ping},
    version::ALPN,
};
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rstest::rstest;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    agent, eventually, rig, within,
};

/// Maximum number of strangers, where descriptors allow it.
const MAX_STRANGERS: usize = 1024;
/// Number of those that gave way and may not have ended yet.
const LEAVING: usize = 64;
/// Time that a stranger has.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for an agent to join on a busy machine: less than a stranger has.
const PROMPT: Duration = Duration::from_secs(5);

/// Lets this process hold both ends of as many connections as the tests make.
fn raise_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    assert!(hard >= 4 * 1024, "these tests need 4096 descriptors");
}

/// Connections that send nothing, each replaced when it ends.
fn silent_connections(address: SocketAddr, count: usize) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    for _ in 0..count {
        connections.spawn(async move {
            loop {
                if let Ok(mut socket) = TcpStream::connect(address).await {
                    let _ = socket.read(&mut [0]).await;
                }
                tokio::task::yield_now().await;
            }
        });
    }
    connections
}

/// Strangers over this carrier.
fn strangers(rig: &Running, carrier: &str) -> f64 {
    let name = "culvert_server_unadmitted_connections";
    rig.server.metric(&format!("{name}{{transport=\"{carrier}\"}}"))
}

fn failures(rig: &Running, reason: &str) -> f64 {
    rig.server.metric(&format!("culvert_server_join_failures_total{{reason=\"{reason}\"}}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_connections_keep_no_agent_over_tcp_out() {
    raise_descriptors();
    within(async {
        let mut rig = rig(ConnectUnix, Tcp).agents(0).start().await.unwrap();
        let _flood = silent_connections(rig.server.tunnel, MAX_STRANGERS + 36);
        let is_full = async || strangers(&rig, "tcp") >= MAX_STRANGERS as f64;
        eventually("the table is full", is_full).await;
        let begun = Instant::now();
        rig.add_agent("agent").unwrap();
        rig.until_joined(1).await.unwrap();
        assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
        assert!(strangers(&rig, "tcp") <= (MAX_STRANGERS + LEAVING) as f64);
        assert!(failures(&rig, "evicted") > 0.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_over_quic_proves_its_address_while_there_are_many_strangers() {
    raise_descriptors();
    within(async {
        let mut rig = rig(ConnectUnix, Quic).agents(1).start().await.unwrap();
        let validations = "culvert_server_address_validations_total";
        assert_eq!(rig.server.metric(validations), 0.0);
        let _flood = silent_connections(rig.server.tunnel, MAX_STRANGERS / 4 + 1);
        let is_crowded = async || strangers(&rig, "tcp") > (MAX_STRANGERS / 4) as f64;
        eventually("the table is crowded", is_crowded).await;
        rig.add_agent("other").unwrap();
        rig.until_joined(2).await.unwrap();
        assert!(rig.server.metric(validations) > 0.0);
    })
    .await;
}

/// The begin of HTTP/2 of a client: the preface and empty settings (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A connection as a Konnectivity agent makes it, with a certificate and without a call.
async fn http2(rig: &Running) -> TlsStream<TcpStream> {
    tls(rig, ALPN_H2).await
}

/// A TLS connection of an agent with a certificate that speaks this protocol.
async fn tls(rig: &Running, protocol: &[u8]) -> TlsStream<TcpStream> {
    let address = rig.server.tunnel;
    let mut tls = agent::tls(rig);
    tls.alpn_protocols = vec![protocol.to_vec()];
    let socket = TcpStream::connect(address).await.unwrap();
    let name = ServerName::from(address.ip());
    TlsConnector::from(Arc::new(tls)).connect(name, socket).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_of_konnectivity_agents_that_make_no_call_end_at_the_deadline() {
    const COUNT: usize = 20;
    within(async {
        let rig = rig(ConnectUnix, Tcp).agents(0).start().await.unwrap();
        let begun = Instant::now();
        let mut connections = Vec::new();
        for _ in 0..COUNT {
            let mut connection = http2(&rig).await;
            connection.write_all(PREFACE).await.unwrap();
            connections.push(connection);
        }
        let counted = async || strangers(&rig, "grpc") == COUNT as f64;
        eventually("all are counted", counted).await;
        let mut read = Vec::new();
        for mut connection in connections {
            // A connection that is closed without a close_notify is an end too.
            let _ = timeout(JOIN_TIMEOUT * 3, connection.read_to_end(&mut read)).await.unwrap();
        }
        assert!(begun.elapsed() >= JOIN_TIMEOUT, "{:?}", begun.elapsed());
        assert_eq!((strangers(&rig, "grpc"), failures(&rig, "timed_out")), (0.0, COUNT as f64));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agent_may_make_four_calls_before_one_is_admitted() {
    within(async {
        let rig = rig(ConnectUnix, Tcp).agents(0).start().await.unwrap();
        let io = TokioIo::new(http2(&rig).await);
        let (mut client, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        let connection = culvert_transport::task::owned(connection);
        for call in 0..5 {
            let request = Request::post(format!("https://server{CONNECT}"))
                .header("content-type", "application/grpc")
                .body(Empty::<Bytes>::new());
            match client.send_request(request.unwrap()).await {
                Ok(response) if call < 4 => {
                    // Without the name of an agent.
                    assert_eq!(response.headers()["grpc-status"], "2");
                    response.into_body().collect().await.unwrap();
                }
                // The answer to the last call may still be sent.
                Ok(response) => assert_eq!(response.headers()["grpc-status"], "8"),
                Err(error) => assert_eq!(call, 4, "{error}"),
            }
        }
        let _ = connection.await.unwrap();
        // Four calls without a name, and the end of the connection.
        eventually("it is counted", async || failures(&rig, "protocol_violation") == 5.0).await;
        assert_eq!(strangers(&rig, "grpc"), 0.0);
    })
    .await;
}

/// Frames that no window limits are not free: PADDING in records of QMux, and frames of a kind that
/// HTTP/2 does not know.
#[rstest]
#[case::qmux(ALPN, &[0x09, 0xff, 0x51, 0x53, 0x30, 0x0d, 0x0a, 0x0d, 0x0a, 0], &[20])]
#[case::http2(ALPN_H2, PREFACE, &[0, 0, 12, 0x20, 0, 0, 0, 0, 0])]
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_over_tcp_that_sends_more_than_an_introduction_is_closed_and_counted(
    #[case] protocol: &[u8],
    #[case] begin: &[u8],
    #[case] head: &[u8],
) {
    const MORE: usize = 64 * 1024;
    within(async {
        let rig = rig(ConnectUnix, Tcp).agents(0).start().await.unwrap();
        let mut connection = tls(&rig, protocol).await;
        let mut frame = head.to_vec();
        frame.resize(21, 0);
        let frames = frame.repeat(MORE / frame.len() + 1);
        connection.write_all(&[begin, &frames].concat()).await.unwrap();
        connection.flush().await.unwrap();
        eventually("it is counted", async || failures(&rig, "protocol_violation") == 1.0).await;
        assert_eq!(strangers(&rig, "tcp") + strangers(&rig, "grpc"), 0.0);
        // Closed, with or without a close_notify.
        let _ = connection.read_to_end(&mut Vec::new()).await;
    })
    .await;
}

/// The server reads the first. Over QUIC it also lets the peer send little more of two million
/// bytes; the limit over TCP is the one of the test above.
#[rstest]
#[case(Quic, 2_000_000)]
#[case(Tcp, 1)]
#[tokio::test(flavor = "multi_thread")]
async fn pings_before_the_hello_are_neither_read_nor_answered(
    #[case] carrier: Carrier,
    #[case] len: usize,
) {
    /// Bytes of the handshake and of the window.
    const LITTLE: u64 = 128 * 1024;
    within(async {
        let rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
        let tunnel = agent::tunnel(&rig).await;
        let (mut send, mut recv) = tunnel.open().await.unwrap();
        let ping = ControlMessage::Ping(Ping { echo: 7 }).encode().unwrap();
        let pings = Bytes::from(ping.repeat(16 * 1024 / ping.len()));
        let mut written = 0;
        while written < len && send.write_chunk(pings.clone()).await.is_ok() {
            written += pings.len();
        }
        let TunnelLost::ClosedByPeer { code, .. } = tunnel.closed().await else { panic!() };
        assert_eq!(code, CloseCode::PROTOCOL_VIOLATION);
        assert!(recv.read_chunks(&mut [Bytes::new()]).await.is_err(), "a pong");
        let sent = tunnel.stats().sent_bytes;
        assert!(sent < LITTLE, "{sent}");
    })
    .await;
}
