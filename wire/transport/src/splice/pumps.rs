//! The two directions of a splice.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_wire::code::StreamCode;
use tokio::{select, sync::SetOnce, time::sleep};

use super::{
    Abort, Cut, HalfEnd, LocalFault, LocalRead, LocalWrite, Meter, Preamble, backlog::Backlog,
    local::AbortGuard,
};
use crate::{RecvHalf, SendHalf, Step, WriteError, budget::Holder, progress::Progress};

/// Maximum number of chunks taken from a stream at once. One chunk is one packet's payload, so this
/// is about 45 KiB: enough to make the system call cheap, little enough to be fair.
pub(super) const CHUNKS: usize = 32;

/// Room for the chunks of a read: for as many as the reads before filled. An idle stream has room for
/// few.
#[derive(Default)]
struct Batch(Vec<Bytes>);

impl Batch {
    /// Room for at least one chunk, and at most [`CHUNKS`].
    fn room(&mut self) -> &mut [Bytes] {
        if self.0.is_empty() {
            self.0.push(Bytes::new());
        }
        &mut self.0
    }

    /// The chunks that a read has filled. If it filled all there was, the next one has more room; if
    /// it filled little, less.
    fn filled(&mut self, count: usize) -> &mut [Bytes] {
        const GROWTH: usize = 4;
        let length = self.0.len();
        if count == length {
            self.0.resize((length * GROWTH).min(CHUNKS), Bytes::new());
        } else if count * 2 * GROWTH <= length {
            self.0.truncate(length / GROWTH);
            self.0.shrink_to_fit();
        }
        &mut self.0[..count]
    }
}

/// State that the two directions of one splice share.
pub(super) struct Pumps<'a> {
    /// How far the splice has come.
    progress: Arc<Progress>,
    /// Bytes of all splices.
    meter: &'a Meter,
    /// Set once the local peer has ended its output.
    local_ended: SetOnce<()>,
    /// Whether the direction from the tunnel has ended.
    from_ended: AtomicBool,
    /// Set once the other side reads no more: what the local side sends is discarded.
    stopped: SetOnce<StreamCode>,
    /// Whether bytes are being written to the local side.
    writing: AtomicBool,
    /// Time for one side to take a byte after the other has closed.
    stuck_timeout: Duration,
}

impl<'a> Pumps<'a> {
    pub(super) fn new(meter: &'a Meter, progress: Arc<Progress>, stuck_timeout: Duration) -> Self {
        Self {
            stuck_timeout,
            progress,
            meter,
            local_ended: SetOnce::new(),
            from_ended: AtomicBool::new(false),
            stopped: SetOnce::new(),
            writing: AtomicBool::new(false),
        }
    }

    /// Runs both directions until they have ended, or until one fails.
    pub(super) async fn run(
        &self,
        (reader, holder): (&mut impl LocalRead, &Arc<Holder>),
        (writer, backlog): (&mut impl LocalWrite, Backlog),
        preamble: impl Preamble,
        guard: &AbortGuard<impl Abort>,
        (send, recv): (&mut SendHalf, &mut RecvHalf),
    ) -> Result<(HalfEnd, HalfEnd), Cut> {
        let mut to = pin!(self.pump_to_tunnel(reader, holder, guard, send));
        let mut from = pin!(async {
            preamble.read(recv).await?;
            self.pump_from_tunnel(writer, guard, recv, backlog).await
        });
        let (mut to_end, mut from_end) = (None, None);
        loop {
            select! {
                end = &mut to, if to_end.is_none() => {
                    to_end = Some(end?);
                    self.progress.set_sending(Step::Ended);
                }
                end = &mut from, if from_end.is_none() => {
                    from_end = Some(end?);
                    self.progress.set_receiving(Step::Ended);
                    self.from_ended.store(true, Ordering::Relaxed);
                }
            }
            // Once the other side reads no more, the local side need not end its output.
            let to_end = to_end.or_else(|| self.stopped.get().copied().map(HalfEnd::Stopped));
            if let (Some(to), Some(from)) = (to_end, from_end) {
                return Ok((to, from));
            }
        }
    }

    fn count_sent(&self, bytes: usize) {
        self.progress.add_to_tunnel(bytes as u64);
        self.meter.to_tunnel.add(bytes);
    }

    fn count_received(&self, bytes: usize) {
        self.progress.add_from_tunnel(bytes as u64);
        self.meter.from_tunnel.add(bytes);
    }

    /// Pumps from the local side to the tunnel until the local side ends or the other side stops.
    async fn pump_to_tunnel(
        &self,
        reader: &mut impl LocalRead,
        holder: &Arc<Holder>,
        guard: &AbortGuard<impl Abort>,
        send: &mut SendHalf,
    ) -> Result<HalfEnd, Cut> {
        let mut stop = pin!(send.stopped());
        let code = loop {
            // Memory is taken before the read, so that the local side waits in its own kernel.
            if holder.room() == 0 {
                self.progress.set_sending(Step::Memory);
                select! {
                    biased;
                    code = &mut stop => break code?.unwrap_or(StreamCode::CLOSED),
                    () = Box::pin(holder.wait_for_room()) => {}
                    cut = self.local_failed(reader, guard) => return Err(cut),
                }
            }
            self.progress.set_sending(Step::Input);
            let chunk = select! {
                biased;
                // Without a code it cannot complete before the stream is finished.
                code = &mut stop => break code?.unwrap_or(StreamCode::CLOSED),
                chunk = reader.read(holder) => chunk?,
            };
            let Some(chunk) = chunk else {
                send.finish();
                let _ = self.local_ended.set(());
                // It is over only when the other side has everything: a loss until then is a cut.
                return Ok(stop.await?.map_or(HalfEnd::Finished, HalfEnd::Stopped));
            };
            let length = chunk.len();
            self.progress.set_sending(Step::Output);
            let written = select! {
                biased;
                written = send.write_chunk(chunk) => written,
                cut = self.local_failed(reader, guard) => return Err(cut),
            };
            match written {
                Ok(()) => self.count_sent(length),
                Err(WriteError::Stopped(code)) => break code,
                Err(WriteError::Lost(lost)) => return Err(lost.into()),
                Err(WriteError::Ended) => break StreamCode::CLOSED,
            }
        };
        let _ = self.stopped.set(code);
        self.discard(reader, holder).await?;
        Ok(HalfEnd::Stopped(code))
    }

    /// Completes when the local side fails, or does not matter any more, while it is not read. On the
    /// heap once it is polled: an idle splice has no room for it.
    async fn local_failed(
        &self,
        reader: &mut impl LocalRead,
        guard: &AbortGuard<impl Abort>,
    ) -> Cut {
        let failed = async {
            select! {
                fault = reader.failed() => fault.into(),
                () = guard.abandoned(self.stuck_timeout) => Cut::Stuck,
            }
        };
        Box::pin(failed).await
    }

    /// Discards what the local side sends, until it ends or the direction from the tunnel has
    /// ended.
    async fn discard(
        &self,
        reader: &mut impl LocalRead,
        holder: &Arc<Holder>,
    ) -> Result<(), LocalFault> {
        loop {
            if self.from_ended.load(Ordering::Relaxed) || reader.read(holder).await?.is_none() {
                return Ok(());
            }
        }
    }

    /// Pumps from the tunnel to the local side until the stream ends or the local peer closes.
    async fn pump_from_tunnel(
        &self,
        writer: &mut impl LocalWrite,
        guard: &AbortGuard<impl Abort>,
        recv: &mut RecvHalf,
        mut backlog: Backlog,
    ) -> Result<HalfEnd, Cut> {
        let mut chunks = Batch::default();
        loop {
            self.progress.set_receiving(Step::Input);
            let count = match backlog.take(chunks.room()) {
                0 => select! {
                    count = recv.read_chunks(chunks.room()) => count?,
                    () = self.local_reader_gone(writer, guard) => return Ok(self.stop(recv)),
                },
                count => Some(count),
            };
            let written = match count {
                Some(count) => {
                    self.writing.store(true, Ordering::Relaxed);
                    self.progress.set_receiving(Step::Output);
                    let filled = chunks.filled(count);
                    let length = filled.iter().map(Bytes::len).sum();
                    let written = select! {
                        biased;
                        written = self.write(filled, writer) => written,
                        // Boxed when it is polled first, so that a splice that does not stall has
                        // no room for it.
                        cut = async { Box::pin(backlog.keep(recv, length)).await } => {
                            return Err(cut);
                        }
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
                Err(fault) if fault.code == StreamCode::BROKEN_PIPE => return Ok(self.stop(recv)),
                Err(fault) => return Err(fault.into()),
            }
        }
    }

    /// Writes all of `chunks`: at once, or one by one while [`Pumps::stuck`] watches for progress.
    async fn write(
        &self,
        chunks: &mut [Bytes],
        writer: &mut impl LocalWrite,
    ) -> Result<(), LocalFault> {
        let batch = if self.stopped.initialized() { 1 } else { CHUNKS };
        for chunks in chunks.chunks_mut(batch) {
            let length = chunks.iter().map(Bytes::len).sum();
            writer.write(chunks).await?;
            self.count_received(length);
        }
        Ok(())
    }

    /// Completes when the other side has closed and the local peer then takes no byte for the
    /// time-out although bytes wait for it.
    ///
    /// A peer that has taken some is looked at again after the same time. Progress is what the
    /// writer counts while it writes, or else what was written as a whole.
    pub(super) async fn stuck(&self, progress: Option<&AtomicU64>) -> Cut {
        let code = *self.stopped.wait().await;
        if code != StreamCode::CLOSED {
            // The client is still there and may wait for the local peer.
            std::future::pending::<()>().await;
        }
        let taken = || {
            progress
                .map_or_else(|| self.progress.from_tunnel(), |taken| taken.load(Ordering::Relaxed))
        };
        loop {
            let before = taken();
            // On the heap, so that a splice that is open has no room for it.
            Box::pin(sleep(self.stuck_timeout)).await;
            if self.writing.load(Ordering::Relaxed) && taken() == before {
                return Cut::Stuck;
            }
        }
    }

    async fn local_reader_gone(
        &self,
        writer: &mut impl LocalWrite,
        guard: &AbortGuard<impl Abort>,
    ) {
        self.local_ended.wait().await;
        let gone = async {
            select! {
                () = writer.gone() => {}
                () = guard.hung_up() => {}
            }
        };
        Box::pin(gone).await;
    }

    /// Stops the stream: the local peer reads no more.
    fn stop(&self, recv: &mut RecvHalf) -> HalfEnd {
        let code = match self.local_ended.initialized() {
            true => StreamCode::CLOSED,
            false => StreamCode::BROKEN_PIPE,
        };
        recv.stop(code);
        HalfEnd::Stopped(code)
    }
}

/// Discards the local side's output until all that it was sent has arrived; `false` if it never
/// will.
pub(super) async fn discard_until_flushed(
    reader: &mut impl LocalRead,
    writer: &mut impl LocalWrite,
    holder: &Arc<Holder>,
) -> bool {
    let discard = async { while let Ok(Some(_)) = reader.read(holder).await {} };
    select! {
        is_flushed = writer.flushed() => return is_flushed,
        () = discard => {}
    }
    // A local side that has ended or failed sends nothing more, but what it was sent still counts.
    writer.flushed().await
}
