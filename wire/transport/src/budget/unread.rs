//! Bytes that have arrived on tunnels and were not read: those behind gaps, and those whose reader
//! is about to take them.
//!
//! Holders do not count them, because nobody can read what waits behind a gap. Each tunnel may have
//! half of the process's limit of them, which is enough for each honest one, and all tunnels together
//! not much more: if they have, those that have most are cut.

use std::{
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use parking_lot::Mutex;
use tokio::{sync::SetOnce, time::Instant};

use super::{CUT_EVERY, MemoryBudget};

/// What the tunnels of a process have received and not read.
#[derive(Default)]
pub(super) struct Unread {
    /// Number of bytes, with those that holders count.
    bytes: AtomicU64,
    tunnels: Mutex<Tunnels>,
}

#[derive(Default)]
struct Tunnels {
    all: Vec<Weak<TunnelUnread>>,
    /// When tunnels were last looked at.
    looked_at: Option<Instant>,
}

/// What one tunnel has received and not read.
pub(crate) struct TunnelUnread {
    budget: Arc<MemoryBudget>,
    bytes: AtomicU64,
    /// Number of bytes that holders count in place of this.
    counted: AtomicU64,
    cut: SetOnce<()>,
}

impl MemoryBudget {
    /// Counts what a tunnel has received and not read.
    pub(crate) fn count_unread(self: &Arc<Self>) -> Arc<TunnelUnread> {
        let (bytes, counted, cut) = Default::default();
        let tunnel = Arc::new(TunnelUnread { budget: self.clone(), bytes, counted, cut });
        let mut tunnels = self.unread.tunnels.lock();
        tunnels.all.retain(|tunnel| tunnel.strong_count() > 0);
        tunnels.all.push(Arc::downgrade(&tunnel));
        tunnel
    }

    /// Maximum number of bytes of all tunnels: what one may have, and an eighth of the limit; or what
    /// the process may hold beside what holders count, if that is more.
    fn max_unread(&self) -> u64 {
        self.left().max(self.limit / 8 * 5)
    }

    /// Cuts the tunnels that have most until the others are below the maximum.
    fn relieve_unread(&self) {
        let mut tunnels = self.unread.tunnels.lock();
        let now = Instant::now();
        if tunnels.looked_at.is_some_and(|at| now < at + CUT_EVERY) {
            return;
        }
        tunnels.looked_at = Some(now);
        let all: Vec<_> = tunnels.all.iter().filter_map(Weak::upgrade).collect();
        drop(tunnels);
        // What each has at this moment: it changes meanwhile, and a sort by it would panic.
        let uncut = all.iter().filter(|tunnel| !tunnel.is_cut());
        let mut largest: Vec<_> = uncut.map(|tunnel| (tunnel.uncounted(), tunnel)).collect();
        largest.retain(|(count, _)| *count > 0);
        largest.sort_unstable_by_key(|(count, _)| std::cmp::Reverse(*count));
        let mut left = largest.iter().map(|(count, _)| count).sum::<u64>();
        for (count, tunnel) in largest {
            if left <= self.max_unread() {
                return;
            }
            left = left.saturating_sub(count);
            self.cuts.fetch_add(1, Relaxed);
            let _ = tunnel.cut.set(());
        }
    }
}

impl TunnelUnread {
    /// Counts bytes that have arrived.
    pub(crate) fn add(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Relaxed);
        let all = self.budget.unread.bytes.fetch_add(bytes, Relaxed) + bytes;
        if all > self.budget.limit / 8 * 5 {
            self.budget.relieve_unread();
        }
    }

    /// Counts bytes that were read or discarded.
    pub(crate) fn remove(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Relaxed);
        self.budget.unread.bytes.fetch_sub(bytes, Relaxed);
    }

    /// Whether the process has so little of them that bytes may be kept which are of use, but not
    /// needed.
    pub(crate) fn may_keep(&self) -> bool {
        self.budget.unread.bytes.load(Relaxed) < self.budget.limit / 4
    }

    /// Sets the number of bytes that holders count in place of this.
    pub(crate) fn set_counted(&self, bytes: u64) {
        self.counted.store(bytes, Relaxed);
    }

    /// Whether the tunnel is to be closed, because it has most of what was not read.
    pub(crate) fn is_cut(&self) -> bool {
        self.cut.initialized()
    }

    /// Completes when the tunnel is to be closed, because it has most of what was not read.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn cut(&self) {
        self.cut.wait().await;
    }

    fn uncounted(&self) -> u64 {
        self.bytes.load(Relaxed).saturating_sub(self.counted.load(Relaxed))
    }
}

impl fmt::Debug for TunnelUnread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelUnread").field("bytes", &self.bytes).finish_non_exhaustive()
    }
}

impl Drop for TunnelUnread {
    fn drop(&mut self) {
        self.budget.unread.bytes.fetch_sub(*self.bytes.get_mut(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Held, TunnelMemory},
        *,
    };

    const LIMIT: u64 = 8 << 20;
    const MIB: u64 = 1 << 20;

    /// Lets time pass, so that tunnels are looked at again.
    async fn add(tunnel: &TunnelUnread, bytes: u64) {
        tokio::time::sleep(CUT_EVERY).await;
        tunnel.add(bytes);
    }

    #[tokio::test(start_paused = true)]
    async fn one_tunnel_may_have_half_and_of_several_those_that_have_most_are_cut() {
        let budget = MemoryBudget::new(LIMIT);
        let [first, second, honest] = [(); 3].map(|()| budget.count_unread());
        add(&first, LIMIT / 2).await;
        add(&honest, MIB / 2).await;
        assert!(!first.is_cut());
        add(&second, 3 * MIB).await;
        assert!(!first.is_cut(), "the process holds nothing else");
        add(&second, MIB).await;
        assert!(first.is_cut() || second.is_cut());
        assert!(!honest.is_cut() && first.is_cut() != second.is_cut(), "{first:?} {second:?}");
        assert_eq!(budget.cuts(), 1);
        // What is cut leaves room for others before it is gone.
        add(&honest, MIB / 2).await;
        assert_eq!(budget.cuts(), 1);
        drop((first, second));
        assert_eq!(budget.unread.bytes.load(Relaxed), MIB);
        honest.remove(MIB);
        assert_eq!(budget.unread.bytes.load(Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_holders_have_leaves_less_and_what_they_count_is_not_counted_twice() {
        let budget = MemoryBudget::new(LIMIT);
        let [first, second] = [(); 2].map(|()| budget.count_unread());
        add(&first, 3 * MIB).await;
        add(&second, 3 * MIB).await;
        assert!(!first.is_cut() && !second.is_cut());
        let holder = TunnelMemory::new(&budget).holder(Held::Receive);
        holder.add(4 * MIB);
        first.set_counted(3 * MIB);
        add(&second, 1).await;
        assert!(!first.is_cut() && !second.is_cut());
        first.set_counted(0);
        add(&second, 1).await;
        assert!(second.is_cut() && !first.is_cut());
        holder.give_back(4 * MIB);
    }
}
