//! The congestion window in each phase ("Congestion Window"), and the sizes that it is made of.

use std::time::Duration;

use super::{Model, phases::Phase};

/// Window while draining, in what is left when the queue is drained ("ProbeBW_DOWN").
const DOWN_GAIN: f64 = 0.85;
/// The same where no queue stands. Cruise sends what is missing in flight faster than the path
/// delivers it, so more would be a queue.
const GENTLE_DOWN_GAIN: f64 = 0.97;
/// Window while measuring the shortest round-trip time, in BDPs ("ProbeRTT Logic",
/// ProbeRTTCwndGain).
const PROBE_RTT_GAIN: f64 = 0.5;
/// Minimum window on a contended path, in BDPs. BBR's window is never less.
const CONTENDED_GAIN: f64 = 2.0;
/// Number of cycles in a row whose queue stayed after this flow's was drained that make a path
/// contended.
const CONTENDED_CYCLES: u32 = 2;
/// On a contended path, one cycle of this number drains this flow's queue, to see whether the path
/// is contended still.
const DRAINED_CYCLES: u32 = 3;
/// Window of an application that sends bursts with pauses, in bursts: the pacer sends one within an
/// eighth of a round trip.
const BURST_GAIN: u64 = 8;
/// Largest window that it gets for that, in bytes: eight bursts of 64 KiB.
const BURST_WINDOW: u64 = 512 * 1024;
/// Number of packets beyond the BDP, so that delayed acknowledgements do not stop the flow
/// ("BBR.extra_acked").
const EXTRA_PACKETS: u64 = 10;
/// Time's worth of bytes beyond the BDP.
const EXTRA_TIME: Duration = Duration::from_millis(1);
/// Minimum round-trip time of a BDP: on a LAN, timers and schedulers take longer than the path.
const MIN_BDP_RTT: Duration = Duration::from_millis(4);
/// Delay below which there is no queue; nor is there one below an eighth of the shortest round-trip
/// time.
const MIN_QUEUE: Duration = Duration::from_millis(4);
/// Minimum window, in packets: fewer cannot repair a loss without a time-out ("Minimum cwnd for
/// Pipelining", MinPipeCwnd).
const MIN_WINDOW_PACKETS: u64 = 4;

impl Model {
    /// Sets the window for the phase, within its limits.
    pub(super) fn set_window(&mut self) {
        let bandwidth = self.bandwidth.max();
        if bandwidth == 0.0 {
            return;
        }
        let limit = self.inflight_longterm.unwrap_or(u64::MAX);
        self.window = self
            .phase_window(bandwidth)
            .min(limit)
            .min(self.retreat_limit())
            .max(self.min_window());
        if limit > self.contended_window() * 2 {
            self.inflight_longterm = None;
        }
    }

    fn phase_window(&self, bandwidth: f64) -> u64 {
        let bdp = self.bdp(bandwidth) as f64;
        let extra = self.extra();
        match self.phase {
            Phase::Startup { .. } => self.window,
            Phase::Down { rounds } => (self.drained(rounds) as f64 * self.down_gain()) as u64,
            Phase::Cruise { .. } if self.is_contended() => self.contended_window() + extra,
            Phase::Cruise { .. } => {
                let rate = self.bw_shortterm.unwrap_or(bandwidth).min(bandwidth);
                self.bdp(rate) + extra
            }
            Phase::Up(probe) if self.is_contended() => {
                (self.contended_window() as f64 * probe.gain()) as u64 + extra
            }
            Phase::Up(probe) => (bdp * probe.gain()) as u64 + extra,
            Phase::ProbeRtt { .. } => (bdp * PROBE_RTT_GAIN) as u64,
        }
    }

    /// Window of Down, in what is left when the queue is drained.
    fn down_gain(&self) -> f64 {
        if self.last_queue > self.tolerated_queue() { DOWN_GAIN } else { GENTLE_DOWN_GAIN }
    }

    /// Widens the window of an application that sends bursts with pauses, if a burst waits for the
    /// pacer, which follows the window, and no packet of it waited in the path's queue.
    pub(super) fn widen_for_bursts(&mut self) {
        let wanted = (self.round.inflight * BURST_GAIN).min(BURST_WINDOW);
        let queued = self.round.max_rtt.saturating_sub(self.min_rtt.unwrap_or_default());
        if self.window < wanted && queued <= self.tolerated_queue() {
            self.window += self.round.acked;
        }
    }

    pub(super) fn min_window(&self) -> u64 {
        MIN_WINDOW_PACKETS * self.mtu
    }

    /// The bandwidth-delay product at this rate, in bytes.
    pub(super) fn bdp(&self, rate: f64) -> u64 {
        self.inflight_at(rate, self.min_rtt.unwrap_or_default())
    }

    /// Number of bytes in flight at this rate and round-trip time; those that the path will lose
    /// are in flight as well.
    pub(super) fn inflight_at(&self, rate: f64, rtt: Duration) -> u64 {
        (rate * rtt.max(MIN_BDP_RTT).as_secs_f64() / (1.0 - self.usual_loss)) as u64
    }

    /// Number of bytes beyond the BDP.
    pub(super) fn extra(&self) -> u64 {
        EXTRA_PACKETS * self.mtu + (self.bandwidth.max() * EXTRA_TIME.as_secs_f64()) as u64
    }

    /// Delay of this round's quickest packet beyond the shortest round-trip time.
    pub(super) fn queue(&self) -> Duration {
        let rtts = self.round.min_rtt.zip(self.min_rtt);
        rtts.map_or(Duration::ZERO, |(round, least)| round.saturating_sub(least))
    }

    /// Maximum delay that does not count as a queue.
    pub(super) fn tolerated_queue(&self) -> Duration {
        MIN_QUEUE.max(self.min_rtt.unwrap_or_default() / 8)
    }

    /// Delay by this flow's bytes beyond the BDP, if no other flow sends.
    pub(super) fn own_queue(&self) -> Duration {
        Duration::from_secs_f64(self.extra() as f64 / self.bandwidth.max().max(1.0))
    }

    /// Maximum number of bytes in flight once this flow's queue is drained, in this round of Down.
    pub(super) fn drained(&self, rounds: u64) -> u64 {
        let bandwidth = self.bandwidth.max();
        match rounds {
            _ if !self.drains_all() => self.contended_window(),
            0 | 1 => self.bdp(bandwidth),
            // The bandwidth may have fallen, and then the queue is this flow's.
            _ => self.bdp(bandwidth.min(self.last_rate)),
        }
    }

    /// Whether this cycle drains all that this flow has in the queue, to see whether a competing
    /// flow keeps one. Draining leaves the queue to that flow, so on a contended path it is done
    /// rarely.
    pub(super) fn drains_all(&self) -> bool {
        !self.is_contended() || self.contended_cycles.is_multiple_of(DRAINED_CYCLES)
    }

    /// Whether a competing flow keeps a queue.
    pub(super) fn is_contended(&self) -> bool {
        self.contended_cycles >= CONTENDED_CYCLES
    }

    /// The window on a contended path: what is delivered in a round trip that includes the queue,
    /// and at least [`CONTENDED_GAIN`] BDPs.
    fn contended_window(&self) -> u64 {
        let rtt = self.min_rtt.unwrap_or_default() + self.last_queue;
        let bandwidth = self.bandwidth.max();
        let least = (self.bdp(bandwidth) as f64 * CONTENDED_GAIN) as u64;
        self.inflight_at(bandwidth, rtt).max(least)
    }
}
