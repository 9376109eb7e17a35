//! Every way in which a splice ends, in paused time, over a tunnel within the process.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use culvert_wire::StreamCode;
use parking_lot::Mutex;
use tokio::{
    sync::{Semaphore, SetOnce, mpsc},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use super::*;
use crate::{
    Carrier, ReadError, Settings, TunnelLost, WriteError,
    qmux::Peer,
    test_util::{Pair, Side},
};

const CODE: StreamCode = StreamCode::OVERLOADED;
/// Not the default, so that a setting without effect is noticed.
const STUCK_TIMEOUT: Duration = Duration::from_secs(45);
const HOUR: Duration = Duration::from_secs(3600);
/// Number of bytes that one stream takes without a reader, at most: windows and buffers.
const STREAM_CAPACITY: usize = 4 * 1024 * 1024;
/// Number of chunks that the local peer's connection holds while the splice does not read it.
const LOCAL_CAPACITY: usize = 2 * STREAM_CAPACITY / (64 * 1024);

/// The local peer as the splice sees it, and what it has received.
#[derive(Default)]
struct Shared {
    received: Mutex<BytesMut>,
    /// Bytes that the peer still takes. Closed, it reads no more.
    room: Option<Semaphore>,
    /// The fault of writes once `room` is closed, if it is not that the peer reads no more.
    fault: SetOnce<io::ErrorKind>,
    /// Counts the bytes that the peer has taken, if the writer does.
    progress: Option<Arc<AtomicU64>>,
    /// The peer has received the end.
    ended: SetOnce<()>,
    /// The peer has closed for reading.
    gone: SetOnce<()>,
    /// The peer has acknowledged everything.
    flushed: SetOnce<()>,
    /// The connection has failed, while it is not read.
    failed: SetOnce<()>,
    /// The peer's host is known to be gone.
    vanished: SetOnce<()>,
    aborts: AtomicUsize,
}

struct Read(mpsc::Receiver<io::Result<Bytes>>, Arc<Shared>);
struct Write(Arc<Shared>);
struct Aborts(Arc<Shared>);

impl LocalRead for Read {
    async fn read(&mut self) -> Result<Option<Bytes>, LocalFault> {
        Ok(self.0.recv().await.transpose()?)
    }

    async fn failed(&mut self) -> LocalFault {
        self.1.failed.wait().await;
        io::Error::from(io::ErrorKind::ConnectionReset).into()
    }
}

impl LocalWrite for Write {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        for chunk in chunks {
            for byte in chunk.iter() {
                if let Some(room) = &self.0.room {
                    let kind = || self.0.fault.get().copied().unwrap_or(io::ErrorKind::BrokenPipe);
                    let closed = |_| io::Error::from(kind());
                    room.acquire().await.map_err(closed)?.forget();
                }
                self.0.received.lock().put_u8(*byte);
                if let Some(taken) = &self.0.progress {
                    taken.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    fn progress(&self) -> Option<Arc<AtomicU64>> {
        self.0.progress.clone()
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        let _ = self.0.ended.set(());
        Ok(())
    }

    async fn gone(&mut self) {
        self.0.gone.wait().await;
    }

    async fn flushed(&mut self) {
        self.0.flushed.wait().await;
    }
}

impl Abort for Aborts {
    fn abort(&self) {
        self.0.aborts.fetch_add(1, Ordering::Relaxed);
    }

    async fn vanished(&self) -> LocalFault {
        self.0.vanished.wait().await;
        io::Error::from(io::ErrorKind::TimedOut).into()
    }
}

/// A splice in progress: the local peer on one side of it, a stream's other end on the other.
struct Bench {
    /// What the local peer sends. Dropped, it ends its output.
    local: mpsc::Sender<io::Result<Bytes>>,
    peer: Arc<Shared>,
    meter: Arc<Meter>,
    send: SendHalf,
    recv: RecvHalf,
    task: JoinHandle<Outcome>,
    pair: Pair,
}

impl Bench {
    async fn new() -> Self {
        Self::with((), Shared::default()).await
    }

    /// With a local peer that takes `room` bytes.
    async fn with_room(room: usize) -> Self {
        Self::with((), Shared { room: Some(Semaphore::new(room)), ..Shared::default() }).await
    }

    async fn with(preamble: impl Preamble + 'static, peer: Shared) -> Self {
        let settings = Settings::default();
        let pair = Pair::without_idle_timeout(Peer::local(Carrier::Grpc), &settings, &settings);
        let pair = pair.await.unwrap();
        let stream = pair.server.open().await.unwrap();
        let peer = Arc::new(peer);
        let (local, chunks) = mpsc::channel(LOCAL_CAPACITY);
        // A stream exists for the other side from its first byte.
        local.try_send(Ok(Bytes::from_static(b"!"))).unwrap();
        let (reader, writer) = (Read(chunks, peer.clone()), Write(peer.clone()));
        let spliced = Local::new(reader, writer, Aborts(peer.clone()));
        let spliced = spliced.with_stuck_timeout(STUCK_TIMEOUT);
        let meter = Arc::new(Meter::default());
        let counted = meter.clone();
        let task =
            tokio::spawn(async move { splice_after(preamble, spliced, stream, &counted).await });
        let (send, recv) = pair.agent.accept().await.unwrap();
        let mut bench = Self { local, peer, meter, send, recv, task, pair };
        assert_eq!(bench.read().await, Ok(Some("!".into())));
        bench
    }

    fn send_local(&self, bytes: &'static [u8]) {
        self.local.try_send(Ok(Bytes::from_static(bytes))).unwrap();
    }

    /// Ends the local side's output.
    fn end_local(&mut self) {
        self.local = mpsc::channel(1).0;
    }

    async fn send_remote(&mut self, bytes: &'static [u8]) {
        self.send.write_chunk(Bytes::from_static(bytes)).await.unwrap();
    }

    /// The next chunk at the stream's other end; `None` at its clean end.
    async fn read(&mut self) -> Result<Option<Bytes>, ReadError> {
        let mut chunks = [Bytes::new()];
        let count = self.recv.read_chunks(&mut chunks).await?;
        let [chunk] = chunks;
        Ok(count.map(|_| chunk))
    }

    fn received(&self) -> Bytes {
        self.peer.received.lock().clone().freeze()
    }

    fn aborts(&self) -> usize {
        self.peer.aborts.load(Ordering::Relaxed)
    }

    async fn outcome(&mut self) -> Outcome {
        (&mut self.task).await.unwrap()
    }
}

/// Fills a stream until a write is pending; the number of bytes that it took.
async fn fill(send: &mut SendHalf) -> usize {
    let mut length = 0;
    let chunk = Bytes::from(vec![7; 16 * 1024]);
    while timeout(Duration::from_secs(1), send.write_chunk(chunk.clone())).await.is_ok() {
        length += chunk.len();
        assert!(length < STREAM_CAPACITY, "a stream has no bound");
    }
    length
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_local_side_leaves_the_other_direction_open() {
    let mut bench = Bench::new().await;
    bench.send_local(b"a request");
    bench.end_local();
    assert_eq!(bench.read().await, Ok(Some("a request".into())));
    assert_eq!(bench.read().await, Ok(None));
    sleep(HOUR).await;
    bench.send_remote(b"an answer").await;
    bench.send.finish();
    let outcome = bench.outcome().await;
    assert_eq!(outcome.end.unwrap(), (HalfEnd::Finished, HalfEnd::Finished));
    assert_eq!((outcome.to_tunnel, outcome.from_tunnel), (1 + 9, 9));
    assert_eq!((bench.meter.to_tunnel(), bench.meter.from_tunnel()), (1 + 9, 9));
    assert_eq!(bench.received(), "an answer");
    assert!(bench.peer.ended.initialized());
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_other_side_leaves_the_local_side_open() {
    let mut bench = Bench::new().await;
    bench.send_remote(b"a request").await;
    bench.send.finish();
    bench.peer.ended.wait().await;
    assert_eq!(bench.received(), "a request");
    sleep(HOUR).await;
    bench.send_local(b"an answer");
    assert_eq!(bench.read().await, Ok(Some("an answer".into())));
    bench.end_local();
    assert_eq!(bench.read().await, Ok(None));
    let outcome = bench.outcome().await;
    assert_eq!(outcome.end.unwrap(), (HalfEnd::Finished, HalfEnd::Finished));
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_local_fault_resets_both_sides_with_its_code() {
    for (kind, code) in [
        (io::ErrorKind::ConnectionReset, StreamCode::PEER_RESET),
        (io::ErrorKind::TimedOut, StreamCode::IO_ERROR),
    ] {
        let mut bench = Bench::new().await;
        bench.local.try_send(Err(kind.into())).unwrap();
        assert_eq!(bench.read().await, Err(ReadError::Reset(code)));
        assert_eq!(bench.send.stopped().await, Ok(Some(code)));
        let cut = bench.outcome().await.end.unwrap_err();
        assert!(matches!(&cut, Cut::Local(fault) if fault.code == code), "{cut:?}");
        assert_eq!((cut.code(), bench.aborts()), (code, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_local_fault_is_noticed_while_the_stream_takes_no_more() {
    let mut bench = Bench::new().await;
    for _ in 0..STREAM_CAPACITY / (64 * 1024) {
        bench.local.try_send(Ok(Bytes::from(vec![7; 64 * 1024]))).unwrap();
    }
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.failed.set(()).unwrap();
    let cut = bench.outcome().await.end.unwrap_err();
    assert_eq!((cut.code(), bench.aborts()), (StreamCode::PEER_RESET, 1));
}

#[tokio::test(start_paused = true)]
async fn a_local_peer_whose_host_is_gone_is_cut_off_while_idle() {
    let mut bench = Bench::new().await;
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.vanished.set(()).unwrap();
    assert_eq!(bench.read().await, Err(ReadError::Reset(StreamCode::IO_ERROR)));
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(&cut, Cut::Local(fault) if fault.code == StreamCode::IO_ERROR), "{cut:?}");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reset_of_the_other_side_resets_the_local_side() {
    let mut bench = Bench::new().await;
    bench.send.reset(CODE);
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Reset(CODE)), "{cut:?}");
    assert_eq!(bench.read().await, Err(ReadError::Reset(CODE)));
    assert!(!bench.peer.ended.initialized(), "a reset is not an end");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_reset_is_noticed_while_the_local_peer_does_not_read() {
    let mut bench = Bench::with_room(0).await;
    bench.send_remote(b"never taken").await;
    sleep(HOUR).await;
    bench.send.reset(CODE);
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Reset(CODE)), "{cut:?}");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_lost_tunnel_resets_the_local_side() {
    let mut bench = Bench::new().await;
    bench.pair.line.cut();
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Lost(TunnelLost::Transport(_))), "{cut:?}");
    assert_eq!((cut.code(), bench.aborts()), (StreamCode::TUNNEL_LOST, 1));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_is_lost_before_the_end_is_delivered_is_a_cut() {
    let mut bench = Bench::new().await;
    // The end is sent, and does not arrive.
    bench.pair.line.silence(Side::Server);
    bench.end_local();
    bench.send.finish();
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.pair.line.cut();
    assert!(matches!(bench.outcome().await.end, Err(Cut::Lost(_))));
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stuck_peer_is_cut_off_exactly_after_the_timeout() {
    let mut bench = Bench::with_room(3).await;
    bench.send_remote(b"0123456789").await;
    sleep(HOUR).await;
    assert!(!bench.task.is_finished(), "a slow peer is cut only after the other side has closed");
    let closed = Instant::now();
    bench.recv.stop(StreamCode::CLOSED);
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(cut, Cut::Stuck), "{cut:?}");
    assert_eq!(closed.elapsed(), STUCK_TIMEOUT);
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::IO_ERROR)));
    assert_eq!((bench.received(), bench.aborts()), ("012".into(), 1));
}

/// A writer with nothing but what a writer must have.
struct Plain;

impl LocalWrite for Plain {
    async fn write(&mut self, _chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        Ok(())
    }
}

#[test]
fn without_settings_a_stuck_peer_has_a_minute_and_its_writer_counts_nothing() {
    let shared = Arc::<Shared>::default();
    let local = Local::new(Read(mpsc::channel(1).1, shared.clone()), Plain, Aborts(shared));
    assert_eq!(local.stuck_timeout, Duration::from_secs(60));
    assert!(local.writer.progress().is_none(), "a counter that nothing raises looks stuck");
}

/// Lets the peer take a byte a little more often than the time-out demands; all must arrive.
async fn takes_slowly(mut bench: Bench, bytes: &str) {
    for _ in bytes.bytes() {
        sleep(STUCK_TIMEOUT - Duration::from_secs(2)).await;
        bench.peer.room.as_ref().unwrap().add_permits(1);
    }
    bench.peer.flushed.set(()).unwrap();
    let end = bench.outcome().await.end.unwrap();
    assert_eq!(end, (HalfEnd::Stopped(StreamCode::CLOSED), HalfEnd::Finished));
    assert_eq!((bench.received(), bench.aborts()), (bytes.to_owned().into(), 0));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_part_of_a_batch_is_not_stuck() {
    let progress = Some(Arc::default());
    let room = Some(Semaphore::new(0));
    let mut bench = Bench::with((), Shared { room, progress, ..Shared::default() }).await;
    bench.send_remote(b"abcde").await;
    bench.send.finish();
    // The write has begun before the other side closes.
    sleep(HOUR).await;
    bench.recv.stop(StreamCode::CLOSED);
    takes_slowly(bench, "abcde").await;
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_chunk_after_chunk_is_not_stuck() {
    let mut bench = Bench::with_room(0).await;
    bench.recv.stop(StreamCode::CLOSED);
    sleep(Duration::from_secs(1)).await;
    for chunk in [b"a", b"b", b"c", b"d", b"e"] {
        bench.send_remote(chunk).await;
    }
    bench.send.finish();
    takes_slowly(bench, "abcde").await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_still_there_may_wait_for_the_local_peer() {
    let mut bench = Bench::with_room(0).await;
    bench.send_remote(b"taken late").await;
    bench.recv.stop(StreamCode::BROKEN_PIPE);
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.room.as_ref().unwrap().add_permits(100);
    bench.peer.flushed.set(()).unwrap();
    bench.send.finish();
    let (to, from) = bench.outcome().await.end.unwrap();
    assert_eq!((to, from), (HalfEnd::Stopped(StreamCode::BROKEN_PIPE), HalfEnd::Finished));
    assert_eq!((bench.received(), bench.aborts()), ("taken late".into(), 1));
}

#[tokio::test(start_paused = true)]
async fn an_idle_stream_is_stopped_when_the_local_reader_is_gone() {
    let mut bench = Bench::new().await;
    bench.end_local();
    assert_eq!(bench.read().await, Ok(None));
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    let gone = Instant::now();
    bench.peer.gone.set(()).unwrap();
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::CLOSED)));
    assert_eq!(gone.elapsed(), Duration::ZERO);
    let (to, from) = bench.outcome().await.end.unwrap();
    assert_eq!((to, from), (HalfEnd::Finished, HalfEnd::Stopped(StreamCode::CLOSED)));
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_local_reader_that_closes_stops_its_direction_alone() {
    let mut bench = Bench::with_room(1).await;
    bench.send_remote(b"refused").await;
    bench.peer.room.as_ref().unwrap().close();
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::BROKEN_PIPE)));
    let refused = bench.send.write_chunk(Bytes::from_static(b"more")).await;
    assert_eq!(refused, Err(WriteError::Stopped(StreamCode::BROKEN_PIPE)));
    sleep(HOUR).await;
    bench.send_local(b"still sending");
    assert_eq!(bench.read().await, Ok(Some("still sending".into())));
    bench.end_local();
    assert_eq!(bench.read().await, Ok(None));
    let (to, from) = bench.outcome().await.end.unwrap();
    assert_eq!((to, from), (HalfEnd::Finished, HalfEnd::Stopped(StreamCode::BROKEN_PIPE)));
}

#[tokio::test(start_paused = true)]
async fn a_write_that_fails_otherwise_cuts_both_directions_off() {
    let mut bench = Bench::with_room(1).await;
    bench.peer.fault.set(io::ErrorKind::ConnectionReset).unwrap();
    bench.send_remote(b"lost").await;
    bench.peer.room.as_ref().unwrap().close();
    assert_eq!(bench.read().await, Err(ReadError::Reset(StreamCode::PEER_RESET)));
    let cut = bench.outcome().await.end.unwrap_err();
    assert!(matches!(&cut, Cut::Local(fault) if fault.code == StreamCode::PEER_RESET), "{cut:?}");
    assert_eq!(bench.aborts(), 1);
}

#[tokio::test(start_paused = true)]
async fn all_that_the_local_side_wrote_before_it_closed_arrives() {
    let mut bench = Bench::new().await;
    let chunks = STREAM_CAPACITY / (64 * 1024);
    for number in 0..chunks {
        bench.local.try_send(Ok(Bytes::from(vec![number as u8; 64 * 1024]))).unwrap();
    }
    bench.end_local();
    sleep(HOUR).await;
    let mut arrived = Vec::new();
    while let Some(chunk) = bench.read().await.unwrap() {
        arrived.extend_from_slice(&chunk);
    }
    assert_eq!(arrived.len(), chunks * 64 * 1024);
    let in_order = |(at, byte): (usize, &u8)| *byte == (at / (64 * 1024)) as u8;
    assert!(arrived.iter().enumerate().all(in_order));
    bench.send.finish();
    assert!(bench.outcome().await.end.is_ok());
}

#[tokio::test(start_paused = true)]
async fn all_that_the_other_side_wrote_before_it_closed_arrives() {
    let mut bench = Bench::with_room(0).await;
    let length = fill(&mut bench.send).await;
    bench.recv.stop(StreamCode::CLOSED);
    bench.send.finish();
    bench.peer.room.as_ref().unwrap().add_permits(STREAM_CAPACITY);
    bench.peer.ended.wait().await;
    // Written is not arrived: the connection is closed only once the kernel has delivered it.
    bench.send_local(b"discarded meanwhile");
    sleep(HOUR).await;
    assert!(!bench.task.is_finished());
    bench.peer.flushed.set(()).unwrap();
    let outcome = bench.outcome().await;
    assert_eq!(outcome.from_tunnel, length as u64);
    assert_eq!(bench.received().len(), length);
    assert_eq!(outcome.end.unwrap(), (HalfEnd::Stopped(StreamCode::CLOSED), HalfEnd::Finished));
    assert_eq!(bench.aborts(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_local_side_that_is_refused_may_send_on_until_its_answer_is_delivered() {
    let mut bench = Bench::with_room(1).await;
    bench.recv.stop(StreamCode::BROKEN_PIPE);
    sleep(Duration::from_secs(1)).await;
    // A peer that reads only after it has written everything.
    for _ in 0..2 * LOCAL_CAPACITY {
        let written = bench.local.send(Ok(Bytes::from(vec![7; 64 * 1024])));
        timeout(HOUR, written).await.expect("the connection takes no more").unwrap();
    }
    bench.send_remote(b"an answer").await;
    sleep(HOUR).await;
    assert_eq!(bench.received(), "a");
    bench.peer.room.as_ref().unwrap().add_permits(100);
    bench.send.finish();
    bench.peer.ended.wait().await;
    assert_eq!(bench.received(), "an answer");
    bench.peer.flushed.set(()).unwrap();
    let outcome = bench.outcome().await;
    assert_eq!(outcome.to_tunnel, 1, "discarded bytes are not counted");
    assert!(matches!(outcome.end, Ok((HalfEnd::Stopped(_), HalfEnd::Finished))));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_splice_resets_both_sides() {
    let mut bench = Bench::new().await;
    bench.task.abort();
    assert_eq!(bench.read().await, Err(ReadError::Reset(StreamCode::ABANDONED)));
    assert_eq!(bench.send.stopped().await, Ok(Some(StreamCode::ABANDONED)));
    assert!((&mut bench.task).await.unwrap_err().is_cancelled());
    assert_eq!(bench.aborts(), 1);
}

/// Reads one byte, and refuses the splice if it is not 1.
struct Byte;

impl Preamble for Byte {
    async fn read(self, recv: &mut RecvHalf) -> Result<(), Cut> {
        let mut chunks = [Bytes::new()];
        recv.read_chunks(&mut chunks).await?;
        match chunks[0][..] {
            [1] => Ok(()),
            _ => Err(Cut::Preamble { code: CODE, reason: "no target".into() }),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn local_bytes_go_out_before_the_preamble_is_here() {
    let mut bench = Bench::with(Byte, Shared::default()).await;
    bench.send_local(b"early");
    assert_eq!(bench.read().await, Ok(Some("early".into())));
    bench.send_remote(&[1]).await;
    bench.send_remote(b"then its bytes").await;
    bench.send.finish();
    bench.peer.ended.wait().await;
    assert_eq!(bench.received(), "then its bytes");
}

#[tokio::test(start_paused = true)]
async fn a_preamble_that_refuses_cuts_both_sides_off_with_its_code_and_reason() {
    let mut bench = Bench::with(Byte, Shared::default()).await;
    bench.send_remote(&[2]).await;
    let cut = bench.outcome().await.end.unwrap_err();
    assert_eq!((cut.code(), cut.to_string()), (CODE, "no target".into()));
    assert_eq!(bench.read().await, Err(ReadError::Reset(CODE)));
    assert_eq!(bench.aborts(), 1);
}
