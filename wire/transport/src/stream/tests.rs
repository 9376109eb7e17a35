//! Streams in paused time, on a tunnel within this process.

use std::{
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use culvert_wire::{
    CloseCode,
    bounded::PeerText,
    control::{Drain, Ping},
    frame::{self, FrameError},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    time::{sleep, timeout},
};

use super::*;
use crate::{
    Carrier, Settings, Tunnel,
    qmux::{Peer, Role, establish},
    test_util::Pair,
};

/// More than the time in which everything in flight arrives, which is none.
const MOMENT: Duration = Duration::from_millis(1);
/// Bytes that a sender may be ahead of its reader on the network.
const WINDOW: usize = 64 * 1024;
/// Bytes that this carrier queues before a writer waits.
const QUEUE: usize = 128 * 1024;

async fn pair() -> Pair {
    let settings = Settings { stream_receive_window: WINDOW as u32, ..Settings::default() };
    let peer = Peer::local(Carrier::Tcp);
    Pair::without_idle_timeout(peer, &settings, &settings).await.unwrap()
}

/// A stream that the server writes and the agent reads, and the halves of the other direction.
async fn stream(pair: &Pair) -> (SendHalf, RecvHalf, (SendHalf, RecvHalf)) {
    let (mut send, server_recv) = pair.server.open().await.unwrap();
    // A stream exists for the peer from its first byte.
    send.write_chunk(Bytes::from_static(b"!")).await.unwrap();
    let (agent_send, mut recv) = pair.agent.accept().await.unwrap();
    assert_eq!(read(&mut recv).await, "!");
    (send, recv, (agent_send, server_recv))
}

async fn read(recv: &mut RecvHalf) -> Bytes {
    let mut chunks = [Bytes::new()];
    assert_eq!(recv.read_chunks(&mut chunks).await, Ok(Some(1)));
    let [chunk] = chunks;
    chunk
}

/// Everything up to the clean end.
async fn read_all(recv: &mut RecvHalf) -> Vec<u8> {
    let (mut all, mut chunks) = (Vec::new(), [const { Bytes::new() }; 4]);
    while let Some(count) = recv.read_chunks(&mut chunks).await.unwrap() {
        chunks[..count].iter().for_each(|chunk| all.extend_from_slice(chunk));
    }
    all
}

/// Polls the future once and drops it.
fn poll_once<T>(future: impl Future<Output = T>) -> Poll<T> {
    pin!(future).poll(&mut Context::from_waker(Waker::noop()))
}

#[tokio::test(start_paused = true)]
async fn bytes_that_follow_a_frame_stay_in_the_half() {
    let pair = pair().await;
    let (mut send, mut recv, _other) = stream(&pair).await;
    let ping = frame::encode(&Ping { echo: 5 }).unwrap();
    let drain = frame::encode(&Drain { deadline_millis: 9 }).unwrap();
    send.write_chunk([&ping[..], &drain, b"raw bytes"].concat().into()).await.unwrap();
    send.write_chunk(Bytes::from_static(b", and more")).await.unwrap();
    send.finish();
    let ping = recv.read_frame(16).await.unwrap().message::<Ping>().unwrap();
    assert_eq!(ping, Ping { echo: 5 });
    let drain = recv.read_frame(16).await.unwrap().message::<Drain>().unwrap();
    assert_eq!(drain, Drain { deadline_millis: 9 });
    assert_eq!(read_all(&mut recv).await, b"raw bytes, and more");
    assert_eq!(recv.read_frame(16).await, Err(ReadFrameError::End));
    assert_eq!(recv.read_chunks(&mut [Bytes::new()]).await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn a_frame_whose_reader_is_dropped_after_each_byte_is_read_whole() {
    let pair = pair().await;
    let (mut send, mut recv, _other) = stream(&pair).await;
    let bytes = frame::encode(&Ping { echo: 5 }).unwrap();
    for byte in bytes.chunks(1) {
        assert!(poll_once(recv.read_frame(16)).is_pending());
        send.write_chunk(Bytes::copy_from_slice(byte)).await.unwrap();
        if let Ok(frame) = timeout(MOMENT, recv.read_frame(16)).await {
            assert_eq!(frame.unwrap().message::<Ping>(), Ok(Ping { echo: 5 }));
            return;
        }
    }
    panic!("no frame");
}

/// The half of a frame that was read is not lost when the caller reads bytes instead.
#[tokio::test(start_paused = true)]
async fn a_part_of_a_frame_can_be_read_as_bytes() {
    let pair = pair().await;
    let (mut send, mut recv, _other) = stream(&pair).await;
    send.write_chunk(Bytes::from_static(&[3, 0, 9, 1])).await.unwrap();
    timeout(MOMENT, recv.read_frame(16)).await.unwrap_err();
    assert_eq!(read(&mut recv).await, &[3, 0, 9, 1][..]);
}

#[tokio::test(start_paused = true)]
async fn an_oversized_frame_is_refused_before_its_body_arrives() {
    let pair = pair().await;
    let (mut send, mut recv, _other) = stream(&pair).await;
    send.write_chunk(Bytes::from_static(&[3, 0, 17])).await.unwrap();
    let oversized = FrameError::Oversized { kind: 3, length: 17, limit: 16 };
    assert_eq!(recv.read_frame(16).await, Err(oversized.into()));
}

#[tokio::test(start_paused = true)]
async fn a_reset_outlasts_the_bytes_that_were_buffered() {
    let pair = pair().await;
    let (mut send, mut recv, _other) = stream(&pair).await;
    let ping = frame::encode(&Ping { echo: 5 }).unwrap();
    send.write_chunk([&ping[..], b"rest"].concat().into()).await.unwrap();
    recv.read_frame(16).await.unwrap();
    send.reset(StreamCode::CANCELLED);
    let reset = ReadError::Reset(StreamCode::CANCELLED);
    assert_eq!(recv.failed().await, reset);
    for _ in 0..2 {
        assert_eq!(recv.read_chunks(&mut [Bytes::new()]).await, Err(reset.clone()));
        assert_eq!(recv.read_frame(16).await, Err(reset.clone().into()));
        assert_eq!(recv.failed().await, reset);
    }
}

#[tokio::test(start_paused = true)]
async fn a_writer_waits_once_the_window_is_full_and_goes_on_as_it_is_read() {
    let pair = pair().await;
    let (mut send, mut recv, _other) = stream(&pair).await;
    let chunk = Bytes::from_static(&[7; 1024]);
    let mut written = 0;
    while let Ok(result) = timeout(MOMENT, send.write_chunk(chunk.clone())).await {
        result.unwrap();
        written += chunk.len();
        assert!(written <= WINDOW + QUEUE, "beyond the window");
    }
    assert!(written >= WINDOW, "only {written} bytes");
    let mut arrived = 0;
    while arrived < WINDOW / 2 {
        arrived += read(&mut recv).await.len();
    }
    timeout(MOMENT, send.write_chunk(chunk)).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_half_abandons_its_direction_and_not_the_other() {
    let pair = pair().await;
    let (send, mut recv, (mut agent_send, mut server_recv)) = stream(&pair).await;
    drop(send);
    let reset = ReadError::Reset(StreamCode::ABANDONED);
    assert_eq!(recv.read_chunks(&mut [Bytes::new()]).await, Err(reset));
    agent_send.write_chunk(Bytes::from_static(b"still here")).await.unwrap();
    assert_eq!(read(&mut server_recv).await, "still here");
    let stopped = agent_send.stopped();
    drop(server_recv);
    assert_eq!(stopped.await, Ok(Some(StreamCode::ABANDONED)));
    let error = agent_send.write_chunk(Bytes::from_static(b"lost")).await;
    assert_eq!(error, Err(WriteError::Stopped(StreamCode::ABANDONED)));
}

#[tokio::test(start_paused = true)]
async fn only_the_first_end_of_a_half_counts() {
    let pair = pair().await;
    let (mut send, mut recv, _other) = stream(&pair).await;
    let delivered = send.stopped();
    send.finish();
    send.reset(StreamCode::IO_ERROR);
    drop(send);
    assert_eq!(read_all(&mut recv).await, b"");
    assert_eq!(delivered.await, Ok(None));
    let (mut send, mut recv, _other) = stream(&pair).await;
    recv.stop(StreamCode::CLOSED);
    recv.stop(StreamCode::IO_ERROR);
    assert_eq!(recv.read_chunks(&mut [Bytes::new()]).await, Err(ReadError::Ended));
    assert_eq!(recv.failed().await, ReadError::Ended);
    drop(recv);
    assert_eq!(send.stopped().await, Ok(Some(StreamCode::CLOSED)));
    send.finish();
}

#[tokio::test(start_paused = true)]
async fn the_last_handle_closes_the_tunnel_as_done() {
    let Pair { agent, server, line: _line } = pair().await;
    let (mut send, _recv) = server.open().await.unwrap();
    send.write_chunk(Bytes::from_static(b"x")).await.unwrap();
    let streams = agent.accept().await.unwrap();
    drop(server);
    // A stream is a handle too.
    timeout(MOMENT, agent.closed()).await.unwrap_err();
    drop((send, _recv));
    let (code, reason) = (CloseCode::DONE, PeerText::default());
    assert_eq!(agent.closed().await, TunnelLost::ClosedByPeer { code, reason });
    drop(streams);
}

/// How many bytes of a download are sent before a write that comes after it on another stream. The
/// peer reads nothing until both were written.
async fn overtaken(prepare: impl FnOnce(&mut SendHalf, &mut SendHalf)) -> usize {
    const KEYS: &[u8] = b"keystroke";
    let (settings, peer) = (Settings::default(), Peer::local(Carrier::Tcp));
    let ((near, near_relay), (far, far_relay)) = (duplex(1024), duplex(1024));
    let (mut from_server, mut to_server) = tokio::io::split(near_relay);
    let (mut from_agent, mut to_agent) = tokio::io::split(far_relay);
    crate::test_util::detached(
        async move { tokio::io::copy(&mut from_agent, &mut to_server).await },
    );
    let (held, hold) = tokio::sync::watch::channel(false);
    let relay = crate::task::owned(async move {
        let (mut sent, mut buf) = (Vec::new(), [0; 1024]);
        loop {
            hold.clone().wait_for(|held| !held).await.unwrap();
            let count = from_server.read(&mut buf).await.unwrap();
            let searched = sent.len().saturating_sub(KEYS.len());
            sent.extend_from_slice(&buf[..count]);
            let found = sent[searched..].windows(KEYS.len()).position(|bytes| bytes == KEYS);
            if let Some(position) = found {
                return searched + position;
            }
            to_agent.write_all(&buf[..count]).await.unwrap();
        }
    });
    let (server, agent) = tokio::try_join!(
        establish(near, Role::Server, peer.clone(), &settings),
        establish(far, Role::Client, peer, &settings),
    )
    .unwrap();
    let (server, _agent) = (Tunnel::from(server), Tunnel::from(agent));
    let (mut download, _recv) = server.open().await.unwrap();
    let (mut keys, _recv) = server.open().await.unwrap();
    prepare(&mut download, &mut keys);
    held.send(true).unwrap();
    download.write_chunk(vec![0; 1024 * 1024].into()).await.unwrap();
    sleep(MOMENT).await;
    keys.write_chunk(Bytes::from_static(KEYS)).await.unwrap();
    held.send(false).unwrap();
    relay.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_keystroke_overtakes_a_download() {
    let before = overtaken(|_, _| {}).await;
    // What was on its way already: a batch of records.
    assert!(before < 64 * 1024, "{before}");
}

#[tokio::test(start_paused = true)]
async fn a_fixed_priority_is_kept_whatever_the_stream_sends() {
    let before = overtaken(|download, _| download.set_priority(100)).await;
    assert!(before >= 1024 * 1024, "{before}");
    let before = overtaken(|download, keys| {
        download.set_priority(100);
        keys.set_priority(101);
    })
    .await;
    assert!(before < 64 * 1024, "{before}");
}

#[tokio::test(start_paused = true)]
async fn a_stream_sinks_as_it_sends_and_rises_as_it_waits() {
    let settings = Settings::default();
    let peer = Peer::local(Carrier::Tcp);
    let pair = Pair::without_idle_timeout(peer, &settings, &settings).await.unwrap();
    let (mut send, mut recv, _other) = stream(&pair).await;
    crate::test_util::detached(async move {
        while recv.read_chunks(&mut [Bytes::new()]).await.is_ok() {}
    });
    assert_eq!(send.class, Class::Interactive);
    let mut classes = Vec::new();
    for _ in 0..16 {
        send.write_chunk(vec![0; 32 * 1024].into()).await.unwrap();
        classes.push(send.class);
    }
    assert!(classes.is_sorted_by(|before, after| before >= after), "{classes:?}");
    assert!(classes.contains(&Class::Short), "{classes:?}");
    assert_eq!(send.class, Class::Bulk);
    sleep(MOMENT * 10_000).await;
    send.write_chunk(Bytes::from_static(b"k")).await.unwrap();
    assert_eq!(send.class, Class::Interactive);
}
