//! The flags of `culvert-agent`: every one a Konnectivity `proxy-agent` has, and ours.

use clap::Parser;
use culvert_process::{
    admin_flags::AdminFlags, go_duration::GoDuration, tunnel_flags::TunnelFlags,
};

use super::Transport;

/// The node side of Culvert: keeps a tunnel to the server of the control plane and connects the
/// streams that arrive on it to kubelets, pods and services.
///
/// A drop-in for Konnectivity's proxy-agent. It makes connections and accepts none, except for
/// health checks and administration.
#[derive(Debug, Clone, Parser)]
#[command(name = "culvert-agent", version, max_term_width = 100)]
pub struct Flags {
    /// Address of the servers: an IPv4 address, an IPv6 address without brackets, or a DNS name.
    /// One address for all of them, such as a load balancer's
    #[arg(long, help_heading = "Servers", value_name = "HOST", default_value = "127.0.0.1")]
    pub proxy_server_host: String,

    /// Agent port of the servers, UDP and TCP [default: 8132, or 8091 when started as proxy-agent]
    #[arg(long, help_heading = "Servers", value_name = "PORT")]
    pub proxy_server_port: Option<i64>,

    /// Name or address the servers' certificate must carry [default: --proxy-server-host]
    #[arg(long, help_heading = "Servers", value_name = "NAME", default_value = "")]
    pub server_name: String,

    /// CA that the servers' certificate must come from, PEM. Mandatory
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub ca_cert: String,

    /// What carries a tunnel: quic over UDP; tcp on the same port, and gRPC to a Konnectivity
    /// server; auto tries quic and, once it has failed or taken 300 ms, tcp. Later auto moves
    /// tunnels from tcp to quic when UDP gets through again, and from quic to tcp when it no longer
    /// does
    #[arg(long, help_heading = "Servers", value_name = "KIND", default_value = "auto")]
    pub transport: Transport,

    /// Time after which auto tries quic again once it has failed; doubles with each further
    /// failure, up to 10m
    #[arg(long, help_heading = "Servers", value_name = "DURATION", default_value = "10s")]
    pub quic_retry_interval: GoDuration,

    /// Certificate chain the agent proves itself with, PEM
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub agent_cert: String,

    /// Private key of --agent-cert, PEM
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub agent_key: String,

    /// Service-account token the agent proves itself with; read for each tunnel
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub service_account_token_path: String,

    /// ALPN names offered before h2 to a Konnectivity server, separated by commas: distinguishes
    /// this traffic from kube-apiserver's where both share an address
    #[arg(long, help_heading = "Servers", value_name = "LIST", default_value = "")]
    pub alpn_proto: String,

    /// Quiet time after which a Konnectivity server is pinged; at least 30s, because it ends
    /// connections that are pinged more often. Tunnels have --tunnel-keep-alive-interval
    #[arg(long, help_heading = "Servers", value_name = "DURATION", default_value = "1h")]
    pub keepalive_time: GoDuration,

    /// Interval at which missing servers are looked for after a failure
    #[arg(long, help_heading = "Server set", value_name = "DURATION", default_value = "1s")]
    pub sync_interval: GoDuration,

    /// Longest interval that failed attempts may stretch --sync-interval to
    #[arg(long, help_heading = "Server set", value_name = "DURATION", default_value = "10s")]
    pub sync_interval_cap: GoDuration,

    /// Interval at which a Konnectivity agent checks its connections. Accepted and ignored: the end
    /// of a tunnel needs no check
    #[arg(long, help_heading = "Server set", value_name = "DURATION", default_value = "1s")]
    pub probe_interval: GoDuration,

    /// Look for servers even when as many were found as exist
    #[arg(long, help_heading = "Server set")]
    pub sync_forever: bool,

    /// Count the servers by their Leases, which servers publish with --enable-lease-controller
    #[arg(long, help_heading = "Server set")]
    pub count_server_leases: bool,

    /// Namespace of the servers' Leases
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "NAMESPACE",
        default_value = "kube-system"
    )]
    pub lease_namespace: String,

    /// Which Leases are the servers', as a label selector (older name: --lease-label)
    #[arg(
        long,
        alias = "lease-label",
        help_heading = "Server set",
        value_name = "SELECTOR",
        default_value = "k8s-app=konnectivity-server"
    )]
    pub lease_label_selector: String,

    /// Count of servers that applies when Leases are counted: default (the Leases') or max (the
    /// larger of that and the number that servers report)
    #[arg(long, help_heading = "Server set", value_name = "SOURCE", default_value = "default")]
    pub server_count_source: String,

    /// Kubeconfig for listing Leases; empty is the pod's own
    #[arg(long, help_heading = "Server set", value_name = "FILE", default_value = "")]
    pub kubeconfig: String,

    /// Media type of requests to kube-apiserver. Accepted and ignored: they are JSON
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "TYPE",
        default_value = "application/vnd.kubernetes.protobuf"
    )]
    pub kube_api_content_type: String,

    /// Name of this agent; must differ among agents [default: a random UUID]
    #[arg(
        long,
        help_heading = "Agent",
        value_name = "ID",
        env = "PROXY_AGENT_ID",
        hide_env_values = true
    )]
    pub agent_id: Option<String>,

    /// What this agent can reach, as a URL query with the keys ipv4, ipv6, host, cidr and
    /// default-route, such as host=node1&ipv4=10.0.0.7&default-route=true
    #[arg(long, help_heading = "Agent", value_name = "QUERY", default_value = "")]
    pub agent_identifiers: String,

    /// Time to connect to a target
    #[arg(long, help_heading = "Agent", value_name = "DURATION", default_value = "5s")]
    pub dial_timeout: GoDuration,

    /// Proxied connections that one tunnel may carry at once
    #[arg(long, help_heading = "Agent", value_name = "COUNT", default_value_t = 10_000)]
    pub max_streams: i64,

    /// Time for proxied connections to end after SIGTERM, while servers send no new ones; then the
    /// agent exits. Keep it below the pod's terminationGracePeriodSeconds
    #[arg(long, help_heading = "Agent", value_name = "DURATION", default_value = "20s")]
    pub drain_timeout: GoDuration,

    /// Queue length of a Konnectivity agent. Accepted and ignored: each stream has its own window
    #[arg(long, help_heading = "Agent", value_name = "COUNT", default_value_t = 150)]
    pub xfr_channel_size: i64,

    /// Accepted and ignored: there is no queue to be full
    #[arg(long, help_heading = "Agent")]
    pub warn_on_channel_limit: bool,

    /// Port for /healthz, /readyz and /metrics [default: 8134, or 8093 when started as
    /// proxy-agent]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub health_server_port: Option<i64>,

    /// Address to listen on for health checks; empty is every interface
    #[arg(
        long,
        help_heading = "Health and administration",
        value_name = "ADDRESS",
        default_value = ""
    )]
    pub health_server_host: String,

    /// Port for administration (/metrics, which leads to the health port's) [default: 8133, or
    /// 8094 when started as proxy-agent]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub admin_server_port: Option<i64>,

    /// Flags of the admin port that server and agent share.
    #[command(flatten)]
    pub admin: AdminFlags,

    /// Flags of tunnel and log that server and agent share.
    #[command(flatten)]
    pub tunnel: TunnelFlags,
}
