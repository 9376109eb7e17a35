//! What has arrived for a local peer that does not read.
//!
//! quinn reports how much waits in a stream only by handing it on. So the first part is taken while
//! the local peer stalls: if all that waits is in it, the stream holds that much. If more waits, the
//! stream counts with its window, which is the most that the peer may have sent.

use std::{future::ready, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{select, time::sleep};

use super::{Cut, pumps::CHUNKS};
use crate::{
    RecvHalf,
    arrived::Arrived,
    budget::{Held, Holder, StreamMemory},
};

/// Time for which a local peer takes nothing before what waits for it is counted.
const STALLED: Duration = Duration::from_millis(50);
/// Number of bytes that are taken from the stream while the local peer stalls.
const AHEAD: usize = 32 * 1024;

/// What waits for the local peer of one splice.
pub(super) struct Backlog {
    memory: Arc<StreamMemory>,
    /// `None` while the local peer reads.
    stalled: Option<Box<Stalled>>,
}

struct Stalled {
    arrived: Arrived,
    holder: Arc<Holder>,
    /// Number of bytes that the holder counts.
    counted: u64,
}

impl Backlog {
    pub(super) fn new(memory: Arc<StreamMemory>) -> Self {
        Self { memory, stalled: None }
    }

    /// Fills the front of `chunks` with what was taken while the local peer stalled; how many it
    /// filled.
    pub(super) fn take(&mut self, chunks: &mut [Bytes]) -> usize {
        let count = self.stalled.as_mut().map_or(0, |stalled| stalled.arrived.take(chunks));
        if count == 0 {
            self.stalled = None;
        }
        count
    }

    /// Takes and counts what arrives while the local peer is written `writing` bytes. Completes with
    /// what cuts the splice.
    ///
    /// # Cancel safety
    /// Cancel safe: [`take`](Self::take) returns what was taken.
    pub(super) async fn keep(&mut self, recv: &mut RecvHalf, writing: usize) -> Cut {
        select! {
            error = recv.failed() => return error.into(),
            () = sleep(STALLED) => {}
        }
        let memory = &self.memory;
        let stalled = self.stalled.get_or_insert_with(|| Box::new(Stalled::new(memory)));
        loop {
            if let Err(cut) = stalled.fill(recv).await {
                return cut;
            }
            stalled.count(writing);
            select! {
                error = recv.failed() => return error.into(),
                () = stalled.holder.cut() => return Cut::Memory,
                () = sleep(STALLED) => {}
            }
        }
    }
}

impl Stalled {
    fn new(memory: &StreamMemory) -> Self {
        Self { arrived: Arrived::default(), holder: memory.holder(Held::Receive), counted: 0 }
    }

    /// Takes what has arrived, up to [`AHEAD`] bytes, without waiting.
    async fn fill(&mut self, recv: &mut RecvHalf) -> Result<(), Cut> {
        let mut chunks = [const { Bytes::new() }; CHUNKS];
        while self.arrived.len() < AHEAD {
            let read = select! {
                biased;
                read = recv.read_chunks(&mut chunks) => read?,
                () = ready(()) => return Ok(()),
            };
            let Some(count) = read else { return Ok(()) };
            for chunk in &mut chunks[..count] {
                self.arrived.push(&std::mem::take(chunk));
            }
        }
        Ok(())
    }

    fn count(&mut self, writing: usize) {
        let taken = self.arrived.len();
        let waiting = if taken < AHEAD { 0 } else { self.holder.window() };
        let counted = (taken + writing) as u64 + waiting;
        self.holder.add(counted);
        self.holder.give_back(std::mem::replace(&mut self.counted, counted));
        self.holder.relieve();
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        self.holder.give_back(self.counted);
    }
}
