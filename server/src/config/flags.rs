//! The flags of `culvert-server`: every one a Konnectivity `proxy-server` has, and ours.

use clap::Parser;
use culvert_process::{
    admin_flags::AdminFlags, go_duration::GoDuration, tunnel_flags::TunnelFlags,
};

/// The control-plane side of Culvert: takes kube-apiserver's connections to nodes, pods and
/// services and carries each to an agent through a tunnel, over QUIC or TCP.
///
/// A drop-in for Konnectivity's proxy-server. It listens on four addresses: for kube-apiserver
/// (a Unix socket, or TCP with client certificates), for agents (UDP and TCP),
/// for health checks, and for administration.
#[derive(Debug, Clone, Parser)]
#[command(name = "culvert-server", version, max_term_width = 100)]
pub struct Flags {
    /// Protocol kube-apiserver speaks to us: grpc or http-connect, as in its egress selector
    /// configuration
    #[arg(long, help_heading = "Frontend", value_name = "MODE", default_value = "grpc")]
    pub mode: String,

    /// Path of the Unix socket for kube-apiserver. Needs --server-port=0 and no --server-cert,
    /// --server-key or --server-ca-cert: the socket's file mode is its protection
    #[arg(long, help_heading = "Frontend", value_name = "PATH", default_value = "")]
    pub uds_name: String,

    /// Remove a socket left behind at --uds-name before listening there
    #[arg(long, help_heading = "Frontend", default_value_t = true)]
    pub delete_existing_uds_file: bool,

    /// TCP port for kube-apiserver, 1024 to 49151; 0 goes with --uds-name
    #[arg(long, help_heading = "Frontend", value_name = "PORT", default_value_t = 8090)]
    pub server_port: i64,

    /// Address to listen on for kube-apiserver; empty is every interface
    #[arg(long, help_heading = "Frontend", value_name = "ADDRESS", default_value = "")]
    pub server_bind_address: String,

    /// Certificate chain shown to kube-apiserver, PEM. TCP only
    #[arg(long, help_heading = "Frontend", value_name = "FILE", default_value = "")]
    pub server_cert: String,

    /// Private key of --server-cert, PEM
    #[arg(long, help_heading = "Frontend", value_name = "FILE", default_value = "")]
    pub server_key: String,

    /// CA that kube-apiserver's client certificate must come from, PEM. Mandatory on TCP
    #[arg(long, help_heading = "Frontend", value_name = "FILE", default_value = "")]
    pub server_ca_cert: String,

    /// Quiet time after which a gRPC connection of kube-apiserver is pinged
    #[arg(long, help_heading = "Frontend", value_name = "DURATION", default_value = "1h")]
    pub frontend_keepalive_time: GoDuration,

    /// Connections of kube-apiserver open at once; more wait to be accepted
    #[arg(long, help_heading = "Frontend", value_name = "COUNT", default_value_t = 20_000)]
    pub max_frontend_connections: i64,

    /// Time for kube-apiserver to say what it wants once connected
    #[arg(long, help_heading = "Frontend", value_name = "DURATION", default_value = "10s")]
    pub frontend_header_timeout: GoDuration,

    /// Port for agents, UDP and TCP, 1024 to 49151 [default: 8132, or 8091 when started as
    /// proxy-server]
    #[arg(long, help_heading = "Agents", value_name = "PORT")]
    pub agent_port: Option<i64>,

    /// Address to listen on for agents; empty is every interface
    #[arg(long, help_heading = "Agents", value_name = "ADDRESS", default_value = "")]
    pub agent_bind_address: String,

    /// Certificate chain shown to agents, PEM. Mandatory
    #[arg(long, help_heading = "Agents", value_name = "FILE", default_value = "")]
    pub cluster_cert: String,

    /// Private key of --cluster-cert, PEM
    #[arg(long, help_heading = "Agents", value_name = "FILE", default_value = "")]
    pub cluster_key: String,

    /// CA that agents' client certificates must come from, PEM
    #[arg(long, help_heading = "Agents", value_name = "FILE", default_value = "")]
    pub cluster_ca_cert: String,

    /// Quiet time after which a Konnectivity agent's gRPC connection is pinged, where
    /// --tunnel-keep-alive-interval, which holds for it too, is longer or 0
    #[arg(long, help_heading = "Agents", value_name = "DURATION", default_value = "1h")]
    pub keepalive_time: GoDuration,

    /// How agents are chosen for a target, in order of trial: default (any), destHost (the agent
    /// that announced the host), defaultRoute (an agent that announced the default route)
    #[arg(long, help_heading = "Agents", value_name = "LIST", default_value = "default")]
    pub proxy_strategies: String,

    /// Time for an agent to answer a dial; 0 waits for ever, which is Konnectivity's default
    /// [default: 10s]
    #[arg(long, help_heading = "Agents", value_name = "DURATION")]
    pub backend_dial_timeout: Option<GoDuration>,

    /// Answer a frontend at once, without waiting for the agent, when the same agent reached the
    /// same target within the last five minutes: saves a round trip. If the dial fails after all,
    /// the connection is reset
    #[arg(long, help_heading = "Agents")]
    pub optimistic_dial: bool,

    /// Proxied connections that one agent may carry at once
    #[arg(long, help_heading = "Agents", value_name = "COUNT", default_value_t = 10_000)]
    pub max_streams_per_agent: i64,

    /// Queue length of a Konnectivity server. Accepted and ignored: each stream has a window of its
    /// own
    #[arg(long, help_heading = "Agents", value_name = "COUNT", default_value_t = 10)]
    pub xfr_channel_size: i64,

    /// Accepted and ignored, as Konnectivity does
    #[arg(long, help_heading = "Agents", hide = true, default_value_t = true)]
    pub warn_on_channel_limit: bool,

    /// Namespace an agent's token must come from. Token authentication takes this,
    /// --agent-service-account and --authentication-audience together
    #[arg(long, help_heading = "Agent tokens", value_name = "NAMESPACE", default_value = "")]
    pub agent_namespace: String,

    /// Service account an agent's token must belong to
    #[arg(long, help_heading = "Agent tokens", value_name = "NAME", default_value = "")]
    pub agent_service_account: String,

    /// Audience an agent's token must be meant for
    #[arg(long, help_heading = "Agent tokens", value_name = "AUDIENCE", default_value = "")]
    pub authentication_audience: String,

    /// Start even though agents need not prove who they are: anyone who reaches the agent port
    /// may then pose as a node and receive its traffic
    #[arg(long, help_heading = "Agent tokens")]
    pub insecure_allow_unauthenticated_agents: bool,

    /// Kubeconfig for asking kube-apiserver about tokens and leases; empty is the pod's own
    #[arg(long, help_heading = "Kubernetes client", value_name = "FILE", default_value = "")]
    pub kubeconfig: String,

    /// Requests per second to kube-apiserver; 0 is as many as it answers
    #[arg(long, help_heading = "Kubernetes client", value_name = "RATE", default_value_t = 0.0)]
    pub kubeconfig_qps: f32,

    /// Requests to kube-apiserver that may exceed the rate for a moment; 0 is 10
    #[arg(long, help_heading = "Kubernetes client", value_name = "COUNT", default_value_t = 0)]
    pub kubeconfig_burst: i64,

    /// Media type of requests to kube-apiserver. Accepted and ignored: they are JSON
    #[arg(
        long,
        help_heading = "Kubernetes client",
        value_name = "TYPE",
        default_value = "application/vnd.kubernetes.protobuf"
    )]
    pub kube_api_content_type: String,

    /// Name of this server, sent to agents; must differ among servers [default: a random UUID]
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "ID",
        env = "PROXY_SERVER_ID",
        hide_env_values = true
    )]
    pub server_id: Option<String>,

    /// How many servers there are, sent to agents, which connect to that many
    #[arg(long, help_heading = "Server set", value_name = "COUNT", default_value_t = 1)]
    pub server_count: i64,

    /// Publish a Lease for this server and remove those of servers gone
    #[arg(long, help_heading = "Server set")]
    pub enable_lease_controller: bool,

    /// Namespace of the Leases
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "NAMESPACE",
        default_value = "kube-system"
    )]
    pub lease_namespace: String,

    /// Labels of the Leases, key=value pairs separated by commas
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "LABELS",
        default_value = "k8s-app=konnectivity-server"
    )]
    pub lease_label: String,

    /// Time for open connections to end after the first SIGTERM; 0 ends them at once
    #[arg(long, help_heading = "Server set", value_name = "DURATION", default_value = "0")]
    pub graceful_shutdown_timeout: GoDuration,

    /// File with a secret from which stateless-reset tokens are derived: with the same secret a
    /// restarted server ends its old tunnels at once. Empty derives them from --cluster-key
    #[arg(long, help_heading = "Tunnel", value_name = "FILE", default_value = "")]
    pub reset_key_file: String,

    /// Cipher suites for TLS 1.2, by Go's names, separated by commas; empty is a safe choice
    #[arg(long, help_heading = "TLS", value_name = "LIST", default_value = "")]
    pub cipher_suites: String,

    /// Oldest TLS version to accept on TCP: VersionTLS10, VersionTLS11, VersionTLS12 or
    /// VersionTLS13; empty is 1.2, and so is everything older. Tunnels always have 1.3
    #[arg(long, help_heading = "TLS", value_name = "VERSION", default_value = "")]
    pub tls_min_version: String,

    /// Port for /healthz, /readyz and /metrics, 1024 to 49151 [default: 8134, or 8092 when
    /// started as proxy-server]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub health_port: Option<i64>,

    /// Address to listen on for health checks; empty is every interface
    #[arg(
        long,
        help_heading = "Health and administration",
        value_name = "ADDRESS",
        default_value = ""
    )]
    pub health_bind_address: String,

    /// Port for administration (/metrics), 1024 to 49151 [default: 8133, or 8095 when started as
    /// proxy-server]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub admin_port: Option<i64>,

    /// Flags of the admin port that server and agent share.
    #[command(flatten)]
    pub admin: AdminFlags,

    /// Flags of tunnel and log that server and agent share.
    #[command(flatten)]
    pub tunnel: TunnelFlags,
}
