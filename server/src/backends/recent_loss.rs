//! The share of the packets to an agent that were lost in the last minute.

use std::time::Duration;

use culvert_transport::{Carrier, TunnelStats};
use parking_lot::Mutex;
use tokio::time::Instant;

/// Time between two samples; the share is that of the last one to two of them.
const INTERVAL: Duration = Duration::from_secs(30);
/// Minimum number of packets that make a share.
const MIN_PACKETS: u64 = 20;

/// Samples of the counters of a tunnel.
#[derive(Debug)]
pub(super) struct RecentLoss(Mutex<[Sample; 2]>);

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    sent: u64,
    lost: u64,
}

impl RecentLoss {
    /// Those of a tunnel that has just begun.
    pub(super) fn now() -> Self {
        Self(Mutex::new([Sample { at: Instant::now(), sent: 0, lost: 0 }; 2]))
    }

    /// Samples the counters, if it is time to.
    pub(super) fn sample(&self, stats: &TunnelStats, now: Instant) {
        let mut samples = self.0.lock();
        if now.saturating_duration_since(samples[1].at) >= INTERVAL {
            let sample = Sample { at: now, sent: stats.sent_packets, lost: stats.lost_packets };
            *samples = [samples[1], sample];
        }
    }

    /// The share, in percent; `None` where the carrier does not count packets, or too few were sent.
    pub(super) fn percent(&self, carrier: Carrier, stats: &TunnelStats) -> Option<u8> {
        let [before, _] = *self.0.lock();
        let sent = stats.sent_packets.saturating_sub(before.sent);
        let lost = stats.lost_packets.saturating_sub(before.lost).min(sent);
        let counts = carrier == Carrier::Quic && sent >= MIN_PACKETS;
        counts.then(|| u8::try_from(lost * 100 / sent).unwrap_or(100))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(sent_packets: u64, lost_packets: u64) -> TunnelStats {
        let mut stats = TunnelStats::default();
        (stats.sent_packets, stats.lost_packets) = (sent_packets, lost_packets);
        stats
    }

    #[tokio::test(start_paused = true)]
    async fn losses_of_more_than_a_minute_ago_do_not_count() {
        let (loss, start) = (RecentLoss::now(), Instant::now());
        assert_eq!(loss.percent(Carrier::Quic, &stats(19, 19)), None);
        assert_eq!(loss.percent(Carrier::Quic, &stats(100, 31)), Some(31));
        assert_eq!(loss.percent(Carrier::Tcp, &stats(100, 31)), None);
        loss.sample(&stats(100, 31), start + INTERVAL / 2);
        loss.sample(&stats(1000, 500), start + INTERVAL);
        assert_eq!(loss.percent(Carrier::Quic, &stats(1000, 500)), Some(50));
        loss.sample(&stats(1000, 500), start + INTERVAL * 2);
        assert_eq!(loss.percent(Carrier::Quic, &stats(1100, 501)), Some(1));
    }
}
