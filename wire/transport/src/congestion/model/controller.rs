//! The model as one of quinn's congestion controllers.

use std::{any::Any, sync::Arc, time::Instant};

use quinn::congestion::{Controller, ControllerFactory};

use super::{BANDWIDTH_ROUNDS, Model, phases::Phase};
use crate::congestion::{INITIAL_WINDOW, filter::MaxFilter, known::Memory};

/// The memory of a controller of this kind.
pub(in crate::congestion) fn memory(controller: Box<dyn Controller>) -> Option<Arc<Memory>> {
    Some(controller.into_any().downcast::<Model>().ok()?.memory)
}

/// Makes a model for each path.
#[derive(Debug)]
pub(in crate::congestion) struct ModelConfig;

impl ControllerFactory for ModelConfig {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        Box::new(Model::new(now, current_mtu))
    }
}

impl Model {
    /// Starts again, as on a path that is not known yet: the path was gone and is back, or is
    /// another one, for an acknowledgement has arrived.
    ///
    /// RFC 9002 §7.6.2 would set the minimum window, which is meant for a path that is still
    /// congested. This one starts with no more than every new tunnel sends. What was sent before
    /// was lost with the old path and says nothing about the new one.
    fn restart(&mut self, now: Instant) {
        self.answered_until = Some(now);
        self.round.lost = 0;
        self.inflight_longterm = None;
        self.bw_shortterm = None;
        self.known = None;
        self.bandwidth = MaxFilter::new(BANDWIDTH_ROUNDS);
        self.phase = Phase::START;
        self.window = self.window.min(INITIAL_WINDOW).max(self.min_window());
    }
}

impl Controller for Model {
    fn on_sent(&mut self, now: Instant, bytes: u64, _last_packet_number: u64) {
        self.sampler.on_sent(now);
        self.unacked += bytes;
        self.resume_on_sent(now, self.unacked);
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
        (self.inflight, self.unacked) = (in_flight, in_flight);
        let min_rtt = self.min_rtt.unwrap_or_default();
        if let Some(sample) = self.sampler.on_end_acks(now, in_flight, app_limited, min_rtt) {
            self.on_sample(now, sample, app_limited);
        }
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent_congestion: bool,
        lost_bytes: u64,
    ) {
        if self.answered_until.is_some_and(|until| sent <= until) {
            return;
        }
        if is_persistent_congestion {
            self.resume_on_congestion(now);
            return self.restart(now);
        }
        self.round.lost += lost_bytes;
        if lost_bytes == 0 && !self.round.congested {
            // An ECN mark is congestion by definition (RFC 3168).
            self.resume_on_congestion(now);
            self.on_congestion();
        }
        self.resume_on_loss(now, sent, lost_bytes);
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
