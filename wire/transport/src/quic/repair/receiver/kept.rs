//! The latest bytes of streams that are not bulk.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::super::recent::Recent;
use crate::priority::{ALLOWANCE, SHORT};

/// Time after which bytes of a stream that is idle are dropped.
const KEPT_FOR: Duration = Duration::from_secs(2);
/// Maximum number of streams.
const MAX_STREAMS: usize = 256;
/// Bytes beyond those of a stream that is not bulk, for those that the sender's clock forgives.
const MARGIN: u64 = 64 * 1024;

/// The latest bytes of a connection's streams.
#[derive(Debug)]
pub(super) struct Kept {
    streams: HashMap<u64, Stream>,
    cost: usize,
    /// Maximum number of bytes.
    limit: usize,
}

#[derive(Debug)]
struct Stream {
    recent: Recent,
    /// When bytes last arrived.
    last: Instant,
    /// Bytes that count against it, as the sender counts them.
    attained: u64,
}

impl Kept {
    pub(super) fn new(limit: usize) -> Self {
        Self { streams: HashMap::new(), cost: 0, limit }
    }

    pub(super) fn cost(&self) -> usize {
        self.cost
    }

    /// The bytes of a stream.
    pub(super) fn get(&self, stream: u64) -> Option<&Recent> {
        Some(&self.streams.get(&stream)?.recent)
    }

    /// Keeps bytes that arrived, unless their stream is bulk.
    pub(super) fn put(&mut self, now: Instant, id: u64, offset: u64, bytes: &[u8]) {
        if self.streams.len() >= MAX_STREAMS && !self.streams.contains_key(&id) {
            self.drop_oldest();
        }
        let new = || Stream { recent: Recent::default(), last: now, attained: 0 };
        let stream = self.streams.entry(id).or_insert_with(new);
        let elapsed = now.saturating_duration_since(stream.last).as_secs_f64();
        let forgiven = (elapsed * ALLOWANCE as f64) as u64;
        stream.attained = stream.attained.saturating_sub(forgiven) + bytes.len() as u64;
        stream.last = now;
        self.cost -= stream.recent.cost();
        if stream.attained > SHORT + MARGIN {
            stream.attained = stream.attained.min(2 * SHORT);
            stream.recent = Recent::default();
        } else {
            stream.recent.insert(offset, bytes);
        }
        self.cost += stream.recent.cost();
        while self.cost > self.limit {
            self.drop_oldest();
        }
    }

    pub(super) fn forget(&mut self, stream: u64) {
        let cost = self.streams.remove(&stream).map_or(0, |stream| stream.recent.cost());
        self.cost -= cost;
    }

    pub(super) fn expire(&mut self, now: Instant) {
        self.streams.retain(|_, stream| {
            let is_kept = now.saturating_duration_since(stream.last) < KEPT_FOR;
            self.cost -= if is_kept { 0 } else { stream.recent.cost() };
            is_kept
        });
    }

    pub(super) fn clear(&mut self) {
        self.streams.clear();
        self.cost = 0;
    }

    fn drop_oldest(&mut self) {
        let oldest = self.streams.iter().min_by_key(|(_, stream)| stream.last);
        if let Some(id) = oldest.map(|(id, _)| *id) {
            self.forget(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_that_brings_much_is_not_kept_until_it_brings_little() {
        let (mut kept, start) = (Kept::new(1 << 20), Instant::now());
        let mut at = |millis: u64, offset: u64| {
            kept.put(start + Duration::from_millis(millis), 4, offset, &[7; 1400]);
            kept.cost()
        };
        let costs: Vec<_> = (0..300).map(|number| at(number, number * 1400)).collect();
        assert!(costs[100] > 64 * 1024 && costs[299] == 0);
        assert!(at(3000, 300 * 1400) > 0);
        kept.forget(4);
        assert_eq!(kept.cost(), 0);
    }

    #[test]
    fn a_connection_keeps_a_limited_number_of_bytes_and_streams() {
        let (mut kept, start) = (Kept::new(100_000), Instant::now());
        for number in 0..2000 {
            kept.put(start + Duration::from_micros(number), number * 4, 0, &[7; 1400]);
            assert!(kept.cost() <= 100_000);
        }
        assert!(kept.get(1999 * 4).is_some() && kept.get(0).is_none());
        let mut kept = Kept::new(1 << 20);
        for number in 0..2000 {
            kept.put(start, number * 4, 0, &[7]);
        }
        assert_eq!(kept.streams.len(), MAX_STREAMS);
    }

    #[test]
    fn bytes_are_kept_for_a_moment() {
        let (mut kept, start) = (Kept::new(100_000), Instant::now());
        kept.put(start, 0, 0, &[7; 1400]);
        kept.put(start + KEPT_FOR / 2, 4, 0, &[7; 700]);
        kept.expire(start + KEPT_FOR);
        assert!(kept.get(0).is_none() && kept.get(4).is_some());
        assert!((700..800).contains(&kept.cost()));
        kept.clear();
        assert_eq!((kept.cost(), kept.streams.len()), (0, 0));
    }
}
