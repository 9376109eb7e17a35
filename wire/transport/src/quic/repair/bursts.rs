//! Which writes belong together: those of one stream that follow one another soon.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::code::MAX_BURST;

/// Maximum number of streams whose writes are collected at one time.
const MAX_OPEN: usize = 64;
/// A burst is over this many pauses after its first write, however many follow.
const PAUSES: u32 = 4;

/// Writes of one stream that belong together.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Burst {
    pub(super) stream: u64,
    /// Position of the first byte in the stream.
    pub(super) offset: u64,
    /// The writes, whose bytes follow one another; at most [`MAX_BURST`] of them.
    pub(super) writes: Vec<Bytes>,
    pub(super) length: usize,
    /// Whether the stream ends after them.
    pub(super) is_last: bool,
    /// When the first was written.
    pub(super) first: Instant,
    last: Instant,
}

impl Burst {
    fn end(&self) -> u64 {
        self.offset + self.length as u64
    }

    fn over_at(&self, pause: Duration) -> Instant {
        if self.length == MAX_BURST {
            return self.last;
        }
        (self.last + pause).min(self.first + pause * PAUSES)
    }
}

/// The bursts of a connection's streams that are not over, and those that are over early.
#[derive(Debug, Default)]
pub(super) struct Bursts {
    open: HashMap<u64, Burst>,
    over: Vec<Burst>,
}

impl Bursts {
    /// Adds bytes that were written at this position of the stream.
    pub(super) fn write(&mut self, now: Instant, stream: u64, mut offset: u64, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let Some(burst) = self.burst(now, stream, offset) else { return };
            let part = bytes.split_to(bytes.len().min(MAX_BURST - burst.length));
            offset += part.len() as u64;
            burst.length += part.len();
            burst.writes.push(part);
            burst.last = now;
        }
    }

    /// The stream ends at this position.
    pub(super) fn finish(&mut self, now: Instant, stream: u64, offset: u64) {
        if let Some(burst) = self.burst(now, stream, offset) {
            burst.is_last = true;
        }
    }

    /// The stream was reset: nothing of it is of use any more.
    pub(super) fn forget(&mut self, stream: u64) {
        self.open.remove(&stream);
        self.over.retain(|burst| burst.stream != stream);
    }

    /// When the next burst is over, where a pause is so long.
    pub(super) fn over_at(&self, pause: Duration) -> Option<Instant> {
        let over = self.over.first().map(|burst| burst.first);
        over.or_else(|| self.open.values().map(|burst| burst.over_at(pause)).min())
    }

    /// Takes a burst that is over.
    pub(super) fn take(&mut self, now: Instant, pause: Duration) -> Option<Burst> {
        if !self.over.is_empty() {
            return Some(self.over.remove(0));
        }
        let over = self.open.values().find(|burst| burst.over_at(pause) <= now)?.stream;
        self.open.remove(&over)
    }

    /// The burst that what is written at this position belongs to; `None` if there are too many.
    fn burst(&mut self, now: Instant, stream: u64, offset: u64) -> Option<&mut Burst> {
        let continues = |burst: &Burst| burst.end() == offset && burst.length < MAX_BURST;
        if self.open.get(&stream).is_some_and(|burst| !continues(burst)) {
            self.over.extend(self.open.remove(&stream));
        }
        if self.open.len() + self.over.len() >= MAX_OPEN && !self.open.contains_key(&stream) {
            return None;
        }
        let new = || Burst {
            stream,
            offset,
            writes: Vec::new(),
            length: 0,
            is_last: false,
            first: now,
            last: now,
        };
        Some(self.open.entry(stream).or_insert_with(new))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAUSE: Duration = Duration::from_millis(2);

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn bytes(length: usize) -> Bytes {
        vec![7; length].into()
    }

    #[test]
    fn writes_that_follow_soon_are_one_burst() {
        let (mut bursts, start) = (Bursts::default(), Instant::now());
        bursts.write(start, 4, 100, bytes(10));
        bursts.write(start + millis(1), 4, 110, bytes(20));
        bursts.write(start + millis(1), 8, 0, bytes(1));
        assert_eq!(bursts.over_at(PAUSE), Some(start + millis(3)));
        assert_eq!(bursts.take(start + millis(2), PAUSE), None);
        bursts.forget(8);
        let burst = bursts.take(start + millis(3), PAUSE).unwrap();
        assert_eq!((burst.stream, burst.offset, burst.length), (4, 100, 30));
        assert_eq!(burst.writes, [bytes(10), bytes(20)]);
        assert_eq!((burst.is_last, bursts.over_at(PAUSE)), (false, None));
    }

    #[test]
    fn a_burst_is_over_in_time_even_if_writes_go_on() {
        let (mut bursts, start) = (Bursts::default(), Instant::now());
        for milli in 0..8 {
            bursts.write(start + millis(milli), 0, milli, bytes(1));
        }
        assert_eq!(bursts.over_at(PAUSE), Some(start + millis(8)));
        assert_eq!(bursts.take(start + millis(8), PAUSE).unwrap().length, 8);
    }

    #[test]
    fn long_writes_are_several_bursts_and_gaps_end_one() {
        let (mut bursts, now) = (Bursts::default(), Instant::now());
        bursts.write(now, 0, 0, bytes(MAX_BURST + 5));
        bursts.write(now, 0, 100_000, bytes(1));
        let mut taken = Vec::new();
        while let Some(burst) = bursts.take(now + PAUSE, PAUSE) {
            taken.push((burst.offset, burst.length));
        }
        assert_eq!(taken, [(0, MAX_BURST), (MAX_BURST as u64, 5), (100_000, 1)]);
    }

    #[test]
    fn the_end_of_a_stream_belongs_to_what_was_written_before_it() {
        let (mut bursts, now) = (Bursts::default(), Instant::now());
        bursts.write(now, 0, 0, bytes(5));
        bursts.finish(now, 0, 5);
        bursts.finish(now, 4, 70);
        let mut taken: Vec<_> = std::iter::from_fn(|| bursts.take(now + PAUSE, PAUSE)).collect();
        taken.sort_by_key(|burst| burst.stream);
        let ends: Vec<_> = taken.iter().map(|it| (it.offset, it.length, it.is_last)).collect();
        assert_eq!(ends, [(0, 5, true), (70, 0, true)]);
    }

    #[test]
    fn a_connection_collects_writes_of_few_streams() {
        let (mut bursts, now) = (Bursts::default(), Instant::now());
        for stream in 0..1000 {
            bursts.write(now, stream, 0, bytes(1));
        }
        let taken = std::iter::from_fn(|| bursts.take(now + PAUSE, PAUSE)).count();
        assert_eq!(taken, MAX_OPEN);
    }
}
