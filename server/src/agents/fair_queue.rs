//! What waits for its turn, fair by source.

use std::{
    collections::{HashMap, VecDeque},
    hash::Hash,
};

/// A queue per source, which take turns.
#[derive(Debug)]
pub(in crate::agents) struct FairQueue<S, T> {
    queues: HashMap<S, VecDeque<T>>,
    /// Sources with a queue, the next one first.
    order: VecDeque<S>,
    len: usize,
    max: usize,
}

impl<S: Copy + Eq + Hash, T> FairQueue<S, T> {
    /// An empty queue, for at most `max` items in all.
    pub(in crate::agents) fn new(max: usize) -> Self {
        Self { queues: HashMap::new(), order: VecDeque::new(), len: 0, max }
    }

    /// Whether nothing waits.
    pub(in crate::agents) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of items that wait.
    pub(in crate::agents) fn len(&self) -> usize {
        self.len
    }

    /// Adds an item. If there are too many, the newest of the longest queue is returned.
    pub(in crate::agents) fn push(&mut self, source: S, item: T) -> Option<T> {
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
    pub(in crate::agents) fn pop(&mut self) -> Option<T> {
        let source = *self.order.front()?;
        let item = self.pop_from(source);
        if self.queues.contains_key(&source) {
            self.order.rotate_left(1);
        }
        item
    }

    /// The oldest item of this source.
    pub(in crate::agents) fn pop_from(&mut self, source: S) -> Option<T> {
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
}
