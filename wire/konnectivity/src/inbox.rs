//! Bytes that a Konnectivity peer has sent on one connection and that its reader has not taken yet.
//!
//! Konnectivity has no window per connection. A reader that stalls would therefore stop all other
//! connections of the peer, so it is cut off once [`HARD_LIMIT`] bytes wait for it. A reader that
//! is slower than the peer, but works, slows the peer down instead: above [`SOFT_LIMIT`] the task
//! that fills the inbox waits for it, [`PATIENCE`] at a time. All inboxes of a peer together have
//! a limit too.

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use culvert_transport::{budget::Holder, splice::LocalFault};
use culvert_wire::{bounded::PeerText, code::StreamCode};
use parking_lot::{Mutex, MutexGuard};
use tokio::{
    select,
    sync::Notify,
    time::{Instant, timeout_at},
};

/// Number of waiting bytes above which the peer is slowed down for a working reader.
const SOFT_LIMIT: usize = 1024 * 1024;
/// Maximum number of bytes that wait for one reader.
const HARD_LIMIT: usize = 16 * 1024 * 1024;
/// Time for which the peer is slowed down for a reader that takes nothing. It bounds how long one
/// connection delays the others each time that it stalls.
const PATIENCE: Duration = Duration::from_millis(50);
/// Cost of a waiting chunk beside its bytes, in bytes.
const CHUNK_COST: usize = 64;
/// Maximum number of bytes that the reader takes at once. It also sets how often a working reader
/// is seen to work.
const MAX_TAKE: usize = 16 * 1024;

/// End of the peer's half of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// In order, after everything that the peer sent.
    Finished,
    /// Early; bytes that were not taken are dropped.
    Cut {
        /// Code for the other side of the stream.
        code: StreamCode,
        /// Text for logs and users.
        reason: PeerText,
    },
}

/// Number of bytes that wait in all inboxes of one peer. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Waiting(Arc<AtomicUsize>);

impl Waiting {
    pub(super) fn bytes(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

/// A queue between the Konnectivity peer's one stream and one connection's reader.
#[derive(Debug)]
pub struct Inbox {
    state: Mutex<State>,
    changed: Notify,
    taken: Notify,
    waiting: Waiting,
    /// Holds what waits in the process's memory.
    holder: Arc<Holder>,
}

#[derive(Debug)]
struct State {
    chunks: VecDeque<Bytes>,
    len: usize,
    end: Option<End>,
    taken_at: Instant,
}

impl Inbox {
    /// An empty inbox. `waiting` counts the bytes in all inboxes of the peer.
    pub(super) fn new(waiting: Waiting, holder: Arc<Holder>) -> Self {
        let state = State { chunks: VecDeque::new(), len: 0, end: None, taken_at: Instant::now() };
        let state = Mutex::new(state);
        Self { state, changed: Notify::new(), taken: Notify::new(), waiting, holder }
    }

    /// Adds bytes from the peer. Above [`HARD_LIMIT`] the reader is cut off.
    pub(super) fn push(&self, bytes: Bytes) {
        self.change(|state| {
            if state.end.is_some() || bytes.is_empty() {
                return;
            }
            if state.held() + bytes.len() > HARD_LIMIT {
                let reason = format!("{HARD_LIMIT} bytes wait and are not read");
                let reason = PeerText::truncated(reason);
                state.cut(StreamCode::OVERLOADED, reason);
            } else {
                state.len += bytes.len();
                state.chunks.push_back(bytes);
            }
        });
        self.changed.notify_one();
        self.holder.relieve();
    }

    /// Number of bytes that wait, with the cost of their chunks.
    pub(super) fn held(&self) -> usize {
        self.state().held()
    }

    /// Waits while more than [`SOFT_LIMIT`] bytes wait and the reader works.
    ///
    /// # Cancel safety
    /// Cancel safe: it only waits.
    pub(super) async fn pace(&self) {
        loop {
            let taken = self.taken.notified();
            let patience = {
                let state = self.state();
                if state.len <= SOFT_LIMIT || state.end.is_some() {
                    return;
                }
                state.taken_at + PATIENCE
            };
            if timeout_at(patience, taken).await.is_err() {
                return;
            }
        }
    }

    /// Ends the peer's half of the connection. Only the first end counts.
    pub fn end(&self, end: End) {
        self.change(|state| match end {
            _ if state.end.is_some() => {}
            End::Finished => state.end = Some(End::Finished),
            End::Cut { code, reason } => state.cut(code, reason),
        });
        self.changed.notify_one();
        self.taken.notify_one();
    }

    /// The next bytes, or `None` after an end in order.
    ///
    /// # Errors
    /// If the half was cut.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is taken before it completes.
    pub(super) async fn take(&self) -> Result<Option<Bytes>, LocalFault> {
        loop {
            let changed = self.changed.notified();
            if let Some(bytes) = self.change(State::take) {
                self.taken.notify_one();
                return Ok(Some(bytes));
            }
            match &self.state().end {
                Some(End::Finished) => return Ok(None),
                Some(End::Cut { code, reason }) => return Err(fault(*code, reason)),
                None => {}
            }
            select! {
                () = changed => {}
                () = self.holder.cut() => self.give_up(),
            }
        }
    }

    /// Cuts the half because the process has no more memory.
    fn give_up(&self) {
        let reason = PeerText::lossy(b"the process has no more memory for what is not read");
        self.end(End::Cut { code: StreamCode::OVERLOADED, reason });
    }

    /// Completes when the half is cut.
    ///
    /// # Cancel safety
    /// Cancel safe: it only waits.
    pub(super) async fn cut(&self) -> LocalFault {
        loop {
            let changed = self.changed.notified();
            if let Some(End::Cut { code, reason }) = &self.state().end {
                return fault(*code, reason);
            }
            select! {
                () = changed => {}
                () = self.holder.cut() => self.give_up(),
            }
        }
    }

    /// Changes the state, and the count of all inboxes with it.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state();
        let before = state.held();
        let result = change(&mut state);
        let after = state.held();
        // Added before it is subtracted, so that the count never falls below zero.
        self.waiting.0.fetch_add(after, Ordering::Relaxed);
        self.waiting.0.fetch_sub(before, Ordering::Relaxed);
        self.holder.add(after as u64);
        self.holder.give_back(before as u64);
        result
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let held = self.held();
        self.waiting.0.fetch_sub(held, Ordering::Relaxed);
        self.holder.give_back(held as u64);
    }
}

impl State {
    fn held(&self) -> usize {
        self.len + self.chunks.len() * CHUNK_COST
    }

    fn cut(&mut self, code: StreamCode, reason: PeerText) {
        self.chunks.clear();
        self.len = 0;
        self.end = Some(End::Cut { code, reason });
    }

    /// The next bytes, with small chunks joined.
    fn take(&mut self) -> Option<Bytes> {
        let mut first = self.chunks.pop_front()?;
        let more = |next: &Bytes, len: usize| len + next.len() <= MAX_TAKE;
        if self.chunks.front().is_some_and(|next| more(next, first.len())) {
            let mut joined = BytesMut::with_capacity(MAX_TAKE);
            joined.extend_from_slice(&first);
            while let Some(next) = self.chunks.pop_front_if(|next| more(next, joined.len())) {
                joined.extend_from_slice(&next);
            }
            first = joined.freeze();
        }
        if first.len() > MAX_TAKE {
            self.chunks.push_front(first.split_off(MAX_TAKE));
        }
        self.len -= first.len();
        self.taken_at = Instant::now();
        Some(first)
    }
}

fn fault(code: StreamCode, reason: &PeerText) -> LocalFault {
    LocalFault { code, source: io::Error::new(io::ErrorKind::ConnectionReset, reason.to_string()) }
}

#[cfg(test)]
mod tests {
    use culvert_transport::budget::{Held, MemoryBudget, TunnelMemory};

    use super::*;

    fn holder() -> Arc<Holder> {
        TunnelMemory::new(&MemoryBudget::new(0)).holder(Held::Konnectivity)
    }

    fn of(len: usize) -> Bytes {
        Bytes::from(vec![7; len])
    }

    #[tokio::test]
    async fn bytes_are_taken_in_order_and_then_the_end() {
        let inbox = Inbox::new(Waiting::default(), holder());
        inbox.push(Bytes::from_static(b"one "));
        inbox.push(Bytes::from_static(b"two"));
        inbox.push(of(40_000));
        inbox.end(End::Finished);
        inbox.push(Bytes::from_static(b"late"));
        let mut all = Vec::new();
        while let Some(bytes) = inbox.take().await.unwrap() {
            assert!(bytes.len() <= MAX_TAKE);
            all.extend_from_slice(&bytes);
        }
        assert_eq!((&all[..7], all.len()), (&b"one two"[..], 40_007));
    }

    #[tokio::test]
    async fn a_reader_that_is_too_far_behind_is_cut_off() {
        let inbox = Inbox::new(Waiting::default(), holder());
        for _ in 0..15 {
            inbox.push(of(1 << 20));
        }
        assert_eq!(inbox.take().await.unwrap().unwrap().len(), MAX_TAKE);
        inbox.push(of(1 << 20));
        inbox.push(of(1 << 20));
        assert_eq!(inbox.take().await.unwrap_err().code, StreamCode::OVERLOADED);
        assert_eq!(inbox.cut().await.code, StreamCode::OVERLOADED);
    }

    #[tokio::test]
    async fn what_waits_is_held_by_the_process_and_the_largest_inbox_is_cut_at_its_limit() {
        let budget = MemoryBudget::new(100_000);
        let memory = TunnelMemory::new(&budget);
        let inbox = || Inbox::new(Waiting::default(), memory.holder(Held::Konnectivity));
        let (small, large) = (inbox(), inbox());
        small.push(of(30_000));
        assert_eq!(budget.held(Held::Konnectivity), 30_000 + CHUNK_COST as u64);
        large.push(of(69_000));
        assert_eq!(budget.cuts(), 0);
        large.push(of(10_000));
        assert_eq!(budget.cuts(), 1);
        assert_eq!(large.cut().await.code, StreamCode::OVERLOADED);
        assert_eq!(budget.held(Held::Konnectivity), 30_000 + CHUNK_COST as u64);
        assert_eq!(small.take().await.unwrap().unwrap().len(), MAX_TAKE);
        drop((small, large));
        assert_eq!(budget.held(Held::Konnectivity), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_peer_waits_for_a_working_reader_and_not_for_a_stalled_one() {
        let inbox = Inbox::new(Waiting::default(), holder());
        inbox.push(of(SOFT_LIMIT + 2 * MAX_TAKE));
        let begun = Instant::now();
        // Without a read the peer waits once, and then no more.
        inbox.pace().await;
        assert_eq!(begun.elapsed(), PATIENCE);
        inbox.pace().await;
        assert_eq!(begun.elapsed(), PATIENCE);
        // With reads it waits until there is room.
        let reads = async {
            inbox.take().await.unwrap();
            tokio::time::sleep(PATIENCE / 2).await;
            inbox.take().await.unwrap();
        };
        tokio::join!(biased; reads, inbox.pace());
        assert_eq!(begun.elapsed(), PATIENCE + PATIENCE / 2);
    }
}
