//! Durations that are recorded too often for a recorder that keeps each sample until its upkeep.

use std::{
    iter,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

/// A histogram of durations, of constant size. Recording takes no lock and no memory.
#[derive(Debug)]
pub struct Durations {
    /// Upper bounds, in seconds, in ascending order.
    bounds: &'static [f64],
    /// Number of durations up to each bound and above the one before; the last has no bound.
    counts: Box<[AtomicU64]>,
    nanos: AtomicU64,
}

impl Durations {
    /// No durations yet. `bounds` are in seconds, in ascending order.
    pub fn new(bounds: &'static [f64]) -> Self {
        let counts = iter::repeat_with(AtomicU64::default).take(bounds.len() + 1).collect();
        Self { bounds, counts, nanos: AtomicU64::new(0) }
    }

    /// Adds a duration.
    pub fn record(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.partition_point(|bound| *bound < seconds);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    /// Each bound with the number of durations up to it; the last bound is infinite.
    pub(super) fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(&self.counts).scan(0, |sum, (bound, count)| {
            *sum += count.load(Ordering::Relaxed);
            Some((bound, *sum))
        })
    }

    /// Sum of all durations, in seconds.
    pub(super) fn sum(&self) -> f64 {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64()
    }
}
