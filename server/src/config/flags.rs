//! The flags of `culvert-server`: every one a Konnectivity `proxy-server` has, and ours.

use clap::Parser;
use culvert_process::{
    admin_flags::AdminFlags, channel_flags, go_duration::GoDuration,
    kubernetes_flags::KubernetesFlags, tls_flags::TlsFlags, tunnel_flags::TunnelFlags, version,
};

/// Konnectivity's default of `--xfr-channel-size`.
pub(super) const DEFAULT_CHANNEL_SIZE: i64 = 10;

/// The control-plane side of Culvert: takes kube-apiserver's connections to nodes, pods and
/// services and carries each to an agent through a tunnel, over QUIC or TCP.
///
/// A drop-in for Konnectivity's proxy-server. It listens on four addresses: for kube-apiserver
/// (a Unix socket, or TCP with client certificates), for agents (UDP and TCP),
/// for health checks, and for administration.
#[derive(Debug, Clone, Parser)]
#[command(name = "culvert-server", version = version::text(), max_term_width = 100)]
pub struct Flags {
    /// Protocol of kube-apiserver's requests, as in its egress selector configuration
    #[arg(
        long,
        help_heading = "Frontend",
        value_name = "MODE",
        value_parser = ["grpc", "http-connect"],
        default_value = "grpc"
    )]
    pub mode: String,

    /// Path of the Unix socket for kube-apiserver, which its file mode protects. Requires
    /// --server-port=0, and no --server-cert, --server-key or --server-ca-cert; empty listens on
    /// TCP instead
    #[arg(long, help_heading = "Frontend", value_name = "PATH", default_value = "")]
    pub uds_name: String,

    /// Remove a socket that is at --uds-name before listening there, even if another process listens
    /// on it
    #[arg(long, help_heading = "Frontend", default_value_t = true)]
    pub delete_existing_uds_file: bool,

    /// TCP port for kube-apiserver, 1024 to 49151; 0 with --uds-name
    #[arg(long, help_heading = "Frontend", value_name = "PORT", default_value_t = 8090)]
    pub server_port: i64,

    /// Address to listen on for kube-apiserver; empty means every interface
    #[arg(long, help_heading = "Frontend", value_name = "ADDRESS", default_value = "")]
    pub server_bind_address: String,

    /// Certificate chain that the server presents to kube-apiserver, PEM. Mandatory on TCP
    #[arg(long, help_heading = "Frontend", value_name = "FILE", default_value = "")]
    pub server_cert: String,

    /// Private key of --server-cert, PEM
    #[arg(long, help_heading = "Frontend", value_name = "FILE", default_value = "")]
    pub server_key: String,

    /// CA of kube-apiserver's client certificate, PEM. Mandatory on TCP
    #[arg(long, help_heading = "Frontend", value_name = "FILE", default_value = "")]
    pub server_ca_cert: String,

    /// Names of the client certificates that may connect over TCP: common names, DNS names or URIs.
    /// Empty accepts every certificate of --server-ca-cert
    #[arg(long, help_heading = "Frontend", value_name = "LIST", default_value = "")]
    pub server_client_names: String,

    /// Idle time after which a gRPC connection of kube-apiserver is pinged; 0 sends no pings
    #[arg(long, help_heading = "Frontend", value_name = "DURATION", default_value = "1h")]
    pub frontend_keepalive_time: GoDuration,

    /// Maximum number of open connections of kube-apiserver; further ones wait to be accepted
    #[arg(long, help_heading = "Frontend", value_name = "COUNT", default_value_t = 20_000)]
    pub max_frontend_connections: i64,

    /// Time limit of a new connection of kube-apiserver for its TLS handshake, and again for the
    /// head of its request or the first packet of its gRPC stream
    #[arg(long, help_heading = "Frontend", value_name = "DURATION", default_value = "10s")]
    pub frontend_header_timeout: GoDuration,

    /// Port for agents, UDP and TCP, 1024 to 49151 [default: 8132, or 8091 when started as
    /// proxy-server]
    #[arg(long, help_heading = "Agents", value_name = "PORT")]
    pub agent_port: Option<i64>,

    /// Address to listen on for agents; empty means every interface
    #[arg(long, help_heading = "Agents", value_name = "ADDRESS", default_value = "")]
    pub agent_bind_address: String,

    /// Certificate chain that the server presents to agents, PEM. Mandatory
    #[arg(long, help_heading = "Agents", value_name = "FILE", default_value = "")]
    pub cluster_cert: String,

    /// Private key of --cluster-cert, PEM
    #[arg(long, help_heading = "Agents", value_name = "FILE", default_value = "")]
    pub cluster_key: String,

    /// CA of the agents' client certificates, PEM; empty requests no certificate from agents
    #[arg(long, help_heading = "Agents", value_name = "FILE", default_value = "")]
    pub cluster_ca_cert: String,

    /// Idle time after which the gRPC connection of a Konnectivity agent is pinged; 0 sets no time
    /// here. --tunnel-keep-alive-interval applies to these connections too, and the shorter time
    /// counts
    #[arg(long, help_heading = "Agents", value_name = "DURATION", default_value = "1h")]
    pub keepalive_time: GoDuration,

    /// Strategies that choose an agent for a target, in order of preference: destHost (agents that
    /// announce the host), defaultRoute (agents that announce the default route), default (any
    /// agent)
    #[arg(long, help_heading = "Agents", value_name = "LIST", default_value = "default")]
    pub proxy_strategies: String,

    /// Time limit of a dial; 0, Konnectivity's default, is no limit [default: 10s]
    #[arg(long, help_heading = "Agents", value_name = "DURATION")]
    pub backend_dial_timeout: Option<GoDuration>,

    /// Answer kube-apiserver before the agent has replied, if the same agent reached the same
    /// target within the last five minutes. Saves a round trip; if the dial then fails, the
    /// connection is reset
    #[arg(long, help_heading = "Agents")]
    pub optimistic_dial: bool,

    /// Maximum number of open proxied connections per agent; further dials fail
    #[arg(long, help_heading = "Agents", value_name = "COUNT", default_value_t = 10_000)]
    pub max_streams_per_agent: i64,

    /// Has no effect.
    #[arg(
        long,
        help = channel_flags::CHANNEL_SIZE,
        help_heading = "Agents",
        value_name = "COUNT",
        default_value_t = DEFAULT_CHANNEL_SIZE
    )]
    pub xfr_channel_size: i64,

    /// Has no effect.
    #[arg(
        long,
        help = channel_flags::WARN_ON_CHANNEL_LIMIT,
        default_value_t = true
    )]
    pub warn_on_channel_limit: bool,

    /// Namespace of the service account of the agents' tokens. Token authentication requires this
    /// flag, --agent-service-account and --authentication-audience together
    #[arg(long, help_heading = "Agent tokens", value_name = "NAMESPACE", default_value = "")]
    pub agent_namespace: String,

    /// Service account of the agents' tokens
    #[arg(long, help_heading = "Agent tokens", value_name = "NAME", default_value = "")]
    pub agent_service_account: String,

    /// Audience of the agents' tokens
    #[arg(long, help_heading = "Agent tokens", value_name = "AUDIENCE", default_value = "")]
    pub authentication_audience: String,

    /// Admit agents without authentication. Any client that reaches the agent port can then pose as
    /// a node and receive its traffic
    #[arg(long, help_heading = "Agent tokens")]
    pub insecure_allow_unauthenticated_agents: bool,

    /// What the id of an agent and its identifiers of the kind host must be: any (a value that no
    /// connected agent of another identity has), node (the name of the node, which a token that is
    /// bound to a pod proves, or the name of a certificate, with or without system:node:),
    /// certificate (the common name, or an alternative name that is a DNS name or a URI)
    #[arg(
        long,
        help_heading = "Agents",
        value_name = "RULE",
        value_parser = ["any", "node", "certificate"],
        default_value = "any"
    )]
    pub agent_identity: String,

    /// Default routes and networks that agents may announce with --agent-identity=node or certificate:
    /// AGENT=default-route or AGENT=NETWORK/BITS, separated by commas; * is every agent. Networks
    /// within the network are allowed too. May be repeated
    #[arg(long, help_heading = "Agents", value_name = "LIST")]
    pub agent_identity_allow: Vec<String>,

    /// Which agents lose their tunnel when their certificate or token has expired: renewing (those
    /// that can renew it while they are connected, as Culvert's agents do), all, none
    #[arg(
        long,
        help_heading = "Agents",
        value_name = "WHICH",
        value_parser = ["renewing", "all", "none"],
        default_value = "renewing"
    )]
    pub expire_agents: String,

    /// Mean time between two reviews of the token of an agent that is connected, at least 10s; an
    /// agent whose token is refused for a minute loses its tunnel. 0 reviews no token again
    #[arg(long, help_heading = "Agents", value_name = "DURATION", default_value = "5m")]
    pub agent_recheck_interval: GoDuration,

    /// Maximum number of tunnels of all agents together; further agents are refused
    #[arg(long, help_heading = "Agents", value_name = "COUNT", default_value_t = 20_000)]
    pub max_agent_tunnels: i64,

    /// Flags of kube-apiserver's client that server and agent share.
    #[command(flatten)]
    pub kubernetes: KubernetesFlags,

    /// Maximum rate of requests to kube-apiserver, per second, for reviews of tokens and again for
    /// Leases; 0 is 100 reviews and no limit for Leases
    #[arg(long, help_heading = "Kubernetes client", value_name = "RATE", default_value_t = 0.0)]
    pub kubeconfig_qps: f32,

    /// Number of requests to kube-apiserver that may exceed --kubeconfig-qps at once; 0 means 10,
    /// and 500 reviews without --kubeconfig-qps
    #[arg(long, help_heading = "Kubernetes client", value_name = "COUNT", default_value_t = 0)]
    pub kubeconfig_burst: i64,

    /// Name of this server, sent to agents; unique among servers [default: a random UUID]
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "ID",
        env = "PROXY_SERVER_ID",
        hide_env_values = true
    )]
    pub server_id: Option<String>,

    /// Number of servers, sent to agents; an agent keeps tunnels to that many servers
    #[arg(long, help_heading = "Server set", value_name = "COUNT", default_value_t = 1)]
    pub server_count: i64,

    /// This server's own address for agents, which reach it there and not by chance at the address
    /// that all servers share: an IP address, with or without a port [default port: --agent-port],
    /// or two of them separated by a comma. Sent to agents, and to other servers with
    /// --enable-lease-controller; empty sends none
    #[arg(long, help_heading = "Server set", value_name = "LIST", default_value = "")]
    pub advertise_address: String,

    /// Servers and their addresses for agents, sent to agents: ID=ADDRESS or ID=ADDRESS:PORT,
    /// separated by commas; at most 64. A server with two addresses is named twice. All servers can
    /// have the same list, which may name the server itself. May be repeated. With --enable-lease-controller servers know one another
    /// without it
    #[arg(long, help_heading = "Server set", value_name = "LIST")]
    pub server_addresses: Vec<String>,

    /// Publish a Lease for this server, by which agents count servers, and delete expired Leases of
    /// other servers
    #[arg(long, help_heading = "Server set")]
    pub enable_lease_controller: bool,

    /// Labels of the servers' Leases: key=value pairs, separated by commas
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

    /// File with the secret of this server's stateless-reset tokens, by which agents notice at once
    /// that it restarted; the tokens also depend on its host, network namespace and port. Empty
    /// uses the key of --cluster-key
    #[arg(long, help_heading = "Tunnel", value_name = "FILE", default_value = "")]
    pub reset_key_file: String,

    /// Flags of TLS that server and agent share.
    #[command(flatten)]
    pub tls: TlsFlags,

    /// Port of /healthz, /readyz and /metrics, 1024 to 49151 [default: 8134, or 8092 when started
    /// as proxy-server]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub health_port: Option<i64>,

    /// Address to listen on for health checks; empty means every interface
    #[arg(
        long,
        help_heading = "Health and administration",
        value_name = "ADDRESS",
        default_value = ""
    )]
    pub health_bind_address: String,

    /// Port of the administration endpoint (/metrics), 1024 to 49151 [default: 8133, or 8095 when
    /// started as proxy-server]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub admin_port: Option<i64>,

    /// Flags of the admin port and of operators that server and agent share.
    #[command(flatten)]
    pub admin: AdminFlags,

    /// Flags of tunnel and log that server and agent share.
    #[command(flatten)]
    pub tunnel: TunnelFlags,
}
