//! What is counted about agents: their admission, their proofs and their tunnels.

use culvert_process::metrics::{Counted, LiveCount};
use culvert_transport::Carrier;

use super::ServerMetrics;
use super::families::{
    ADDRESS_VALIDATIONS, IDENTITY_CONFLICTS, JOIN_FAILURES, PROOF_RENEWALS, TOKEN_RECHECKS,
    TOKEN_REVIEWS, TUNNELS_LOST,
};
use crate::agents::{
    JOIN_FAILURE_REASONS,
    admission::REVIEW_RESULTS,
    identity::ClaimFault,
    session::{recheck::RECHECK_RESULTS, renewal::RENEWAL_RESULTS},
};

impl ServerMetrics {
    /// Counts a tunnel that ended.
    pub(crate) fn tunnel_lost(&self, reason: &'static str) {
        self.metrics.counter(TUNNELS_LOST.name, &[("reason", reason)]).increment(1);
    }

    /// Counts an agent that did not become a backend.
    pub(crate) fn join_failed(&self, reason: &'static str) {
        debug_assert!(JOIN_FAILURE_REASONS.contains(&reason));
        self.metrics.counter(JOIN_FAILURES.name, &[("reason", reason)]).increment(1);
    }

    /// Counts an id or an identifier that an agent announced and did not get.
    pub(crate) fn identity_conflict(&self, reason: &'static str) {
        debug_assert!(ClaimFault::LABELS.contains(&reason));
        self.metrics.counter(IDENTITY_CONFLICTS.name, &[("reason", reason)]).increment(1);
    }

    /// Counts a token with which a connected agent renewed its proof.
    pub(crate) fn proof_renewed(&self, result: &'static str) {
        debug_assert!(RENEWAL_RESULTS.contains(&result));
        self.metrics.counter(PROOF_RENEWALS.name, &[("result", result)]).increment(1);
    }

    /// Counts a review of a token that was accepted before, of a connected agent.
    pub(crate) fn token_rechecked(&self, result: &'static str) {
        debug_assert!(RECHECK_RESULTS.contains(&result));
        self.metrics.counter(TOKEN_RECHECKS.name, &[("result", result)]).increment(1);
    }

    /// Counts a token that kube-apiserver has reviewed, or has not in time.
    pub(crate) fn token_reviewed(&self, result: &'static str) {
        debug_assert!(REVIEW_RESULTS.contains(&result));
        self.metrics.counter(TOKEN_REVIEWS.name, &[("result", result)]).increment(1);
    }

    /// Counts a peer as not admitted until the guard is dropped.
    pub(crate) fn unadmitted(&self, carrier: Carrier) -> Counted {
        let count = self.unadmitted.iter().find(|(counted, _)| *counted == carrier);
        count.map_or_else(LiveCount::default, |(_, count)| count.clone()).enter()
    }

    /// Counts a QUIC client that has to prove its address.
    pub(crate) fn address_validated(&self) {
        self.metrics.counter(ADDRESS_VALIDATIONS.name, &[]).increment(1);
    }
}
