//! The controller: a model of the path, and the window that follows from it.
//!
//! Sections are those of draft-ietf-ccwg-bbr. What differs, and why:
//! - The window does the pacing (see the parent module). It is the model's bandwidth-delay product
//!   and a few packets; there is no gain of two, whose second half waits in a queue.
//! - Loss by itself is no congestion below [`LOSS_TOLERANCE`]: wireless and intercontinental paths
//!   lose as much by chance. Loss that exceeds what the path loses anyway, or that comes with a
//!   standing queue, is.
//! - A queue that stays although this flow has drained its own belongs to somebody else. Then the
//!   window is at least twice the product, as BBR's always is, and what this flow delivers in a round
//!   trip that includes the queue: a flow that yields to every queue starves, and one that counts on
//!   the shortest round trip alone starves in a deep one. Loss bounds it there.

use std::{
    any::Any,
    sync::Arc,
    time::{Duration, Instant},
};

use quinn::congestion::{Controller, ControllerFactory};
use tracing::trace;

use super::{
    INITIAL_WINDOW,
    filter::MaxFilter,
    sampler::{Sample, Sampler},
};

/// Rounds that a bandwidth is believed: two cycles of probing (§5.5.5).
const BANDWIDTH_ROUNDS: u64 = 24;
/// A minimum RTT is looked for again after this long without meeting it (§5.5.7; the draft has 5 s
/// and 10 s for two parts of it).
const MIN_RTT_LIFETIME: Duration = Duration::from_secs(10);
/// How long the window is lowered to look for it.
const PROBE_RTT_DURATION: Duration = Duration::from_millis(200);
/// PriorityBudget of the product that is in flight meanwhile (§5.3.4.3).
const PROBE_RTT_GAIN: f64 = 0.5;
/// Growth per round by which startup knows that there is more (§5.3.1.2).
const FULL_GROWTH: f64 = 1.25;
/// Rounds without it that end startup.
const FULL_ROUNDS: u32 = 3;
/// Window when bandwidth is looked for, in products (§5.3.3.4).
const UP_GAIN: f64 = 1.25;
/// Window when the queue of that is drained (§5.3.3.1).
const DOWN_GAIN: f64 = 0.85;
/// Least window beside a flow that keeps a queue of its own, in products (§5.6.3 has it always).
const CROWDED_GAIN: f64 = 2.0;
/// Part of its limit by which the flow grows again each round there.
const CROWDED_GROWTH: u64 = 32;
/// Drained cycles that still met a queue, before it counts as another's.
const CROWDED_CYCLES: u32 = 2;
/// Cycles after which it is looked again whether that is still so.
const DRAINED_CYCLES: u32 = 3;
/// Rounds between two searches for bandwidth, and how much that varies so that flows do not march
/// in step.
const CRUISE_ROUNDS: u64 = 8;
const CRUISE_SPREAD: u64 = 3;
/// PriorityBudget of a round that may be lost by chance, whatever the path usually loses.
const LOSS_TOLERANCE: f64 = 0.08;
/// PriorityBudget that a path may lose before it is known.
const CHANCE_LOSS: f64 = 0.05;
/// PriorityBudget beyond the usual loss that counts as congestion when a queue stands (§2.7: 2 %).
const LOSS_MARGIN: f64 = 0.02;
/// Fewer lost packets in a round say nothing.
const LOSS_PACKETS: u64 = 8;
/// What is left of the flight after congestion (§2.7: Beta is 0.7; less is enough when the model is
/// right about the rest).
const BETA: f64 = 0.85;
/// Packets beyond the product, so that delayed acknowledgements do not stop the flow (§5.5.9).
const EXTRA_PACKETS: u64 = 10;
/// The product is taken of at least this much time: on a LAN, timers and schedulers are longer than
/// the path.
const MIN_PIPE: Duration = Duration::from_millis(4);
/// Time's worth of bytes beyond the product.
const EXTRA_TIME: Duration = Duration::from_millis(1);
/// A queue shorter than this, or than an eighth of the minimum RTT, is none.
const MIN_QUEUE: Duration = Duration::from_millis(4);
/// Fewer packets in flight cannot repair a loss without a time-out.
const MIN_WINDOW_PACKETS: u64 = 4;

/// Makes controllers.
#[derive(Debug)]
pub(super) struct ModelConfig;

impl ControllerFactory for ModelConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Model::new(now, current_mtu))
    }
}

/// What the flow is about.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Doubling until the path is full (§5.3.1).
    Startup {
        /// Bandwidth when it last grew well, and rounds since.
        full: f64,
        stale: u32,
    },
    /// Draining what was sent too much, for so many rounds (§5.3.2, §5.3.3.1).
    Down { rounds: u64 },
    /// Staying at the product, for so many rounds (§5.3.3.2).
    Cruise { rounds: u64 },
    /// Looking for more bandwidth (§5.3.3.4).
    Up { rounds: u64, from: f64 },
    /// Looking for the minimum RTT (§5.3.4).
    ProbeRtt { until: Instant },
}

/// What one round trip has shown.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    acked: u64,
    lost: u64,
    min_rtt: Option<Duration>,
    rate: f64,
    app_limited: bool,
    /// Congestion was met, and answered.
    answered: bool,
}

/// A model of one path.
#[derive(Clone, Debug)]
struct Model {
    mtu: u64,
    sampler: Sampler,
    /// Rounds so far, and how much will be delivered at the end of this one (§5.5.1).
    rounds: u64,
    round_end: u64,
    round: Round,
    bandwidth: MaxFilter,
    /// Bandwidth that is left while a queue stands (§5.5.10: bw_shortterm).
    short_term: Option<f64>,
    min_rtt: Option<Duration>,
    min_rtt_at: Instant,
    /// PriorityBudget that the path loses usually.
    usual_loss: f64,
    /// Most that may be in flight, if more was too much (§5.5.10: inflight_longterm).
    limit: Option<u64>,
    /// Drained cycles in a row that met a queue.
    crowded: u32,
    /// Bandwidth of the last round.
    delivered: f64,
    /// How long the queue of the last round was.
    queued: Duration,
    in_flight: u64,
    /// When the path was last found to have been gone.
    outage_until: Option<Instant>,
    phase: Phase,
    window: u64,
}

impl Model {
    fn new(now: Instant, mtu: u16) -> Self {
        Self {
            mtu: mtu.into(),
            sampler: Sampler::new(now),
            rounds: 0,
            round_end: 0,
            round: Round::default(),
            bandwidth: MaxFilter::new(BANDWIDTH_ROUNDS),
            short_term: None,
            min_rtt: None,
            min_rtt_at: now,
            usual_loss: 0.0,
            limit: None,
            crowded: 0,
            delivered: 0.0,
            queued: Duration::ZERO,
            in_flight: 0,
            outage_until: None,
            phase: Phase::Startup { full: 0.0, stale: 0 },
            window: INITIAL_WINDOW,
        }
    }

    fn on_sample(&mut self, now: Instant, sample: Sample) {
        self.round.acked += sample.bytes;
        self.round.app_limited |= sample.app_limited;
        self.round.min_rtt =
            Some(self.round.min_rtt.map_or(sample.rtt, |least| least.min(sample.rtt)));
        self.learn_min_rtt(now, sample.rtt);
        if let Some(rate) = sample.rate {
            self.round.rate = self.round.rate.max(rate);
            // §5.5.5: what an idle sender achieved is no bound from above.
            if !sample.app_limited || rate > self.bandwidth.max() {
                self.bandwidth.update(self.rounds, rate);
            }
        }
        if let Phase::Startup { .. } = self.phase
            && !sample.app_limited
        {
            self.window += sample.bytes;
        }
        if sample.delivered_before >= self.round_end {
            self.round_end = self.sampler.delivered();
            self.rounds += 1;
            self.on_round(now);
            self.round = Round::default();
        }
        self.set_window();
    }

    fn learn_min_rtt(&mut self, now: Instant, rtt: Duration) {
        match self.min_rtt {
            Some(least) if rtt > least => {
                // Near enough: the queue was empty.
                if rtt <= least + least / 32 + Duration::from_micros(250) {
                    self.min_rtt_at = now;
                }
            }
            _ => (self.min_rtt, self.min_rtt_at) = (Some(rtt), now),
        }
    }

    fn on_round(&mut self, now: Instant) {
        trace!(
            phase = ?self.phase, window = self.window, in_flight = self.in_flight,
            bandwidth = self.bandwidth.max() as u64, min_rtt = ?self.min_rtt, queue = ?self.queue(),
            lost = self.loss_share(), usual_loss = self.usual_loss, limit = self.limit,
            crowded = self.crowded, "a round trip of the path's model",
        );
        self.queued = self.queue();
        self.delivered = self.round.rate;
        let standing = self.queued > self.tolerated_queue();
        self.learn_loss(standing);
        if self.is_congested(standing) {
            self.answer_congestion();
        }
        self.phase = match self.phase {
            Phase::Startup { full, stale } => self.after_startup_round(full, stale, standing),
            Phase::Down { rounds } => {
                let drained = self.in_flight <= self.drained(rounds);
                let empty = drained && (!standing || !self.drains_all());
                if (rounds >= 1 && empty) || rounds >= 3 {
                    self.crowded = if standing { self.crowded + 1 } else { 0 };
                    Phase::Cruise { rounds: 0 }
                } else {
                    Phase::Down { rounds: rounds + 1 }
                }
            }
            Phase::Cruise { rounds } => self.after_cruise_round(rounds),
            Phase::Up { rounds, from } => self.after_up_round(rounds, from, standing),
            Phase::ProbeRtt { until } if now >= until => {
                self.min_rtt = self.round.min_rtt;
                self.min_rtt_at = now;
                Phase::Cruise { rounds: 0 }
            }
            Phase::ProbeRtt { until } => Phase::ProbeRtt { until },
        };
        if now.saturating_duration_since(self.min_rtt_at) > MIN_RTT_LIFETIME
            && !matches!(self.phase, Phase::ProbeRtt { .. } | Phase::Startup { .. })
        {
            self.phase = Phase::ProbeRtt { until: now + PROBE_RTT_DURATION };
        }
    }

    fn after_startup_round(&self, full: f64, stale: u32, standing: bool) -> Phase {
        if self.round.app_limited {
            return self.phase;
        }
        let bandwidth = self.bandwidth.max();
        let grows = bandwidth >= full * FULL_GROWTH;
        let stale = if grows { 0 } else { stale + 1 };
        if stale >= FULL_ROUNDS || standing || self.round.answered {
            return Phase::Down { rounds: 0 };
        }
        Phase::Startup { full: if grows { bandwidth } else { full }, stale }
    }

    fn after_cruise_round(&mut self, rounds: u64) -> Phase {
        if self.round.app_limited {
            return Phase::Cruise { rounds };
        }
        // What others do with the room that a loss made is not for this flow to wait for.
        if self.is_crowded() && !self.round.answered {
            self.limit = self.limit.map(|limit| limit + limit / CROWDED_GROWTH);
        }
        // With a queue, what is delivered is all there is: a window of that, followed until the next
        // search, drains it. Flows that all do so keep as many bytes in the queue each, and so have
        // the same rate.
        let shared = self.queue() > self.own_queue() * 3 / 2;
        if (shared || self.short_term.is_some()) && !self.is_crowded() {
            self.short_term = Some(self.round.rate);
        }
        if rounds >= CRUISE_ROUNDS + self.rounds % CRUISE_SPREAD {
            self.short_term = None;
            return Phase::Up { rounds: 0, from: self.bandwidth.max() };
        }
        Phase::Cruise { rounds: rounds + 1 }
    }

    fn after_up_round(&mut self, rounds: u64, from: f64, standing: bool) -> Phase {
        if self.round.answered {
            return Phase::Down { rounds: 0 };
        }
        // The first round still shows what was sent before.
        if rounds == 0 {
            return Phase::Up { rounds: 1, from };
        }
        self.limit = self.limit.map(|limit| limit + limit / 8);
        let bandwidth = self.bandwidth.max();
        if !standing && bandwidth >= from * 1.1 && !self.round.app_limited {
            return Phase::Up { rounds: 1, from: bandwidth };
        }
        Phase::Down { rounds: 0 }
    }

    fn learn_loss(&mut self, standing: bool) {
        let calm = !standing && !matches!(self.phase, Phase::Startup { .. } | Phase::Up { .. });
        if calm && self.round.acked > 0 {
            let share = self.loss_share().min(LOSS_TOLERANCE);
            self.usual_loss += (share - self.usual_loss) / 8.0;
        }
    }

    fn loss_share(&self) -> f64 {
        self.round.lost as f64 / (self.round.lost + self.round.acked).max(1) as f64
    }

    /// Whether this round lost more than chance explains (§5.5.10.2).
    fn is_congested(&self, standing: bool) -> bool {
        if self.round.answered || self.round.lost < LOSS_PACKETS * self.mtu {
            return false;
        }
        let share = self.loss_share();
        // In a round of few packets chance alone goes far beyond the mean: three standard deviations.
        let usual = self.usual_loss.max(CHANCE_LOSS);
        let packets = ((self.round.lost + self.round.acked) / self.mtu).max(1) as f64;
        let chance = usual + 3.0 * (usual * (1.0 - usual) / packets).sqrt();
        share > chance.max(self.usual_loss.max(LOSS_TOLERANCE / 2.0) * 2.0)
            || (standing && share > self.usual_loss + LOSS_MARGIN)
    }

    fn answer_congestion(&mut self) {
        self.round.answered = true;
        let flight = self.in_flight.max(self.product(self.bandwidth.max()));
        self.limit = Some(((flight as f64 * BETA) as u64).max(self.min_window()));
    }

    /// How much longer than the minimum this round's quickest packet took.
    fn queue(&self) -> Duration {
        let rtts = self.round.min_rtt.zip(self.min_rtt);
        rtts.map_or(Duration::ZERO, |(round, least)| round.saturating_sub(least))
    }

    fn tolerated_queue(&self) -> Duration {
        MIN_QUEUE.max(self.min_rtt.unwrap_or_default() / 8)
    }

    /// How long the bytes beyond the product wait, if nobody else sends.
    fn own_queue(&self) -> Duration {
        Duration::from_secs_f64(self.extra() as f64 / self.bandwidth.max().max(1.0))
    }

    /// Bytes beyond the product.
    fn extra(&self) -> u64 {
        EXTRA_PACKETS * self.mtu + (self.bandwidth.max() * EXTRA_TIME.as_secs_f64()) as u64
    }

    /// Bytes in flight once the queue is drained for so many rounds, or this flow's part of it.
    fn drained(&self, rounds: u64) -> u64 {
        let bandwidth = self.bandwidth.max();
        match rounds {
            _ if !self.drains_all() => self.crowded_window(),
            0 | 1 => self.product(bandwidth),
            // The bandwidth may have fallen, and the queue be this flow's for that.
            _ => self.product(bandwidth.min(self.delivered)),
        }
    }

    /// Whether all that this flow has in the queue is drained, to see whether the queue is another's:
    /// beside one that keeps a queue it gives its place away, so it is done rarely there.
    fn drains_all(&self) -> bool {
        !self.is_crowded() || self.crowded.is_multiple_of(DRAINED_CYCLES)
    }

    fn is_crowded(&self) -> bool {
        self.crowded >= CROWDED_CYCLES
    }

    /// Bytes that fill the path at this rate; what the path loses on the way included, for it was in
    /// flight as well.
    fn product(&self, rate: f64) -> u64 {
        self.flight(rate, self.min_rtt.unwrap_or_default())
    }

    /// Bytes that are in flight at this rate when they take so long.
    fn flight(&self, rate: f64, rtt: Duration) -> u64 {
        (rate * rtt.max(MIN_PIPE).as_secs_f64() / (1.0 - self.usual_loss)) as u64
    }

    /// The window beside a flow that keeps a queue: a flow that counts on the shortest RTT starves in
    /// a queue that is longer.
    fn crowded_window(&self) -> u64 {
        let rtt = self.min_rtt.unwrap_or_default() + self.queued;
        let bandwidth = self.bandwidth.max();
        let least = (self.product(bandwidth) as f64 * CROWDED_GAIN) as u64;
        self.flight(bandwidth, rtt).max(least)
    }

    fn min_window(&self) -> u64 {
        MIN_WINDOW_PACKETS * self.mtu
    }

    fn set_window(&mut self) {
        let bandwidth = self.bandwidth.max();
        if bandwidth == 0.0 {
            return;
        }
        let product = self.product(bandwidth) as f64;
        let gain = |gain: f64| (product * gain) as u64;
        let extra = self.extra();
        let window = match self.phase {
            Phase::Startup { .. } => self.window,
            Phase::Down { rounds } => (self.drained(rounds) as f64 * DOWN_GAIN) as u64,
            Phase::Cruise { .. } if self.is_crowded() => self.crowded_window() + extra,
            Phase::Cruise { .. } => {
                let rate = self.short_term.unwrap_or(bandwidth).min(bandwidth);
                self.product(rate) + extra
            }
            Phase::Up { .. } if self.is_crowded() => {
                (self.crowded_window() as f64 * UP_GAIN) as u64 + extra
            }
            Phase::Up { .. } => gain(UP_GAIN) + extra,
            Phase::ProbeRtt { .. } => gain(PROBE_RTT_GAIN),
        };
        let limit = self.limit.unwrap_or(u64::MAX);
        self.window = window.min(limit).max(self.min_window());
        if limit > self.crowded_window() * 2 {
            self.limit = None;
        }
    }
}

impl Controller for Model {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        self.sampler.on_sent(now);
    }

    fn on_ack(
        &mut self,
        _now: Instant,
        sent: Instant,
        bytes: u64,
        _app_limited: bool,
        _rtt: &quinn_proto::RttEstimator,
    ) {
        self.sampler.on_ack(sent, bytes);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        app_limited: bool,
        _largest_packet_num_acked: Option<u64>,
    ) {
        self.in_flight = in_flight;
        let min_rtt = self.min_rtt.unwrap_or_default();
        if let Some(sample) = self.sampler.on_end_acks(now, in_flight, app_limited, min_rtt) {
            self.on_sample(now, sample);
        }
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        if self.outage_until.is_some_and(|until| sent <= until) {
            return;
        }
        if is_persistent_congestion {
            // The path was gone, and is there again or another one, for an acknowledgement has told of
            // it: begin anew, as on a path that is not known yet. RFC 9002 §7.6.2 would have the least
            // window, which is for a path that is still congested; this one begins with no more than
            // every new tunnel sends. Whatever was sent before was lost with the old one.
            self.outage_until = Some(now);
            self.round.lost = 0;
            self.limit = None;
            self.short_term = None;
            self.bandwidth = MaxFilter::new(BANDWIDTH_ROUNDS);
            self.phase = Phase::Startup { full: 0.0, stale: 0 };
            self.window = self.window.min(INITIAL_WINDOW).max(self.min_window());
            return;
        }
        self.round.lost += lost_bytes;
        if lost_bytes == 0 && !self.round.answered {
            // A mark is congestion by definition (RFC 3168).
            self.answer_congestion();
        }
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.mtu = new_mtu.into();
        self.window = self.window.max(self.min_window());
    }

    fn window(&self) -> u64 {
        self.window
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_WINDOW
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
