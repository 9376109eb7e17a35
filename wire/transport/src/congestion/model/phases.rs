//! The phases of a flow ("State Machine Operation"): it finds the bandwidth, and then probes for
//! more in cycles.
//!
//! ```text
//!  Startup ──▶ Down ──▶ Cruise ──▶ Up ──┐      ProbeRtt: from Down, Cruise or Up when the shortest
//!               ▲                       │                round-trip time is old, and on to Cruise
//!               └───────────────────────┘
//! ```

use std::time::{Duration, Instant};

use super::{
    Model,
    probe::{KNOWN_EXCESS, Probe},
};
use crate::congestion::INITIAL_WINDOW;

/// Time after which the shortest round-trip time is measured again ("BBR.min_rtt Min Filter",
/// MinRTTFilterLen).
const MIN_RTT_LIFETIME: Duration = Duration::from_secs(10);
/// Time for which the window is lowered to measure it ("ProbeRTT Logic", ProbeRTTDuration).
const PROBE_RTT_DURATION: Duration = Duration::from_millis(200);
/// Growth of the bandwidth in a round of Startup that shows that there is more ("Exiting
/// Acceleration Based on Bandwidth Plateau").
const FULL_BW_GROWTH: f64 = 1.25;
/// Number of rounds without such growth that end Startup (the same section).
const FULL_BW_ROUNDS: u32 = 3;
/// Number of rounds between two probes for bandwidth, and how much it varies, so that flows do not
/// probe in step ("Time Scale for Bandwidth Probing", which has seconds instead).
const CRUISE_ROUNDS: u64 = 8;
const CRUISE_SPREAD: u64 = 3;
/// Number of bytes in a round of Startup whose rate is remembered although the application limits it.
const REMEMBERED_ROUND: u64 = 8 * INITIAL_WINDOW;
/// Inverse of the share by which inflight_longterm grows in a round of Cruise on a contended path.
const CONTENDED_GROWTH: u64 = 32;

/// What the flow does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Phase {
    /// Doubles what it sends until the path is full ("Startup").
    Startup {
        /// Bandwidth when it last grew well.
        full_bw: f64,
        /// Number of rounds since.
        full_bw_count: u32,
    },
    /// Drains its queue ("Drain", "ProbeBW_DOWN").
    Down {
        /// Number of rounds so far.
        rounds: u64,
    },
    /// Sends at the estimated bandwidth ("ProbeBW_CRUISE").
    Cruise {
        /// Number of rounds so far.
        rounds: u64,
        /// Bandwidth when it began.
        from: f64,
    },
    /// Probes for more bandwidth ("ProbeBW_UP").
    Up(Probe),
    /// Measures the shortest round-trip time ("ProbeRTT").
    ProbeRtt {
        /// When it ends.
        until: Instant,
    },
}

impl Phase {
    /// Name in log lines.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Startup { .. } => "startup",
            Self::Down { .. } => "down",
            Self::Cruise { .. } => "cruise",
            Self::Up(_) => "up",
            Self::ProbeRtt { .. } => "probe_rtt",
        }
    }
}

impl Phase {
    /// The phase of a new path.
    pub(super) const START: Self = Self::Startup { full_bw: 0.0, full_bw_count: 0 };
}

impl Model {
    /// Chooses the phase of the next round.
    pub(super) fn next_phase(&mut self, now: Instant, queue_stands: bool) {
        let before = self.phase;
        self.phase = match before {
            Phase::Startup { full_bw, full_bw_count } => {
                self.after_startup_round(full_bw, full_bw_count, queue_stands)
            }
            Phase::Down { rounds } => self.after_down_round(rounds, queue_stands),
            Phase::Cruise { rounds, from } => self.after_cruise_round(rounds, from),
            Phase::Up(probe) => self.after_up_round(probe, queue_stands),
            Phase::ProbeRtt { until } if now >= until => {
                self.min_rtt = self.round.min_rtt;
                self.min_rtt_at = now;
                self.cruise()
            }
            Phase::ProbeRtt { until } => Phase::ProbeRtt { until },
        };
        // The bandwidth was found, or has been probed for and drained.
        // A stream's flow control can keep a flow in Startup; the rate of much data is found too.
        let found = match (before, self.phase) {
            (Phase::Startup { .. }, Phase::Startup { .. }) => {
                self.round.app_limited && self.round.acked >= REMEMBERED_ROUND
            }
            (Phase::Startup { .. }, Phase::Down { .. } | Phase::Up(_))
            | (Phase::Down { .. }, Phase::Cruise { .. }) => true,
            _ => false,
        };
        if found {
            self.remember(now);
        }
        if now.saturating_duration_since(self.min_rtt_at) > MIN_RTT_LIFETIME
            && !matches!(self.phase, Phase::ProbeRtt { .. } | Phase::Startup { .. })
        {
            self.phase = Phase::ProbeRtt { until: now + PROBE_RTT_DURATION };
        }
    }

    /// Leaves Startup when the bandwidth is the known one or grows no more, a queue stands, or there
    /// is congestion.
    fn after_startup_round(
        &mut self,
        full_bw: f64,
        full_bw_count: u32,
        queue_stands: bool,
    ) -> Phase {
        if self.round.app_limited {
            self.inflight_longterm = self.inflight_longterm.map(|limit| limit + limit / 8);
            self.widen_for_bursts();
            return self.phase;
        }
        if self.reaches_known() && !queue_stands && !self.round.congested {
            return self.probe(KNOWN_EXCESS);
        }
        let bandwidth = self.bandwidth.max();
        let grows = bandwidth >= full_bw * FULL_BW_GROWTH;
        let full_bw_count = if grows { 0 } else { full_bw_count + 1 };
        if full_bw_count >= FULL_BW_ROUNDS || queue_stands || self.round.congested {
            return Phase::Down { rounds: 0 };
        }
        Phase::Startup { full_bw: if grows { bandwidth } else { full_bw }, full_bw_count }
    }

    /// Leaves Down when this flow's queue is drained, after four rounds at the latest. Whether a
    /// queue still stands then shows whether the path is contended.
    fn after_down_round(&mut self, rounds: u64, queue_stands: bool) -> Phase {
        let drained = self.inflight <= self.drained(rounds);
        let empty = drained && (!queue_stands || !self.drains_all());
        if (rounds >= 1 && empty) || rounds >= 3 {
            self.contended_cycles = if queue_stands { self.contended_cycles + 1 } else { 0 };
            return self.cruise();
        }
        Phase::Down { rounds: rounds + 1 }
    }

    /// Begins Cruise.
    fn cruise(&self) -> Phase {
        Phase::Cruise { rounds: 0, from: self.bandwidth.max() }
    }

    fn after_cruise_round(&mut self, rounds: u64, from: f64) -> Phase {
        if self.round.app_limited {
            return Phase::Cruise { rounds, from };
        }
        // A competing flow would take the room that a loss has made, if this one waited for its
        // probe.
        if self.is_contended() && !self.round.congested {
            self.inflight_longterm =
                self.inflight_longterm.map(|limit| limit + limit / CONTENDED_GROWTH);
        }
        // While a queue stands, the path delivers all it can, and a window of that rate drains the
        // queue until the next probe. Flows that all do so keep as many bytes in the queue each,
        // and so have the same rate. A queue that stands delays all packets, and jitter only some.
        let shared = self.queue() > (self.own_queue() * 3 / 2).max(self.round.range());
        if (shared || self.bw_shortterm.is_some()) && !self.is_contended() {
            self.bw_shortterm = Some(self.round.rate);
        }
        let is_due = rounds >= CRUISE_ROUNDS + self.rounds % CRUISE_SPREAD;
        if is_due || self.outgrows(from) {
            self.bw_shortterm = None;
            return self.probe(self.first_excess());
        }
        Phase::Cruise { rounds: rounds + 1, from }
    }
}
