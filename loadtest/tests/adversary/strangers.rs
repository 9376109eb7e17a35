//! Peers that prove nothing.

use std::{net::SocketAddr, time::Duration};

use rstest::rstest;
use serde_json::json;
use tokio::{
    net::{TcpSocket, TcpStream, UdpSocket},
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    http2, initial, qmux,
    quic::{self, EVERYTHING, Grants},
    support::{
        Carrier,
        kube_api::{AUDIENCE, jwt},
        within,
    },
    victim::{
        MIB,
        Proof::{Certificate, Token},
        Victim, token,
    },
};

/// Time for an honest agent to join during an attack, with the start of its process.
const JOIN_TIME: Duration = Duration::from_secs(8);
/// Time from the accept to the admission, and a margin.
const DEADLINE: Duration = Duration::from_secs(14);
/// Growth of the server's memory that no attack of a few strangers may pass.
const MEMORY: u64 = 24 * MIB;

/// Cost of a stranger over QUIC, at most: a handshake of 55 KiB, 16 KiB of TLS, the 32 KiB that quinn
/// keeps in excess of its pieces before it joins them, and what the allocator adds.
const STRANGER: u64 = 120 << 10;
/// Number of calls that one connection may make before it is admitted.
const CALLS_EACH: u32 = 4;

/// A ping of the control stream, without its echo.
const PING: [u8; 4] = [3, 0, 1, 7];

/// The server answers no ping before the hello, so it holds no answers that the peer does not take.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn pings_before_the_hello_cost_no_memory(
    #[values(Carrier::Quic, Carrier::Tcp)] carrier: Carrier,
) {
    const PEERS: usize = 4;
    let pings = PING.repeat(500_000);
    within(async {
        let mut victim = Victim::start(Token).await;
        let mut ended = JoinSet::new();
        for _ in 0..PEERS {
            let pings = pings.clone();
            match carrier {
                Carrier::Quic => {
                    // The answers find no room.
                    let grants = Grants { stream_window: 0, streams: 0 };
                    let mut peer = quic::Peer::connect(&victim, grants).await;
                    ended.spawn(async move {
                        let _ = peer.send.write_all(&pings).await;
                        peer.connection.closed().await;
                    });
                }
                _ => {
                    let mut peer = qmux::Peer::connect(&victim).await;
                    ended.spawn(async move {
                        let _ = peer.send(0, &pings, 16_000).await;
                    });
                }
            }
        }
        let (_agent, took) = victim.honest_agent_joins("honest").await;
        assert!(took < JOIN_TIME, "{took:?}");
        timeout(DEADLINE, ended.join_all()).await.expect("the server keeps the strangers");
        assert!(victim.cost().peak_memory < MEMORY);
    })
    .await;
}

/// Each byte in a frame of its own, while the token is being reviewed and nothing reads the stream.
#[tokio::test(flavor = "multi_thread")]
async fn frames_of_one_byte_cost_little_memory() {
    within(async {
        let mut victim = Victim::start(Token).await;
        victim.api.delay_answers(Duration::from_secs(4));
        let mut sent = JoinSet::new();
        for number in 0..2 {
            let mut peer = qmux::Peer::connect(&victim).await;
            let hello = hello(&token(number));
            peer.send(0, &hello, hello.len()).await.unwrap();
            sent.spawn(async move {
                let bytes = vec![0xff; 400_000];
                let _ = peer.send(hello.len() as u64, &bytes, 1).await;
                peer
            });
        }
        let peers = sent.join_all().await;
        // Both have had their answer.
        victim.api.delay_answers(Duration::ZERO);
        let (_agent, took) = victim.honest_agent_joins("honest").await;
        assert!(took < JOIN_TIME, "{took:?}");
        assert!(victim.cost().peak_memory < MEMORY);
        drop(peers);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_connection_without_a_call_is_closed_at_the_deadline() {
    within(async {
        let mut victim = Victim::start(Token).await;
        let mut open = JoinSet::new();
        for _ in 0..200 {
            open.spawn(http2::Peer::connect(&victim).await.until_closed());
        }
        let (agent, took) = victim.honest_agent_joins("honest").await;
        assert!(took < JOIN_TIME, "{took:?}");
        timeout(DEADLINE, open.join_all()).await.expect("the server keeps the connections");
        drop(agent);
        victim.deployment.until_joined(0).await;
        assert!(victim.cost().descriptors < 5);
    })
    .await;
}

/// A call that is given up has its review paid for: reviews are limited, not the waits for them.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_given_up_do_not_multiply_reviews() {
    const CALLS: u32 = 400;
    within(async {
        let mut victim = Victim::start(Token).await;
        victim.api.delay_answers(Duration::from_secs(1));
        let begun = Instant::now();
        let mut peer = http2::Peer::connect(&victim).await;
        for call in 0..CALLS {
            if call > 0 && call % CALLS_EACH == 0 {
                peer = http2::Peer::connect(&victim).await;
            }
            let stream = 2 * (call % CALLS_EACH) + 1;
            peer.call(stream, &token(call)).await.unwrap();
            peer.reset(stream).await.unwrap();
        }
        let (_agent, took) = victim.honest_agent_joins("honest").await;
        assert!(took < JOIN_TIME, "{took:?}");
        let seconds = begun.elapsed().as_secs() as usize + 1;
        let reviews = victim.cost().reviews;
        // At most 64 at a time, each of which takes a second.
        assert!(reviews <= 64 * seconds && reviews < 300, "{reviews} reviews in {seconds} s");
    })
    .await;
}

/// Tokens that kube-apiserver cannot accept are refused without asking it.
#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_cannot_be_valid_are_not_reviewed() {
    within(async {
        let mut victim = Victim::start(Token).await;
        let mut peer = http2::Peer::connect(&victim).await;
        for call in 0..100 {
            if call > 0 && call % CALLS_EACH == 0 {
                peer = http2::Peer::connect(&victim).await;
            }
            // No JWT, another audience, and one that has expired.
            let token = match call % 3 {
                0 => format!("word-{call}"),
                1 => jwt(&json!({ "aud": ["other"], "exp": 4_000_000_000_u32, "jti": call })),
                _ => jwt(&json!({ "aud": [AUDIENCE], "exp": 1000, "jti": call })),
            };
            peer.call(2 * (call % CALLS_EACH) + 1, &token).await.unwrap();
        }
        let (_agent, _) = victim.honest_agent_joins("honest").await;
        // The honest agent's own.
        let reviews = victim.cost().reviews;
        assert!(reviews <= 2, "{reviews} reviews");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_tcp_connections_do_not_keep_agents_out() {
    within(async {
        let mut victim = Victim::start(Certificate).await;
        let mut open = Vec::new();
        for _ in 0..1100 {
            open.push(TcpStream::connect(victim.deployment.tunnel()).await.unwrap());
        }
        let (_agent, took) = victim.honest_agent_joins_with("honest", &["--transport=tcp"]).await;
        assert!(took < JOIN_TIME, "{took:?}");
        assert!(victim.cost().log < 64 << 10, "the log grows with the attack");
    })
    .await;
}

/// Handshakes over QUIC that begin and never end, from many ports of one address.
#[tokio::test(flavor = "multi_thread")]
async fn quic_handshakes_that_never_end_do_not_keep_agents_out() {
    within(async {
        let mut victim = Victim::start(Certificate).await;
        let server = victim.deployment.tunnel();
        for _ in 0..40 {
            let endpoint = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
            let config = quic::config(&victim, EVERYTHING);
            let connecting: Vec<_> = (0..40)
                .map(|_| {
                    endpoint.connect_with(config.clone(), server, &quic::name(server)).unwrap()
                })
                .collect();
            // Their first packets are out, and nothing answers the server's.
            tokio::task::yield_now().await;
            std::mem::forget(connecting);
            drop(endpoint);
        }
        let (_agent, took) = victim.honest_agent_joins_with("honest", &["--transport=quic"]).await;
        assert!(took < JOIN_TIME, "{took:?}");
        let cost = victim.cost();
        assert!(cost.log < 64 << 10, "{} bytes of log", cost.log);
        assert!(cost.peak_memory < 70 * MIB, "{} bytes", cost.peak_memory);
    })
    .await;
}

/// Bytes of TLS that wait behind a gap, in pieces of one byte, repeated, or alone in their packets.
#[rstest]
#[case::in_many_pieces(usize::MAX)]
#[case::one_in_a_packet(1)]
#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_a_handshake_behind_gaps_cost_little_memory(#[case] pieces: usize) {
    /// Below the number from which addresses have to be validated.
    const STRANGERS: u64 = 200;
    const PACKETS: usize = 100;
    within(async {
        let mut victim = Victim::start(Certificate).await;
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(victim.deployment.tunnel()).await.unwrap();
        let mut strangers: Vec<_> =
            (0..STRANGERS).map(|number| initial::Stranger::new(&victim, number)).collect();
        let mut offsets = (1_u16..16_000).step_by(16).cycle();
        for _ in 0..PACKETS {
            let frames: Vec<_> =
                offsets.by_ref().take(pieces.min(220)).flat_map(initial::crypto).collect();
            for stranger in &mut strangers {
                stranger.send(&socket, &frames).await;
            }
        }
        let series = "culvert_server_unadmitted_connections{transport=\"quic\"}";
        println!("{} strangers", victim.deployment.server_metric(series).await);
        let (_agent, took) = victim.honest_agent_joins_with("honest", &["--transport=quic"]).await;
        assert!(took < JOIN_TIME, "{took:?}");
        let peak = victim.cost().peak_memory;
        println!("{} KiB for each stranger", (peak / STRANGERS) >> 10);
        assert!(peak < STRANGERS * STRANGER, "{} MiB", peak / MIB);
    })
    .await;
}

/// A reason with line breaks, escape sequences and other control characters stays in its line.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_cannot_forge_lines_of_the_log(
    #[values(Carrier::Quic, Carrier::Tcp)] carrier: Carrier,
) {
    const REASON: &str = "x\r\n2026-01-01T00:00:00Z  INFO forged \u{1b}[31m\u{2028}\u{202e}";
    within(async {
        // A connection that is lost is no warning.
        let victim = Victim::start_with(Token, &["-v=5"]).await;
        match carrier {
            Carrier::Quic => {
                let peer = quic::Peer::connect(&victim, EVERYTHING).await;
                peer.connection.close(0x100_u32.into(), REASON.as_bytes());
                peer.connection.closed().await;
                drop(peer);
            }
            _ => {
                let mut peer = qmux::Peer::connect(&victim).await;
                let reason = REASON.as_bytes();
                // CONNECTION_CLOSE of an application.
                let mut frame = vec![0x1d, 0x41, 0x00, u8::try_from(reason.len()).unwrap()];
                frame.extend(reason);
                peer.record(&frame).await.unwrap();
            }
        }
        let logged = async || victim.deployment.server_log().contains("did not join");
        crate::support::eventually("the failure is logged", logged).await;
        let log = victim.deployment.server_log();
        assert!(!log.lines().any(|line| line.starts_with("2026-01-01")), "{log}");
        assert!(!log.contains(['\u{1b}', '\u{2028}', '\u{202e}', '\r']), "{log:?}");
    })
    .await;
}

/// The failures of a stranger are logged at a bounded rate, and do not hide those of others.
#[tokio::test(flavor = "multi_thread")]
async fn a_strangers_failures_do_not_hide_those_of_another_source() {
    within(async {
        let mut victim = Victim::start(Certificate).await;
        let server = victim.deployment.tunnel();
        let mut failures = JoinSet::new();
        for _ in 0..300 {
            failures.spawn(fail_from("127.0.0.2:0", server));
        }
        failures.join_all().await;
        fail_from("127.0.0.3:0", server).await;
        let logged = async || victim.deployment.server_log().contains("127.0.0.3:");
        crate::support::eventually("the other source is logged", logged).await;
        assert!(victim.cost().log < 32 << 10, "the log grows with the attack");
    })
    .await;
}

/// A connection from this address that speaks no TLS.
async fn fail_from(source: &str, server: SocketAddr) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(source.parse().unwrap()).unwrap();
    let Ok(mut socket) = socket.connect(server).await else { return };
    let _ = socket.write_all(b"nothing that is known\r\n\r\n").await;
    let _ = socket.read(&mut [0; 16]).await;
}

/// The hello of an agent with this token, byte by byte (docs/protocol.md §5).
pub(crate) fn hello(token: &str) -> Vec<u8> {
    hello_of(b"stranger", token)
}

/// The hello of the agent with this id.
pub(crate) fn hello_of(id: &[u8; 8], token: &str) -> Vec<u8> {
    // Revision, features, agent id, instance, no identifiers.
    let mut body = vec![1, 7, 8];
    body.extend(id);
    body.extend([id[7]; 16]);
    body.push(0);
    match token {
        "" => body.push(0),
        _ => {
            body.push(1);
            body.extend(int(token.len()));
            body.extend(token.as_bytes());
        }
    }
    // No software, no extensions.
    body.extend([0, 0]);
    let mut frame = vec![1];
    frame.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
    frame.extend(body);
    frame
}

/// An integer of a body.
fn int(value: usize) -> Vec<u8> {
    match u8::try_from(value) {
        Ok(value) if value < 251 => vec![value],
        _ => [&[0xfb][..], &u16::try_from(value).unwrap().to_le_bytes()].concat(),
    }
}
