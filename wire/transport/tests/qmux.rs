//! What is special about QMux: a byte stream that all streams share, and a peer that may be any
//! implementation of the draft.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod carriers;

use bytes::Bytes;
use culvert_transport::{
    Carrier, ConnectError, Settings, Tunnel, TunnelLost,
    qmux::{Peer, Role, establish},
};
use culvert_wire::{CloseCode, StreamCode};
use qmux::{Config, Session, Version};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinSet,
};
use web_transport_trait::{RecvStream as _, SendStream as _, Session as _};

use carriers::within;

/// Bytes that the pipe between two ends holds.
const PIPE: usize = 64 * 1024;

fn peer() -> Peer {
    Peer { address: "192.0.2.1:8132".parse().unwrap(), carrier: Carrier::Tcp, certificates: None }
}

async fn end(io: DuplexStream, role: Role, settings: &Settings) -> Tunnel {
    establish(io, role, peer(), settings).await.unwrap().into()
}

/// Both ends of a tunnel through a pipe within the process; the server's first.
async fn pair(settings: &Settings) -> (Tunnel, Tunnel) {
    let (near, far) = duplex(PIPE);
    tokio::join!(end(near, Role::Server, settings), end(far, Role::Client, settings))
}

async fn echo(tunnel: Tunnel) {
    while let Ok((mut send, mut recv)) = tunnel.accept().await {
        tokio::spawn(async move {
            let mut chunks = [const { Bytes::new() }; 8];
            while let Ok(Some(count)) = recv.read_chunks(&mut chunks).await {
                for chunk in &chunks[..count] {
                    send.write_chunk(chunk.clone()).await.unwrap();
                }
            }
            send.finish();
            let _ = send.stopped().await;
        });
    }
}

/// Sends bytes there and back on a stream of its own.
async fn round_trip(tunnel: &Tunnel, length: usize, seed: u64) {
    let (mut send, mut recv) = tunnel.open().await.unwrap();
    let mut random = fastrand::Rng::with_seed(seed);
    let bytes: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
    let sending = async {
        for chunk in bytes.chunks(10_000) {
            send.write_chunk(Bytes::copy_from_slice(chunk)).await.unwrap();
        }
        send.finish();
        assert_eq!(send.stopped().await, Ok(None));
    };
    let reading = async {
        let (mut chunks, mut echoed) = ([const { Bytes::new() }; 8], Vec::new());
        while let Some(count) = recv.read_chunks(&mut chunks).await.unwrap() {
            chunks[..count].iter().for_each(|chunk| echoed.extend_from_slice(chunk));
        }
        echoed
    };
    let ((), echoed) = tokio::join!(sending, reading);
    assert!(echoed == bytes, "{} bytes came back of {length}", echoed.len());
}

#[tokio::test]
async fn many_streams_share_a_pipe() {
    within(async {
        let (server, agent) = pair(&Settings::default()).await;
        tokio::spawn(echo(agent));
        let mut trips = JoinSet::new();
        for stream in 0..50 {
            let server = server.clone();
            trips.spawn(async move { round_trip(&server, 100_000, stream).await });
        }
        trips.join_all().await;
        // Streams that are over make room for others.
        for stream in 0..1000 {
            round_trip(&server, 1, stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn few_streams_at_once_are_many_one_after_another() {
    within(async {
        let (server, agent) = pair(&Settings { max_streams: 2, ..Settings::default() }).await;
        tokio::spawn(echo(agent));
        for stream in 0..10 {
            round_trip(&server, 1, stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_stalled_reader_holds_up_nobody_else() {
    within(async {
        let settings = Settings { stream_receive_window: 64 * 1024, ..Settings::default() };
        let (server, agent) = pair(&settings).await;
        let mut stalled = Vec::new();
        for _ in 0..20 {
            // A window and what waits in front of it, never to be read.
            let (mut send, recv) = server.open().await.unwrap();
            for _ in 0..(64 + 128) / 16 {
                send.write_chunk(Bytes::from_static(&[7; 16_384])).await.unwrap();
            }
            stalled.push((send, recv, agent.accept().await.unwrap()));
        }
        tokio::spawn(echo(agent.clone()));
        for stream in 0..20 {
            round_trip(&server, 100_000, stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_end_that_was_not_delivered_is_a_loss() {
    within(async {
        let (near, mut far) = duplex(1024);
        // A peer that begins with a mebibyte and nine streams, and then reads no more.
        let mebibyte = &[0x80, 0x10, 0, 0][..];
        let granted = parameters(&[(4, mebibyte), (6, mebibyte), (8, &[9])]);
        far.write_all(&record(&[&granted])).await.unwrap();
        let near = end(near, Role::Server, &Settings::default()).await;
        let (mut send, _recv) = near.open().await.unwrap();
        for _ in 0..4 {
            send.write_chunk(Bytes::from_static(&[7; 10_000])).await.unwrap();
        }
        send.finish();
        let delivered = send.stopped();
        drop(far);
        assert!(matches!(delivered.await, Err(TunnelLost::Transport(_))));
    })
    .await;
}

/// The frame that begins a connection, with what it grants.
fn parameters(granted: &[(u8, &[u8])]) -> Vec<u8> {
    let granted: Vec<_> = granted
        .iter()
        .flat_map(|(id, value)| [&[*id, value.len() as u8], *value].concat())
        .collect();
    let head = [0xff, 0x51, 0x53, 0x30, 0x0d, 0x0a, 0x0d, 0x0a, granted.len() as u8];
    [&head[..], &granted].concat()
}

/// Bytes of a record of these frames.
fn record(frames: &[&[u8]]) -> Vec<u8> {
    let frames = frames.concat();
    [&[0x40 | (frames.len() >> 8) as u8, frames.len() as u8][..], &frames].concat()
}

/// What becomes of a server whose peer sends this.
async fn fate(bytes: Vec<u8>) -> String {
    let (near, mut far) = duplex(PIPE);
    let settings = Settings { max_streams: 4, ..Settings::default() };
    let near = tokio::spawn(async move {
        match establish(near, Role::Server, peer(), &settings).await {
            Ok(connection) => Tunnel::from(connection).closed().await.to_string(),
            Err(ConnectError::Handshake(lost)) => lost.to_string(),
            Err(error) => panic!("{error}"),
        }
    });
    far.write_all(&bytes).await.unwrap();
    let fate = near.await.unwrap();
    // The last words come, and then the end.
    far.read_to_end(&mut Vec::new()).await.unwrap();
    fate
}

#[tokio::test]
async fn a_peer_that_breaks_the_protocol_costs_its_own_tunnel() {
    within(async {
        let parameters = &parameters(&[(8, &[9])])[..];
        for (bytes, words) in [
            (b"GET / HTTP/1.1\r\n\r\n".repeat(200), "a frame of the unknown type"),
            (vec![0x80, 1, 0, 0], "a record of 65536 bytes"),
            (record(&[&[0x05, 0, 0]]), "frames before the transport parameters"),
            (record(&[parameters, parameters]), "or these twice"),
            (record(&[parameters, &[0x3f]]), "a frame of the unknown type 0x3f"),
            (record(&[parameters, &[0x0e, 16, 0, 0]]), "more than was granted"),
            (record(&[parameters, &[0x0e, 1, 0, 0]]), "a stream that cannot be"),
            (record(&[parameters, &[0x0e, 2, 0, 0]]), "a stream that cannot be"),
            (record(&[parameters, &[0x0e, 0, 5, 1, 0]]), "not in order"),
            (record(&[parameters, &[0x0e, 0, 0, 9, 0]]), "ends before its time"),
        ] {
            let fate = fate(bytes).await;
            assert!(fate.contains(words), "{fate}, not {words}");
        }
    })
    .await;
}

/// The other implementation's settings, which match ours.
fn config() -> Config {
    Config::negotiated(Version::QMux02, Some("culvert/1".into()))
}

fn transport(io: DuplexStream) -> qmux::transport::Stream<DuplexStream> {
    qmux::transport::Stream::new(io, Version::QMux02, config().max_record_size)
}

#[tokio::test]
async fn another_implementation_is_a_client_of_ours() {
    within(async {
        let (near, far) = duplex(PIPE);
        let settings = Settings::default();
        let (server, client) = tokio::join!(
            end(near, Role::Server, &settings),
            Session::connect(transport(far), config()),
        );
        let client = client.unwrap();
        tokio::spawn(echo(server.clone()));
        let (mut send, mut recv) = client.open_bi().await.unwrap();
        let bytes = vec![7; 1 << 20];
        let sending = async {
            send.write_all(&bytes).await.unwrap();
            send.finish().unwrap();
        };
        let reading = async {
            let mut echoed = 0;
            while let Some(chunk) = recv.read_chunk(usize::MAX).await.unwrap() {
                echoed += chunk.len();
            }
            echoed
        };
        assert_eq!(tokio::join!(sending, reading).1, bytes.len());
        client.close(CloseCode::SHUTDOWN.as_u32(), "enough");
        let lost = server.closed().await;
        let (code, reason) = (CloseCode::SHUTDOWN, "enough".to_owned());
        assert_eq!(lost, TunnelLost::ClosedByPeer { code, reason });
    })
    .await;
}

#[tokio::test]
async fn another_implementation_is_a_server_of_ours() {
    within(async {
        let (near, far) = duplex(PIPE);
        let settings = Settings::default();
        let (agent, server) = tokio::join!(
            end(near, Role::Client, &settings),
            Session::accept(transport(far), config()),
        );
        let server = server.unwrap();
        let (mut send, mut recv) = server.open_bi().await.unwrap();
        send.write_all(b"hello").await.unwrap();
        let (mut our_send, mut our_recv) = agent.accept().await.unwrap();
        let mut chunks = [Bytes::new()];
        our_recv.read_chunks(&mut chunks).await.unwrap();
        assert_eq!(chunks[0], "hello");
        our_recv.stop(StreamCode::BROKEN_PIPE);
        our_send.reset(StreamCode::PEER_RESET);
        let stopped = send.closed().await.unwrap_err();
        let reset = recv.read_chunk(1).await.unwrap_err();
        assert!(matches!(stopped, qmux::Error::StreamStop(code) if code.into_inner() == 3));
        assert!(matches!(reset, qmux::Error::StreamReset(code) if code.into_inner() == 2));
        agent.close(CloseCode::DONE, "bye");
        let closed = server.closed().await;
        assert!(matches!(closed, qmux::Error::ConnectionClosed { reason, .. } if reason == "bye"));
    })
    .await;
}
