//! What is counted about dials.

use std::time::Duration;

use culvert_process::metrics::{Counted, PacketType, Segment};

use super::ServerMetrics;
use super::families::{
    DIAL_FAILURES, DIALS_FAILED, DIALS_MOVED, DIALS_WAITED, EJECTIONS, OPTIMISTIC_DIALS,
};
use crate::dial::{DialError, KonnectivityFailure};

/// Reason of a dial that its frontend gave up.
pub(super) const FRONTEND_CLOSE: &str = "frontend_close";

impl ServerMetrics {
    /// Counts a dial as pending until the guard is dropped.
    pub(crate) fn dial_pending(&self) -> Counted {
        self.pending_dials.enter()
    }

    /// Counts a dial that an agent has agreed to after this time.
    pub(crate) fn dial_succeeded(&self, duration: Duration) {
        self.dial_durations.iter().for_each(|histogram| histogram.record(duration));
    }

    /// Counts a dial that failed.
    pub(crate) fn dial_failed(&self, error: &DialError) {
        self.metrics.counter(DIALS_FAILED.name, &[("reason", error.reason())]).increment(1);
        if let Some(failure) = error.konnectivity_failure() {
            self.konnectivity_dial_failed(failure);
        }
    }

    /// Counts a dial that its frontend gave up.
    pub(crate) fn dial_given_up(&self) {
        self.metrics.counter(DIALS_FAILED.name, &[("reason", FRONTEND_CLOSE)]).increment(1);
        self.konnectivity_dial_failed(KonnectivityFailure::FrontendClose);
        self.flow.packet(Segment::ToAgent, PacketType::DialCls);
    }

    /// Counts a failed dial in Konnectivity's family alone.
    pub(crate) fn konnectivity_dial_failed(&self, failure: KonnectivityFailure) {
        self.metrics.counter(DIAL_FAILURES.name, &[("reason", failure.label())]).increment(1);
    }

    /// Counts a dial that is made again on another tunnel.
    pub(crate) fn dial_moved(&self) {
        self.metrics.counter(DIALS_MOVED.name, &[]).increment(1);
    }

    /// Counts an agent that gets no dials for a while.
    pub(crate) fn backend_ejected(&self) {
        self.metrics.counter(EJECTIONS.name, &[]).increment(1);
    }

    /// Counts a dial that waited for an agent, and whether one appeared.
    pub(crate) fn dial_waited(&self, came: bool) {
        let result = if came { "came" } else { "failed" };
        self.metrics.counter(DIALS_WAITED.name, &[("result", result)]).increment(1);
    }

    /// Counts a dial whose frontend was answered before the agent did, and whether it agreed.
    pub(crate) fn optimistic_dial(&self, agreed: bool) {
        let result = if agreed { "kept" } else { "broken" };
        self.metrics.counter(OPTIMISTIC_DIALS.name, &[("result", result)]).increment(1);
    }
}
