//! The limit of a peer's pings, each of which has to be answered.

use std::time::Duration;

use tokio::time::Instant;

/// Number of pings that may come at once.
const BURST: u32 = 100;
/// Time after which one more may come, and between two pings of this side.
pub(super) const INTERVAL: Duration = Duration::from_millis(50);

/// Counts the pings of one peer. Pure.
#[derive(Debug, Default)]
pub(super) struct PingRate {
    /// When the peer's allowance is whole again.
    whole_at: Option<Instant>,
}

impl PingRate {
    /// Counts a ping at `now`; whether it is within the limit.
    pub(super) fn admit(&mut self, now: Instant) -> bool {
        let whole_at = self.whole_at.map_or(now, |whole_at| whole_at.max(now)) + INTERVAL;
        let is_within = whole_at.saturating_duration_since(now) <= INTERVAL * BURST;
        if is_within {
            self.whole_at = Some(whole_at);
        }
        is_within
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_allowed_and_then_one_ping_per_interval() {
        let (mut rate, start) = (PingRate::default(), Instant::now());
        for _ in 0..BURST {
            assert!(rate.admit(start));
        }
        assert!(!rate.admit(start));
        for count in 1..1000 {
            let now = start + INTERVAL * count;
            assert!(rate.admit(now), "{count}");
            assert!(!rate.admit(now), "{count}");
        }
        let later = start + INTERVAL * 5000;
        assert!((0..BURST).all(|_| rate.admit(later)));
        assert!(!rate.admit(later));
    }
}
