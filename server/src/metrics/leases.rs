//! What is counted about Leases.

use std::time::Instant;

use super::ServerMetrics;
use super::families::{
    CULLED_LEASES, LEASE_DELETE_LATENCY, LEASE_DELETES, LEASE_LIST_LATENCY, LEASE_LISTS,
    LEASE_RENEWALS,
};

/// Kind of a request about Leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaseRequest {
    /// Lists them.
    List,
    /// Removes one.
    Delete,
}

impl ServerMetrics {
    /// Counts a renewal of the server's own Lease.
    pub(crate) fn lease_renewed(&self, done: bool) {
        let result = if done { "ok" } else { "failed" };
        self.metrics.counter(LEASE_RENEWALS.name, &[("result", result)]).increment(1);
    }

    /// Counts a request about Leases that was sent at `begun`, and its answer.
    pub(crate) fn lease_request(
        &self,
        request: LeaseRequest,
        begun: Instant,
        code: &str,
        reason: &str,
    ) {
        let (total, latency) = match request {
            LeaseRequest::List => (LEASE_LISTS, LEASE_LIST_LATENCY),
            LeaseRequest::Delete => (LEASE_DELETES, LEASE_DELETE_LATENCY),
        };
        let labels = [("http_status_code", code), ("reason", reason)];
        self.metrics.counter(total.name, &labels).increment(1);
        self.metrics.histogram(latency.name, &labels[..1]).record(begun.elapsed());
    }

    /// Counts an expired Lease that was removed.
    pub(crate) fn lease_culled(&self) {
        self.metrics.counter(CULLED_LEASES.name, &[]).increment(1);
    }
}
