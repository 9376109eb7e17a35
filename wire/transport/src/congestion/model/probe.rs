//! Probes for more bandwidth ("ProbeBW_UP"): small at first, and larger only while the path follows.
//!
//! What a probe sends beyond the bandwidth-delay product either shows that the path can do more, or
//! waits in its queue, and every keystroke with it. The draft sends a quarter more at once. Here
//! the first round sends little more, and each round after it twice as much more, as long as the
//! delivery rate follows and no queue stands.

use std::time::Duration;

use super::{Model, phases::Phase};

/// Share of the BDP that the first round of a probe sends beyond it.
const FIRST_EXCESS: f64 = 1.0 / 32.0;
/// The same, at most, where the path's jitter would hide a small probe.
const MAX_FIRST_EXCESS: f64 = 0.25;
/// The same on a contended path, where the queue is another flow's ("ProbeBW_UP").
const CONTENDED_EXCESS: f64 = 0.25;
/// The same where the bandwidth is one that an earlier connection has found, and this one has not
/// looked for more.
pub(super) const KNOWN_EXCESS: f64 = 0.25;
/// Share of the BDP that any round sends beyond it, at most.
const MAX_EXCESS: f64 = 0.5;
/// Inverse of the least share by which inflight_longterm grows in a round of a probe.
const LIMIT_GROWTH: u64 = 8;
/// Growth of the bandwidth in Cruise that shows that there is more.
const CRUISE_GROWTH: f64 = 1.03;

/// A probe.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Probe {
    /// Whether the round in progress shows what the probe has sent. The first one shows what was sent
    /// before.
    is_seen: bool,
    /// Bandwidth before what the round in progress shows.
    from: f64,
    /// Share of the BDP that is sent beyond it.
    excess: f64,
}

impl Probe {
    /// Window, in BDPs.
    pub(super) fn gain(self) -> f64 {
        1.0 + self.excess
    }
}

impl Model {
    /// Begins a probe that sends this share of the BDP beyond it.
    pub(super) fn probe(&self, excess: f64) -> Phase {
        Phase::Up(Probe { is_seen: false, from: self.bandwidth.max(), excess })
    }

    /// Share of the BDP that the first round of a probe sends beyond it.
    ///
    /// What is small against the range of the round-trip times would show neither a rate nor a queue,
    /// and keystrokes wait for the jitter in any case.
    pub(super) fn first_excess(&self) -> f64 {
        if self.is_contended() {
            return CONTENDED_EXCESS;
        }
        let min_rtt = self.min_rtt.unwrap_or_default().max(Duration::from_millis(1));
        let jitter = self.round.range().as_secs_f64() / min_rtt.as_secs_f64();
        jitter.clamp(FIRST_EXCESS, MAX_FIRST_EXCESS)
    }

    /// Whether the path has become faster in Cruise: then the few packets beyond the BDP do not wait
    /// in a queue, but are delivered.
    pub(super) fn outgrows(&self, from: f64) -> bool {
        !self.is_contended() && self.bandwidth.max() >= from * CRUISE_GROWTH
    }

    /// Probes on, with more, while the delivery rate follows and no queue stands.
    pub(super) fn after_up_round(&mut self, probe: Probe, queue_stands: bool) -> Phase {
        if self.round.congested {
            return Phase::Down { rounds: 0 };
        }
        if !probe.is_seen {
            return Phase::Up(Probe { is_seen: true, ..probe });
        }
        self.inflight_longterm = self
            .inflight_longterm
            .map(|limit| limit + ((limit as f64 * probe.excess) as u64).max(limit / LIMIT_GROWTH));
        let bandwidth = self.bandwidth.max();
        let follows = bandwidth >= probe.from * (1.0 + probe.excess / 2.0);
        if follows && !queue_stands && !self.round.app_limited {
            let excess = (probe.excess * 2.0).min(MAX_EXCESS);
            return Phase::Up(Probe { from: bandwidth, excess, ..probe });
        }
        Phase::Down { rounds: 0 }
    }
}
