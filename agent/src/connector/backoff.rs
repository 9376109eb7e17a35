//! Delays between attempts: longer after each failure, and random, so that the agents that lost one
//! server do not come back together. Pure: the caller sleeps and brings the randomness.

use std::time::Duration;

/// Ratio of each delay to the one before, unless another is given.
const FACTOR: f64 = 1.5;

/// Growing delays between attempts. There is no last one.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    factor: f64,
    first: Duration,
    cap: Duration,
    next: Duration,
}

impl Backoff {
    /// Delays that grow from about `first` to at most `cap`.
    pub(crate) fn new(first: Duration, cap: Duration) -> Self {
        Self::growing_by(FACTOR, first, cap)
    }

    /// The same, where each delay is `factor` times the one before.
    pub(crate) fn growing_by(factor: f64, first: Duration, cap: Duration) -> Self {
        Self { factor, first, cap, next: first }
    }

    /// The delay after one more failure. `random`, from 0 to 1, chooses within the upper half of
    /// the delay, so that agents spread and none comes back at once.
    pub(crate) fn next(&mut self, random: f64) -> Duration {
        let delay = self.now(random);
        self.next = self.next.min(self.cap).mul_f64(self.factor).min(self.cap);
        delay
    }

    /// The delay that [`next`](Self::next) would give, without counting a failure.
    pub(crate) fn now(&self, random: f64) -> Duration {
        self.next.min(self.cap).mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// Starts again at the first delay, after a success.
    pub(crate) fn reset(&mut self) {
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
