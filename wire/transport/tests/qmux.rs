//! QMux over a pipe: streams share one byte stream and nothing else, and the peer may be any
//! implementation of the draft, or something else altogether.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod carriers;

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use culvert_transport::{
    Carrier, ConnectError, Settings, Tunnel, TunnelLost,
    qmux::{Peer, Role, establish},
};
use culvert_wire::{CloseCode, StreamCode, bounded::PeerText};
use qmux::{Config, Session, Version};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    task::JoinSet,
};
use web_transport_trait::{RecvStream as _, SendStream as _, Session as _};

use carriers::within;

/// Capacity of the pipe between two ends, in bytes.
const PIPE: usize = 64 * 1024;

fn peer() -> Peer {
    Peer { address: "192.0.2.1:8132".parse().unwrap(), carrier: Carrier::Tcp, certificates: None }
}

async fn end(io: DuplexStream, role: Role, settings: &Settings) -> Tunnel {
    establish(io, role, peer(), settings).await.unwrap().into()
}

/// Both ends of a tunnel through a pipe within the process, the server's first.
async fn pair(settings: &Settings) -> (Tunnel, Tunnel) {
    let (near, far) = duplex(PIPE);
    tokio::join!(end(near, Role::Server, settings), end(far, Role::Client, settings))
}

async fn echo(tunnel: Tunnel) {
    while let Ok((mut send, mut recv)) = tunnel.accept().await {
        culvert_transport::test_util::detached(async move {
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

/// Sends bytes to an echo and back, on a stream of their own.
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
        culvert_transport::test_util::detached(echo(agent));
        let mut trips = JoinSet::new();
        for stream in 0..50 {
            let server = server.clone();
            trips.spawn(async move { round_trip(&server, 100_000, stream).await });
        }
        trips.join_all().await;
        // Streams that are closed make room for others.
        for stream in 0..1000 {
            round_trip(&server, 1, stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_limit_of_two_streams_allows_ten_one_after_another() {
    within(async {
        let (server, agent) = pair(&Settings { max_streams: 2, ..Settings::default() }).await;
        culvert_transport::test_util::detached(echo(agent));
        for stream in 0..10 {
            round_trip(&server, 1, stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn stalled_readers_do_not_delay_other_streams() {
    within(async {
        let settings = Settings { stream_receive_window: 64 * 1024, ..Settings::default() };
        let (server, agent) = pair(&settings).await;
        let mut stalled = Vec::new();
        for _ in 0..20 {
            // As much as the window and the send buffer hold, which is never read.
            let (mut send, recv) = server.open().await.unwrap();
            for _ in 0..(64 + 128) / 16 {
                send.write_chunk(Bytes::from_static(&[7; 16_384])).await.unwrap();
            }
            stalled.push((send, recv, agent.accept().await.unwrap()));
        }
        culvert_transport::test_util::detached(echo(agent.clone()));
        for stream in 0..20 {
            round_trip(&server, 100_000, stream).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_fin_that_was_not_delivered_is_reported_as_a_loss() {
    within(async {
        let (near, mut far) = duplex(1024);
        // The peer allows a mebibyte on nine streams, and then reads no more.
        let parameters = frames::parameters(&[
            (frames::MAX_DATA, 1 << 20),
            (frames::MAX_STREAM_DATA_REMOTE, 1 << 20),
            (frames::MAX_STREAMS, 9),
        ]);
        far.write_all(&frames::record(&[&parameters])).await.unwrap();
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

/// Frames as a peer writes them. They are encoded here, so that the crate's encoder does not test
/// itself.
mod frames {
    pub(crate) const MAX_DATA: u8 = 0x04;
    pub(crate) const MAX_STREAM_DATA_REMOTE: u8 = 0x06;
    pub(crate) const MAX_STREAMS: u8 = 0x08;

    pub(crate) const STOP_SENDING: u8 = 0x05;
    pub(crate) const STREAM: u8 = 0x08;
    pub(crate) const OFF: u8 = 0x04;
    pub(crate) const LEN: u8 = 0x02;

    /// QX_TRANSPORT_PARAMETERS: the frame that comes first, with numbers of four bytes each.
    pub(crate) fn parameters(granted: &[(u8, u32)]) -> Vec<u8> {
        let encode = |(id, value): &(u8, u32)| {
            let [first, rest @ ..] = value.to_be_bytes();
            [&[*id, 4, 0x80 | first][..], &rest].concat()
        };
        let granted = granted.iter().flat_map(encode).collect::<Vec<_>>();
        let kind = [0xff, 0x51, 0x53, 0x30, 0x0d, 0x0a, 0x0d, 0x0a];
        [&kind[..], &[granted.len() as u8], &granted].concat()
    }

    /// A record of these frames.
    pub(crate) fn record(frames: &[&[u8]]) -> Vec<u8> {
        let frames = frames.concat();
        [&[0x40 | (frames.len() >> 8) as u8, frames.len() as u8][..], &frames].concat()
    }
}

/// Why a server's tunnel is lost whose peer sends these bytes.
async fn loss_after(bytes: Vec<u8>) -> String {
    let (near, mut far) = duplex(PIPE);
    let settings = Settings { max_streams: 4, ..Settings::default() };
    let near = culvert_transport::task::owned(async move {
        match establish(near, Role::Server, peer(), &settings).await {
            Ok(connection) => Tunnel::from(connection).closed().await.to_string(),
            Err(ConnectError::Handshake(lost)) => lost.to_string(),
            Err(error) => panic!("{error}"),
        }
    });
    far.write_all(&bytes).await.unwrap();
    let lost = near.await.unwrap();
    // The close comes, and then the end.
    far.read_to_end(&mut Vec::new()).await.unwrap();
    lost
}

#[tokio::test]
async fn a_peer_that_breaks_the_protocol_loses_the_tunnel_with_the_reason() {
    use frames::{LEN, OFF, STOP_SENDING, STREAM};
    within(async {
        let parameters = &frames::parameters(&[(frames::MAX_STREAMS, 9)])[..];
        // The first client stream has the id 0, the first server stream 1.
        for (frames, reason) in [
            (&[&[STOP_SENDING, 0, 0][..]][..], "transport parameters are missing"),
            (&[parameters, parameters], "or came twice"),
            (&[parameters, &[0x3f]], "a frame of the unknown type 0x3f"),
            (&[parameters, &[STREAM | OFF | LEN, 4 << 2, 0, 0]], "more bytes or streams than"),
            (&[parameters, &[STREAM | OFF | LEN, 1, 0, 0]], "an id that cannot exist"),
            (&[parameters, &[STREAM | OFF | LEN, 2, 0, 0]], "an id that cannot exist"),
            (&[parameters, &[STREAM | OFF | LEN, 0, 5, 1, 0]], "not in order"),
            (&[parameters, &[STREAM | OFF | LEN, 0, 0, 9, 0]], "cut short"),
        ] {
            let lost = loss_after(frames::record(frames)).await;
            assert!(lost.contains(reason), "{lost}, not {reason}");
        }
        let http = b"GET / HTTP/1.1\r\n\r\n".repeat(200);
        assert!(loss_after(http).await.contains("a frame of the unknown type"));
        let long_record = vec![0x80, 1, 0, 0];
        assert!(loss_after(long_record).await.contains("a record of 65536 bytes"));
    })
    .await;
}

#[tokio::test]
async fn a_connection_starts_with_these_bytes() {
    within(async {
        let (near, mut far) = duplex(PIPE);
        let settings = Settings {
            idle_timeout: Duration::from_secs(30),
            stream_receive_window: 4 << 20,
            max_streams: 4,
            ..Settings::default()
        };
        let _near = culvert_transport::task::owned(async move {
            establish(near, Role::Client, peer(), &settings).await
        });
        // Record, frame type, length; idle time-out 30 s, no limit of data, 4 MiB on each stream
        // of either side, 4 streams.
        let expected = [
            &[0x40, 40][..],
            &[0xff, 0x51, 0x53, 0x30, 0x0d, 0x0a, 0x0d, 0x0a, 31],
            &[0x01, 4, 0x80, 0x00, 0x75, 0x30],
            &[0x04, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[0x05, 4, 0x80, 0x40, 0x00, 0x00],
            &[0x06, 4, 0x80, 0x40, 0x00, 0x00],
            &[0x08, 1, 4],
        ]
        .concat();
        let mut sent = vec![0; expected.len()];
        far.read_exact(&mut sent).await.unwrap();
        assert_eq!(sent, expected);
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
async fn another_implementation_works_as_client() {
    within(async {
        let (near, far) = duplex(PIPE);
        let settings = Settings::default();
        let (server, client) = tokio::join!(
            end(near, Role::Server, &settings),
            Session::connect(transport(far), config()),
        );
        let client = client.unwrap();
        culvert_transport::test_util::detached(echo(server.clone()));
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
        let (code, reason) = (CloseCode::SHUTDOWN, PeerText::lossy(b"enough"));
        assert_eq!(lost, TunnelLost::ClosedByPeer { code, reason });
    })
    .await;
}

#[tokio::test]
async fn another_implementation_works_as_server() {
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

/// A byte stream whose reads panic, as a defect of a carrier would.
struct Defective;

impl tokio::io::AsyncRead for Defective {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        panic!("scripted");
    }
}

impl tokio::io::AsyncWrite for Defective {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_panic_of_a_task_ends_its_connection() {
    within(async {
        let refused = establish(Defective, Role::Client, peer(), &Settings::default()).await;
        let error = refused.map(drop).unwrap_err();
        assert!(matches!(error, ConnectError::Handshake(TunnelLost::Transport(_))), "{error:?}");
    })
    .await;
}
