//! The memory budget of a process: what it holds for peers that do not read or acknowledge.
//!
//! A chunk of bytes is held from the read that made it until the last reference to it is dropped:
//! when the carrier knows that the peer has it, or when the stream ends. It counts with the memory
//! that was allocated for it.
//!
//! ```text
//!  MemoryBudget      the process: its limit, what is held, by kind
//!    └ TunnelMemory  a tunnel: what its streams hold together
//!        └ Holder    one direction of a stream: its room, and whether it is to be cut
//!            └ chunk bytes that give their memory back when they are dropped
//! ```
//!
//! A holder that asks for room gets half of what its tunnel has left, and a tunnel has what the
//! process has left beyond what the tunnel holds itself. So one stream has at most a quarter of the
//! limit and one tunnel half of it, and however many there are, some is left for the next (dynamic
//! thresholds, Choudhury and Hahne 1998). A holder has room for [`MINIMUM`] as long as the process
//! is below its limit. At the limit all wait, and those that hold most are cut.

mod streams;
mod unread;

use std::{
    fmt,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use crate::Settings;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{
    select,
    sync::{Notify, SetOnce},
    time::{Instant, sleep},
};

pub use self::streams::{StreamCost, StreamRoom};
pub(crate) use self::unread::TunnelUnread;
use self::unread::Unread;

/// Bytes that a stream may hold however little is left, below the limit: enough that it goes on.
pub const MINIMUM: u64 = 4 * 1024;
/// Maximum number of bytes that one direction of a stream holds, however much is left and whatever
/// its peer allows: at 100 ms this is 1.3 Gbit/s.
const MAXIMUM: u64 = 16 * 1024 * 1024;
/// Cost of a chunk beside its bytes: its owner's allocation, and its slot in a queue.
const CHUNK_COST: u64 = 128;
/// Minimum interval of looks at all holders for those to be cut.
const CUT_EVERY: Duration = Duration::from_millis(5);
/// Interval at which a process at its limit looks whether that is over, and cuts holders if not.
const AT_LIMIT: Duration = Duration::from_millis(100);

/// What memory is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Bytes read from local connections, until the peer of the tunnel has them.
    Send,
    /// Bytes that have arrived on streams whose local connections do not take them.
    Receive,
    /// Bytes from Konnectivity's peers that were not read.
    Konnectivity,
    /// What streams cost while they hold no bytes.
    Streams,
}

impl Held {
    /// All kinds.
    pub const ALL: [Self; 4] = [Self::Send, Self::Receive, Self::Konnectivity, Self::Streams];

    /// The kind as a metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Send => "send",
            Self::Receive => "receive",
            Self::Konnectivity => "konnectivity",
            Self::Streams => "streams",
        }
    }
}

/// The memory that a process may hold for its peers.
pub struct MemoryBudget {
    /// Number of bytes; `u64::MAX` without a limit.
    limit: u64,
    /// Number of bytes that may wait for a stream's reader.
    window: u64,
    held: AtomicU64,
    by_kind: [AtomicU64; Held::ALL.len()],
    waits: AtomicU64,
    cuts: AtomicU64,
    holders: Mutex<Holders>,
    unread: Unread,
}

#[derive(Default)]
struct Holders {
    /// All of them; those that are gone leave a slot for the next.
    slots: Vec<Weak<Holder>>,
    free: Vec<usize>,
    /// When one was cut last.
    cut_at: Option<Instant>,
}

impl MemoryBudget {
    /// A budget of `limit` bytes; 0 sets no limit.
    pub fn new(limit: u64) -> Arc<Self> {
        Self::with_window(limit, Settings::default().stream_receive_window)
    }

    /// The same for tunnels whose peers may send `window` bytes ahead of a stream's reader.
    pub fn with_window(limit: u64, window: u32) -> Arc<Self> {
        let limit = if limit == 0 { u64::MAX } else { limit };
        Arc::new(Self {
            limit,
            window: window.into(),
            held: AtomicU64::new(0),
            by_kind: Default::default(),
            waits: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            holders: Mutex::default(),
            unread: Unread::default(),
        })
    }

    /// The limit in bytes; `None` if there is none.
    pub fn limit(&self) -> Option<u64> {
        (self.limit != u64::MAX).then_some(self.limit)
    }

    /// Number of bytes held, of one kind.
    pub fn held(&self, kind: Held) -> u64 {
        self.by_kind[kind as usize].load(Relaxed)
    }

    /// Number of times that a stream waited for room.
    pub fn waits(&self) -> u64 {
        self.waits.load(Relaxed)
    }

    /// Number of streams and tunnels that were cut because the limit was reached.
    pub fn cuts(&self) -> u64 {
        self.cuts.load(Relaxed)
    }

    fn left(&self) -> u64 {
        self.limit.saturating_sub(self.held.load(Relaxed))
    }

    /// Cuts the holders that have most until less than the limit is held.
    fn relieve(&self) {
        self.cut_until(|| self.held.load(Relaxed), self.limit, |_| true);
    }

    /// The same for what was received, which is at most half of the limit: the other half is for
    /// what a tunnel may receive before it is counted. Streams that send adapt to what is left.
    fn relieve_received(&self) {
        let held = || self.held(Held::Receive);
        self.cut_until(held, self.limit / 2, |holder| holder.kind == Held::Receive);
    }

    /// Cuts the largest of these holders until `held`, without those that are cut, is below `limit`.
    fn cut_until(&self, held: impl Fn() -> u64, limit: u64, is_one: impl Fn(&Holder) -> bool) {
        if held() < limit {
            return;
        }
        let mut holders = self.holders.lock();
        let now = Instant::now();
        if holders.cut_at.is_some_and(|at| now < at + CUT_EVERY) {
            return;
        }
        holders.cut_at = Some(now);
        // Dropped without the lock, which the last reference to a holder takes.
        let all: Vec<_> = holders.slots.iter().filter_map(Weak::upgrade).collect();
        drop(holders);
        let mut left = held();
        // What each holds at this moment: it changes meanwhile, and a sort by it would panic.
        let mut largest = Vec::new();
        for holder in all.iter().filter(|holder| is_one(holder)) {
            match (holder.is_cut(), holder.held()) {
                (true, count) => left = left.saturating_sub(count),
                (false, 0) => {}
                (false, count) => largest.push((count, holder)),
            }
        }
        largest.sort_unstable_by_key(|(count, _)| std::cmp::Reverse(*count));
        for (count, holder) in largest {
            if left < limit {
                return;
            }
            left = left.saturating_sub(count);
            self.cuts.fetch_add(1, Relaxed);
            let _ = holder.cut.set(());
        }
    }
}

impl fmt::Debug for MemoryBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryBudget")
            .field("limit", &self.limit())
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

/// What the streams of one tunnel hold together.
#[derive(Debug)]
pub struct TunnelMemory {
    budget: Arc<MemoryBudget>,
    held: AtomicU64,
}

impl TunnelMemory {
    /// The memory of a new tunnel.
    pub fn new(budget: &Arc<MemoryBudget>) -> Arc<Self> {
        Arc::new(Self { budget: budget.clone(), held: AtomicU64::new(0) })
    }

    /// Number of bytes that one of the tunnel's streams may hold now.
    fn share(&self) -> u64 {
        let left = self.budget.left();
        let of_tunnel = left.saturating_sub(self.held.load(Relaxed));
        let share = (of_tunnel / 2).min(MAXIMUM);
        if left > 0 { share.max(MINIMUM) } else { 0 }
    }

    /// One direction of a stream, which holds nothing yet.
    pub fn holder(self: &Arc<Self>, kind: Held) -> Arc<Holder> {
        let mut holders = self.budget.holders.lock();
        let slot = holders.free.pop().unwrap_or(holders.slots.len());
        let holder = Arc::new(Holder {
            tunnel: self.clone(),
            kind,
            slot,
            held: AtomicU64::new(0),
            cut: SetOnce::new(),
            given_back: Notify::new(),
        });
        let weak = Arc::downgrade(&holder);
        match holders.slots.get_mut(slot) {
            Some(free) => *free = weak,
            None => holders.slots.push(weak),
        }
        holder
    }
}

/// The memory of a tunnel's streams, whose budget need not be known yet.
#[derive(Debug, Default)]
pub struct StreamMemory(OnceLock<Arc<TunnelMemory>>);

impl StreamMemory {
    /// The memory of streams that belong to no tunnel.
    pub fn of(budget: &Arc<MemoryBudget>) -> Arc<Self> {
        let memory = Arc::<Self>::default();
        memory.set(budget);
        memory
    }

    /// Takes the memory from this budget, unless a splice has begun before.
    pub(crate) fn set(&self, budget: &Arc<MemoryBudget>) {
        self.0.get_or_init(|| TunnelMemory::new(budget));
    }

    /// One direction of a stream, which holds nothing yet. Without a budget there is no limit.
    pub fn holder(&self, kind: Held) -> Arc<Holder> {
        self.0.get_or_init(|| TunnelMemory::new(&MemoryBudget::new(0))).holder(kind)
    }
}

/// One direction of a stream, and what it holds.
#[derive(Debug)]
pub struct Holder {
    tunnel: Arc<TunnelMemory>,
    kind: Held,
    slot: usize,
    held: AtomicU64,
    /// Set once the holder is to give up what it holds. Apart from `given_back`, which would wake
    /// what waits for it each time that a chunk is acknowledged.
    cut: SetOnce<()>,
    /// Notified when something was given back.
    given_back: Notify,
}

impl Holder {
    /// Number of bytes that it holds.
    pub fn held(&self) -> u64 {
        self.held.load(Relaxed)
    }

    fn is_cut(&self) -> bool {
        self.cut.initialized()
    }

    /// Number of bytes that may be read now; 0 while it must wait.
    pub fn room(&self) -> u64 {
        self.tunnel.share().saturating_sub(self.held())
    }

    /// Waits until there is room. At the limit of the process it has the largest holder cut.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn wait_for_room(&self) {
        if self.room() > 0 {
            return;
        }
        self.budget().waits.fetch_add(1, Relaxed);
        loop {
            let given_back = self.given_back.notified();
            if self.room() > 0 {
                return;
            }
            if self.budget().left() == 0 {
                select! {
                    () = given_back => {}
                    () = sleep(AT_LIMIT) => self.budget().relieve(),
                }
            } else {
                // It holds something, and has room again only once that is given back.
                given_back.await;
            }
        }
    }

    /// Completes when the holder is to give up what it holds.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn cut(&self) {
        self.cut.wait().await;
    }

    /// The contents of the buffer, which is held until the last reference to them is dropped.
    ///
    /// Contents that are much shorter than their buffer are copied.
    pub fn hold(self: &Arc<Self>, buffer: BytesMut) -> Bytes {
        if buffer.len() <= buffer.capacity() / 4 {
            let cost = buffer.len() as u64;
            return self.hold_owner(Box::<[u8]>::from(&*buffer), cost);
        }
        let cost = buffer.capacity() as u64;
        self.hold_owner(buffer, cost)
    }

    /// Bytes that were received, held until the last reference to the result is dropped.
    pub fn hold_bytes(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        let cost = bytes.len() as u64;
        self.hold_owner(bytes, cost)
    }

    fn hold_owner(self: &Arc<Self>, owner: impl AsRef<[u8]> + Send + 'static, cost: u64) -> Bytes {
        let bytes = cost + CHUNK_COST;
        self.add(bytes);
        Bytes::from_owner(HeldChunk { owner, bytes, holder: self.clone() })
    }

    /// Counts bytes that are held, even beyond the limit.
    pub fn add(&self, bytes: u64) {
        let budget = self.budget();
        self.held.fetch_add(bytes, Relaxed);
        self.tunnel.held.fetch_add(bytes, Relaxed);
        budget.by_kind[self.kind as usize].fetch_add(bytes, Relaxed);
        budget.held.fetch_add(bytes, Relaxed);
    }

    /// Number of bytes that a peer may send ahead of a stream's reader.
    pub(crate) fn window(&self) -> u64 {
        self.budget().window
    }

    /// Has the largest holders cut if the process is at its limit, for bytes that came without room.
    pub fn relieve(&self) {
        match self.kind {
            Held::Receive => self.budget().relieve_received(),
            Held::Send | Held::Konnectivity | Held::Streams => self.budget().relieve(),
        }
    }

    /// Counts bytes that are held no more.
    pub fn give_back(&self, bytes: u64) {
        let budget = self.budget();
        self.held.fetch_sub(bytes, Relaxed);
        self.tunnel.held.fetch_sub(bytes, Relaxed);
        budget.by_kind[self.kind as usize].fetch_sub(bytes, Relaxed);
        budget.held.fetch_sub(bytes, Relaxed);
        self.given_back.notify_waiters();
    }

    fn budget(&self) -> &MemoryBudget {
        &self.tunnel.budget
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let mut holders = self.tunnel.budget.holders.lock();
        holders.slots[self.slot] = Weak::new();
        holders.free.push(self.slot);
    }
}

/// Bytes that give their memory back when they are dropped.
struct HeldChunk<T> {
    owner: T,
    bytes: u64,
    holder: Arc<Holder>,
}

impl<T: AsRef<[u8]>> AsRef<[u8]> for HeldChunk<T> {
    fn as_ref(&self) -> &[u8] {
        self.owner.as_ref()
    }
}

impl<T> Drop for HeldChunk<T> {
    fn drop(&mut self) {
        self.holder.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests;
