//! What is counted about frontends and their connections.

use std::{sync::atomic::Ordering, time::Instant};

use culvert_process::metrics::Counted;
use culvert_transport::splice::Outcome;

use super::ServerMetrics;
use super::families::FRONTENDS_REFUSED;

/// Why a frontend was refused before its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FrontendRefusal {
    /// Its certificate has none of the names of `--server-client-names`.
    ClientName,
    /// Its TLS handshake failed.
    Handshake,
    /// Its handshake, or its request, took too long.
    TimedOut,
}

impl FrontendRefusal {
    pub(super) const ALL: [Self; 3] = [Self::ClientName, Self::Handshake, Self::TimedOut];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::ClientName => "client_name",
            Self::Handshake => "handshake",
            Self::TimedOut => "timed_out",
        }
    }
}

/// Kind of a frontend's connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum FrontendKind {
    /// One `Proxy` stream of the gRPC frontend.
    Grpc,
    /// One connection of the HTTP CONNECT frontend.
    Connect,
}

impl ServerMetrics {
    /// Counts a frontend that was refused.
    pub(crate) fn frontend_refused(&self, reason: FrontendRefusal) {
        let labels = [("reason", reason.label())];
        self.metrics.counter(FRONTENDS_REFUSED.name, &labels).increment(1);
    }

    /// Counts a frontend's connection as open until the guard is dropped.
    pub(crate) fn frontend_open(&self, kind: FrontendKind) -> Counted {
        match kind {
            FrontendKind::Grpc => self.grpc_connections.enter(),
            FrontendKind::Connect => self.http_connections.enter(),
        }
    }

    /// Counts a stream as open until the guard is dropped.
    pub(crate) fn stream_open(&self) -> Counted {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.established.enter()
    }

    /// Counts how a splice ended and how long it lived.
    pub(crate) fn stream_ended(&self, started: Instant, outcome: &Outcome) {
        self.connection_duration.record(started.elapsed());
        self.stream_ends.record(outcome);
    }
}
