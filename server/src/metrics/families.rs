//! The families of the server's metrics: names, HELP texts, and bounds of buckets.

/// A family of metrics: its name and its HELP text.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
}

impl Family {
    const fn new(name: &'static str, help: &'static str) -> Self {
        Self { name, help }
    }
}

pub(super) const DIAL_DURATION: Family = Family::new(
    "konnectivity_network_proxy_server_dial_duration_seconds",
    "Latency of dial to the remote endpoint in seconds",
);
pub(super) const DIAL_DURATION_FINE: Family = Family::new(
    "culvert_server_dial_duration_seconds",
    "Time from a dial's start to the agent's positive reply, in seconds.",
);
pub(super) const CONNECTION_DURATION: Family = Family::new(
    "konnectivity_network_proxy_server_connection_duration_seconds",
    "Duration in seconds a proxied end-to-end connection was established (post-dial) before being \
     closed.",
);
pub(super) const FRONTEND_WRITES: Family = Family::new(
    "konnectivity_network_proxy_server_frontend_write_duration_seconds",
    "Latency of write to the frontend in seconds",
);
pub(super) const FULL_CHANNELS: Family = Family::new(
    "konnectivity_network_proxy_server_full_receive_channels",
    "Number of current connections blocked by a full receive channel, partitioned by service \
     method.",
);
pub(super) const STREAM_PACKETS: &str = "konnectivity_network_proxy_server_stream_packets_total";
pub(super) const STREAM_ERRORS: &str = "konnectivity_network_proxy_server_stream_errors_total";
pub(super) const DIAL_FAILURES: Family = Family::new(
    "konnectivity_network_proxy_server_dial_failure_count",
    "Number of dial failures observed. Multiple failures can occur for a single dial \
     request.",
);
pub(super) const DIALS_FAILED: Family = Family::new(
    "culvert_server_dial_failures_total",
    "Dials that failed or were given up, by reason.",
);
pub(super) const OPTIMISTIC_DIALS: Family = Family::new(
    "culvert_server_optimistic_dials_total",
    "Dials answered before the agent did, by what it then said.",
);
pub(super) const DIALS_MOVED: Family = Family::new(
    "culvert_server_dials_moved_total",
    "Dials whose tunnel was lost or superseded before the answer and that were made again \
     on another.",
);
pub(super) const DIALS_WAITED: Family = Family::new(
    "culvert_server_dials_waited_total",
    "Dials that waited for an agent that had just left, by whether one came.",
);
pub(super) const EJECTIONS: Family = Family::new(
    "culvert_server_ejections_total",
    "Times that an agent got no dials for a while, because those through it timed out while those \
     through others did not.",
);
pub(super) const PENDING_DIALS: Family = Family::new(
    "konnectivity_network_proxy_server_pending_backend_dials",
    "Current number of pending backend dial requests",
);
pub(super) const ESTABLISHED: Family = Family::new(
    "konnectivity_network_proxy_server_established_connections",
    "Current number of established end-to-end connections (post-dial).",
);
pub(super) const GRPC_CONNECTIONS: Family = Family::new(
    "konnectivity_network_proxy_server_grpc_connections",
    "Number of current grpc connections, partitioned by service method.",
);
pub(super) const HTTP_CONNECTIONS: Family = Family::new(
    "konnectivity_network_proxy_server_http_connections",
    "Number of current HTTP CONNECT connections",
);
pub(super) const READY_BACKENDS: Family = Family::new(
    "konnectivity_network_proxy_server_ready_backends",
    "Number of konnectivity agent connected to the proxy server",
);
pub(super) const AGENTS_BY_VERSION: Family = Family::new(
    "culvert_server_agents_by_version",
    "Connected agents by the name and version of their software.",
);
pub(super) const DUPLICATE_AGENTS: Family =
    Family::new("culvert_server_duplicate_agents", "Ids that several live agents have.");
pub(super) const READY_CONNECTIONS: Family = Family::new(
    "konnectivity_network_proxy_server_ready_backend_connections",
    "Number of konnectivity agent connected to the proxy server. DEPRECATED, please \
     use ready_backends",
);
pub(super) const STREAMS: Family =
    Family::new("culvert_server_streams_total", "Streams that were spliced.");
pub(super) const STREAM_ENDS: &str = "culvert_server_stream_ends_total";
pub(super) const STREAM_BYTES: &str = "culvert_server_stream_bytes_total";
pub(super) const OPEN_STREAMS: Family =
    Family::new("culvert_server_tunnel_open_streams", "Streams being dialed or spliced, by agent.");
pub(super) const SET_SERVERS: Family = Family::new(
    "culvert_server_set_servers",
    "Servers of the set that agents are sent, by whether their address is known.",
);
pub(super) const TUNNELS: Family =
    Family::new("culvert_server_tunnels", "Tunnels of agents that have joined.");
pub(super) const IDENTITY_CONFLICTS: Family = Family::new(
    "culvert_server_identity_conflicts_total",
    "Ids and identifiers that agents announced and did not get, by reason.",
);
pub(super) const PROOF_RENEWALS: Family = Family::new(
    "culvert_server_proof_renewals_total",
    "Tokens with which connected agents renewed their proof of identity, by result.",
);
pub(super) const TUNNELS_LOST: Family =
    Family::new("culvert_server_tunnels_lost_total", "Tunnels that ended, by reason.");
pub(super) const JOIN_FAILURES: Family = Family::new(
    "culvert_server_join_failures_total",
    "Agents that connected and did not become a backend, by reason.",
);
pub(super) const TOKEN_REVIEWS: Family = Family::new(
    "culvert_server_token_reviews_total",
    "Tokens that kube-apiserver was asked to review, by result.",
);
pub(super) const TOKEN_RECHECKS: Family = Family::new(
    "culvert_server_token_rechecks_total",
    "Reviews of tokens of connected agents that were accepted before, by result.",
);
pub(super) const UNADMITTED: Family = Family::new(
    "culvert_server_unadmitted_connections",
    "Connections of peers that are not admitted yet, by what carries them.",
);
pub(super) const ADDRESS_VALIDATIONS: Family = Family::new(
    "culvert_server_address_validations_total",
    "QUIC clients that had to prove their address first, because many peers were not admitted \
     yet.",
);
pub(super) const FRONTENDS_REFUSED: Family = Family::new(
    "culvert_server_frontends_refused_total",
    "Connections of frontends that were refused before a request, by reason.",
);
pub(super) const CULLED_LEASES: Family = Family::new(
    "konnectivity_network_proxy_server_culled_leases_count",
    "Count of expired leases that the lease garbage collection controller has culled.",
);
pub(super) const LEASE_RENEWALS: Family = Family::new(
    "culvert_server_lease_renewals_total",
    "Renewals of the server's own Lease, by result.",
);
pub(super) const LEASE_LISTS: Family = Family::new(
    "konnectivity_network_proxy_server_lease_list_total",
    "Count of lease deletion calls by the garbage collection controller. Labeled by HTTP status \
     code and reason.",
);
pub(super) const LEASE_LIST_LATENCY: Family = Family::new(
    "konnectivity_network_proxy_server_lease_list_latency_seconds",
    "Latency of lease list calls by the garbage collection controller in seconds.",
);
pub(super) const LEASE_DELETES: Family = Family::new(
    "konnectivity_network_proxy_server_lease_delete_total",
    "Count of lease delection calls by the garbage collection controller. Labeled by HTTP status \
     code and reason.",
);
pub(super) const LEASE_DELETE_LATENCY: Family = Family::new(
    "konnectivity_network_proxy_server_lease_delete_latency_seconds",
    "Latency of lease deletion calls by the garbage collection controller in seconds.",
);
pub(super) const UDP_BUFFER: Family = Family::new(
    "culvert_server_udp_buffer_bytes",
    "Kernel buffer granted to the tunnel's UDP socket, in bytes.",
);

/// Families that count events.
pub(super) const COUNTERS: [Family; 16] = [
    DIAL_FAILURES,
    DIALS_FAILED,
    OPTIMISTIC_DIALS,
    DIALS_MOVED,
    DIALS_WAITED,
    TUNNELS_LOST,
    JOIN_FAILURES,
    FRONTENDS_REFUSED,
    TOKEN_REVIEWS,
    ADDRESS_VALIDATIONS,
    IDENTITY_CONFLICTS,
    PROOF_RENEWALS,
    CULLED_LEASES,
    LEASE_RENEWALS,
    LEASE_LISTS,
    LEASE_DELETES,
];
/// Families of durations, and the bounds of their buckets.
pub(super) const HISTOGRAMS: [(Family, &[f64]); 5] = [
    (DIAL_DURATION, LATENCY_BUCKETS),
    (DIAL_DURATION_FINE, DIAL_BUCKETS),
    (CONNECTION_DURATION, CONNECTION_BUCKETS),
    (LEASE_LIST_LATENCY, REQUEST_BUCKETS),
    (LEASE_DELETE_LATENCY, REQUEST_BUCKETS),
];
/// Labels of the bytes to the tunnel and of those from it.
pub(super) const DIRECTIONS: [&str; 2] = ["to_agent", "from_agent"];

/// Bounds of Konnectivity's durations of dials and writes, in seconds. They are exactly its own:
/// buckets of servers of both makes are added up.
pub(super) const LATENCY_BUCKETS: &[f64] = &[1e-6, 1e-5, 1e-4, 0.005, 0.025, 0.1, 0.5, 2.5, 12.5];
/// Bounds of requests to kube-apiserver, in seconds: those of Go's client library.
const REQUEST_BUCKETS: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Bounds of dial durations, in seconds, finer in the range of tunnels.
const DIAL_BUCKETS: &[f64] =
    &[1e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 12.5];
/// Bounds of connection durations, in seconds: Konnectivity's.
const CONNECTION_BUCKETS: &[f64] =
    &[1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14_400.0, 43_200.0, 86_400.0];
