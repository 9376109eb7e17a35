//! Everything the server counts: each name once, in this file.
//!
//! Where Konnectivity has a metric for the same thing, its name and HELP text are kept, so that
//! dashboards and alerts go on working; what it has no word for begins with `culvert_server_`.
//! What describes the state of now is read when it is scraped, so it cannot go stale.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use culvert_process::metrics::{
    BuildError, Counted, Exposition, Kind, Labels, LiveCount, Metrics, StreamEnds,
};
use culvert_transport::{
    BufferSizes,
    splice::{Meter, Outcome},
};
use culvert_wire::AgentId;
use metrics::Histogram;

use crate::backends::{Backend, Backends, registry::Candidate};

const DIAL_DURATION: &str = "konnectivity_network_proxy_server_dial_duration_seconds";
const CONNECTION_DURATION: &str = "konnectivity_network_proxy_server_connection_duration_seconds";
const DIAL_FAILURES: &str = "konnectivity_network_proxy_server_dial_failure_count";
const OPTIMISTIC_DIALS: &str = "culvert_server_optimistic_dials_total";
const DIALS_MOVED: &str = "culvert_server_dials_moved_total";
const DIALS_WAITED: &str = "culvert_server_dials_waited_total";
const PENDING_DIALS: &str = "konnectivity_network_proxy_server_pending_backend_dials";
const ESTABLISHED: &str = "konnectivity_network_proxy_server_established_connections";
const GRPC_CONNECTIONS: &str = "konnectivity_network_proxy_server_grpc_connections";
const HTTP_CONNECTIONS: &str = "konnectivity_network_proxy_server_http_connections";
const READY_BACKENDS: &str = "konnectivity_network_proxy_server_ready_backends";
const READY_CONNECTIONS: &str = "konnectivity_network_proxy_server_ready_backend_connections";
/// Labels of the bytes to the tunnel and of those from it.
const DIRECTIONS: [&str; 2] = ["to_agent", "from_agent"];
const STREAMS: &str = "culvert_server_streams_total";
const STREAM_ENDS: &str = "culvert_server_stream_ends_total";
const STREAM_BYTES: &str = "culvert_server_stream_bytes_total";
const OPEN_STREAMS: &str = "culvert_server_tunnel_open_streams";
const TUNNELS: &str = "culvert_server_tunnels";
const TUNNELS_LOST: &str = "culvert_server_tunnels_lost_total";
const JOIN_FAILURES: &str = "culvert_server_join_failures_total";
const CULLED_LEASES: &str = "konnectivity_network_proxy_server_culled_leases_count";
const LEASE_RENEWALS: &str = "culvert_server_lease_renewals_total";
const LEASE_LISTS: &str = "konnectivity_network_proxy_server_lease_list_total";
const LEASE_LIST_LATENCY: &str = "konnectivity_network_proxy_server_lease_list_latency_seconds";
const LEASE_DELETES: &str = "konnectivity_network_proxy_server_lease_delete_total";
const LEASE_DELETE_LATENCY: &str = "konnectivity_network_proxy_server_lease_delete_latency_seconds";
const UDP_BUFFER: &str = "culvert_server_udp_buffer_bytes";

/// Bounds of dial durations: Konnectivity's, with the range that tunnels live in made finer.
const DIAL_BUCKETS: &[f64] = &[
    1e-6, 1e-5, 1e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 12.5,
];
/// Bounds of connection durations: Konnectivity's.
const CONNECTION_BUCKETS: &[f64] =
    &[1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14_400.0, 43_200.0, 86_400.0];

/// Which kind of frontend a connection came in by.
#[derive(Clone, Copy, Debug)]
pub enum FrontendKind {
    /// One `Proxy` stream of the gRPC frontend.
    Grpc,
    /// One connection of the HTTP CONNECT frontend.
    Connect,
}

/// What kube-apiserver is asked about Leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeaseCall {
    /// Which there are.
    List,
    /// To remove one.
    Delete,
}

/// The server's metrics. Shared by everything that counts.
#[derive(Debug)]
pub struct ServerMetrics {
    metrics: Metrics,
    /// Time from a dial's start to a positive answer.
    pub dial_duration: Histogram,
    connection_duration: Histogram,
    pending_dials: LiveCount,
    established: LiveCount,
    grpc_connections: LiveCount,
    http_connections: LiveCount,
    streams: AtomicU64,
    stream_ends: StreamEnds,
    /// Bytes spliced in either direction.
    pub meter: Meter,
}

impl ServerMetrics {
    /// Nothing counted yet.
    ///
    /// # Errors
    /// When a histogram has no bounds; the fault is ours.
    pub fn new() -> Result<Self, BuildError> {
        let buckets: &[(&str, &[f64])] = &[
            (DIAL_DURATION, DIAL_BUCKETS),
            (CONNECTION_DURATION, CONNECTION_BUCKETS),
            (LEASE_LIST_LATENCY, DIAL_BUCKETS),
            (LEASE_DELETE_LATENCY, DIAL_BUCKETS),
        ];
        let metrics = Metrics::new(env!("CARGO_PKG_VERSION"), buckets)?;
        metrics
            .describe_histogram(DIAL_DURATION, "Latency of dial to the remote endpoint in seconds");
        metrics.describe_histogram(
            CONNECTION_DURATION,
            "Time a spliced connection lived, in seconds.",
        );
        metrics.describe_counter(
            DIAL_FAILURES,
            "Number of dial failures observed. Multiple failures can occur for a single dial request.",
        );
        metrics.describe_counter(
            OPTIMISTIC_DIALS,
            "Dials answered before the agent did, by what it then said.",
        );
        metrics.describe_counter(
            DIALS_MOVED,
            "Dials whose tunnel was lost before the answer and that were made again on another.",
        );
        metrics.describe_counter(
            DIALS_WAITED,
            "Dials that waited for an agent that had just left, by whether one came.",
        );
        metrics.describe_counter(TUNNELS_LOST, "Tunnels that ended, by reason.");
        metrics.describe_counter(
            JOIN_FAILURES,
            "Agents that connected and did not become a backend, by reason.",
        );
        metrics.describe_counter(
            CULLED_LEASES,
            "Count of expired leases that the lease garbage collection controller has culled.",
        );
        metrics.describe_counter(LEASE_RENEWALS, "Renewals of the server's own Lease, by result.");
        metrics.describe_counter(LEASE_LISTS, "Lists of Leases, by kube-apiserver's answer.");
        metrics.describe_counter(LEASE_DELETES, "Removals of Leases, by kube-apiserver's answer.");
        metrics.describe_histogram(LEASE_LIST_LATENCY, "Latency of lease list calls in seconds.");
        metrics.describe_histogram(
            LEASE_DELETE_LATENCY,
            "Latency of lease deletion calls in seconds.",
        );
        Ok(Self {
            dial_duration: metrics.histogram(DIAL_DURATION, &[]),
            connection_duration: metrics.histogram(CONNECTION_DURATION, &[]),
            pending_dials: LiveCount::default(),
            established: LiveCount::default(),
            grpc_connections: LiveCount::default(),
            http_connections: LiveCount::default(),
            streams: AtomicU64::new(0),
            stream_ends: StreamEnds::new(&metrics, STREAM_ENDS, DIRECTIONS),
            meter: Meter::default(),
            metrics,
        })
    }

    /// Tells the kernel's UDP buffers, which do not change while the server runs.
    pub fn set_udp_buffers(&self, sizes: BufferSizes) {
        self.metrics.describe_gauge(
            UDP_BUFFER,
            "Kernel buffer granted to the tunnel's UDP socket, in bytes.",
        );
        let set = |direction, size| {
            #[expect(clippy::cast_precision_loss, reason = "buffers are far below 2^52 bytes")]
            self.metrics.gauge(UDP_BUFFER, &[("direction", direction)]).set(size as f64);
        };
        set("receive", sizes.receive);
        set("send", sizes.send);
    }

    /// Counts a dial that waits for its answer.
    pub fn dial_pending(&self) -> Counted {
        self.pending_dials.enter()
    }

    /// Counts a dial that failed.
    pub fn dial_failed(&self, reason: &'static str) {
        self.metrics.counter(DIAL_FAILURES, &[("reason", reason)]).increment(1);
    }

    /// Counts a dial that is made again on another tunnel.
    pub fn dial_moved(&self) {
        self.metrics.counter(DIALS_MOVED, &[]).increment(1);
    }

    /// Counts a dial that waited for an agent, and whether one came.
    pub fn dial_waited(&self, came: bool) {
        let result = if came { "came" } else { "failed" };
        self.metrics.counter(DIALS_WAITED, &[("result", result)]).increment(1);
    }

    /// Counts a dial that was answered before the agent did, and whether the agent agreed.
    pub fn optimistic_dial(&self, agreed: bool) {
        let result = if agreed { "kept" } else { "broken" };
        self.metrics.counter(OPTIMISTIC_DIALS, &[("result", result)]).increment(1);
    }

    /// Counts a frontend's connection.
    pub fn frontend_open(&self, kind: FrontendKind) -> Counted {
        match kind {
            FrontendKind::Grpc => self.grpc_connections.enter(),
            FrontendKind::Connect => self.http_connections.enter(),
        }
    }

    /// Counts a stream that is being spliced.
    pub fn stream_open(&self) -> Counted {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.established.enter()
    }

    /// Counts how a splice ended and how long it lived.
    pub fn stream_ended(&self, started: Instant, outcome: &Outcome) {
        self.connection_duration.record(started.elapsed());
        self.stream_ends.record(outcome);
    }

    /// Counts a tunnel that ended.
    pub fn tunnel_lost(&self, reason: &'static str) {
        self.metrics.counter(TUNNELS_LOST, &[("reason", reason)]).increment(1);
    }

    /// Counts an agent that did not become a backend.
    pub fn join_failed(&self, reason: &'static str) {
        self.metrics.counter(JOIN_FAILURES, &[("reason", reason)]).increment(1);
    }

    /// Counts a renewal of the server's own Lease.
    pub fn lease_renewed(&self, done: bool) {
        let result = if done { "ok" } else { "failed" };
        self.metrics.counter(LEASE_RENEWALS, &[("result", result)]).increment(1);
    }

    /// Counts a request about Leases that began at `begun`, and how it was answered.
    pub fn lease_call(&self, call: LeaseCall, begun: Instant, code: &str, reason: &str) {
        let (total, latency) = match call {
            LeaseCall::List => (LEASE_LISTS, LEASE_LIST_LATENCY),
            LeaseCall::Delete => (LEASE_DELETES, LEASE_DELETE_LATENCY),
        };
        let labels = [("http_status_code", code), ("reason", reason)];
        self.metrics.counter(total, &labels).increment(1);
        self.metrics.histogram(latency, &labels[..1]).record(begun.elapsed());
    }

    /// Counts an expired Lease that was removed.
    pub fn lease_culled(&self) {
        self.metrics.counter(CULLED_LEASES, &[]).increment(1);
    }

    /// The metrics to keep in shape between scrapes.
    pub fn inner(&self) -> &Metrics {
        &self.metrics
    }

    /// All metrics in Prometheus' text format.
    pub fn render(&self, backends: &Backends) -> String {
        self.metrics.render(|exposition| {
            self.collect_connections(exposition);
            collect_backends(backends, exposition);
            collect_tunnels(&backends.all(), exposition);
            let streams = self.streams.load(Ordering::Relaxed);
            exposition.counter(STREAMS, "Streams that were spliced.", streams);
            exposition.meter(STREAM_BYTES, &self.meter, DIRECTIONS);
        })
    }

    fn collect_connections(&self, exposition: &mut Exposition) {
        let help = "Current number of pending backend dial requests";
        exposition.gauge(PENDING_DIALS, help, self.pending_dials.get());
        let help = "Current number of established end-to-end connections (post-dial).";
        exposition.gauge(ESTABLISHED, help, self.established.get());
        let help = "Number of current grpc connections, partitioned by service method.";
        let proxy = vec![("service_method", "Proxy".to_owned())];
        let rows = [(proxy, self.grpc_connections.get())];
        exposition.family(GRPC_CONNECTIONS, Kind::Gauge, help, rows);
        let help = "Number of current HTTP CONNECT connections";
        exposition.gauge(HTTP_CONNECTIONS, help, self.http_connections.get());
    }
}

fn collect_backends(backends: &Backends, exposition: &mut Exposition) {
    let counts = backends.counts();
    let last = counts.last().map_or(0, |(_, count)| *count);
    let rows = counts
        .into_iter()
        .map(|(strategy, count)| (vec![("proxy_strategy", strategy.name().to_owned())], count));
    let help = "Number of konnectivity agent connected to the proxy server";
    exposition.family(READY_BACKENDS, Kind::Gauge, help, rows);
    let help = "Number of konnectivity agent connected to the proxy server. DEPRECATED, please use ready_backends";
    exposition.gauge(READY_CONNECTIONS, help, last);
}

fn collect_tunnels(tunnels: &[Arc<Backend>], exposition: &mut Exposition) {
    exposition.gauge(TUNNELS, "Tunnels of agents that have joined.", tunnels.len());
    let agent = |id: &AgentId| ("agent_id", id.to_string());
    let mut open: BTreeMap<_, usize> = BTreeMap::new();
    for backend in tunnels {
        *open.entry(backend.agent_id()).or_default() += backend.open_streams();
    }
    let rows = open.into_iter().map(|(id, open)| (Labels::from([agent(id)]), open));
    let help = "Streams being dialed or spliced, by agent.";
    exposition.family(OPEN_STREAMS, Kind::Gauge, help, rows);
    // An agent that moves to another tunnel has several; new dials take the newest.
    let newest: BTreeMap<_, _> =
        tunnels.iter().map(|backend| (backend.agent_id(), backend)).collect();
    let paths: Vec<_> = newest
        .into_iter()
        .map(|(id, backend)| (agent(id), backend.tunnel.carrier(), backend.tunnel.stats()))
        .collect();
    exposition.tunnels("culvert_server_tunnel", &paths);
}
