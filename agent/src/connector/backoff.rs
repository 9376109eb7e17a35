//! How long to wait before the next attempt: longer after each failure, and never twice the same,
//! so that a fleet that lost its server does not come back in step. Pure: the caller sleeps and
//! brings the randomness.

use std::time::Duration;

/// Each delay is this many times the one before, unless another factor is given.
const FACTOR: f64 = 1.5;

/// Delays between attempts; never gives up.
#[derive(Clone, Debug)]
pub struct Backoff {
    factor: f64,
    first: Duration,
    cap: Duration,
    next: Duration,
}

impl Backoff {
    /// Delays that grow from about `first` to at most `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        Self::growing_by(FACTOR, first, cap)
    }

    /// The same, each `factor` times the one before.
    pub fn growing_by(factor: f64, first: Duration, cap: Duration) -> Self {
        Self { factor, first, cap, next: first }
    }

    /// The delay after another failure. `random` is from 0 to 1 and chooses within the upper half
    /// of the delay, so that agents spread while each still waits a real while.
    pub fn next(&mut self, random: f64) -> Duration {
        let delay = self.now(random);
        self.next = self.next.min(self.cap).mul_f64(self.factor).min(self.cap);
        delay
    }

    /// The delay that is due now, after what is no further failure.
    pub fn now(&self, random: f64) -> Duration {
        self.next.min(self.cap).mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// Forgets the failures: the attempt succeeded.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_cap_and_stay_there() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(10));
        let delays: Vec<_> = (0..8).map(|_| backoff.next(1.0).as_secs_f64()).collect();
        assert_eq!(delays[..3], [1.0, 1.5, 2.25]);
        assert_eq!(delays[6..], [10.0, 10.0]);
        backoff.reset();
        assert_eq!(backoff.next(1.0), Duration::from_secs(1));
    }

    #[test]
    fn each_delay_is_spread_over_its_upper_half() {
        let mut backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(2));
        assert_eq!(backoff.next(0.0), Duration::from_secs(1));
        assert_eq!(backoff.next(0.5), Duration::from_millis(1500));
        assert_eq!(backoff.next(7.0), Duration::from_secs(2));
    }
}
