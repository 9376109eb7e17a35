//! What the path loses, as the sender knows it.

use std::time::{Duration, Instant};

/// Time after a loss for which the path counts as lossy.
const MEMORY: Duration = Duration::from_secs(60);
/// Interval at which the path's counters are read.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);
/// Time after which a packet counts half in the share of those that are lost, in seconds.
const HALF_LIFE: f64 = 15.0;
/// Share of packets that are lost before it is known.
const PRIOR: f64 = 0.01;
/// Number of packets that count as much as the prior.
const PRIOR_PACKETS: f64 = 50.0;
/// Bounds of the share. Beyond the upper one, repair would be the larger part of what is sent.
const BOUNDS: (f64, f64) = (0.005, 0.25);
/// A copy follows the first after one part in so many of a round trip: late enough not to be lost
/// with it, soon enough not to matter.
const PAUSE_SHARE: u32 = 32;
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(10);

/// What is known of a path.
#[derive(Debug, Default)]
pub(super) struct Path {
    sampled: Option<Instant>,
    lost_packets: u64,
    lost_bytes: u64,
    sent_bytes: u64,
    lossy_until: Option<Instant>,
    /// Bytes that were lost and sent lately.
    lost: f64,
    sent: f64,
    mtu: u16,
    rtt: Duration,
    cwnd: u64,
}

impl Path {
    /// Reads the path's counters, if it is time for that.
    #[expect(clippy::cast_precision_loss, reason = "bytes of some seconds")]
    pub(super) fn sample(&mut self, now: Instant, read: impl FnOnce() -> quinn::ConnectionStats) {
        let elapsed = self.sampled.map(|last| now.saturating_duration_since(last));
        if elapsed.is_some_and(|elapsed| elapsed < SAMPLE_INTERVAL) {
            return;
        }
        self.sampled = Some(now);
        let stats = read();
        let (path, sent_bytes) = (stats.path, stats.udp_tx.bytes);
        if path.lost_packets > self.lost_packets {
            self.lossy_until = Some(now + MEMORY);
        }
        let kept = 0.5_f64.powf(elapsed.unwrap_or_default().as_secs_f64() / HALF_LIFE);
        let lost = path.lost_bytes.saturating_sub(self.lost_bytes);
        let sent = sent_bytes.saturating_sub(self.sent_bytes);
        self.lost = self.lost * kept + lost as f64;
        self.sent = self.sent * kept + sent as f64;
        (self.lost_packets, self.lost_bytes) = (path.lost_packets, path.lost_bytes);
        self.sent_bytes = sent_bytes;
        (self.mtu, self.rtt, self.cwnd) = (path.current_mtu, path.rtt, path.cwnd);
    }

    /// Whether the path lost something lately.
    pub(super) fn is_lossy(&self, now: Instant) -> bool {
        self.lossy_until.is_some_and(|until| now <= until)
    }

    /// Share of packets that it loses.
    pub(super) fn loss(&self) -> f64 {
        let prior = PRIOR_PACKETS * f64::from(self.mtu.max(1));
        ((self.lost + prior * PRIOR) / (self.sent + prior)).clamp(BOUNDS.0, BOUNDS.1)
    }

    /// How long a copy follows after the first.
    pub(super) fn pause(&self) -> Duration {
        (self.rtt / PAUSE_SHARE).clamp(PAUSE_MIN, PAUSE_MAX)
    }

    /// Largest UDP payload, in bytes.
    pub(super) fn mtu(&self) -> usize {
        self.mtu.into()
    }

    /// How long so many bytes take to leave, at the rate that the congestion window means.
    #[expect(clippy::cast_precision_loss, reason = "a burst, and a window of some megabytes")]
    pub(super) fn time_of(&self, bytes: usize) -> Duration {
        self.rtt.mul_f64((bytes as f64 / self.cwnd.max(1) as f64).min(1.0))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Counters of a path.
    pub(in super::super) fn counters(
        rtt: u64,
        lost_packets: u64,
        sent_bytes: u64,
    ) -> quinn::ConnectionStats {
        let mut stats = quinn::ConnectionStats::default();
        stats.path.rtt = Duration::from_millis(rtt);
        stats.path.current_mtu = 1400;
        stats.path.cwnd = 1 << 20;
        stats.path.lost_packets = lost_packets;
        stats.path.lost_bytes = lost_packets * 1400;
        stats.udp_tx.bytes = sent_bytes;
        stats
    }

    #[test]
    fn a_path_is_lossy_for_a_minute_after_a_loss() {
        let start = Instant::now();
        let mut path = Path::default();
        path.sample(start, || counters(50, 0, 0));
        assert!(!path.is_lossy(start));
        let later = start + SAMPLE_INTERVAL;
        path.sample(later, || counters(50, 1, 1400));
        assert!(path.is_lossy(later + MEMORY));
        assert!(!path.is_lossy(later + MEMORY + Duration::from_millis(1)));
        path.sample(later, || panic!("it was just read"));
    }

    #[test]
    fn the_share_of_lost_packets_is_followed() {
        let (mut path, mut now) = (Path::default(), Instant::now());
        let mut sample = |lost, sent| {
            now += Duration::from_secs(1);
            path.sample(now, || counters(50, lost, sent * 1400));
            path.loss()
        };
        assert!((sample(0, 10) - 0.01).abs() < 0.002, "little is known");
        let last = (1..=100).map(|second| sample(second * 5, second * 100)).last().unwrap();
        assert!((0.045..0.05).contains(&last), "{last}");
        let last = (1..=100).map(|second| sample(500, 10_000 + second * 100)).last().unwrap();
        assert!(last < 0.01, "{last}");
        assert!(sample(1_000_000, 1_000_000) <= 0.25);
    }

    #[test]
    fn a_copy_follows_soon_and_not_at_once() {
        for (rtt, pause) in [(1, 1), (64, 2), (2_000, 10)] {
            let mut path = Path::default();
            path.sample(Instant::now(), || counters(rtt, 0, 0));
            assert_eq!(path.pause(), Duration::from_millis(pause));
        }
    }
}
