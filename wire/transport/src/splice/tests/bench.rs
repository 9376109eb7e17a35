//! A splice whose local side and whose peer are the test's.

use super::*;
use crate::budget::{Holder, MemoryBudget};
use tokio_util::task::AbortOnDropHandle;

/// The local peer as the splice sees it, and what it has received.
#[derive(Default)]
pub(super) struct Shared {
    pub(super) received: Mutex<BytesMut>,
    /// Bytes that the peer still takes. Closed, it reads no more.
    pub(super) room: Option<Semaphore>,
    /// The fault of writes once `room` is closed, if it is not that the peer reads no more.
    pub(super) fault: SetOnce<io::ErrorKind>,
    /// Counts the bytes that the peer has taken, if the writer does.
    pub(super) progress: Option<Arc<AtomicU64>>,
    /// The peer has received the end.
    pub(super) ended: SetOnce<()>,
    /// The peer has closed for reading.
    pub(super) gone: SetOnce<()>,
    /// The peer has acknowledged everything; `false` if it never will.
    pub(super) flushed: SetOnce<bool>,
    /// The connection has failed, while it is not read.
    pub(super) failed: SetOnce<()>,
    /// The peer's host is known to be gone.
    pub(super) vanished: SetOnce<()>,
    /// The peer has closed for both directions.
    pub(super) hung_up: SetOnce<()>,
    pub(super) aborts: AtomicUsize,
}

pub(super) struct Read(pub(super) mpsc::Receiver<io::Result<Bytes>>, pub(super) Arc<Shared>);
struct Write(Arc<Shared>);
pub(super) struct Aborts(pub(super) Arc<Shared>);

impl LocalRead for Read {
    async fn read(&mut self, holder: &Arc<Holder>) -> Result<Option<Bytes>, LocalFault> {
        Ok(self.0.recv().await.transpose()?.map(|bytes| holder.hold_bytes(bytes)))
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

    async fn flushed(&mut self) -> bool {
        *self.0.flushed.wait().await
    }
}

impl Abort for Aborts {
    fn abort(&self) {
        self.0.aborts.fetch_add(1, Ordering::Relaxed);
    }

    fn is_hung_up(&self) -> bool {
        self.0.hung_up.initialized()
    }

    async fn vanished(&self) -> LocalFault {
        self.0.vanished.wait().await;
        io::Error::from(io::ErrorKind::TimedOut).into()
    }
}

/// A splice in progress: the local peer on one side of it, a stream's other end on the other.
pub(super) struct Bench {
    /// What the local peer sends. Dropped, it ends its output.
    pub(super) local: mpsc::Sender<io::Result<Bytes>>,
    pub(super) peer: Arc<Shared>,
    pub(super) meter: Arc<Meter>,
    pub(super) send: SendHalf,
    pub(super) recv: RecvHalf,
    pub(super) task: AbortOnDropHandle<Outcome>,
    pub(super) pair: Pair,
}

impl Bench {
    pub(super) async fn new() -> Self {
        Self::with((), Shared::default()).await
    }

    /// With a local peer that takes `room` bytes.
    pub(super) async fn with_room(room: usize) -> Self {
        Self::with((), Shared { room: Some(Semaphore::new(room)), ..Shared::default() }).await
    }

    pub(super) async fn with(preamble: impl Preamble + 'static, peer: Shared) -> Self {
        Self::with_budget(preamble, peer, &MemoryBudget::new(0)).await
    }

    /// With the memory that the splice's process has for its peers.
    pub(super) async fn with_budget(
        preamble: impl Preamble + 'static,
        peer: Shared,
        budget: &Arc<MemoryBudget>,
    ) -> Self {
        let settings = Settings::default();
        let pair = Pair::without_idle_timeout(Peer::local(Carrier::Grpc), &settings, &settings);
        let pair = pair.await.unwrap();
        pair.server.set_memory(budget);
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
            crate::task::owned(
                async move { splice_after(preamble, spliced, stream, &counted).await },
            );
        let (send, recv) = pair.agent.accept().await.unwrap();
        let mut bench = Self { local, peer, meter, send, recv, task, pair };
        assert_eq!(bench.read().await, Ok(Some("!".into())));
        bench
    }

    pub(super) fn send_local(&self, bytes: &'static [u8]) {
        self.local.try_send(Ok(Bytes::from_static(bytes))).unwrap();
    }

    /// Ends the local side's output.
    pub(super) fn end_local(&mut self) {
        self.local = mpsc::channel(1).0;
    }

    pub(super) async fn send_remote(&mut self, bytes: &'static [u8]) {
        self.send.write_chunk(Bytes::from_static(bytes)).await.unwrap();
    }

    /// The next chunk at the stream's other end; `None` at its clean end.
    pub(super) async fn read(&mut self) -> Result<Option<Bytes>, ReadError> {
        let mut chunks = [Bytes::new()];
        let count = self.recv.read_chunks(&mut chunks).await?;
        let [chunk] = chunks;
        Ok(count.map(|_| chunk))
    }

    pub(super) fn received(&self) -> Bytes {
        self.peer.received.lock().clone().freeze()
    }

    pub(super) fn aborts(&self) -> usize {
        self.peer.aborts.load(Ordering::Relaxed)
    }

    pub(super) async fn outcome(&mut self) -> Outcome {
        (&mut self.task).await.unwrap()
    }
}

/// Fills a stream until a write is pending; the number of bytes that it took.
pub(super) async fn fill(send: &mut SendHalf) -> usize {
    let mut length = 0;
    let chunk = Bytes::from(vec![7; 16 * 1024]);
    while timeout(Duration::from_secs(1), send.write_chunk(chunk.clone())).await.is_ok() {
        length += chunk.len();
        assert!(length < STREAM_CAPACITY, "a stream has no bound");
    }
    length
}
