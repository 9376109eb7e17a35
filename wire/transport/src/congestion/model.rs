//! A model of one path, and the congestion window that follows from it.
//!
//! Names are those of draft-ietf-ccwg-bbr, and what stands in "…" is the title of a section there:
//! its numbers change between revisions. This controller differs where it must:
//! - quinn's pacer follows the window, so the window also does what BBR does by pacing gains. It is
//!   the BDP and a few packets; BBR's gain of two would keep a queue of one BDP.
//! - A probe for bandwidth begins small, so that a path that has no more keeps no queue for it.
//! - Loss below `loss::TOLERANCE` is not congestion by itself: wireless and intercontinental paths
//!   lose as much by chance. Loss is congestion where it exceeds what the path usually loses by
//!   far, or exceeds it a little while a queue stands.
//! - A queue that stays after this flow has drained its own part belongs to a competing flow. The
//!   path is then *contended*, and the window is at least two BDPs, as BBR's always is, and at
//!   least what is delivered in a round trip that includes the queue. A flow that yields to every
//!   queue starves, and so does one that takes the shortest round trip for the real one in a deep
//!   queue. There, loss is what bounds the window.
//!
//! ```text
//!  controller   what quinn calls
//!  phases       Startup ─▶ Down ─▶ Cruise ─▶ Up ─▶ Down …, and ProbeRtt in between
//!  probe        how much Up sends, and for how long
//!  loss         what the path usually loses, and when loss is congestion
//!  window       the window in each phase
//!  resume       a begin near the rate of an earlier connection
//! ```

mod controller;
mod loss;
mod phases;
mod probe;
mod resume;
mod window;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::trace;

pub(super) use self::controller::{ModelConfig, memory};
use self::{phases::Phase, resume::Resume};
use super::{
    INITIAL_WINDOW,
    filter::MaxFilter,
    known::Memory,
    sampler::{Sample, Sampler},
};

/// Length of the filter of the maximum bandwidth, in rounds: two cycles of probing ("BBR.max_bw
/// Max Filter").
const BANDWIDTH_ROUNDS: u64 = 24;

/// What the acknowledgements and losses of one round trip have shown.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    /// Number of bytes acknowledged.
    acked: u64,
    /// Number of bytes lost.
    lost: u64,
    /// Shortest round-trip time.
    min_rtt: Option<Duration>,
    /// Longest round-trip time.
    max_rtt: Duration,
    /// Sum of the round-trip times, and their number.
    rtts: Duration,
    samples: u32,
    /// Maximum number of bytes in flight.
    inflight: u64,
    /// Largest delivery rate, in bytes per second.
    rate: f64,
    /// Whether the application had nothing to send at some time.
    app_limited: bool,
    /// Whether there was congestion, to which the model has responded.
    congested: bool,
}

impl Round {
    /// Range of the round-trip times: twice the difference between their mean and the shortest, so
    /// that a single one that is long does not count.
    fn range(&self) -> Duration {
        let mean = self.rtts / self.samples.max(1);
        2 * mean.saturating_sub(self.min_rtt.unwrap_or_default())
    }
}

/// A model of one path. Rates are in bytes per second.
#[derive(Clone, Debug)]
pub(super) struct Model {
    /// Size of a full packet, in bytes.
    mtu: u64,
    sampler: Sampler,

    /// Number of round trips so far ("BBR.round_count").
    rounds: u64,
    /// The round ends when a packet is acknowledged that was sent after this many bytes were
    /// delivered.
    round_end: u64,
    /// The round in progress.
    round: Round,
    /// Delivery rate of the last round.
    last_rate: f64,
    /// Delay by the queue in the last round.
    last_queue: Duration,

    /// Maximum bandwidth ("BBR.max_bw").
    bandwidth: MaxFilter,
    /// Bandwidth while a queue stands ("When not Probing for Bandwidth").
    bw_shortterm: Option<f64>,
    /// Shortest round-trip time ("BBR.min_rtt").
    min_rtt: Option<Duration>,
    /// When a round-trip time near the shortest was last measured.
    min_rtt_at: Instant,

    /// Share of bytes that the path usually loses.
    usual_loss: f64,
    /// Maximum number of bytes in flight, where more was too much ("Probing for Bandwidth In
    /// ProbeBW").
    inflight_longterm: Option<u64>,
    /// Number of cycles in a row whose queue stayed after this flow had drained its own.
    contended_cycles: u32,

    /// Number of bytes in flight after the last acknowledgement.
    inflight: u64,
    /// Number of bytes sent and not acknowledged, including those sent since then.
    unacked: u64,
    /// Losses of packets sent up to this moment have had their response.
    answered_until: Option<Instant>,
    /// What is known of the path from earlier connections.
    memory: Arc<Memory>,
    resume: Resume,
    /// Bandwidth that an earlier connection has found, where this one has begun with it.
    known: Option<f64>,
    phase: Phase,
    /// The congestion window, in bytes.
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
            last_rate: 0.0,
            last_queue: Duration::ZERO,
            bandwidth: MaxFilter::new(BANDWIDTH_ROUNDS),
            bw_shortterm: None,
            min_rtt: None,
            min_rtt_at: now,
            usual_loss: 0.0,
            inflight_longterm: None,
            contended_cycles: 0,
            inflight: 0,
            unacked: 0,
            answered_until: None,
            memory: Arc::default(),
            resume: Resume::Reconnaissance,
            known: None,
            phase: Phase::START,
            window: INITIAL_WINDOW,
        }
    }

    /// Updates the model with an acknowledgement, after which the application had nothing to send or
    /// had ("Per-ACK Steps").
    fn on_sample(&mut self, now: Instant, sample: Sample, app_limited: bool) {
        self.round.acked += sample.bytes;
        self.round.app_limited |= sample.app_limited || app_limited;
        self.round.min_rtt =
            Some(self.round.min_rtt.map_or(sample.rtt, |least| least.min(sample.rtt)));
        self.round.max_rtt = self.round.max_rtt.max(sample.rtt);
        self.round.rtts += sample.rtt;
        self.round.samples += 1;
        self.round.inflight = self.round.inflight.max(self.inflight + sample.bytes);
        self.update_min_rtt(now, sample.rtt);
        self.resume_on_ack(now, now - sample.rtt, sample.bytes);
        if let Some(rate) = sample.rate {
            self.update_bandwidth(rate, sample.app_limited);
        }
        if let Phase::Startup { .. } = self.phase
            && !sample.app_limited
        {
            self.grow(sample.bytes);
        }
        if sample.delivered_before >= self.round_end {
            self.round_end = self.sampler.delivered();
            self.rounds += 1;
            self.on_round(now);
            self.round = Round::default();
        }
        self.set_window();
    }

    /// Takes a delivery rate; one that the application limited only when it is the largest
    /// ("Updating the BBR.max_bw Max Filter").
    fn update_bandwidth(&mut self, rate: f64, app_limited: bool) {
        self.round.rate = self.round.rate.max(rate);
        if !app_limited || rate > self.bandwidth.max() {
            self.bandwidth.update(self.rounds, rate);
        }
    }

    fn update_min_rtt(&mut self, now: Instant, rtt: Duration) {
        match self.min_rtt {
            Some(least) if rtt > least => {
                // Near enough to know that the queue was empty.
                if rtt <= least + least / 32 + Duration::from_micros(250) {
                    self.min_rtt_at = now;
                }
            }
            _ => (self.min_rtt, self.min_rtt_at) = (Some(rtt), now),
        }
    }

    /// Ends a round trip.
    fn on_round(&mut self, now: Instant) {
        trace!(
            phase = self.phase.name(),
            window = self.window,
            inflight = self.inflight,
            bandwidth = self.bandwidth.max() as u64,
            min_rtt_seconds = self.min_rtt.map(|rtt| rtt.as_secs_f64()),
            queue_seconds = self.queue().as_secs_f64(),
            lost = self.loss_share(),
            usual_loss = self.usual_loss,
            inflight_longterm = self.inflight_longterm,
            contended = self.contended_cycles,
            "a round trip of the path's model",
        );
        self.last_queue = self.queue();
        self.last_rate = self.round.rate;
        let queue_stands = self.last_queue > self.tolerated_queue();
        self.update_usual_loss(queue_stands);
        if self.is_congested(queue_stands) {
            self.on_congestion();
        }
        self.next_phase(now, queue_stands);
    }
}
