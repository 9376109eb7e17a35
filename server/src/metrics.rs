//! The server's metrics; `families` has their names and HELP texts.
//!
//! Where Konnectivity has a metric for the same thing, its name and HELP text are kept, so that
//! dashboards and alerts go on working; the names of all others begin with `culvert_server_`.
//! What describes the current state is read when it is scraped, so it cannot go stale.

mod families;
mod flow;
mod versions;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use culvert_process::metrics::{
    BuildError, Counted, Exposition, Kind, Labels, LiveCount, Metrics, PacketType, Segment,
    StreamEnds,
};
use culvert_transport::{
    BufferSizes, Carrier, TunnelLost, UdpHealth,
    budget::MemoryBudget,
    splice::{Meter, Outcome},
};
use culvert_wire::AgentId;
use metrics::Histogram;

use self::families::{
    ADDRESS_VALIDATIONS, AGENTS_BY_VERSION, CONNECTION_DURATION, COUNTERS, CULLED_LEASES,
    DIAL_DURATION, DIAL_DURATION_FINE, DIAL_FAILURES, DIALS_FAILED, DIALS_MOVED, DIALS_WAITED,
    DIRECTIONS, DUPLICATE_AGENTS, EJECTIONS, ESTABLISHED, FRONTENDS_REFUSED, Family,
    GRPC_CONNECTIONS, HISTOGRAMS, HTTP_CONNECTIONS, IDENTITY_CONFLICTS, JOIN_FAILURES,
    LEASE_DELETE_LATENCY, LEASE_DELETES, LEASE_LIST_LATENCY, LEASE_LISTS, LEASE_RENEWALS,
    OPEN_STREAMS, OPTIMISTIC_DIALS, PENDING_DIALS, PROOF_RENEWALS, READY_BACKENDS,
    READY_CONNECTIONS, SET_SERVERS, STREAM_BYTES, STREAM_ENDS, STREAMS, TOKEN_RECHECKS,
    TOKEN_REVIEWS, TUNNELS, TUNNELS_LOST, UDP_BUFFER, UNADMITTED,
};
pub(crate) use self::flow::Flow;
use self::versions::KnownVersions;
use crate::{
    agents::{
        JOIN_FAILURE_REASONS,
        admission::REVIEW_RESULTS,
        identity::ClaimFault,
        session::{recheck::RECHECK_RESULTS, renewal::RENEWAL_RESULTS},
    },
    backends::{Backend, Backends, duplicates::duplicates, registry::Candidate},
    dial::{DialError, KonnectivityFailure},
    server_set::ServerSet,
};

/// Reason of a dial that its frontend gave up.
const FRONTEND_CLOSE: &str = "frontend_close";

/// Number of live tasks.
const TASKS: &str = "culvert_server_tasks";

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
    const ALL: [Self; 3] = [Self::ClientName, Self::Handshake, Self::TimedOut];

    fn label(self) -> &'static str {
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

/// Kind of a request about Leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaseRequest {
    /// Lists them.
    List,
    /// Removes one.
    Delete,
}

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

    /// The metrics below, whose histograms need upkeep between scrapes.
    pub(crate) fn inner(&self) -> &Metrics {
        &self.metrics
    }

    /// All metrics in Prometheus' text format.
    pub fn render(&self, backends: &Backends) -> String {
        self.metrics.render(|exposition| {
            exposition.tasks(TASKS);
            let agents = backends.all();
            self.collect_connections(agents.len(), exposition);
            self.flow.collect(&self.meter, exposition);
            collect_backends(backends, exposition);
            collect_tunnels(&agents, exposition);
            let versions = self.versions.count(&agents);
            let (name, help) = (AGENTS_BY_VERSION.name, AGENTS_BY_VERSION.help);
            exposition.family(name, Kind::Gauge, help, versions);
            let duplicates = duplicates(&agents).len();
            exposition.gauge(DUPLICATE_AGENTS.name, DUPLICATE_AGENTS.help, duplicates);
            let streams = self.streams.load(Ordering::Relaxed);
            exposition.counter(STREAMS.name, STREAMS.help, streams);
            exposition.meter(STREAM_BYTES, &self.meter, DIRECTIONS);
            if let Some(health) = self.udp_health.get() {
                exposition.udp("culvert_server_udp", &health.stats());
            }
            if let Some(memory) = self.memory.get() {
                exposition.memory("culvert_server", memory);
            }
            if let Some(servers) = self.servers.get() {
                let counts = servers.counts().into_iter();
                let rows = counts.map(|(state, count)| (vec![("address", state.into())], count));
                exposition.family(SET_SERVERS.name, Kind::Gauge, SET_SERVERS.help, rows);
            }
        })
    }

    fn collect_connections(&self, agents: usize, exposition: &mut Exposition) {
        exposition.gauge(PENDING_DIALS.name, PENDING_DIALS.help, self.pending_dials.get());
        exposition.gauge(ESTABLISHED.name, ESTABLISHED.help, self.established.get());
        let method = |name: &str| vec![("service_method", name.to_owned())];
        let rows =
            [(method("Proxy"), self.grpc_connections.get()), (method("Connect"), agents as u64)];
        exposition.family(GRPC_CONNECTIONS.name, Kind::Gauge, GRPC_CONNECTIONS.help, rows);
        exposition.gauge(HTTP_CONNECTIONS.name, HTTP_CONNECTIONS.help, self.http_connections.get());
        let unadmitted = self
            .unadmitted
            .iter()
            .map(|(carrier, count)| (vec![("transport", carrier.name().to_owned())], count.get()));
        exposition.family(UNADMITTED.name, Kind::Gauge, UNADMITTED.help, unadmitted);
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

fn collect_backends(backends: &Backends, exposition: &mut Exposition) {
    let counts = backends.counts();
    let last = counts.last().map_or(0, |(_, count)| *count);
    let rows = counts
        .into_iter()
        .map(|(strategy, count)| (vec![("proxy_strategy", strategy.name().to_owned())], count));
    exposition.family(READY_BACKENDS.name, Kind::Gauge, READY_BACKENDS.help, rows);
    exposition.gauge(READY_CONNECTIONS.name, READY_CONNECTIONS.help, last);
}

fn collect_tunnels(tunnels: &[Arc<Backend>], exposition: &mut Exposition) {
    exposition.gauge(TUNNELS.name, TUNNELS.help, tunnels.len());
    let agent = |id: &AgentId| ("agent_id", id.to_string());
    let mut open: BTreeMap<_, usize> = BTreeMap::new();
    for backend in tunnels {
        *open.entry(backend.agent_id()).or_default() += backend.open_streams();
    }
    let rows = open.into_iter().map(|(id, open)| (Labels::from([agent(id)]), open));
    exposition.family(OPEN_STREAMS.name, Kind::Gauge, OPEN_STREAMS.help, rows);
    // An agent that moves to another tunnel has several; new dials take the newest.
    let newest: BTreeMap<_, _> =
        tunnels.iter().map(|backend| (backend.agent_id(), backend)).collect();
    let paths: Vec<_> = newest
        .into_iter()
        .map(|(id, backend)| (agent(id), backend.tunnel.carrier(), backend.tunnel.stats()))
        .collect();
    exposition.tunnels("culvert_server_tunnel", &paths);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backends::Strategy,
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
