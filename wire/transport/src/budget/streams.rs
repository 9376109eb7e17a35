//! The memory that streams cost while they hold no bytes.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use super::{Held, MemoryBudget};

/// Memory of a stream that holds nothing, in bytes: its tasks, its socket, and the carrier's state.
const COST: u64 = 12 * 1024;

/// Admits streams as long as what they cost is at most half of the process's limit. The other half
/// is for what they hold.
#[derive(Clone, Debug)]
pub struct StreamRoom {
    budget: Arc<MemoryBudget>,
    cost: u64,
}

impl StreamRoom {
    /// Room for streams whose local side costs `more` bytes than a socket.
    pub fn new(budget: &Arc<MemoryBudget>, more: u64) -> Self {
        Self { budget: budget.clone(), cost: COST + more }
    }

    /// Room for one more stream, until the result is dropped; `None` if there is none.
    pub fn take(&self) -> Option<StreamCost> {
        let Self { budget, cost } = self;
        let of_streams = &budget.by_kind[Held::Streams as usize];
        let limit = budget.limit / 2;
        let add = |taken: u64| taken.checked_add(*cost).filter(|taken| *taken <= limit);
        of_streams.fetch_update(Relaxed, Relaxed, add).ok()?;
        budget.held.fetch_add(*cost, Relaxed);
        Some(StreamCost(self.clone()))
    }
}

/// What one stream costs. Gives it back when it is dropped.
pub struct StreamCost(StreamRoom);

impl Drop for StreamCost {
    fn drop(&mut self) {
        let StreamRoom { budget, cost } = &self.0;
        budget.by_kind[Held::Streams as usize].fetch_sub(*cost, Relaxed);
        budget.held.fetch_sub(*cost, Relaxed);
    }
}

impl fmt::Debug for StreamCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("StreamCost").field(&self.0.cost).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_cost_at_most_half_of_the_limit_and_give_it_back() {
        let budget = MemoryBudget::new(8 * COST);
        let room = StreamRoom::new(&budget, 0);
        let mut streams: Vec<_> = (0..4).map(|_| room.take().unwrap()).collect();
        assert!(room.take().is_none());
        assert_eq!((budget.held(Held::Streams), budget.left()), (4 * COST, 4 * COST));
        streams.pop();
        assert!(StreamRoom::new(&budget, 1).take().is_none());
        streams.push(room.take().unwrap());
        drop(streams);
        assert_eq!((budget.held(Held::Streams), budget.left()), (0, 8 * COST));
    }

    #[test]
    fn without_a_limit_there_is_room_for_all_streams() {
        let room = StreamRoom::new(&MemoryBudget::new(0), 0);
        let streams: Vec<_> = (0..10_000).filter_map(|_| room.take()).collect();
        assert_eq!(streams.len(), 10_000);
    }
}
