//! The two halves of a stream, whichever carrier it is on.
//!
//! Two guards live here because forgetting them loses data in silence:
//! - a half that is dropped before it ended is reset (or stopped), never finished, so that a task
//!   that crashed cannot look like a clean end;
//! - bytes that were read together with a frame and follow it stay in the half, for the next read.

use std::{fmt, sync::Arc};

use bytes::{Bytes, BytesMut};
use culvert_wire::{code::StreamCode, frame::Frame};
use tokio_util::either::Either;

use crate::{
    ReadError, ReadFrameError, TunnelLost, WriteError,
    budget::StreamMemory,
    priority::{AttainedService, Class, PriorityBudget},
    progress::Progress,
    qmux, quic,
    resume::link::Link,
    tunnel::now,
};

/// Does the same with the variant of either carrier.
macro_rules! either {
    ($kind:ident, $value:expr, $inner:ident => $call:expr) => {
        match $value {
            $kind::Quic($inner) => $call,
            $kind::Qmux($inner) => $call,
        }
    };
}
pub(crate) use either;

/// A carrier's half that this side writes.
pub(crate) enum SendStream {
    Quic(quic::SendStream),
    Qmux(qmux::SendStream),
}

/// A carrier's half that this side reads.
pub(crate) enum RecvStream {
    Quic(quic::RecvStream),
    Qmux(qmux::RecvStream),
}

macro_rules! from_carriers {
    ($($kind:ident),+) => {
        $(
            impl From<quic::$kind> for $kind {
                fn from(stream: quic::$kind) -> Self {
                    Self::Quic(stream)
                }
            }

            impl From<qmux::$kind> for $kind {
                fn from(stream: qmux::$kind) -> Self {
                    Self::Qmux(stream)
                }
            }
        )+
    };
}

from_carriers!(SendStream, RecvStream);

/// The half of a stream that this side writes.
///
/// Dropping it before [`finish`](Self::finish) or [`reset`](Self::reset) resets it with
/// [`StreamCode::ABANDONED`].
pub struct SendHalf {
    stream: SendStream,
    ended: bool,
    /// The service that the stream has attained; `None` once its priority was set.
    attained: Option<AttainedService>,
    class: Class,
    memory: Arc<StreamMemory>,
    progress: Arc<Progress>,
    /// What is known about the stream beyond its tunnel, if it outlives that.
    link: Option<Arc<Link>>,
}

impl SendHalf {
    pub(crate) fn new(
        stream: SendStream,
        priorities: Arc<PriorityBudget>,
        memory: Arc<StreamMemory>,
    ) -> Self {
        let attained = Some(AttainedService::new(priorities, now()));
        let (class, progress) = (Class::Interactive, Arc::default());
        let half = Self { stream, ended: false, attained, class, memory, progress, link: None };
        half.prioritize(half.class.priority());
        half
    }

    /// Retains what is written from now on until the peer has reported it, and goes on over another
    /// tunnel when this one is lost.
    pub(crate) fn keep(&mut self, link: Arc<Link>) {
        self.progress.set_link(Arc::downgrade(&link));
        link.hold();
        self.link = Some(link);
    }

    /// Takes the place of this half's stream on a tunnel that was lost.
    fn replace(&mut self, mut next: Self) {
        std::mem::swap(&mut self.stream, &mut next.stream);
        // It has counted what was sent again. A fixed priority stays.
        if self.attained.is_some() {
            std::mem::swap(&mut self.attained, &mut next.attained);
            self.class = next.class;
            self.progress.set_class(self.class);
        }
        next.ended = true;
    }

    /// Queues the whole chunk without copying it, waiting while the windows are full.
    ///
    /// # Errors
    /// When the peer stopped the stream or the tunnel is lost, and no other takes its place.
    ///
    /// # Cancel safety
    /// Not cancel safe: an unknown part of the chunk may have been queued. Reset the half then.
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), WriteError> {
        let Some(link) = &self.link else { return self.write_to_carrier(chunk).await };
        if let Some(next) = link.retain(&chunk) {
            self.replace(*next);
        }
        match self.write_to_carrier(chunk).await {
            Err(WriteError::Lost(lost)) => {
                // The next half has been sent the chunk too.
                let link = self.link.clone();
                let Some(link) = link else { return Err(WriteError::Lost(lost)) };
                let next = Box::pin(link.next_send(lost)).await.map_err(WriteError::Lost)?;
                self.replace(*next);
                Ok(())
            }
            written => written,
        }
    }

    async fn write_to_carrier(&mut self, mut chunk: Bytes) -> Result<(), WriteError> {
        if let Some(attained) = &mut self.attained {
            let now = now();
            attained
                .tunnel()
                .measure(now, || either!(SendStream, &self.stream, it => it.path_rate()));
            let class = attained.on_write(now, chunk.len() as u64);
            if class != self.class {
                self.class = class;
                self.progress.set_class(class);
                self.prioritize(class.priority());
            }
        }
        // A stream with a fixed priority always has others in flight, which reveal its losses.
        let is_urgent = self.attained.is_some() && self.class > Class::Bulk;
        let written = match &mut self.stream {
            SendStream::Quic(stream) => stream.write_chunk(chunk, is_urgent).await,
            SendStream::Qmux(stream) => match stream.try_write_chunk(&mut chunk) {
                Some(written) => written,
                // Boxed, so that an idle stream over QUIC has no room for it.
                None => Box::pin(stream.write_chunk(chunk)).await,
            },
        };
        if let Some(attained) = &mut self.attained {
            attained.on_written(now());
        }
        written
    }

    /// The memory of the tunnel's streams.
    pub(crate) fn memory(&self) -> &Arc<StreamMemory> {
        &self.memory
    }

    /// The progress of the stream's splice.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Ends the stream cleanly after all that was written. Returns at once; delivery goes on.
    pub fn finish(&mut self) {
        if !self.ended {
            self.ended = true;
            if let Some(next) = self.link.as_ref().and_then(|link| link.finish()) {
                self.replace(*next);
            }
            either!(SendStream, &mut self.stream, stream => stream.finish());
        }
    }

    /// Abandons the stream: unsent bytes are dropped, and the peer sees `code`, never an end.
    pub fn reset(&mut self, code: StreamCode) {
        if !self.ended {
            self.ended = true;
            if let Some(next) = self.link.as_ref().and_then(|link| link.reset(code)) {
                self.replace(*next);
            }
            either!(SendStream, &mut self.stream, stream => stream.reset(code));
        }
    }

    /// Completes when the peer is done with the stream: with a code when it stopped it, with
    /// `None` when it has everything up to the finish.
    ///
    /// The future does not borrow the half, so it can be watched while writing. Of a stream that goes
    /// on over other tunnels, one future at a time does.
    ///
    /// # Errors
    /// When the tunnel is lost, and no other takes its place.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<StreamCode>, TunnelLost>> + Send + Sync + 'static {
        let link = self.link.clone();
        let on_carrier = match &self.stream {
            SendStream::Quic(stream) => Either::Left(stream.stopped()),
            SendStream::Qmux(stream) => Either::Right(Box::pin(stream.stopped())),
        };
        async move {
            let mut stopped = on_carrier.await;
            let Some(link) = link else { return stopped };
            while let Err(lost) = stopped {
                // Boxed, so that a stream has no room for it while its tunnel lives.
                stopped = Box::pin(link.next_stopped(lost)).await?.await;
            }
            match stopped {
                Ok(None) => link.was_delivered(),
                _ => link.was_stopped(),
            }
            stopped
        }
    }

    /// Fixes the stream's priority among the tunnel's others; higher goes first. Without it the
    /// priority follows how much the stream sends, between −10 and 10.
    pub fn set_priority(&mut self, priority: i32) {
        self.attained = None;
        self.prioritize(priority);
    }

    fn prioritize(&self, priority: i32) {
        either!(SendStream, &self.stream, stream => stream.set_priority(priority));
    }
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        self.reset(StreamCode::ABANDONED);
        if let Some(link) = &self.link {
            link.let_go_of_sent();
        }
    }
}

impl fmt::Debug for SendHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendHalf").field("ended", &self.ended).finish_non_exhaustive()
    }
}

/// The half of a stream that this side reads.
///
/// Dropping it before its end stops it with [`StreamCode::ABANDONED`].
pub struct RecvHalf {
    stream: RecvStream,
    /// Bytes that were taken from the stream and not handed on: part of a frame, or what follows
    /// one.
    buffered: BytesMut,
    state: RecvState,
    /// What is known about the stream beyond its tunnel, if it outlives that, and the epoch of
    /// `stream`.
    link: Option<(Arc<Link>, u32)>,
}

/// How far a receiving half has come, as this side knows it.
#[derive(Debug)]
enum RecvState {
    /// More may arrive.
    Open,
    /// The clean end was read.
    Finished,
    /// The peer reset the stream, or the tunnel is lost. A carrier may report that once and an end
    /// after it.
    Failed(ReadError),
    /// This side stopped the stream.
    Stopped,
}

impl RecvHalf {
    pub(crate) fn new(stream: RecvStream) -> Self {
        Self { stream, buffered: BytesMut::new(), state: RecvState::Open, link: None }
    }

    /// Fills the front of `chunks` with what has arrived, in order, waiting for the first; returns
    /// how many it filled. `None` is the clean end. Bytes are copied only if they arrived in the
    /// same packet as a frame.
    ///
    /// # Errors
    /// When the peer reset the stream or the tunnel is lost.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is taken before the future completes.
    pub async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, ReadError> {
        match (&self.state, chunks.first_mut()) {
            (RecvState::Open | RecvState::Finished, Some(first)) if !self.buffered.is_empty() => {
                *first = std::mem::take(&mut self.buffered).freeze();
                Ok(Some(1))
            }
            _ => self.read_stream(chunks).await,
        }
    }

    /// The next frame, if its body has at most `limit` bytes. Bytes that follow it stay in the
    /// half.
    ///
    /// # Errors
    /// When the stream ends, fails, or announces more than `limit`.
    ///
    /// # Cancel safety
    /// Cancel safe: the part of a frame that has arrived stays in the half, and the next call goes
    /// on with it.
    pub async fn read_frame(&mut self, limit: usize) -> Result<Frame, ReadFrameError> {
        loop {
            if matches!(self.state, RecvState::Open | RecvState::Finished)
                && let Some(frame) = Frame::split(&mut self.buffered, limit)?
            {
                if self.buffered.is_empty() {
                    // Lets the frame's memory go with the frame.
                    self.buffered = BytesMut::new();
                }
                return Ok(frame);
            }
            // One chunk at a time bounds what a peer can make this side buffer.
            let mut chunk = [Bytes::new()];
            match self.read_stream(&mut chunk).await? {
                Some(_) => self.buffered.extend_from_slice(&chunk[0]),
                None if self.buffered.is_empty() => return Err(ReadFrameError::End),
                None => return Err(ReadFrameError::Truncated),
            }
        }
    }

    /// Counts what was not handed on yet and what is received from now on, and goes on over another
    /// tunnel when this one is lost.
    pub(crate) fn keep(&mut self, link: Arc<Link>) {
        let epoch = link.epoch();
        if !self.buffered.is_empty() {
            link.received(epoch, self.buffered.len() as u64);
        }
        link.hold();
        self.link = Some((link, epoch));
    }

    /// Reads what is not buffered, and remembers how the half ended if this is its end.
    async fn read_stream(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, ReadError> {
        match &self.state {
            RecvState::Open => {}
            RecvState::Finished => return Ok(None),
            RecvState::Failed(fault) => return Err(fault.clone()),
            RecvState::Stopped => return Err(ReadError::Ended),
        }
        let read = loop {
            let read = self.read_carrier(chunks).await;
            let Some((link, epoch)) = &self.link else { break read };
            let counts = match &read {
                Ok(Some(count)) => {
                    let bytes = chunks[..*count].iter().map(Bytes::len).sum::<usize>();
                    link.received(*epoch, bytes as u64)
                }
                Ok(None) => link.ended(*epoch),
                Err(ReadError::Lost(_)) => false,
                Err(ReadError::Reset(_)) => link.was_reset(*epoch),
                Err(ReadError::Ended) => true,
            };
            if counts {
                break read;
            }
            // What was read will be sent again.
            let lost = match read {
                Err(ReadError::Lost(lost)) => lost,
                _ => TunnelLost::TimedOut,
            };
            if let Err(lost) = Box::pin(self.replaced(lost)).await {
                break Err(ReadError::Lost(lost));
            }
            if let RecvState::Failed(error) = &self.state {
                break Err(error.clone());
            }
            if !self.buffered.is_empty() {
                chunks[0] = std::mem::take(&mut self.buffered).freeze();
                break Ok(Some(1));
            }
        };
        match &read {
            Ok(Some(_)) => {}
            Ok(None) => self.state = RecvState::Finished,
            Err(fault) => self.state = RecvState::Failed(fault.clone()),
        }
        read
    }

    async fn read_carrier(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, ReadError> {
        match &mut self.stream {
            RecvStream::Quic(stream) => stream.read_chunks(chunks).await,
            RecvStream::Qmux(stream) => match stream.try_read_chunks(chunks) {
                Some(read) => read,
                None => Box::pin(stream.read_chunks(chunks)).await,
            },
        }
    }

    /// Waits for the half on another tunnel, and takes its stream.
    async fn replaced(&mut self, lost: TunnelLost) -> Result<(), TunnelLost> {
        let Some((link, _)) = &self.link else { return Err(lost) };
        let link = link.clone();
        loop {
            let (next, epoch) = link.next_recv(lost.clone()).await?;
            let counts = match next.state {
                RecvState::Failed(_) => link.was_reset(epoch),
                // What followed the head of the new stream was read with it.
                _ => link.received(epoch, next.buffered.len() as u64),
            };
            if counts {
                self.replace(*next);
                self.link = Some((link, epoch));
                return Ok(());
            }
        }
    }

    /// Takes the place of this half's stream on a tunnel that was lost.
    fn replace(&mut self, mut next: Self) {
        std::mem::swap(&mut self.stream, &mut next.stream);
        self.buffered.unsplit(std::mem::take(&mut next.buffered));
        if let RecvState::Failed(_) = &next.state {
            self.state = std::mem::replace(&mut next.state, RecvState::Stopped);
        }
        next.state = RecvState::Stopped;
    }

    /// Lets the peer send `bytes` more on the tunnel until the result is dropped, because as many of
    /// this stream wait and are counted; `None` where a tunnel has no window of its own.
    pub(crate) fn widen_tunnel(&self, bytes: u64) -> Option<quic::Widened> {
        match &self.stream {
            RecvStream::Quic(stream) => Some(stream.widen(bytes)),
            RecvStream::Qmux(_) => None,
        }
    }

    /// Has the half fail with this error from now on: the peer said so in another way.
    pub(crate) fn fail(&mut self, error: ReadError) {
        self.buffered.clear();
        self.state = RecvState::Failed(error);
    }

    /// Refuses the rest of the stream: what has arrived is dropped and the peer sees `code`.
    pub fn stop(&mut self, code: StreamCode) {
        if matches!(self.state, RecvState::Open) {
            self.state = RecvState::Stopped;
            if let Some(next) = self.link.as_ref().and_then(|(link, _)| link.stop(code)) {
                self.replace(*next);
            }
            either!(RecvStream, &mut self.stream, stream => stream.stop(code));
        }
    }

    /// Completes when the peer resets the stream or the tunnel is lost, and never on a clean end.
    ///
    /// It is for readers that stop reading for a while and must notice a failure meanwhile.
    ///
    /// # Cancel safety
    /// Cancel safe: no byte is taken.
    pub async fn failed(&mut self) -> ReadError {
        match &self.state {
            RecvState::Open => {}
            RecvState::Finished => std::future::pending().await,
            RecvState::Failed(fault) => return fault.clone(),
            RecvState::Stopped => return ReadError::Ended,
        }
        let fault = loop {
            let fault = match &mut self.stream {
                RecvStream::Quic(stream) => stream.failed().await,
                RecvStream::Qmux(stream) => Box::pin(stream.failed()).await,
            };
            let Some((link, epoch)) = &self.link else { break fault };
            let lost = match fault {
                ReadError::Lost(lost) => lost,
                ReadError::Reset(_) if !link.was_reset(*epoch) => TunnelLost::TimedOut,
                fault => break fault,
            };
            if let Err(lost) = Box::pin(self.replaced(lost)).await {
                break ReadError::Lost(lost);
            }
            if let RecvState::Failed(error) = &self.state {
                break error.clone();
            }
        };
        self.state = RecvState::Failed(fault.clone());
        fault
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        self.stop(StreamCode::ABANDONED);
        if let Some((link, _)) = &self.link {
            link.let_go();
        }
    }
}

impl fmt::Debug for RecvHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvHalf").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
