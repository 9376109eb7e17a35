//! When the peer of a tunnel is suspected to be gone: it does not answer, or the network reports that
//! it cannot be reached. Pure: the caller brings time and the carrier's measurements.
//!
//! QUIC and TCP themselves wait for a silent peer for the whole idle time-out, because they have no
//! other path. An agent has: the other carrier, or another connection, which is also one from another
//! address of the node. It tries them while the old tunnel stays, so a suspicion that proves wrong
//! costs one handshake.
//!
//! An idle tunnel has nothing that could remain unacknowledged but its keep-alive, so the time until
//! its silence is noticed is that interval, and at most two seconds more on short paths. Servers are
//! often lost together, so the pings of several are spread: see [`Sweep`](super::sweep::Sweep).

use std::time::Duration;

use culvert_transport::{Carrier, TunnelStats};
use tokio::time::Instant;

/// Interval of the checks while the tunnel carries streams. Silence is noticed up to three intervals
/// later than the limits below say.
const BUSY_INTERVAL: Duration = Duration::from_millis(75);
/// Interval of the checks of a tunnel without streams.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);
/// Time for the peer to acknowledge something, and then again to answer a ping. Both together are
/// 1.5 s, so that dials have another tunnel within 3 s. Long paths have [`ANSWER_ROUND_TRIPS`]
/// instead.
const ANSWER_LIMIT: Duration = Duration::from_millis(750);
/// The same over TCP, whose retransmissions begin after 200 ms and a round trip, and are twice as far
/// apart each time: two fit.
const ANSWER_LIMIT_TCP: Duration = Duration::from_secs(1);
/// Minimum time for the answer, in round trips: a lost packet can be repaired twice within it.
const ANSWER_ROUND_TRIPS: u32 = 6;
/// Share of a round trip for which packets that arrive after a report of the network prove nothing:
/// they were sent before. An answer takes a whole round trip.
const REFUSED_SHARE: f64 = 0.75;
/// Number of checks per round trip after a report, so that at least one falls between the two.
const REFUSED_CHECKS: u32 = 8;
/// Shortest and longest interval of those checks.
const REFUSED_INTERVAL_MIN: Duration = Duration::from_millis(1);
const REFUSED_INTERVAL_MAX: Duration = Duration::from_millis(25);
/// Time for which streams may be quiet before the peer is pinged.
const QUIET_LIMIT: Duration = Duration::from_secs(2);

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The peer answers, or has time left to.
    Fine,
    /// The peer is to be pinged.
    Ask,
    /// The peer has not answered a ping.
    Silent,
    /// The network reports that the peer cannot be reached, and nothing came from it since.
    Refused,
}

/// Watches the peer of one tunnel.
#[derive(Clone, Debug)]
pub(crate) struct Liveness {
    received_bytes: u64,
    /// Number of sent frames that the peer must acknowledge, when bytes last came from it.
    eliciting_frames: u64,
    heard_at: Instant,
    asked_at: Option<Instant>,
    refused: Option<Refused>,
    keep_alive_interval: Option<Duration>,
    /// Time for the peer to answer on a short path.
    answer_limit: Duration,
}

/// A report of the network that the peer cannot be reached.
#[derive(Clone, Copy, Debug)]
struct Refused {
    at: Instant,
    rtt: Duration,
}

impl Liveness {
    /// Watches a tunnel over `carrier` whose peer has just answered. While it is idle its carrier
    /// pings the peer at this interval, if there is one.
    pub(crate) fn new(
        carrier: Carrier,
        now: Instant,
        stats: &TunnelStats,
        keep_alive_interval: Option<Duration>,
    ) -> Self {
        let answer_limit = match carrier {
            Carrier::Quic => ANSWER_LIMIT,
            Carrier::Tcp | Carrier::Grpc => ANSWER_LIMIT_TCP,
        };
        let TunnelStats { received_bytes, eliciting_frames, .. } = *stats;
        Self {
            received_bytes,
            eliciting_frames,
            heard_at: now,
            asked_at: None,
            refused: None,
            keep_alive_interval,
            answer_limit,
        }
    }

    /// Records that bytes came from the peer.
    fn on_heard(&mut self, now: Instant, stats: &TunnelStats) {
        self.received_bytes = stats.received_bytes;
        self.eliciting_frames = stats.eliciting_frames;
        self.heard_at = now;
        (self.asked_at, self.refused) = (None, None);
    }

    /// Time until the next check of a tunnel that carries `streams` streams.
    pub(crate) fn interval(&self, streams: usize) -> Duration {
        match (self.refused, streams) {
            (Some(Refused { rtt, .. }), _) => {
                (rtt / REFUSED_CHECKS).clamp(REFUSED_INTERVAL_MIN, REFUSED_INTERVAL_MAX)
            }
            (None, 0) if self.asked_at.is_none() => IDLE_INTERVAL,
            (None, _) => BUSY_INTERVAL,
        }
    }

    /// Records that the network reported the peer as unreachable and that the peer was pinged.
    pub(crate) fn on_refused(&mut self, now: Instant, stats: &TunnelStats) {
        if self.refused.is_none() {
            self.received_bytes = stats.received_bytes;
            self.refused = Some(Refused { at: now, rtt: stats.rtt });
        }
    }

    /// Checks a tunnel that carries `streams` streams. `is_due` decides whether a peer that was quiet
    /// for this time is to be pinged early.
    pub(crate) fn check(
        &mut self,
        now: Instant,
        stats: &TunnelStats,
        streams: usize,
        is_due: impl FnOnce(Duration) -> bool,
    ) -> Verdict {
        if let Some(Refused { at, rtt }) = self.refused
            && now.saturating_duration_since(at) < rtt.mul_f64(REFUSED_SHARE)
        {
            self.received_bytes = stats.received_bytes;
            return Verdict::Refused;
        }
        if stats.received_bytes != self.received_bytes {
            self.on_heard(now, stats);
            return Verdict::Fine;
        }
        if self.refused.is_some() {
            return Verdict::Refused;
        }
        let limit = self.answer_limit.max(stats.rtt * ANSWER_ROUND_TRIPS);
        if let Some(asked_at) = self.asked_at {
            let overdue = now.saturating_duration_since(asked_at) >= limit;
            return if overdue { Verdict::Silent } else { Verdict::Fine };
        }
        let quiet = now.saturating_duration_since(self.heard_at);
        let unanswered = stats.eliciting_frames != self.eliciting_frames;
        let quiet_limit = match streams {
            // The peer was due to answer the keep-alive.
            0 => self.keep_alive_interval.map(|interval| interval + limit),
            _ => Some(QUIET_LIMIT.max(limit)),
        };
        if (unanswered && quiet >= limit)
            || quiet_limit.is_some_and(|limit| quiet >= limit)
            || is_due(quiet)
        {
            self.asked_at = Some(now);
            return Verdict::Ask;
        }
        Verdict::Fine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP_ALIVE: Duration = Duration::from_secs(5);
    const QUARTER: Duration = Duration::from_millis(250);

    /// A tunnel that is checked every quarter of a second.
    struct Watched {
        liveness: Liveness,
        now: Instant,
        stats: TunnelStats,
        early: bool,
    }

    impl Watched {
        fn new(rtt_millis: u64) -> Self {
            let mut stats = TunnelStats::default();
            stats.rtt = Duration::from_millis(rtt_millis);
            let now = Instant::now();
            let liveness = Liveness::new(Carrier::Quic, now, &stats, Some(KEEP_ALIVE));
            Self { liveness, now, stats, early: false }
        }

        /// The verdicts of `checks` checks other than `Fine`, each with the number of its check.
        fn check(&mut self, checks: u32, streams: usize) -> Vec<(u32, Verdict)> {
            let mut verdicts = Vec::new();
            for check in 1..=checks {
                self.now += QUARTER;
                let verdict = self.liveness.check(self.now, &self.stats, streams, |_| self.early);
                if verdict != Verdict::Fine {
                    verdicts.push((check, verdict));
                }
            }
            verdicts
        }
    }

    #[test]
    fn a_peer_that_acknowledges_nothing_is_pinged_and_then_silent() {
        let mut tunnel = Watched::new(50);
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.check(3, 1), [(3, Verdict::Ask)]);
        // The ping.
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.check(3, 1), [(3, Verdict::Silent)]);
    }

    #[test]
    fn an_idle_tunnel_whose_keep_alives_are_answered_is_not_pinged() {
        let mut tunnel = Watched::new(50);
        for _ in 0..100 {
            assert_eq!(tunnel.check(20, 0), []);
            tunnel.stats.eliciting_frames += 1;
            tunnel.stats.received_bytes += 40;
            assert_eq!(tunnel.check(1, 0), []);
        }
    }

    #[test]
    fn an_idle_tunnel_whose_keep_alive_is_not_acknowledged_is_silent_within_a_second() {
        let mut tunnel = Watched::new(50);
        assert_eq!(tunnel.check(20, 0), []);
        assert_eq!(tunnel.liveness.interval(0), IDLE_INTERVAL);
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.check(1, 0), [(1, Verdict::Ask)]);
        assert_eq!(tunnel.liveness.interval(0), BUSY_INTERVAL);
        assert_eq!(tunnel.check(3, 0), [(3, Verdict::Silent)]);
    }

    #[test]
    fn an_idle_tunnel_whose_peer_sends_no_keep_alive_either_is_pinged() {
        // A carrier that does not count what it sends.
        let mut tunnel = Watched::new(50);
        assert_eq!(tunnel.check(26, 0), [(23, Verdict::Ask), (26, Verdict::Silent)]);
        let mut tunnel = Watched::new(50);
        tunnel.liveness.keep_alive_interval = None;
        assert_eq!(tunnel.check(1000, 0), []);
    }

    #[test]
    fn an_idle_tunnel_is_pinged_early_where_that_is_due() {
        let mut tunnel = Watched::new(50);
        tunnel.early = true;
        for _ in 0..3 {
            assert_eq!(tunnel.check(1, 0), [(1, Verdict::Ask)]);
            tunnel.stats.eliciting_frames += 1;
            tunnel.stats.received_bytes += 40;
            assert_eq!(tunnel.check(1, 0), []);
        }
        assert_eq!(tunnel.check(4, 0), [(1, Verdict::Ask), (4, Verdict::Silent)]);
    }

    #[test]
    fn a_peer_over_tcp_has_time_for_two_retransmissions() {
        for (streams, asked) in [(0, 24), (1, 8)] {
            let mut tunnel = Watched::new(50);
            let stats = &tunnel.stats;
            tunnel.liveness = Liveness::new(Carrier::Tcp, tunnel.now, stats, Some(KEEP_ALIVE));
            let (ask, silent) = ((asked, Verdict::Ask), (asked + 4, Verdict::Silent));
            assert_eq!(tunnel.check(asked + 4, streams), [ask, silent]);
        }
    }

    #[test]
    fn quiet_streams_cause_a_ping_every_two_seconds_and_an_answer_ends_it() {
        let mut tunnel = Watched::new(50);
        for _ in 0..3 {
            assert_eq!(tunnel.check(8, 1), [(8, Verdict::Ask)]);
            tunnel.stats.eliciting_frames += 1;
            tunnel.stats.received_bytes += 40;
            assert_eq!(tunnel.check(1, 1), []);
        }
    }

    #[test]
    fn a_long_path_has_more_time() {
        let mut tunnel = Watched::new(500);
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.check(12, 0), [(12, Verdict::Ask)]);
        assert_eq!(tunnel.check(12, 0), [(12, Verdict::Silent)]);
    }

    #[test]
    fn a_peer_that_cannot_be_reached_is_suspect_at_once_until_it_answers() {
        let mut tunnel = Watched::new(48);
        tunnel.liveness.on_refused(tunnel.now, &tunnel.stats);
        assert_eq!(tunnel.liveness.interval(0), Duration::from_millis(6));
        let check = |tunnel: &mut Watched, millis, received| {
            tunnel.stats.received_bytes += received;
            let now = tunnel.now + Duration::from_millis(millis);
            tunnel.liveness.check(now, &tunnel.stats, 1, |_| false)
        };
        assert_eq!(check(&mut tunnel, 0, 0), Verdict::Refused);
        // What was in flight is no answer.
        assert_eq!(check(&mut tunnel, 30, 40), Verdict::Refused);
        assert_eq!(check(&mut tunnel, 36, 0), Verdict::Refused);
        tunnel.liveness.on_refused(tunnel.now + Duration::from_millis(40), &tunnel.stats);
        assert_eq!(check(&mut tunnel, 48, 40), Verdict::Fine);
        assert_eq!(tunnel.liveness.interval(1), BUSY_INTERVAL);
        assert_eq!(check(&mut tunnel, 75, 0), Verdict::Fine);
    }

    #[test]
    fn a_silent_peer_stays_silent_until_bytes_arrive() {
        let mut tunnel = Watched::new(50);
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.check(8, 1).len(), 4);
        tunnel.stats.received_bytes += 1;
        assert_eq!(tunnel.check(7, 1), []);
    }
}
