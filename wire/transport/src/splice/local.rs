//! The local side of a splice: what a connection must be able to do to be joined to a stream.

use std::{
    io,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use bytes::Bytes;
use culvert_wire::code::StreamCode;
use tokio::time::sleep;

use super::until_hung_up;
use crate::budget::Holder;

/// Default of [`Local::with_stuck_timeout`]: long enough for a target that pauses, short enough
/// that targets that hang do not keep the streams of all clients that gave up on them.
const STUCK_TIMEOUT: Duration = Duration::from_secs(60);

/// Time, in stuck timeouts, for the tunnel to take a byte after the local peer has closed. A target
/// that reads slowly is seen only when half a window was read.
const ABANDONED_TIMEOUTS: u32 = 5;

/// A failure of the local side.
#[derive(Debug, thiserror::Error)]
#[error("{source}")]
pub struct LocalFault {
    /// The code that the other side of the tunnel receives.
    pub code: StreamCode,
    /// The cause, for this side's log.
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

/// Source of the local side's bytes.
pub trait LocalRead: Send {
    /// The next bytes, at least one; `None` at the clean end. They are held by `holder`: the buffer
    /// is no longer than its room, or [`MINIMUM`](crate::budget::MINIMUM) if it has less by now.
    ///
    /// # Errors
    /// When the local connection fails.
    ///
    /// # Cancel safety
    /// Implementations must be cancel safe: bytes are taken only when the future completes.
    fn read(
        &mut self,
        holder: &Arc<Holder>,
    ) -> impl Future<Output = Result<Option<Bytes>, LocalFault>> + Send;

    /// Completes when the local connection fails while it is not read.
    fn failed(&mut self) -> impl Future<Output = LocalFault> + Send {
        std::future::pending()
    }
}

/// Sink of the bytes for the local side.
pub trait LocalWrite: Send {
    /// Writes all of `chunks`, waiting while the local peer does not read.
    ///
    /// # Errors
    /// When the local connection fails. [`StreamCode::BROKEN_PIPE`] means that the peer reads no
    /// more, which need not end the other direction.
    fn write(
        &mut self,
        chunks: &mut [Bytes],
    ) -> impl Future<Output = Result<(), LocalFault>> + Send;

    /// Counter of bytes that the local peer has taken, if it is raised during
    /// [`LocalWrite::write`]. It shows whether a peer that has not taken a whole batch is stuck.
    fn progress(&self) -> Option<Arc<AtomicU64>> {
        None
    }

    /// Ends the local peer's input cleanly.
    ///
    /// # Errors
    /// As [`LocalWrite::write`].
    fn finish(&mut self) -> impl Future<Output = Result<(), LocalFault>> + Send;

    /// Completes when the local peer has closed for reading, although nothing is being written.
    /// Called only after the local peer has ended its output.
    fn gone(&mut self) -> impl Future<Output = ()> + Send {
        std::future::pending()
    }

    /// Completes when all that was written has arrived at the local peer; `false` when it never will.
    fn flushed(&mut self) -> impl Future<Output = bool> + Send {
        std::future::ready(true)
    }
}

/// Turns the coming close of the local connection into a reset.
pub trait Abort: Send + Sync {
    /// Called at most once, before the local halves are dropped.
    fn abort(&self);

    /// Whether the local peer has closed its connection for both directions, where that is known.
    fn is_hung_up(&self) -> bool {
        false
    }

    /// Completes once the local peer's host is known to be gone.
    ///
    /// # Cancel safety
    /// Implementations must be cancel safe.
    fn vanished(&self) -> impl Future<Output = LocalFault> + Send {
        std::future::pending()
    }
}

/// A local connection that is ready to be spliced.
///
/// Dropping it resets the connection, unless a splice ended in order before.
#[derive(Debug)]
pub struct Local<R, W, A: Abort> {
    pub(super) reader: R,
    pub(super) writer: W,
    pub(super) guard: AbortGuard<A>,
    pub(super) stuck_timeout: Duration,
}

impl<R: LocalRead, W: LocalWrite, A: Abort> Local<R, W, A> {
    /// The connection that is read by `reader`, written by `writer` and reset by `abort`.
    pub fn new(reader: R, writer: W, abort: A) -> Self {
        let guard = AbortGuard(Some(abort));
        Self { reader, writer, guard, stuck_timeout: STUCK_TIMEOUT }
    }

    /// The same connection with another writer, which `wrap` makes of this one.
    #[must_use]
    pub fn map_writer<W2: LocalWrite>(self, wrap: impl FnOnce(W) -> W2) -> Local<R, W2, A> {
        let Self { reader, writer, guard, stuck_timeout } = self;
        Local { reader, writer: wrap(writer), guard, stuck_timeout }
    }

    /// The same connection with another reader, which `wrap` makes of this one.
    #[must_use]
    pub fn map_reader<R2: LocalRead>(self, wrap: impl FnOnce(R) -> R2) -> Local<R2, W, A> {
        let Self { reader, writer, guard, stuck_timeout } = self;
        Local { reader: wrap(reader), writer, guard, stuck_timeout }
    }

    /// Sets how long a local peer may take no byte after the other side has closed. The other side
    /// may take no byte for five times as long after the local peer has closed. What was sent is kept
    /// until then; after that the splice ends with [`Cut::Stuck`](super::Cut::Stuck). The default is
    /// a minute.
    #[must_use]
    pub fn with_stuck_timeout(self, stuck_timeout: Duration) -> Self {
        Self { stuck_timeout, ..self }
    }
}

/// Resets the local connection when it is dropped, unless it is disarmed before.
#[derive(Debug)]
pub(super) struct AbortGuard<A: Abort>(Option<A>);

impl<A: Abort> AbortGuard<A> {
    /// Completes when the local peer has closed its connection for both directions and
    /// [`ABANDONED_TIMEOUTS`] times `stuck_timeout` have passed, at a multiple of that time. A peer
    /// that only ended its output waits for an answer.
    pub(super) async fn abandoned(&self, stuck_timeout: Duration) {
        loop {
            sleep(stuck_timeout * ABANDONED_TIMEOUTS).await;
            if self.0.as_ref().is_some_and(Abort::is_hung_up) {
                return;
            }
        }
    }

    /// Completes when the local peer, which has ended its output, has closed for good, where that
    /// is known.
    pub(super) async fn hung_up(&self) {
        until_hung_up(|| self.0.as_ref().is_some_and(Abort::is_hung_up)).await;
    }

    pub(super) async fn vanished(&self) -> LocalFault {
        match &self.0 {
            Some(abort) => abort.vanished().await,
            None => std::future::pending().await,
        }
    }

    pub(super) fn disarm(&mut self) {
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
