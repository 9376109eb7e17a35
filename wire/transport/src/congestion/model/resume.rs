//! Begins near the rate that an earlier connection to the same peer has found (RFC 9959, "Careful
//! Resume"; the phases have its names).
//!
//! ```text
//!  Reconnaissance ─▶ Granted ─▶ Unvalidated ─▶ Validating ─▶ Normal
//!        │                           └──────┬──────┘            ▲
//!        │                                  └─▶ SafeRetreat ────┤
//!        └── nothing known, or another round trip ──────────────┘
//! ```
//!
//! quinn asks for the window when it sends, and says so afterwards. So the window is granted as soon
//! as the round trip is confirmed, which hello and welcome do, and the unvalidated phase begins with
//! the first packet beyond the window of a new connection. quinn paces 1.25 windows per round trip,
//! so half of what was known is sent at 5/8 of the known rate.
//!
//! Startup goes on in all phases, up to the known bandwidth and no further: beyond it, the path is
//! probed as ever. It differs from RFC 9959 where the model does: what the path loses
//! by chance is no congestion, and a queue of a round trip is.

use std::time::{Duration, Instant};

use tracing::trace;

use super::{Model, phases::Phase};
use crate::congestion::{
    INITIAL_WINDOW,
    known::{Observed, Resumption},
};

/// Share of the known bandwidth-delay product that is sent unvalidated ("jump_cwnd").
const JUMP_SHARE: f64 = 0.5;
/// Share of the known bandwidth that is as good as all of it.
const REACHED: f64 = 0.9;
/// Share of the known round trip below which the path is another one.
const SHORTER: f64 = 0.5;
/// Share of the known round trip above which the path is another one, or has a queue. The RFC allows
/// ten times as much.
const LONGER: f64 = 1.25;
/// Time beyond that for the processing of a handshake.
const PROCESSING: Duration = Duration::from_millis(5);
/// Maximum time by which a peer delays an acknowledgement (RFC 9000 §18.2, the default).
const MAX_ACK_DELAY: Duration = Duration::from_millis(25);
/// Minimum window after a retreat, in packets (RFC 6928).
const RETREAT_PACKETS: u64 = 10;

/// Where a connection stands with what is known of its path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Resume {
    /// The peer is not known yet, or nothing was acknowledged since.
    Reconnaissance,
    /// The round trip is longer than the known one.
    Longer(Observed),
    /// The window is that of the known path, and is not used yet.
    Granted {
        /// When what is known is too old.
        until: Instant,
    },
    /// More was sent than a new connection may, and nothing of it is acknowledged.
    Unvalidated(Jump),
    /// A part of it is acknowledged.
    Validating {
        jump: Jump,
        /// When the last unvalidated packet was sent.
        until: Instant,
    },
    /// The path does not carry it.
    SafeRetreat {
        /// When the last packet before it was sent.
        until: Instant,
        /// Maximum window until packets sent later are acknowledged.
        window: u64,
    },
    /// As without anything known.
    Normal,
}

impl Resume {
    /// Name in log lines.
    fn name(self) -> &'static str {
        match self {
            Self::Reconnaissance => "reconnaissance",
            Self::Longer(_) => "longer",
            Self::Granted { .. } => "granted",
            Self::Unvalidated(_) => "unvalidated",
            Self::Validating { .. } => "validating",
            Self::SafeRetreat { .. } => "safe_retreat",
            Self::Normal => "normal",
        }
    }
}

/// What was sent because of what is known.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Jump {
    /// When the first packet was sent.
    from: Instant,
    /// Number of bytes acknowledged of those sent since ("PipeSize").
    acked: u64,
    /// Number of bytes lost of those sent since.
    lost: u64,
}

impl Model {
    /// Takes what was sent: the first packet beyond the window of a new connection is unvalidated.
    pub(super) fn resume_on_sent(&mut self, now: Instant, unacked: u64) {
        if unacked <= INITIAL_WINDOW {
            return;
        }
        match self.resume {
            Resume::Granted { .. } => {
                self.memory.used();
                self.enter(Resume::Unvalidated(Jump { from: now, acked: 0, lost: 0 }));
            }
            Resume::Longer(_) => {
                self.memory.record(Resumption::OtherPath);
                self.enter(Resume::Normal);
            }
            _ => {}
        }
    }

    /// Takes an acknowledgement of this many bytes, of which the newest were sent at `sent`.
    pub(super) fn resume_on_ack(&mut self, now: Instant, sent: Instant, bytes: u64) {
        let queue = self.min_rtt.map(|least| now.saturating_duration_since(sent + least));
        match &mut self.resume {
            Resume::Reconnaissance if self.memory.is_set() => self.reconnoitre(now),
            Resume::Longer(observed) => {
                let observed = *observed;
                self.compare(observed);
            }
            Resume::Granted { until } if now >= *until => self.renounce(),
            Resume::Unvalidated(jump) if sent >= jump.from => {
                jump.acked += bytes;
                let jump = *jump;
                // What was sent in a round trip; Startup goes on from there.
                self.window = self.inflight.max(INITIAL_WINDOW);
                self.enter(Resume::Validating { jump, until: now });
            }
            Resume::Validating { jump, until } => {
                jump.acked += bytes;
                if sent >= *until {
                    self.memory.record(Resumption::Confirmed);
                    self.enter(Resume::Normal);
                }
            }
            Resume::SafeRetreat { until, .. } if sent > *until => self.enter(Resume::Normal),
            _ => {}
        }
        let limit = self.min_rtt.unwrap_or_default() + MAX_ACK_DELAY;
        if let Resume::Validating { jump, .. } = self.resume
            && queue.is_some_and(|queue| queue > limit)
        {
            self.retreat(now, jump);
        }
    }

    /// Takes a loss of packets that were sent at `sent`.
    pub(super) fn resume_on_loss(&mut self, now: Instant, sent: Instant, bytes: u64) {
        let (Resume::Unvalidated(jump) | Resume::Validating { jump, .. }) = &mut self.resume else {
            return;
        };
        if sent >= jump.from {
            jump.lost += bytes;
            let jump = *jump;
            if self.exceeds_chance(jump.lost, jump.acked) {
                self.retreat(now, jump);
            }
        }
    }

    /// Takes an ECN mark or an outage.
    pub(super) fn resume_on_congestion(&mut self, now: Instant) {
        match self.resume {
            Resume::Unvalidated(jump) | Resume::Validating { jump, .. } => self.retreat(now, jump),
            Resume::Reconnaissance | Resume::Longer(_) | Resume::Granted { .. } => {
                self.renounce();
            }
            _ => {}
        }
    }

    /// Raises the window in Startup, up to the known bandwidth; not yet where what is known has raised
    /// it, and nothing of that is acknowledged.
    pub(super) fn grow(&mut self, bytes: u64) {
        if matches!(self.resume, Resume::Granted { .. } | Resume::Unvalidated(_)) {
            return;
        }
        let limit = self.known.map_or(u64::MAX, |known| self.bdp(known) + self.extra());
        self.window = (self.window + bytes).min(limit.max(self.window));
    }

    /// Whether the bandwidth is the known one, so that Startup has nothing left to find.
    pub(super) fn reaches_known(&self) -> bool {
        self.known.is_some_and(|known| self.bandwidth.max() >= known * REACHED)
    }

    /// Maximum window during a retreat.
    pub(super) fn retreat_limit(&self) -> u64 {
        match self.resume {
            Resume::SafeRetreat { window, .. } => window,
            _ => u64::MAX,
        }
    }

    /// Leaves what was found out for later connections.
    pub(super) fn remember(&self, now: Instant) {
        let (bandwidth, min_rtt) = (self.bandwidth.max(), self.min_rtt);
        if let Some(min_rtt) = min_rtt.filter(|_| bandwidth > 0.0) {
            self.memory.put(Observed { bandwidth, min_rtt, at: now });
        }
    }

    /// Begins as a new connection.
    fn renounce(&mut self) {
        (self.window, self.known) = (self.window.min(INITIAL_WINDOW), None);
        self.enter(Resume::Normal);
    }

    fn reconnoitre(&mut self, now: Instant) {
        match self.memory.take(now) {
            Some(observed) => self.compare(observed),
            None => self.enter(Resume::Normal),
        }
    }

    /// Grants the window of the known path if its round trip is this one's.
    fn compare(&mut self, observed: Observed) {
        let rtt = self.min_rtt.unwrap_or(Duration::MAX);
        if rtt > observed.min_rtt.mul_f64(LONGER) + PROCESSING {
            // A handshake may have waited for a processor, and later packets have not.
            return self.enter(Resume::Longer(observed));
        }
        if rtt < observed.min_rtt.mul_f64(SHORTER) {
            self.memory.record(Resumption::OtherPath);
            return self.enter(Resume::Normal);
        }
        let product = self.inflight_at(observed.bandwidth, rtt.min(observed.min_rtt));
        let jump = (product as f64 * JUMP_SHARE) as u64;
        if jump <= self.window || !matches!(self.phase, Phase::Startup { .. }) {
            return self.enter(Resume::Normal);
        }
        (self.window, self.known) = (jump, Some(observed.bandwidth));
        self.enter(Resume::Granted { until: observed.expires() });
    }

    /// Cuts the window to half of what has passed ("Safe Retreat").
    fn retreat(&mut self, now: Instant, jump: Jump) {
        self.memory.record(Resumption::Retreated);
        let window = (jump.acked / 2).max(RETREAT_PACKETS * self.mtu);
        self.enter(Resume::SafeRetreat { until: now, window });
        // The losses of the jump have had their response.
        self.answered_until = Some(now);
        self.round.lost = 0;
        self.phase = Phase::Down { rounds: 0 };
        (self.window, self.known) = (self.window.min(window), None);
    }

    fn enter(&mut self, resume: Resume) {
        if resume != self.resume {
            trace!(window = self.window, resume = resume.name(), "careful resume goes on");
        }
        self.resume = resume;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use quinn::congestion::Controller as _;

    use super::*;
    use crate::congestion::known::KnownPaths;

    const RTT: Duration = Duration::from_millis(50);
    /// Bandwidth of the known path: 100 Mbit/s, of which half a product is 312 500 bytes.
    const BANDWIDTH: f64 = 12_500_000.0;

    /// A model of a path that an earlier connection knew, after a round trip of its handshake.
    fn granted(paths: &Arc<KnownPaths>, known_at: Instant, now: Instant) -> Model {
        paths.to("peer").put(Observed { bandwidth: BANDWIDTH, min_rtt: RTT, at: known_at });
        let mut model = Model::new(now, 1200);
        model.memory.set(paths.to("peer"));
        exchange(&mut model, now, 1200);
        assert_eq!(model.window, 312_500);
        model
    }

    /// Sends bytes, which are acknowledged a round trip later.
    fn exchange(model: &mut Model, now: Instant, bytes: u64) {
        model.on_sent(now, bytes, 0);
        acknowledge(model, now, bytes);
    }

    fn acknowledge(model: &mut Model, sent: Instant, bytes: u64) {
        model.sampler.on_ack(sent, bytes);
        model.on_end_acks(sent + RTT, model.unacked - bytes, true, None);
    }

    fn counts(paths: &KnownPaths) -> [u64; 3] {
        Resumption::ALL.map(|result| paths.count(result))
    }

    #[test]
    fn a_jump_is_confirmed_by_the_acknowledgement_of_its_last_packet() {
        let (paths, now) = (Arc::new(KnownPaths::default()), Instant::now());
        let mut model = granted(&paths, now, now);
        let begun = now + RTT;
        model.on_sent(begun, 200_000, 0);
        acknowledge(&mut model, begun, 100_000);
        assert!(matches!(model.resume, Resume::Validating { .. }), "{:?}", model.resume);
        // What was in flight, and Startup's growth.
        assert!(model.window <= 200_000, "{}", model.window);
        assert_eq!(counts(&paths), [0, 0, 0]);
        let last = begun + RTT;
        model.on_sent(last, 1200, 0);
        acknowledge(&mut model, last, 101_200);
        assert_eq!((model.resume, counts(&paths)), (Resume::Normal, [1, 0, 0]));
    }

    #[test]
    fn what_grows_too_old_before_it_is_used_is_renounced() {
        let (paths, now) = (Arc::new(KnownPaths::default()), Instant::now());
        let an_hour = Duration::from_secs(3600);
        let mut model = granted(&paths, now, now + an_hour - RTT * 2);
        exchange(&mut model, now + an_hour, 1200);
        assert_eq!((model.window, model.resume), (INITIAL_WINDOW, Resume::Normal));
        assert_eq!(counts(&paths), [0, 0, 0]);
    }

    #[test]
    fn a_mark_of_congestion_ends_the_jump_or_keeps_it_from_the_path() {
        let (paths, now) = (Arc::new(KnownPaths::default()), Instant::now());
        let mut unused = granted(&paths, now, now);
        unused.on_congestion_event(now + RTT, now + RTT, false, 0);
        assert_eq!((unused.window, counts(&paths)), (INITIAL_WINDOW, [0, 0, 0]));
        drop(unused);
        let mut model = granted(&paths, now, now);
        let begun = now + RTT;
        model.on_sent(begun, 200_000, 0);
        acknowledge(&mut model, begun, 100_000);
        model.on_congestion_event(begun + RTT, begun, false, 0);
        assert_eq!((model.window, counts(&paths)), (50_000, [0, 1, 0]));
        // Nothing is left for the next connection.
        let next = Model::new(now, 1200);
        next.memory.set(paths.to("peer"));
        assert_eq!(next.memory.take(now), None);
    }
}
