//! When a tunnel over QUIC is to be doubted: it is asked something and does not answer, or the network
//! says that its peer cannot be reached. Pure: the caller brings time and what the carrier has measured.
//!
//! QUIC itself gives a silent peer the whole idle time-out, because it has nowhere else to go. An
//! agent has: TCP, or another QUIC connection. It looks for that while the old tunnel lives on, so a
//! doubt that proves wrong costs a handshake.

use std::time::{Duration, Instant};

use culvert_transport::TunnelStats;

/// How often a tunnel is looked at while it carries streams.
const BUSY_LOOK_INTERVAL: Duration = Duration::from_millis(250);
/// How often otherwise.
const IDLE_LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// How long the peer may take to acknowledge something, and then to answer a question: a second and a
/// half together, so that dials have another way within three. Long paths have round trips instead.
const ANSWER_LIMIT: Duration = Duration::from_millis(750);
/// The same in round trips: time for a lost packet's repair, twice.
const ANSWER_ROUND_TRIPS: u32 = 6;
/// What arrives within this share of a round trip after the network said that the peer cannot be reached
/// was on its way before, and proves nothing. An answer takes a whole one.
const REFUSED_SHARE: f64 = 0.75;
/// Looks in a round trip then, so that one is left between the two.
const REFUSED_LOOKS: u32 = 8;
/// Longest and shortest time between them.
const REFUSED_LOOK_MIN: Duration = Duration::from_millis(1);
const REFUSED_LOOK_MAX: Duration = Duration::from_millis(25);
/// Streams may be quiet for this long before the peer is asked whether it is there.
const QUIET_LIMIT: Duration = Duration::from_secs(2);

/// What is to be done about a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Fine,
    /// Ask the peer something.
    Ask,
    /// The peer has not answered; look for another way.
    Silent,
    /// The network says that the peer cannot be reached, and it was not heard since; the same.
    Refused,
}

/// Watches one tunnel.
#[derive(Clone, Debug)]
pub struct Liveness {
    received_bytes: u64,
    /// What had been sent that the peer must acknowledge, when it was last heard.
    eliciting_frames: u64,
    heard_at: Instant,
    asked_at: Option<Instant>,
    refused: Option<Refused>,
}

/// What was known when the network said that the peer cannot be reached.
#[derive(Clone, Copy, Debug)]
struct Refused {
    at: Instant,
    rtt: Duration,
}

impl Liveness {
    /// Of a tunnel whose peer has just been heard.
    pub fn new(now: Instant, stats: &TunnelStats) -> Self {
        let TunnelStats { received_bytes, eliciting_frames, .. } = *stats;
        Self { received_bytes, eliciting_frames, heard_at: now, asked_at: None, refused: None }
    }

    /// When to look next, when it carries so many streams.
    pub fn interval(&self, streams: usize) -> Duration {
        match (self.refused, streams) {
            (Some(Refused { rtt, .. }), _) => {
                (rtt / REFUSED_LOOKS).clamp(REFUSED_LOOK_MIN, REFUSED_LOOK_MAX)
            }
            (None, 0) => IDLE_LOOK_INTERVAL,
            (None, _) => BUSY_LOOK_INTERVAL,
        }
    }

    /// The network says that the peer cannot be reached, and the peer was asked whether that is so.
    pub fn on_refused(&mut self, now: Instant, stats: &TunnelStats) {
        if self.refused.is_none() {
            self.received_bytes = stats.received_bytes;
            self.refused = Some(Refused { at: now, rtt: stats.rtt });
        }
    }

    /// What the tunnel's numbers say now, when it carries so many streams.
    pub fn look(&mut self, now: Instant, stats: &TunnelStats, streams: usize) -> Verdict {
        if let Some(Refused { at, rtt }) = self.refused
            && now.saturating_duration_since(at) < rtt.mul_f64(REFUSED_SHARE)
        {
            self.received_bytes = stats.received_bytes;
            return Verdict::Refused;
        }
        if stats.received_bytes != self.received_bytes {
            *self = Self::new(now, stats);
            return Verdict::Fine;
        }
        if self.refused.is_some() {
            return Verdict::Refused;
        }
        let limit = ANSWER_LIMIT.max(stats.rtt * ANSWER_ROUND_TRIPS);
        if let Some(asked_at) = self.asked_at {
            let overdue = now.saturating_duration_since(asked_at) >= limit;
            return if overdue { Verdict::Silent } else { Verdict::Fine };
        }
        let quiet = now.saturating_duration_since(self.heard_at);
        let unanswered = stats.eliciting_frames != self.eliciting_frames;
        if (unanswered && quiet >= limit) || (streams > 0 && quiet >= QUIET_LIMIT.max(limit)) {
            self.asked_at = Some(now);
            return Verdict::Ask;
        }
        Verdict::Fine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tunnel that is looked at every quarter of a second.
    struct Watched {
        silence: Liveness,
        now: Instant,
        stats: TunnelStats,
    }

    impl Watched {
        fn new(rtt_millis: u64) -> Self {
            let mut stats = TunnelStats::default();
            stats.rtt = Duration::from_millis(rtt_millis);
            let now = Instant::now();
            Self { silence: Liveness::new(now, &stats), now, stats }
        }

        /// What is said at each of so many looks that is not "fine", and after how many looks.
        fn look(&mut self, looks: u32, streams: usize) -> Vec<(u32, Verdict)> {
            let mut said = Vec::new();
            for look in 1..=looks {
                self.now += BUSY_LOOK_INTERVAL;
                let verdict = self.silence.look(self.now, &self.stats, streams);
                if verdict != Verdict::Fine {
                    said.push((look, verdict));
                }
            }
            said
        }
    }

    #[test]
    fn what_is_not_acknowledged_is_asked_for_and_then_doubted() {
        let mut tunnel = Watched::new(50);
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.look(3, 1), [(3, Verdict::Ask)]);
        // The question itself.
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.look(3, 1), [(3, Verdict::Silent)]);
    }

    #[test]
    fn a_tunnel_with_nothing_to_carry_is_left_in_peace() {
        let mut tunnel = Watched::new(50);
        assert_eq!(tunnel.look(1000, 0), []);
        // Until its sign of life is not acknowledged.
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.look(1, 0), [(1, Verdict::Ask)]);
    }

    #[test]
    fn quiet_streams_are_asked_for_seldom_and_whoever_answers_is_believed() {
        let mut tunnel = Watched::new(50);
        for _ in 0..3 {
            assert_eq!(tunnel.look(8, 1), [(8, Verdict::Ask)]);
            tunnel.stats.eliciting_frames += 1;
            tunnel.stats.received_bytes += 40;
            assert_eq!(tunnel.look(1, 1), []);
        }
    }

    #[test]
    fn a_long_path_has_longer() {
        let mut tunnel = Watched::new(500);
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.look(12, 0), [(12, Verdict::Ask)]);
        assert_eq!(tunnel.look(12, 0), [(12, Verdict::Silent)]);
    }

    #[test]
    fn whoever_cannot_be_reached_is_doubted_at_once_and_until_it_answers() {
        let mut tunnel = Watched::new(48);
        tunnel.silence.on_refused(tunnel.now, &tunnel.stats);
        assert_eq!(tunnel.silence.interval(0), Duration::from_millis(6));
        let look = |tunnel: &mut Watched, millis, received| {
            tunnel.stats.received_bytes += received;
            let now = tunnel.now + Duration::from_millis(millis);
            tunnel.silence.look(now, &tunnel.stats, 1)
        };
        assert_eq!(look(&mut tunnel, 0, 0), Verdict::Refused);
        // What was on its way is no answer.
        assert_eq!(look(&mut tunnel, 30, 40), Verdict::Refused);
        assert_eq!(look(&mut tunnel, 36, 0), Verdict::Refused);
        tunnel.silence.on_refused(tunnel.now + Duration::from_millis(40), &tunnel.stats);
        assert_eq!(look(&mut tunnel, 48, 40), Verdict::Fine);
        assert_eq!(tunnel.silence.interval(1), BUSY_LOOK_INTERVAL);
        assert_eq!(look(&mut tunnel, 75, 0), Verdict::Fine);
    }

    #[test]
    fn a_silent_peer_stays_silent_until_it_is_heard() {
        let mut tunnel = Watched::new(50);
        tunnel.stats.eliciting_frames += 1;
        assert_eq!(tunnel.look(8, 1).len(), 4);
        tunnel.stats.received_bytes += 1;
        assert_eq!(tunnel.look(7, 1), []);
    }
}
