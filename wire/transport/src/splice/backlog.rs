//! What has arrived for a local peer that does not read.
//!
//! quinn reports how much waits in a stream only by handing it on. So a part is taken while the local
//! peer stalls: if all that waits is in it, the stream holds that much. If more waits, the stream
//! counts with its window as well, which is the most that the peer may have sent.

use std::{fmt, future::ready, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{select, time::sleep};

use super::{Cut, pumps::CHUNKS};
use crate::{
    RecvHalf, SendHalf,
    arrived::Arrived,
    budget::{Held, Holder, StreamMemory},
    quic::Widened,
};

/// Time for which a local peer takes nothing before what waits for it is counted.
const STALLED: Duration = Duration::from_millis(50);
/// Number of bytes that are taken from the stream while the local peer stalls, at least.
const AHEAD: u64 = 32 * 1024;
/// Part of the window that is taken, where it is larger: what is taken is counted exactly.
const AHEAD_PART: u64 = 8;
/// Mean length of chunks below which the peer's packets carry little: those that carry a full one
/// have at least twice as much.
const SHORT: u64 = 600;

/// What waits for the local peer of one splice, or for the connection to it.
pub struct Backlog {
    memory: Arc<StreamMemory>,
    /// `None` while the local peer reads.
    stalled: Option<Box<Stalled>>,
}

struct Stalled {
    arrived: Arrived,
    holder: Arc<Holder>,
    /// Number of bytes that the holder counts.
    counted: u64,
    /// Number of bytes and chunks that were taken.
    taken: (u64, u64),
    /// The part of the tunnel's window that what waits may use.
    widened: Option<Widened>,
}

impl Backlog {
    /// The backlog of the stream with this half, of which nothing was taken.
    pub fn new(send: &SendHalf) -> Self {
        Self { memory: send.memory().clone(), stalled: None }
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

    /// Takes and counts what arrives while the local peer is written `writing` bytes, or while there is
    /// no local peer yet. Completes with what cuts the stream.
    ///
    /// # Cancel safety
    /// Cancel safe: what was taken comes first in a splice.
    pub async fn keep(&mut self, recv: &mut RecvHalf, writing: usize) -> Cut {
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
            stalled.count(recv, writing as u64);
            select! {
                error = recv.failed() => return error.into(),
                () = stalled.holder.cut() => return Cut::Memory,
                () = sleep(STALLED) => {}
            }
        }
    }
}

impl fmt::Debug for Backlog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backlog").field("stalls", &self.stalled.is_some()).finish_non_exhaustive()
    }
}

impl Stalled {
    fn new(memory: &StreamMemory) -> Self {
        let holder = memory.holder(Held::Receive);
        Self { arrived: Arrived::default(), holder, counted: 0, taken: (0, 0), widened: None }
    }

    /// Whether as much was taken as is taken at most, so that more may wait.
    fn is_full(&self) -> bool {
        self.arrived.len() as u64 >= AHEAD.max(self.holder.window() / AHEAD_PART)
    }

    /// Takes what has arrived, without waiting, until it [is full](Self::is_full).
    async fn fill(&mut self, recv: &mut RecvHalf) -> Result<(), Cut> {
        let mut chunks = [const { Bytes::new() }; CHUNKS];
        while !self.is_full() {
            let read = select! {
                biased;
                read = recv.read_chunks(&mut chunks) => read?,
                () = ready(()) => return Ok(()),
            };
            let Some(count) = read else { return Ok(()) };
            for chunk in &mut chunks[..count] {
                self.taken = (self.taken.0 + chunk.len() as u64, self.taken.1 + 1);
                self.arrived.push_copy(&std::mem::take(chunk));
            }
        }
        Ok(())
    }

    fn count(&mut self, recv: &RecvHalf, writing: u64) {
        let window = if self.is_full() { self.holder.window() } else { 0 };
        match window {
            0 => self.widened = None,
            _ if self.widened.is_none() => self.widened = recv.widen_tunnel(window),
            _ => {}
        }
        let counted = self.arrived.len() as u64 + self.cost(window + writing);
        self.holder.add(counted);
        self.holder.give_back(std::mem::replace(&mut self.counted, counted));
        self.holder.relieve();
    }

    /// Memory that so many bytes take that wait as they arrived. Packets have headers. quinn joins
    /// short pieces once it has allocated two and a half times what they have.
    fn cost(&self, bytes: u64) -> u64 {
        let (taken, chunks) = self.taken;
        if taken < chunks * SHORT { bytes / 2 * 5 } else { bytes / 8 * 9 }
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        self.holder.give_back(self.counted);
    }
}
