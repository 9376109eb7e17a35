//! Loss: what the path loses by chance, and what is congestion ("Updating the Model Upon Packet
//! Loss").

use super::{Model, phases::Phase};
use crate::congestion::INITIAL_WINDOW;

/// Share of a round's bytes that may be lost by chance, whatever the path usually loses.
pub(super) const TOLERANCE: f64 = 0.08;
/// Share of bytes that a path may lose by chance before it is known.
const UNKNOWN_LOSS: f64 = 0.05;
/// Share of bytes beyond the usual loss that is congestion while a queue stands ("Core Algorithm
/// Design Parameters", LossThresh).
const LOSS_THRESH: f64 = 0.02;
/// Number of lost packets in a round below which there is no congestion.
const MIN_LOST_PACKETS: u64 = 8;
/// Factor of what is in flight after congestion. The draft's Beta is 0.7; this cuts less, because
/// the BDP of the model bounds the window as well.
const BETA: f64 = 0.85;

impl Model {
    /// Learns what the path loses while this flow neither probes nor keeps a queue.
    pub(super) fn update_usual_loss(&mut self, queue_stands: bool) {
        let probes = matches!(self.phase, Phase::Startup { .. } | Phase::Up(_));
        if !queue_stands && !probes && self.round.acked > 0 {
            let share = self.loss_share().min(TOLERANCE);
            self.usual_loss += (share - self.usual_loss) / 8.0;
        }
    }

    /// Share of the round's bytes that were lost.
    pub(super) fn loss_share(&self) -> f64 {
        self.round.lost as f64 / (self.round.lost + self.round.acked).max(1) as f64
    }

    /// Whether this round lost more than chance explains ("Probing for Bandwidth In ProbeBW").
    pub(super) fn is_congested(&self, queue_stands: bool) -> bool {
        if self.round.congested || self.round.lost < MIN_LOST_PACKETS * self.mtu {
            return false;
        }
        self.exceeds_chance(self.round.lost, self.round.acked)
            || (queue_stands && self.loss_share() > self.usual_loss + LOSS_THRESH)
    }

    /// Whether so many lost bytes, beside those acknowledged, are more than chance explains.
    pub(super) fn exceeds_chance(&self, lost: u64, acked: u64) -> bool {
        if lost < MIN_LOST_PACKETS * self.mtu {
            return false;
        }
        let share = lost as f64 / (lost + acked).max(1) as f64;
        // In a round of few packets chance alone exceeds the mean by far: three standard
        // deviations.
        let usual = self.usual_loss.max(UNKNOWN_LOSS);
        let packets = ((lost + acked) / self.mtu).max(1) as f64;
        let chance = usual + 3.0 * (usual * (1.0 - usual) / packets).sqrt();
        share > chance.max(self.usual_loss.max(TOLERANCE / 2.0) * 2.0)
    }

    /// Lowers what may be in flight.
    pub(super) fn on_congestion(&mut self) {
        self.round.congested = true;
        if let Phase::Startup { .. } = self.phase
            && self.round.app_limited
            && self.round.inflight * 2 < self.window
        {
            // What was in flight is what the application sent, not what is too much for the path.
            let cut = (self.window as f64 * BETA) as u64;
            self.window = cut.max(self.window.min(INITIAL_WINDOW));
            return;
        }
        let inflight = self.inflight.max(self.bdp(self.bandwidth.max()));
        self.inflight_longterm = Some(((inflight as f64 * BETA) as u64).max(self.min_window()));
    }
}
