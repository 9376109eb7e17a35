//! What waits for its turn, fair by source, and how often there is a turn.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
    time::Duration,
};

use tokio::time::Instant;

use crate::agents::unadmitted::Source;

/// Whose turn it is. Sources take turns, however much one of them asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Turn {
    /// Of a network.
    Of(Source),
    /// Of any network, with a token of another issuer than those of the tokens accepted so far.
    OtherIssuer,
    /// Of the agents that are connected, whose tokens are reviewed again.
    Again,
}

/// A queue per source, which take turns.
#[derive(Debug)]
pub(super) struct FairQueue<S, T> {
    queues: HashMap<S, VecDeque<T>>,
    /// Sources with a queue, the next one first.
    order: VecDeque<S>,
    len: usize,
    max: usize,
}

impl<S: Copy + Eq + Hash, T> FairQueue<S, T> {
    /// An empty queue, for at most `max` items in all.
    pub(super) fn new(max: usize) -> Self {
        Self { queues: HashMap::new(), order: VecDeque::new(), len: 0, max }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds an item. If there are too many, the newest of the longest queue is returned.
    pub(super) fn push(&mut self, source: S, item: T) -> Option<T> {
        let queue = self.queues.entry(source).or_insert_with(|| {
            self.order.push_back(source);
            VecDeque::new()
        });
        queue.push_back(item);
        self.len += 1;
        if self.len <= self.max {
            return None;
        }
        let (longest, _) = self.queues.iter().max_by_key(|(_, queue)| queue.len())?;
        let longest = *longest;
        self.take(longest, VecDeque::pop_back)
    }

    /// The next item of the source whose turn it is.
    pub(super) fn pop(&mut self) -> Option<T> {
        let source = *self.order.front()?;
        let item = self.pop_from(source);
        if self.queues.contains_key(&source) {
            self.order.rotate_left(1);
        }
        item
    }

    /// The oldest item of this source.
    pub(super) fn pop_from(&mut self, source: S) -> Option<T> {
        self.take(source, VecDeque::pop_front)
    }

    fn take(&mut self, source: S, end: impl Fn(&mut VecDeque<T>) -> Option<T>) -> Option<T> {
        let queue = self.queues.get_mut(&source)?;
        let item = end(queue);
        if queue.is_empty() {
            self.queues.remove(&source);
            self.order.retain(|other| *other != source);
        }
        self.len -= usize::from(item.is_some());
        item
    }
}

/// A rate with a burst: a bucket that is full at first.
#[derive(Debug)]
pub(super) struct Pace {
    interval: Duration,
    /// Time that a full bucket is worth, without its last turn.
    tolerance: Duration,
    /// When the bucket is full again.
    full_at: Instant,
}

impl Pace {
    /// `per_second` turns per second, and `burst` of them at once.
    pub(super) fn new(per_second: f32, burst: u32, now: Instant) -> Self {
        let interval = Duration::from_secs_f64(f64::from(per_second).recip());
        Self { interval, tolerance: interval * burst.saturating_sub(1), full_at: now }
    }

    /// Time until the next turn; zero when there is one.
    pub(super) fn wait(&self, now: Instant) -> Duration {
        self.full_at.saturating_duration_since(now).saturating_sub(self.tolerance)
    }

    /// Takes a turn.
    pub(super) fn take(&mut self, now: Instant) {
        self.full_at = self.full_at.max(now) + self.interval;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_take_turns_and_each_keeps_its_order() {
        let mut queue = FairQueue::new(100);
        for item in 0..5 {
            assert_eq!(queue.push('a', ('a', item)), None);
        }
        queue.push('b', ('b', 0));
        queue.push('c', ('c', 0));
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        let expected = [('a', 0), ('b', 0), ('c', 0), ('a', 1), ('a', 2), ('a', 3), ('a', 4)];
        assert_eq!(order, expected);
        assert!(queue.is_empty());
        assert!(queue.queues.is_empty() && queue.order.is_empty(), "nothing is left of a source");
    }

    #[test]
    fn a_full_queue_drops_the_newest_of_the_source_with_the_most() {
        let mut queue = FairQueue::new(4);
        for item in 0..4 {
            assert_eq!(queue.push('a', ('a', item)), None);
        }
        assert_eq!(queue.push('b', ('b', 0)), Some(('a', 3)));
        assert_eq!(queue.push('b', ('b', 1)), Some(('a', 2)));
        assert_eq!(queue.pop_from('b'), Some(('b', 0)));
        assert_eq!(queue.pop_from('c'), None);
        let order: Vec<_> = std::iter::from_fn(|| queue.pop()).collect();
        assert_eq!(order, [('a', 0), ('b', 1), ('a', 1)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pace_allows_a_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut pace = Pace::new(10.0, 3, start);
        let mut turns = Vec::new();
        for _ in 0..5 {
            let now = start + turns.last().copied().unwrap_or_default();
            let at = now + pace.wait(now);
            pace.take(at);
            turns.push(at - start);
        }
        let millis: Vec<_> = turns.iter().map(Duration::as_millis).collect();
        assert_eq!(millis, [0, 0, 0, 100, 200]);
        let later = start + Duration::from_secs(60);
        for _ in 0..3 {
            assert_eq!(pace.wait(later), Duration::ZERO);
            pace.take(later);
        }
        assert_eq!(pace.wait(later), Duration::from_millis(100));
    }
}
