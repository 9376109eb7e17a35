//! The agent's metrics: each name once, in this file.
//!
//! Where Konnectivity has a metric for the same thing, its name and HELP text are kept; all others
//! begin with `culvert_agent_`. Gauges are read from the state itself at each scrape, so they
//! cannot go stale.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use culvert_process::{
    kubernetes,
    metrics::{
        BuildError, Counted, Exposition, Kind, LiveCount, Metrics, PacketType, ResumedStreams,
        Segment, StreamEnds, StreamErrors, StreamPackets,
    },
};
use culvert_transport::{
    BufferSizes, TunnelLost, UdpHealth,
    budget::MemoryBudget,
    congestion::KnownPaths,
    splice::{Cut, Meter, Outcome},
};
use culvert_wire::dial::DialErrorKind;
use kube::runtime::watcher;
use metrics::{Counter, Histogram};
use tokio::time::Instant;

use crate::egress::policy::Rule;
use crate::tunnels::{ServerTunnel, ServerTunnels};

const DIAL_DURATION: &str = "konnectivity_network_proxy_agent_dial_duration_seconds";
const DIAL_DURATION_FINE: &str = "culvert_agent_dial_duration_seconds";
const SERVER_FAILURES: &str = "konnectivity_network_proxy_agent_server_connection_failure_count";
const STREAM_PACKETS: &str = "konnectivity_network_proxy_agent_stream_packets_total";
const STREAM_ERRORS: &str = "konnectivity_network_proxy_agent_stream_errors_total";
/// Without values until a dial has failed, as in Konnectivity, whose tests compare the whole family.
const DIAL_FAILURES: &str = "konnectivity_network_proxy_agent_endpoint_dial_failure_total";
const OPEN_SERVERS: &str = "konnectivity_network_proxy_agent_open_server_connections";
const OPEN_TARGETS: &str = "konnectivity_network_proxy_agent_open_endpoint_connections";
const KNOWN_SERVERS: &str = "konnectivity_network_proxy_agent_known_server_count";
const LEASE_LISTS: &str = "konnectivity_network_proxy_agent_lease_lists_total";
const LEASE_WATCHES: &str = "konnectivity_network_proxy_agent_lease_watches_total";
const LEASE_LIST_LATENCY: &str = "konnectivity_network_proxy_agent_lease_list_latency_seconds";
const DIAL_FAILURE_KINDS: &str = "culvert_agent_dial_failures_total";
const EGRESS_DENIED: &str = "culvert_agent_egress_denied_total";
const STREAM_ENDS: &str = "culvert_agent_stream_ends_total";
const STREAM_BYTES: &str = "culvert_agent_stream_bytes_total";
/// Labels of the bytes to the tunnel and of those from it.
const DIRECTIONS: [&str; 2] = ["to_server", "from_server"];
const STREAMS: &str = "culvert_agent_streams_total";
const CONNECT_ATTEMPTS: &str = "culvert_agent_connect_attempts_total";
const TUNNELS_LOST: &str = "culvert_agent_tunnels_lost_total";
const SWITCHES: &str = "culvert_agent_transport_switches_total";
const TRANSPORT_SINCE: &str = "culvert_agent_tunnel_since_seconds";
const RETIRED: &str = "culvert_agent_tunnels_retired";
const TASKS: &str = "culvert_agent_tasks";
const LOOKUPS: &str = "culvert_agent_lookups_total";
const LOOKUPS_PENDING: &str = "culvert_agent_lookups_pending";
const SET_SERVERS: &str = "culvert_agent_set_servers";
const DIRECT_DIALS: &str = "culvert_agent_direct_dials_total";
const UDP_BUFFER: &str = "culvert_agent_udp_buffer_bytes";

/// The usual new tunnels: the carrier that they replace, their own, and the reasons
/// (docs/operations.md §9).
pub(crate) const USUAL_SWITCHES: [(&str, &str, &[&str]); 6] = [
    ("none", "quic", &["first_choice", "only_choice"]),
    (
        "none",
        "tcp",
        &["only_choice", "quic_refused", "quic_silent", "quic_rejected", "quic_failed_before"],
    ),
    ("quic", "quic", &["quic_silent", "renewed"]),
    ("quic", "tcp", &["quic_silent", "quic_refused"]),
    ("tcp", "quic", &["quic_works", "tcp_silent"]),
    ("tcp", "tcp", &["tcp_silent", "renewed"]),
];

/// What comes of a denial of the egress policy.
const REFUSED: &str = "refused";
const AUDITED: &str = "audited";

/// Label of failures to receive from a server.
const FROM_SERVER: &str = "from_server";

/// Every result of an attempt to get a tunnel.
const CONNECT_RESULTS: [&str; 6] =
    ["ok", "unresolvable", "tls_files", "connect_failed", "join_failed", PANICKED];
/// Every result of a dial of a server at its own address.
const DIRECT_RESULTS: [&str; 4] = ["ok", "connected_already", "other_server", "failed"];
/// Result of an attempt, and reason of a lost tunnel, whose task panicked.
pub(crate) const PANICKED: &str = "panicked";

/// Code of gRPC, as Go spells it, of a stream whose server has gone.
const UNAVAILABLE: &str = "Unavailable";

/// Bounds of Konnectivity's durations, in seconds. They are exactly its own: buckets of agents of
/// both makes are added up.
const LATENCY_BUCKETS: &[f64] = &[0.005, 0.025, 0.1, 0.5, 2.5, 10.0, 30.0];
/// Bounds of dial durations, in seconds, finer in the range of a node's own network.
const DIAL_BUCKETS: &[f64] =
    &[0.0001, 0.0005, 0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The agent's metrics.
#[derive(Debug)]
pub struct AgentMetrics {
    metrics: Metrics,
    dial_durations: [Histogram; 2],
    /// Dials, their replies, and the ends of connections, as the packets that Konnectivity would
    /// have for them.
    packets: StreamPackets,
    errors: StreamErrors,
    /// Bytes spliced in either direction.
    pub(crate) meter: Meter,
    open_targets: LiveCount,
    streams: AtomicU64,
    stream_ends: StreamEnds,
    /// State of the UDP sockets, of which each attempt over QUIC has one.
    pub(crate) udp_health: Arc<UdpHealth>,
    memory: OnceLock<Arc<MemoryBudget>>,
    /// What tunnels have found out about the paths to servers.
    pub(crate) known_paths: Arc<KnownPaths>,
    /// What became of streams whose tunnels were lost.
    pub(crate) resumption: Arc<ResumedStreams>,
    /// Lookups of targets' names.
    pub(crate) target_lookups: LookupMetrics,
    /// Lookups of the servers' name.
    pub(crate) server_lookups: LookupMetrics,
}

impl AgentMetrics {
    /// Nothing counted yet.
    ///
    /// # Errors
    /// When a histogram has no bounds; the fault is ours.
    pub(crate) fn new() -> Result<Self, BuildError> {
        let buckets: &[(&str, &[f64])] = &[
            (DIAL_DURATION, LATENCY_BUCKETS),
            (DIAL_DURATION_FINE, DIAL_BUCKETS),
            (LEASE_LIST_LATENCY, LATENCY_BUCKETS),
        ];
        let metrics = Metrics::new(env!("CARGO_PKG_VERSION"), buckets)?;
        let help = "Time to look up and connect to a target, in seconds.";
        metrics.describe_histogram(DIAL_DURATION_FINE, help);
        metrics.describe_counter(
            SERVER_FAILURES,
            "Count of failures to send to or receive from the proxy server, labeled by the direction (from_server or to_server). DEPRECATED, please use stream_events_error_total",
        );
        metrics.register_counters(SERVER_FAILURES, "direction", ["to_server", FROM_SERVER]);
        metrics
            .describe_histogram(DIAL_DURATION, "Latency of dial to the remote endpoint in seconds");
        metrics.describe_counter(
            DIAL_FAILURES,
            "Number of failures dialing the remote endpoint, by reason (example: timeout).",
        );
        metrics.describe_counter(DIAL_FAILURE_KINDS, "Dials that failed, by kind.");
        metrics
            .describe_counter(CONNECT_ATTEMPTS, "Attempts to get a tunnel to a server, by result.");
        metrics.describe_counter(TUNNELS_LOST, "Tunnels that ended, by reason.");
        metrics.describe_counter(
            SWITCHES,
            "Tunnels that were added, by the transport replaced, their own, and the reason.",
        );
        for (from, to, reasons) in USUAL_SWITCHES {
            for reason in reasons {
                let labels = [("from", from), ("to", to), ("reason", *reason)];
                let _ = metrics.counter(SWITCHES, &labels);
            }
        }
        metrics.describe_counter(
            LEASE_LISTS,
            "Count of server lease list calls made by the agent to the k8s apiserver, labeled by HTTP response code and reason",
        );
        metrics.describe_counter(
            LEASE_WATCHES,
            "Count of server lease watch calls made by the agent to the k8s apiserver, labeled by HTTP response code and reason",
        );
        metrics
            .describe_histogram(LEASE_LIST_LATENCY, "Latency of server lease listing in seconds");
        metrics.register_counters(DIAL_FAILURE_KINDS, "kind", DialErrorKind::NAMES);
        metrics
            .describe_counter(DIRECT_DIALS, "Dials of servers at their own addresses, by result.");
        metrics.register_counters(DIRECT_DIALS, "result", DIRECT_RESULTS);
        metrics.register_counters(CONNECT_ATTEMPTS, "result", CONNECT_RESULTS);
        let lost = TunnelLost::labels().chain([PANICKED]);
        metrics.register_counters(TUNNELS_LOST, "reason", lost);
        metrics.describe_counter(
            EGRESS_DENIED,
            "Addresses of targets that the egress policy denied, by rule and result.",
        );
        for result in [REFUSED, AUDITED] {
            for rule in Rule::labels() {
                let _ = metrics.counter(EGRESS_DENIED, &[("rule", rule), ("result", result)]);
            }
        }
        metrics.describe_counter(LOOKUPS, "Lookups of names, by purpose and result.");
        Ok(Self {
            target_lookups: LookupMetrics::new(&metrics, "target"),
            server_lookups: LookupMetrics::new(&metrics, "server"),
            dial_durations: [DIAL_DURATION, DIAL_DURATION_FINE]
                .map(|name| metrics.histogram(name, &[])),
            packets: StreamPackets::default(),
            errors: StreamErrors::new(&metrics, STREAM_ERRORS, &[(Segment::ToAgent, UNAVAILABLE)]),
            meter: Meter::default(),
            open_targets: LiveCount::default(),
            streams: AtomicU64::new(0),
            udp_health: Arc::default(),
            memory: OnceLock::new(),
            known_paths: Arc::default(),
            resumption: Arc::default(),
            stream_ends: StreamEnds::new(&metrics, STREAM_ENDS, DIRECTIONS),
            metrics,
        })
    }

    /// Adds what the process holds for its peers.
    pub(crate) fn set_memory(&self, memory: &Arc<MemoryBudget>) {
        // There is one budget.
        let _ = self.memory.set(memory.clone());
    }

    /// Counts a dial that succeeded after this time for its lookup and connection.
    pub(crate) fn dial_succeeded(&self, duration: Duration) {
        self.dial_durations.iter().for_each(|histogram| histogram.record(duration));
    }

    /// Counts what Konnectivity would have a packet for.
    pub(crate) fn packet(&self, segment: Segment, packet: PacketType) {
        self.packets.record(segment, packet);
    }

    /// Counts a dial that failed. Konnectivity's metric distinguishes time-outs alone.
    pub(crate) fn dial_failed(&self, kind: DialErrorKind) {
        let reason = if kind == DialErrorKind::TIMEOUT { "timeout" } else { "unknown" };
        self.metrics.counter(DIAL_FAILURES, &[("reason", reason)]).increment(1);
        self.metrics.counter(DIAL_FAILURE_KINDS, &[("kind", kind.name())]).increment(1);
    }

    /// Counts an address that this rule of the egress policy denies. With `audit` it is connected
    /// to nevertheless.
    pub(crate) fn egress_denied(&self, rule: &'static str, audit: bool) {
        let result = if audit { AUDITED } else { REFUSED };
        self.metrics.counter(EGRESS_DENIED, &[("rule", rule), ("result", result)]).increment(1);
    }

    /// Counts a stream whose splice begins. It is open until the result is dropped.
    pub(crate) fn stream_open(&self) -> Counted {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.open_targets.enter()
    }

    /// Counts how a splice ended.
    pub(crate) fn stream_ended(&self, outcome: &Outcome) {
        self.stream_ends.record(outcome);
        if !matches!(outcome.end, Err(Cut::Lost(_))) {
            self.packet(Segment::ToAgent, PacketType::CloseReq);
            self.packet(Segment::FromAgent, PacketType::CloseRsp);
        }
    }

    /// Counts an attempt to get a tunnel.
    pub(crate) fn connect_attempt(&self, result: &'static str) {
        debug_assert!(CONNECT_RESULTS.contains(&result), "{result}");
        self.metrics.counter(CONNECT_ATTEMPTS, &[("result", result)]).increment(1);
    }

    /// Counts a dial of a server at its own address.
    pub(crate) fn direct_dial(&self, result: &'static str) {
        debug_assert!(DIRECT_RESULTS.contains(&result), "{result}");
        self.metrics.counter(DIRECT_DIALS, &[("result", result)]).increment(1);
    }

    /// Counts a tunnel that was added: `from` is the carrier of the one that it replaced, or
    /// `none`.
    pub(crate) fn transport_switched(
        &self,
        from: &'static str,
        to: &'static str,
        reason: &'static str,
    ) {
        self.metrics
            .counter(SWITCHES, &[("from", from), ("to", to), ("reason", reason)])
            .increment(1);
    }

    /// Counts a tunnel that ended because it, or its server, failed.
    pub(crate) fn server_failed(&self) {
        self.metrics.counter(SERVER_FAILURES, &[("direction", FROM_SERVER)]).increment(1);
        self.errors.record(Segment::ToAgent, UNAVAILABLE, None);
    }

    /// Counts a tunnel that ended.
    pub(crate) fn tunnel_lost(&self, reason: &'static str) {
        self.metrics.counter(TUNNELS_LOST, &[("reason", reason)]).increment(1);
    }

    /// Counts a list of the servers' Leases that began at `begun` and is complete.
    pub(crate) fn leases_listed(&self, begun: Instant) {
        let labels = [("http_response_code", "200"), ("reason", "")];
        self.metrics.counter(LEASE_LISTS, &labels).increment(1);
        self.metrics.histogram(LEASE_LIST_LATENCY, &labels[..1]).record(begun.elapsed());
    }

    /// Counts a list or watch of the servers' Leases that failed.
    pub(crate) fn leases_failed(&self, error: &watcher::Error) {
        let (name, (code, reason)) = match error {
            watcher::Error::InitialListFailed(error) => {
                (LEASE_LISTS, kubernetes::labels(Some(error)))
            }
            watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
                (LEASE_WATCHES, kubernetes::labels(Some(error)))
            }
            watcher::Error::WatchError(status) => {
                (LEASE_WATCHES, (status.code.to_string(), status.reason.clone()))
            }
            watcher::Error::NoResourceVersion => (LEASE_LISTS, ("200".into(), "malformed".into())),
        };
        let labels = [("http_response_code", &*code), ("reason", &*reason)];
        self.metrics.counter(name, &labels).increment(1);
    }

    /// The registry, which needs upkeep between scrapes.
    pub(crate) fn inner(&self) -> &Metrics {
        &self.metrics
    }

    /// All metrics in Prometheus' text format.
    pub fn render(&self, servers: &ServerTunnels) -> String {
        self.metrics.render(|exposition| {
            exposition.tasks(TASKS);
            let help = "Current number of open server connections.";
            exposition.gauge(OPEN_SERVERS, help, servers.connected());
            let help = "Current number of open endpoint connections.";
            exposition.gauge(OPEN_TARGETS, help, self.open_targets.get());
            let help = "Current number of servers agent is trying to connect to.";
            // Until a server has reported their number, the agent looks for one.
            exposition.gauge(KNOWN_SERVERS, help, servers.count().max(1));
            let counts = servers.known().counts().into_iter();
            let rows = counts.map(|(state, count)| (vec![("address", state.into())], count));
            let help = "Servers of the set that servers sent, by whether their address is known.";
            exposition.family(SET_SERVERS, Kind::Gauge, help, rows);
            let segments = [
                (Segment::FromAgent, self.meter.writes_to_tunnel()),
                (Segment::ToAgent, self.meter.writes_from_tunnel()),
            ];
            self.packets.collect(STREAM_PACKETS, &segments, exposition);
            let streams = self.streams.load(Ordering::Relaxed);
            exposition.counter(STREAMS, "Streams that were spliced.", streams);
            exposition.meter(STREAM_BYTES, &self.meter, DIRECTIONS);
            exposition.udp("culvert_agent_udp", &self.udp_health.stats());
            if let Some(memory) = self.memory.get() {
                exposition.memory("culvert_agent", memory);
            }
            exposition.resumptions("culvert_agent", &self.known_paths);
            exposition.resumed_streams("culvert_agent", &self.resumption);
            let help = "Tunnels that others have replaced and that still have streams.";
            exposition.gauge(RETIRED, help, servers.retired());
            let pending = [&self.target_lookups, &self.server_lookups]
                .map(|it| (vec![("purpose", it.purpose.to_owned())], it.pending.get()));
            let help = "Lookups of names that have no answer yet.";
            exposition.family(LOOKUPS_PENDING, Kind::Gauge, help, pending);
            collect_tunnels(&servers.in_use(), exposition);
        })
    }
}

/// What is counted about lookups for one purpose. Clones share it.
#[derive(Clone)]
pub(crate) struct LookupMetrics {
    purpose: &'static str,
    found: Counter,
    failed: Counter,
    refused: Counter,
    pending: LiveCount,
}

impl std::fmt::Debug for LookupMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LookupMetrics").field("purpose", &self.purpose).finish_non_exhaustive()
    }
}

impl LookupMetrics {
    fn new(metrics: &Metrics, purpose: &'static str) -> Self {
        let counter =
            |result| metrics.counter(LOOKUPS, &[("purpose", purpose), ("result", result)]);
        let (found, failed, refused) = (counter("found"), counter("failed"), counter("refused"));
        Self { purpose, found, failed, refused, pending: LiveCount::default() }
    }

    /// A lookup has begun, or waits; it is pending until the result is dropped.
    pub(crate) fn pending(&self) -> Counted {
        self.pending.enter()
    }

    /// Counts a lookup that has ended.
    pub(crate) fn ended(&self, found: bool) {
        let counter = if found { &self.found } else { &self.failed };
        counter.increment(1);
    }

    /// Counts a lookup that did not begin.
    pub(crate) fn refused(&self) {
        self.refused.increment(1);
    }
}

/// Adds the tunnels in use, one for each server.
fn collect_tunnels(tunnels: &[Arc<ServerTunnel>], exposition: &mut Exposition) {
    let server_id = |tunnel: &ServerTunnel| ("server_id", tunnel.server_id.to_string());
    let rows = tunnels.iter().map(|tunnel| {
        let labels = vec![
            server_id(tunnel),
            ("transport", tunnel.tunnel.carrier().name().to_owned()),
            ("reason", tunnel.reason.to_owned()),
            ("state", tunnel.state().to_owned()),
        ];
        (labels, tunnel.since.elapsed().as_secs_f64())
    });
    let help = "Age of the tunnel, in seconds.";
    exposition.family(TRANSPORT_SINCE, Kind::Gauge, help, rows);
    let sizes = |BufferSizes { receive, send }| [("receive", receive), ("send", send)];
    let rows = tunnels.iter().filter_map(|tunnel| Some((tunnel, sizes(tunnel.buffers?))));
    let rows = rows.flat_map(|(tunnel, sizes)| {
        sizes.map(|(direction, size)| {
            (vec![server_id(tunnel), ("direction", direction.to_owned())], size)
        })
    });
    let help = "Kernel buffer granted to the tunnel's UDP socket, in bytes.";
    exposition.family(UDP_BUFFER, Kind::Gauge, help, rows);
    let paths: Vec<_> = tunnels
        .iter()
        .map(|tunnel| (server_id(tunnel), tunnel.tunnel.carrier(), tunnel.tunnel.stats()))
        .collect();
    exposition.tunnels("culvert_agent_tunnel", &paths);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rate sees no first event of a counter that did not exist before.
    #[test]
    fn the_usual_switches_of_carriers_are_counted_from_the_start() {
        let metrics = AgentMetrics::new().unwrap();
        let scrape = metrics.inner().render(|_| {});
        for (from, to, reason) in [
            ("none", "quic", "first_choice"),
            ("none", "tcp", "quic_refused"),
            ("none", "tcp", "quic_failed_before"),
            ("quic", "tcp", "quic_silent"),
            ("quic", "quic", "quic_silent"),
            ("tcp", "quic", "quic_works"),
            ("tcp", "tcp", "tcp_silent"),
            ("quic", "quic", "renewed"),
        ] {
            let labels = format!("{{from=\"{from}\",to=\"{to}\",reason=\"{reason}\"}}");
            assert!(scrape.contains(&format!("{SWITCHES}{labels} 0\n")), "{labels} in\n{scrape}");
        }
    }
}
