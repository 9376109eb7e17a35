//! The server's metrics: `families` has their names and HELP texts, `scrape` what is read at a
//! scrape, and a file for each topic what is recorded as it happens.
//!
//! Where Konnectivity has a metric for the same thing, its name and HELP text are kept, so that
//! dashboards and alerts go on working; the names of all others begin with `culvert_server_`.
//! What describes the current state is read when it is scraped, so it cannot go stale.

mod agents;
mod dials;
mod families;
mod flow;
mod frontends;
mod leases;
mod scrape;
mod versions;

use std::sync::{Arc, OnceLock, atomic::AtomicU64};

use culvert_process::metrics::{BuildError, LiveCount, Metrics, ResumedStreams, StreamEnds};
use culvert_transport::{
    BufferSizes, Carrier, TunnelLost, UdpHealth, budget::MemoryBudget, congestion::KnownPaths,
    splice::Meter,
};
use metrics::Histogram;

use self::{
    dials::FRONTEND_CLOSE,
    families::{
        ADDRESS_VALIDATIONS, CONNECTION_DURATION, COUNTERS, CULLED_LEASES, DIAL_DURATION,
        DIAL_DURATION_FINE, DIAL_FAILURES, DIALS_FAILED, DIALS_MOVED, DIALS_WAITED, DIRECTIONS,
        EJECTIONS, FRONTENDS_REFUSED, Family, HISTOGRAMS, IDENTITY_CONFLICTS, JOIN_FAILURES,
        LEASE_RENEWALS, OPTIMISTIC_DIALS, PROOF_RENEWALS, STREAM_ENDS, TOKEN_RECHECKS,
        TOKEN_REVIEWS, TUNNELS_LOST, UDP_BUFFER,
    },
    versions::KnownVersions,
};
pub(crate) use self::{
    flow::Flow,
    frontends::{FrontendKind, FrontendRefusal},
    leases::LeaseRequest,
};
use crate::{
    agents::{
        JOIN_FAILURE_REASONS,
        admission::REVIEW_RESULTS,
        identity::ClaimFault,
        session::{recheck::RECHECK_RESULTS, renewal::RENEWAL_RESULTS},
    },
    dial::{DialError, KonnectivityFailure},
    server_set::ServerSet,
};

/// The server's metrics.
#[derive(Debug)]
pub struct ServerMetrics {
    metrics: Metrics,
    /// What flows between frontends and agents.
    pub(crate) flow: Flow,
    dial_durations: [Histogram; 2],
    connection_duration: Histogram,
    pending_dials: LiveCount,
    established: LiveCount,
    grpc_connections: LiveCount,
    http_connections: LiveCount,
    unadmitted: [(Carrier, LiveCount); 3],
    streams: AtomicU64,
    stream_ends: StreamEnds,
    versions: KnownVersions,
    udp_health: OnceLock<Arc<UdpHealth>>,
    memory: OnceLock<Arc<MemoryBudget>>,
    servers: OnceLock<Arc<ServerSet>>,
    /// What tunnels have found out about the paths to agents.
    pub(crate) known_paths: Arc<KnownPaths>,
    /// What became of streams whose tunnels were lost.
    pub(crate) resumption: Arc<ResumedStreams>,
    /// Bytes spliced in either direction.
    pub meter: Meter,
}

impl ServerMetrics {
    /// Metrics that are all zero.
    ///
    /// # Errors
    /// When a histogram has no bounds; the fault is ours.
    pub(crate) fn new() -> Result<Self, BuildError> {
        let buckets = HISTOGRAMS.map(|(family, bounds)| (family.name, bounds));
        let metrics = Metrics::new(env!("CARGO_PKG_VERSION"), &buckets)?;
        for Family { name, help } in COUNTERS {
            metrics.describe_counter(name, help);
        }
        for (Family { name, help }, _) in HISTOGRAMS {
            metrics.describe_histogram(name, help);
        }
        metrics.describe_gauge(UDP_BUFFER.name, UDP_BUFFER.help);
        register_counters(&metrics);
        Ok(Self {
            flow: Flow::new(&metrics),
            dial_durations: [DIAL_DURATION, DIAL_DURATION_FINE]
                .map(|family| metrics.histogram(family.name, &[])),
            connection_duration: metrics.histogram(CONNECTION_DURATION.name, &[]),
            pending_dials: LiveCount::default(),
            established: LiveCount::default(),
            grpc_connections: LiveCount::default(),
            http_connections: LiveCount::default(),
            unadmitted: [Carrier::Quic, Carrier::Tcp, Carrier::Grpc]
                .map(|carrier| (carrier, LiveCount::default())),
            streams: AtomicU64::new(0),
            versions: KnownVersions::default(),
            udp_health: OnceLock::new(),
            memory: OnceLock::new(),
            servers: OnceLock::new(),
            known_paths: Arc::default(),
            resumption: Arc::default(),
            stream_ends: StreamEnds::new(&metrics, STREAM_ENDS, DIRECTIONS),
            meter: Meter::default(),
            metrics,
        })
    }

    /// Sets the sizes of the kernel's UDP buffers, which do not change while the server runs, and
    /// adds the state of the socket.
    pub(crate) fn set_udp(&self, sizes: BufferSizes, health: &Arc<UdpHealth>) {
        // There is one socket.
        let _ = self.udp_health.set(health.clone());
        let set = |direction, size| {
            #[expect(clippy::cast_precision_loss, reason = "buffers are far below 2^52 bytes")]
            self.metrics.gauge(UDP_BUFFER.name, &[("direction", direction)]).set(size as f64);
        };
        set("receive", sizes.receive);
        set("send", sizes.send);
    }

    /// Adds what the process holds for its peers.
    pub(crate) fn set_memory(&self, memory: &Arc<MemoryBudget>) {
        // There is one budget.
        let _ = self.memory.set(memory.clone());
    }

    /// Adds the set of servers.
    pub(crate) fn set_servers(&self, servers: &Arc<ServerSet>) {
        // There is one set.
        let _ = self.servers.set(servers.clone());
    }

    /// The metrics below, whose histograms need upkeep between scrapes.
    pub(crate) fn inner(&self) -> &Metrics {
        &self.metrics
    }
}

/// Begins every counter whose labels are known at 0, so that the first event is a rise.
fn register_counters(metrics: &Metrics) {
    let families = [
        (
            DIAL_FAILURES,
            "reason",
            KonnectivityFailure::ALL.map(KonnectivityFailure::label).to_vec(),
        ),
        (DIALS_FAILED, "reason", [&DialError::REASONS[..], &[FRONTEND_CLOSE]].concat()),
        (JOIN_FAILURES, "reason", JOIN_FAILURE_REASONS.to_vec()),
        (IDENTITY_CONFLICTS, "reason", ClaimFault::LABELS.to_vec()),
        (FRONTENDS_REFUSED, "reason", FrontendRefusal::ALL.map(FrontendRefusal::label).to_vec()),
        (PROOF_RENEWALS, "result", RENEWAL_RESULTS.to_vec()),
        (TOKEN_REVIEWS, "result", REVIEW_RESULTS.to_vec()),
        (TOKEN_RECHECKS, "result", RECHECK_RESULTS.to_vec()),
        (TUNNELS_LOST, "reason", TunnelLost::labels().collect()),
        (OPTIMISTIC_DIALS, "result", vec!["kept", "broken"]),
        (DIALS_WAITED, "result", vec!["came", "failed"]),
        (LEASE_RENEWALS, "result", vec!["ok", "failed"]),
    ];
    for (family, label, values) in families {
        metrics.register_counters(family.name, label, values);
    }
    for family in [DIALS_MOVED, EJECTIONS, CULLED_LEASES, ADDRESS_VALIDATIONS] {
        let _ = metrics.counter(family.name, &[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backends::{Backends, Strategy},
        testing::{TestAgent, metric},
    };

    #[tokio::test(start_paused = true)]
    async fn tunnels_and_streams_are_those_of_the_backends_at_the_time_of_the_scrape() {
        let metrics = ServerMetrics::new().unwrap();
        let backends = Backends::new(&[Strategy::Default, Strategy::DestHost]);
        let value = |name: &str| metric(&metrics, &backends, name);
        let open = "culvert_server_tunnel_open_streams{agent_id=\"a\"}";
        let older = TestAgent::join(&backends, "a").await;
        let newer = TestAgent::join(&backends, "a").await;
        let permits = (older.backend.permit().unwrap(), newer.backend.permit().unwrap());
        assert_eq!((value("culvert_server_tunnels"), value(open)), (2.0, 2.0));
        let ready = "konnectivity_network_proxy_server_ready_backends";
        assert_eq!(value(&format!("{ready}{{proxy_strategy=\"default\"}}")), 1.0);
        assert_eq!(value(&format!("{ready}{{proxy_strategy=\"destHost\"}}")), 0.0);
        drop((permits, older));
        assert_eq!((value("culvert_server_tunnels"), value(open)), (1.0, 0.0));
    }

    #[test]
    fn the_family_that_konnectivity_deprecates_counts_the_last_strategy() {
        let metrics = ServerMetrics::new().unwrap();
        let scrape = metrics.render(&Backends::new(&[Strategy::Default]));
        let help = "Number of konnectivity agent connected to the proxy server. \
                    DEPRECATED, please use ready_backends";
        let name = "konnectivity_network_proxy_server_ready_backend_connections";
        assert!(scrape.contains(&format!("# HELP {name} {help}\n")), "{scrape}");
        assert!(scrape.contains(&format!("\n{name} 0\n")), "{scrape}");
    }
}
