//! A splice of a real socket over each carrier. Its rules are tested in paused time beside the
//! code.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod carriers;

use std::{io, sync::Arc, time::Duration};

use bytes::Bytes;
use culvert_transport::{
    Carrier, ReadError, RecvHalf, SendHalf, Settings, WriteError,
    budget::{Held, MemoryBudget},
    splice::{Cut, HalfEnd, Local, Meter, Outcome, SpliceSocket, halves, splice},
};
use culvert_wire::StreamCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    time::timeout,
};

use carriers::{Pair, each};

/// The ends that are spliced, and the others, which the test holds.
struct Bench {
    spliced: (TcpStream, (SendHalf, RecvHalf)),
    socket: TcpStream,
    stream: (SendHalf, RecvHalf),
    _pair: Pair,
}

impl Bench {
    async fn new(carrier: Carrier) -> Self {
        let pair = Pair::new(carrier).await;
        let mut stream = pair.server.open().await.unwrap();
        // A stream exists for the peer from its first byte.
        stream.0.write_chunk(Bytes::from_static(b"!")).await.unwrap();
        let mut held = pair.agent.accept().await.unwrap();
        let mut chunks = [Bytes::new()];
        held.1.read_chunks(&mut chunks).await.unwrap();

        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(tcp.local_addr().unwrap()).await.unwrap();
        let (spliced, _) = tcp.accept().await.unwrap();
        Self { spliced: (spliced, stream), socket, stream: held, _pair: pair }
    }
}

async fn run(socket: impl SpliceSocket, stream: (SendHalf, RecvHalf), meter: &Meter) -> Outcome {
    let (reader, writer, abort) = halves(socket);
    splice(Local::new(reader, writer, abort), stream, meter).await
}

#[tokio::test]
async fn a_dropped_splice_resets_both_sides() {
    each(async |carrier| {
        let Bench { spliced: (socket, stream), socket: mut peer, stream: mut held, _pair } =
            Bench::new(carrier).await;
        peer.write_all(b"half a sent").await.unwrap();
        let task =
            culvert_transport::task::owned(
                async move { run(socket, stream, &Meter::default()).await },
            );
        let mut chunks = [Bytes::new()];
        assert_eq!(held.1.read_chunks(&mut chunks).await.unwrap(), Some(1));
        task.abort();
        let error = held.1.read_chunks(&mut chunks).await.unwrap_err();
        assert_eq!(error, ReadError::Reset(StreamCode::ABANDONED));
        assert_eq!(held.0.stopped().await.unwrap(), Some(StreamCode::ABANDONED));
        let error = peer.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn both_directions_are_counted_and_their_ends_reported() {
    each(async |carrier| {
        let Bench { spliced: (socket, stream), socket: mut peer, stream: mut held, _pair } =
            Bench::new(carrier).await;
        let meter = Arc::new(Meter::default());
        let counted = meter.clone();
        let task =
            culvert_transport::task::owned(async move { run(socket, stream, &counted).await });
        peer.write_all(b"12345").await.unwrap();
        peer.shutdown().await.unwrap();
        held.0.write_chunk(Bytes::from_static(b"123")).await.unwrap();
        held.0.finish();
        let mut chunks = [const { Bytes::new() }; 8];
        while held.1.read_chunks(&mut chunks).await.unwrap().is_some() {}
        let mut answer = Vec::new();
        peer.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"123");
        let outcome = task.await.unwrap();
        assert_eq!((outcome.to_tunnel, outcome.from_tunnel), (5, 3));
        assert!(matches!(outcome.end, Ok((HalfEnd::Finished, HalfEnd::Finished))));
        assert_eq!((meter.to_tunnel(), meter.from_tunnel()), (5, 3));
    })
    .await;
}

/// A target that hangs, and a client that gave up on it: the stream must not stay for ever.
#[tokio::test]
async fn a_peer_that_reads_nothing_after_the_close_is_cut_off() {
    each(async |carrier| {
        let Bench { spliced: (socket, stream), socket: mut peer, stream: mut held, _pair } =
            Bench::new(carrier).await;
        // The close, and more than all buffers on the path hold.
        let flood = culvert_transport::task::owned(async move {
            held.1.stop(StreamCode::CLOSED);
            loop {
                if let Err(error) = held.0.write_chunk(vec![0; 65_536].into()).await {
                    return error;
                }
            }
        });
        let (reader, writer, abort) = halves(socket);
        let limit = Duration::from_millis(200);
        let local = Local::new(reader, writer, abort).with_stuck_timeout(limit);
        let outcome = splice(local, stream, &Meter::default()).await;
        assert!(matches!(outcome.end, Err(Cut::Stuck)), "{outcome:?}");
        assert_eq!(flood.await.unwrap(), WriteError::Stopped(StreamCode::IO_ERROR));
        let error = peer.read_to_end(&mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    })
    .await;
}

#[tokio::test]
async fn a_stop_that_overtakes_the_end_is_reported() {
    each(async |carrier| {
        let Bench { spliced: (socket, stream), socket: mut peer, stream: mut held, _pair } =
            Bench::new(carrier).await;
        held.0.finish();
        peer.write_all(b"never read by the other side").await.unwrap();
        peer.shutdown().await.unwrap();
        held.1.stop(StreamCode::BROKEN_PIPE);
        let outcome = run(socket, stream, &Meter::default()).await;
        let code = StreamCode::BROKEN_PIPE;
        assert!(matches!(outcome.end, Ok((HalfEnd::Stopped(found), _)) if found == code));
    })
    .await;
}

/// A Unix socket that is closed with bytes unread reports a reset to its peer. What was written to
/// it before arrives all the same, although it has to wait for room in the stream.
#[tokio::test]
async fn bytes_written_before_a_unix_socket_was_closed_unread_arrive() {
    const PATIENCE: Duration = Duration::from_millis(200);
    each(async |carrier| {
        let Bench { spliced: (_, stream), stream: mut held, _pair, .. } = Bench::new(carrier).await;
        let (socket, mut peer) = UnixStream::pair().unwrap();
        let task =
            culvert_transport::task::owned(
                async move { run(socket, stream, &Meter::default()).await },
            );
        held.0.write_chunk(Bytes::from_static(b"an answer that is never read")).await.unwrap();
        peer.readable().await.unwrap();
        let mut written = 0;
        while let Ok(length) = timeout(PATIENCE, peer.write(&[0; 65_536])).await {
            written += length.unwrap();
        }
        drop(peer);
        let stopped = timeout(PATIENCE, held.0.stopped()).await;
        assert!(stopped.is_err(), "{stopped:?}");
        let (mut chunks, mut arrived) = ([const { Bytes::new() }; 8], 0);
        while let Some(count) = held.1.read_chunks(&mut chunks).await.unwrap() {
            arrived += chunks[..count].iter().map(Bytes::len).sum::<usize>();
        }
        assert_eq!(arrived, written);
        held.0.finish();
        let outcome = task.await.unwrap();
        assert!(matches!(outcome.end, Ok((HalfEnd::Finished, _))), "{outcome:?}");
    })
    .await;
}

/// The streams of readers that stall use up the tunnel's window several times over.
#[tokio::test]
async fn readers_that_stall_do_not_use_up_the_tunnels_window() {
    const WINDOW: u32 = 64 * 1024;
    const READERS: usize = 12;
    const LEN: usize = 1024 * 1024;
    let settings = Settings {
        stream_receive_window: WINDOW,
        tunnel_receive_window: Some(4 * u64::from(WINDOW)),
        ..Settings::default()
    };
    each(async |carrier| {
        let pair = Pair::with(carrier, &settings).await;
        let budget = MemoryBudget::with_window(64 << 20, WINDOW);
        pair.server.set_memory(&budget);
        let mut held = Vec::new();
        for _ in 0..READERS {
            let (mut send, recv) = pair.agent.open().await.unwrap();
            send.write_chunk(Bytes::from_static(b"!")).await.unwrap();
            let stream = pair.server.accept().await.unwrap();
            let (socket, peer) = UnixStream::pair().unwrap();
            let spliced = culvert_transport::task::owned(async move {
                run(socket, stream, &Meter::default()).await
            });
            let sending = culvert_transport::task::owned(async move {
                let chunk = Bytes::from(vec![7; 16 * 1024]);
                while send.write_chunk(chunk.clone()).await.is_ok() {}
            });
            held.push((peer, recv, spliced, sending));
        }
        let counted = || budget.held(Held::Receive) > READERS as u64 * u64::from(WINDOW);
        while !counted() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let (mut send, _recv) = pair.agent.open().await.unwrap();
        let sending = culvert_transport::task::owned(async move {
            send.write_chunk(Bytes::from(vec![7; LEN])).await.unwrap();
            send.finish();
            send.stopped().await.unwrap();
        });
        let (_send, mut recv) = pair.server.accept().await.unwrap();
        let (mut chunks, mut read) = ([Bytes::new()], 0);
        while recv.read_chunks(&mut chunks).await.unwrap().is_some() {
            read += chunks[0].len();
        }
        assert_eq!(read, LEN);
        sending.await.unwrap();
        assert_eq!(budget.cuts(), 0);
    })
    .await;
}
