//! A stream and a local connection joined: bytes both ways, and every end told exactly.
//!
//! | on one side | on the other |
//! | --- | --- |
//! | clean end | clean end; the other half stays open as long as it likes |
//! | reset, error, crash | reset with a code, then a reset of the socket: never a clean end |
//! | reader is slow | this stream's window fills; nothing else notices |
//! | reader is gone | stop with a code, at once, even while idle |
//! | written, then closed | every byte arrives |
//!
//! The two directions are pumped in one task, each at its own pace. A direction whose reader is
//! gone is read on and thrown away until the other direction has ended, because a peer that cannot
//! get rid of its answer may never read what it was sent.
//= docs/protocol.md#9-splicing

mod outq;
mod socket;

use std::{
    io,
    pin::pin,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use bytes::Bytes;
use culvert_wire::code::StreamCode;
use tokio::{select, sync::SetOnce, time::sleep};

use crate::{ReadError, RecvHalf, SendHalf, TunnelLost, WriteError};
pub use socket::{
    BufferedRead, BufferedWrite, SocketAbort, SocketRead, SocketWrite, SpliceSocket, buffered,
    halves, prepare,
};

/// Chunks taken from a stream in one go. One chunk is one packet's payload, so this is about
/// 45 KiB: enough to make the system call cheap, little enough to be fair.
const CHUNKS: usize = 32;
/// How long a local peer may take no byte once the other side has closed: what it was sent is kept
/// for it that long, and then lost, visibly. Without a limit a target that hangs would keep the
/// streams of everybody who gave up on it.
const STUCK_TIMEOUT: Duration = Duration::from_secs(60);

/// What went wrong on the local side, as the other side of the tunnel will be told.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct LocalFault {
    /// The code for the other side.
    pub code: StreamCode,
    /// The reason for our own logs.
    #[source]
    pub source: io::Error,
}

impl From<io::Error> for LocalFault {
    fn from(source: io::Error) -> Self {
        let code = match source.kind() {
            io::ErrorKind::ConnectionReset => StreamCode::PEER_RESET,
            io::ErrorKind::BrokenPipe => StreamCode::BROKEN_PIPE,
            _ => StreamCode::IO_ERROR,
        };
        Self { code, source }
    }
}

/// Where the local side's bytes come from.
pub trait LocalRead: Send {
    /// The next bytes, at least one; `None` at the clean end.
    ///
    /// # Cancel safety
    /// Must be cancel safe: bytes are taken only when the future completes.
    fn read(&mut self) -> impl Future<Output = Result<Option<Bytes>, LocalFault>> + Send;

    /// Completes when the local connection fails while nobody reads it.
    fn failed(&mut self) -> impl Future<Output = LocalFault> + Send {
        std::future::pending()
    }
}

/// Where bytes for the local side go.
pub trait LocalWrite: Send {
    /// Writes all of `chunks`, waiting while the local side does not read.
    fn write(
        &mut self,
        chunks: &mut [Bytes],
    ) -> impl Future<Output = Result<(), LocalFault>> + Send;

    /// Ends the local side's input cleanly.
    fn finish(&mut self) -> impl Future<Output = Result<(), LocalFault>> + Send;

    /// Completes when nobody will ever read what would be written, though nothing is being
    /// written. Asked only once the local side has ended its own output.
    fn gone(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Completes when all that was written has arrived at the local peer, or never will.
    fn flushed(&mut self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// Turns the coming close of the local connection into a reset.
pub trait Abort: Send {
    /// Called at most once, before the local halves are dropped.
    fn abort(&self);
}

/// A local connection, ready to be spliced.
///
/// Unless the splice ends in order, the connection is reset when this is dropped.
#[derive(Debug)]
pub struct Local<R, W, A: Abort> {
    reader: R,
    writer: W,
    guard: AbortGuard<A>,
    stuck_timeout: Duration,
}

impl<R: LocalRead, W: LocalWrite, A: Abort> Local<R, W, A> {
    /// The connection that reads from `reader`, writes to `writer` and is reset by `abort`.
    pub fn new(reader: R, writer: W, abort: A) -> Self {
        let guard = AbortGuard(Some(abort));
        Self { reader, writer, guard, stuck_timeout: STUCK_TIMEOUT }
    }

    /// Keeps what a peer does not take, once the other side has closed, for this long instead of
    /// a minute.
    #[must_use]
    pub fn with_stuck_timeout(self, stuck_timeout: Duration) -> Self {
        Self { stuck_timeout, ..self }
    }
}

#[derive(Debug)]
struct AbortGuard<A: Abort>(Option<A>);

impl<A: Abort> AbortGuard<A> {
    fn disarm(&mut self) {
        self.0 = None;
    }
}

impl<A: Abort> Drop for AbortGuard<A> {
    fn drop(&mut self) {
        if let Some(abort) = &self.0 {
            abort.abort();
        }
    }
}

/// Bytes that crossed, added up over many splices.
#[derive(Debug, Default)]
pub struct Meter {
    to_tunnel: AtomicU64,
    from_tunnel: AtomicU64,
}

impl Meter {
    /// Bytes read from local connections and written to streams.
    pub fn to_tunnel(&self) -> u64 {
        self.to_tunnel.load(Ordering::Relaxed)
    }

    /// Bytes read from streams and written to local connections.
    pub fn from_tunnel(&self) -> u64 {
        self.from_tunnel.load(Ordering::Relaxed)
    }
}

/// How one direction came to its end without a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalfEnd {
    /// Everything up to the clean end has been handed on.
    Finished,
    /// The reader went away first; the rest was not handed on.
    Stopped(StreamCode),
}

/// Why a splice was cut off.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// The local connection failed.
    #[error("local connection: {0}")]
    Local(#[from] LocalFault),
    /// The other side of the tunnel reset the stream.
    #[error("reset from the other side: {0}")]
    Reset(StreamCode),
    /// The other side has closed, and the local peer does not take what it was sent before.
    #[error("the other side has closed and nobody takes what it had sent")]
    Stuck,
    /// A dial that the frontend had been told was done has failed.
    #[error("{text}")]
    Dial {
        /// How the other side is told.
        code: StreamCode,
        /// Why, in the words of the dial's error.
        text: String,
    },
    /// The tunnel is lost.
    #[error("tunnel lost: {0}")]
    Lost(#[from] TunnelLost),
}

impl Cut {
    /// The code that stands for the cut, for the other side and for metric labels.
    pub fn code(&self) -> StreamCode {
        match self {
            Self::Local(fault) => fault.code,
            Self::Reset(code) => *code,
            Self::Stuck => StreamCode::IO_ERROR,
            Self::Dial { code, .. } => *code,
            Self::Lost(_) => StreamCode::TUNNEL_LOST,
        }
    }
}

/// What became of a splice.
#[derive(Debug)]
pub struct Outcome {
    /// Bytes from the local side to the tunnel.
    pub to_tunnel: u64,
    /// Bytes from the tunnel to the local side.
    pub from_tunnel: u64,
    /// How both directions ended, first towards the tunnel, then from it; or what cut them off.
    pub end: Result<(HalfEnd, HalfEnd), Cut>,
}

/// What precedes the bytes of a stream that is spliced before all of that has come.
pub trait Head: Send {
    /// Takes it off the stream.
    ///
    /// # Errors
    /// When the splice is to be cut off for what it says.
    fn take(self, recv: &mut RecvHalf) -> impl Future<Output = Result<(), Cut>> + Send;
}

/// The stream is at its first byte.
impl Head for () {
    async fn take(self, _recv: &mut RecvHalf) -> Result<(), Cut> {
        Ok(())
    }
}

/// Joins a local connection and a stream until both directions have ended.
///
/// # Cancel safety
/// Dropping the future cuts both sides off with a reset.
pub async fn splice<R: LocalRead, W: LocalWrite, A: Abort>(
    local: Local<R, W, A>,
    stream: (SendHalf, RecvHalf),
    meter: &Meter,
) -> Outcome {
    splice_behind((), local, stream, meter).await
}

/// As [`splice()`], where a head still precedes the stream's bytes. What the local side sends goes out
/// meanwhile.
///
/// # Cancel safety
/// Dropping the future cuts both sides off with a reset.
pub async fn splice_behind<R: LocalRead, W: LocalWrite, A: Abort>(
    head: impl Head,
    mut local: Local<R, W, A>,
    (mut send, mut recv): (SendHalf, RecvHalf),
    meter: &Meter,
) -> Outcome {
    let pumps = Pumps::new(meter);
    let end = select! {
        end = pumps.run(&mut local.reader, &mut local.writer, head, &mut send, &mut recv) => end,
        cut = pumps.stuck(local.stuck_timeout) => Err(cut),
    };
    match &end {
        Ok((HalfEnd::Stopped(code), _)) => {
            pumps.discard_until_flushed(&mut local.reader, &mut local.writer).await;
            if *code == StreamCode::CLOSED {
                local.guard.disarm();
            }
        }
        Ok(_) => local.guard.disarm(),
        Err(cut) => {
            send.reset(cut.code());
            recv.stop(cut.code());
        }
    }
    Outcome { to_tunnel: pumps.to.count(), from_tunnel: pumps.from.count(), end }
}

/// Counts one direction's bytes, for this splice and for all.
struct Count<'a> {
    count: AtomicU64,
    total: &'a AtomicU64,
}

impl<'a> Count<'a> {
    fn new(total: &'a AtomicU64) -> Self {
        Self { count: AtomicU64::new(0), total }
    }

    fn add(&self, bytes: usize) {
        self.count.fetch_add(bytes as u64, Ordering::Relaxed);
        self.total.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// What the two directions of one splice know of each other.
struct Pumps<'a> {
    to: Count<'a>,
    from: Count<'a>,
    /// The local side has ended its output.
    local_ended: SetOnce<()>,
    /// The direction from the tunnel has ended.
    from_ended: AtomicBool,
    /// The other side refuses to read; what the local side sends is thrown away.
    stopped: SetOnce<StreamCode>,
    /// Something is being written to the local side.
    writing: AtomicBool,
}

impl<'a> Pumps<'a> {
    fn new(meter: &'a Meter) -> Self {
        Self {
            to: Count::new(&meter.to_tunnel),
            from: Count::new(&meter.from_tunnel),
            local_ended: SetOnce::new(),
            from_ended: AtomicBool::new(false),
            stopped: SetOnce::new(),
            writing: AtomicBool::new(false),
        }
    }

    async fn run(
        &self,
        reader: &mut impl LocalRead,
        writer: &mut impl LocalWrite,
        head: impl Head,
        send: &mut SendHalf,
        recv: &mut RecvHalf,
    ) -> Result<(HalfEnd, HalfEnd), Cut> {
        let mut to = pin!(self.pump_to_tunnel(reader, send));
        let mut from = pin!(async {
            head.take(recv).await?;
            self.pump_from_tunnel(writer, recv).await
        });
        let (mut to_end, mut from_end) = (None, None);
        loop {
            select! {
                end = &mut to, if to_end.is_none() => to_end = Some(end?),
                end = &mut from, if from_end.is_none() => {
                    from_end = Some(end?);
                    self.from_ended.store(true, Ordering::Relaxed);
                }
            }
            match (to_end, self.stopped.get().copied(), from_end) {
                (Some(to), _, Some(from)) => return Ok((to, from)),
                (None, Some(code), Some(from)) => return Ok((HalfEnd::Stopped(code), from)),
                _ => {}
            }
        }
    }

    /// Pumps from the local side to the tunnel until the local side ends.
    async fn pump_to_tunnel(
        &self,
        reader: &mut impl LocalRead,
        send: &mut SendHalf,
    ) -> Result<HalfEnd, Cut> {
        let mut stop = pin!(send.stopped());
        let code = loop {
            let chunk = select! {
                biased;
                // It cannot complete without a code before the stream is finished.
                code = &mut stop => break code?.unwrap_or(StreamCode::CLOSED),
                chunk = reader.read() => chunk?,
            };
            let Some(chunk) = chunk else {
                send.finish();
                let _ = self.local_ended.set(());
                // Not over before the other side has everything: a loss until then is a cut.
                return Ok(match stop.await? {
                    None => HalfEnd::Finished,
                    Some(code) => HalfEnd::Stopped(code),
                });
            };
            let length = chunk.len();
            let written = select! {
                biased;
                written = send.write_chunk(chunk) => written,
                fault = reader.failed() => return Err(fault.into()),
            };
            match written {
                Ok(()) => self.to.add(length),
                Err(WriteError::Stopped(code)) => break code,
                Err(WriteError::Lost(lost)) => return Err(lost.into()),
                Err(WriteError::Ended) => break StreamCode::CLOSED,
            }
        };
        let _ = self.stopped.set(code);
        loop {
            if self.from_ended.load(Ordering::Relaxed) || reader.read().await?.is_none() {
                return Ok(HalfEnd::Stopped(code));
            }
        }
    }

    /// Pumps from the tunnel to the local side until the stream ends.
    async fn pump_from_tunnel(
        &self,
        writer: &mut impl LocalWrite,
        recv: &mut RecvHalf,
    ) -> Result<HalfEnd, Cut> {
        let mut chunks: [Bytes; CHUNKS] = [const { Bytes::new() }; CHUNKS];
        loop {
            let count = select! {
                count = recv.read_chunks(&mut chunks) => count.map_err(Self::cut)?,
                () = self.local_reader_gone(writer) => return Ok(self.refuse(recv)),
            };
            let written = match count {
                Some(count) => {
                    self.writing.store(true, Ordering::Relaxed);
                    let written = select! {
                        biased;
                        written = self.write(&mut chunks[..count], writer) => written,
                        error = recv.failed() => return Err(Self::cut(error)),
                    };
                    self.writing.store(false, Ordering::Relaxed);
                    written
                }
                None => match writer.finish().await {
                    Ok(()) => return Ok(HalfEnd::Finished),
                    Err(fault) => Err(fault),
                },
            };
            match written {
                Ok(()) => {}
                Err(fault) if fault.code == StreamCode::BROKEN_PIPE => {
                    return Ok(self.refuse(recv));
                }
                Err(fault) => return Err(fault.into()),
            }
        }
    }

    /// Writes all of `chunks`: at once, or one by one when somebody watches for progress.
    async fn write(
        &self,
        chunks: &mut [Bytes],
        writer: &mut impl LocalWrite,
    ) -> Result<(), LocalFault> {
        let batch = if self.stopped.initialized() { 1 } else { CHUNKS };
        for chunks in chunks.chunks_mut(batch) {
            let length = chunks.iter().map(Bytes::len).sum();
            writer.write(chunks).await?;
            self.from.add(length);
        }
        Ok(())
    }

    /// Completes when the other side has closed and the local peer has not taken a byte for
    /// `timeout`, though there are some.
    async fn stuck(&self, timeout: Duration) -> Cut {
        let code = *self.stopped.wait().await;
        if code != StreamCode::CLOSED {
            // Somebody is still there who may wait for the local peer.
            std::future::pending::<()>().await;
        }
        loop {
            let before = self.from.count();
            sleep(timeout).await;
            if self.writing.load(Ordering::Relaxed) && self.from.count() == before {
                return Cut::Stuck;
            }
        }
    }

    async fn local_reader_gone(&self, writer: &mut impl LocalWrite) {
        self.local_ended.wait().await;
        writer.gone().await;
    }

    /// Tells the other side that nobody reads here any more.
    fn refuse(&self, recv: &mut RecvHalf) -> HalfEnd {
        let code = match self.local_ended.initialized() {
            true => StreamCode::CLOSED,
            false => StreamCode::BROKEN_PIPE,
        };
        recv.stop(code);
        HalfEnd::Stopped(code)
    }

    fn cut(error: ReadError) -> Cut {
        match error {
            ReadError::Reset(code) => Cut::Reset(code),
            ReadError::Lost(lost) => Cut::Lost(lost),
            ReadError::Ended => Cut::Reset(StreamCode::ABANDONED),
        }
    }

    /// Takes the local side's output off its hands until what it was sent has arrived.
    async fn discard_until_flushed(
        &self,
        reader: &mut impl LocalRead,
        writer: &mut impl LocalWrite,
    ) {
        let discard = async { while let Ok(Some(_)) = reader.read().await {} };
        select! {
            () = writer.flushed() => return,
            () = discard => {}
        }
        // An ended or failed local side sends nothing more; what it was sent still counts. Its end
        // most often is also the news that it has everything.
        writer.flushed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_splice_can_move_between_threads() {
        type Tcp = tokio::net::TcpStream;
        fn assert_send<T: Send>(_: T) {}
        // Never called: only the types matter.
        let _ = |local: Local<SocketRead<Tcp>, SocketWrite<Tcp>, SocketAbort<Tcp>>,
                 stream: (SendHalf, RecvHalf),
                 meter: &'static Meter| assert_send(splice(local, stream, meter));
    }
}
