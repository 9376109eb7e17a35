//! Whose turn it is, and how often there is a turn.

use std::time::Duration;

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
