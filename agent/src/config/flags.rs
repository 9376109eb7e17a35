//! The flags of `culvert-agent`: every one a Konnectivity `proxy-agent` has, and ours.

use clap::Parser;
use culvert_process::{
    admin_flags::AdminFlags, channel_flags, go_duration::GoDuration,
    kubernetes_flags::KubernetesFlags, tls_flags::TlsFlags, tunnel_flags::TunnelFlags, version,
};

use super::{AlpnOrder, Transport};

/// Konnectivity's default of `--xfr-channel-size`.
pub(super) const DEFAULT_CHANNEL_SIZE: i64 = 150;

/// The node side of Culvert: keeps a tunnel to the server of the control plane and connects the
/// streams that arrive on it to kubelets, pods and services.
///
/// A drop-in for Konnectivity's proxy-agent. It makes connections and accepts none, except for
/// health checks and administration.
#[derive(Debug, Clone, Parser)]
#[command(name = "culvert-agent", version = version::text(), max_term_width = 100)]
pub struct Flags {
    /// Address of the servers, one for all of them, such as a load balancer's: an IPv4 address, an
    /// IPv6 address without brackets, or a DNS name
    #[arg(long, help_heading = "Servers", value_name = "HOST", default_value = "127.0.0.1")]
    pub proxy_server_host: String,

    /// Agent port of the servers, UDP and TCP [default: 8132, or 8091 when started as proxy-agent]
    #[arg(long, help_heading = "Servers", value_name = "PORT")]
    pub proxy_server_port: Option<i64>,

    /// Name or address that the servers' certificates must contain [default: --proxy-server-host]
    #[arg(long, help_heading = "Servers", value_name = "NAME", default_value = "")]
    pub server_name: String,

    /// CA of the servers' certificates, PEM. Mandatory
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub ca_cert: String,

    /// Carriers that tunnels may use
    #[arg(long, help_heading = "Servers", value_name = "KIND", default_value = "auto")]
    pub transport: Transport,

    /// Time after a failure of QUIC until --transport=auto tries QUIC again; it doubles with each
    /// further failure, up to 10m
    #[arg(long, help_heading = "Servers", value_name = "DURATION", default_value = "10s")]
    pub quic_retry_interval: GoDuration,

    /// Certificate chain that the agent presents to servers, PEM; empty presents none
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub agent_cert: String,

    /// Private key of --agent-cert, PEM
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub agent_key: String,

    /// File with the service-account token that the agent sends to servers, read again for each
    /// tunnel; empty sends none
    #[arg(long, help_heading = "Servers", value_name = "FILE", default_value = "")]
    pub service_account_token_path: String,

    /// ALPN names that a Konnectivity server is offered before h2, separated by commas. A load
    /// balancer can route by them, if servers and kube-apiserver share an address. May be repeated
    #[arg(long, help_heading = "Servers", value_name = "LIST")]
    pub alpn_proto: Vec<String>,

    /// ALPN names that are offered over TCP, and their order
    #[arg(long, help_heading = "Servers", value_name = "KIND", value_enum, default_value_t)]
    pub alpn_order: AlpnOrder,

    /// Idle time after which the gRPC connection to a Konnectivity server is pinged; 0 sends no
    /// pings. Times below 30s count as 30s, because the server closes connections that are pinged
    /// more often. Tunnels to Culvert's servers have --tunnel-keep-alive-interval
    #[arg(long, help_heading = "Servers", value_name = "DURATION", default_value = "1h")]
    pub keepalive_time: GoDuration,

    /// Delay after a first failed attempt to find a missing server, and the first interval of
    /// --sync-forever
    #[arg(long, help_heading = "Server set", value_name = "DURATION", default_value = "1s")]
    pub sync_interval: GoDuration,

    /// Upper limit of the delay, which grows with each attempt; at least --sync-interval
    #[arg(long, help_heading = "Server set", value_name = "DURATION", default_value = "10s")]
    pub sync_interval_cap: GoDuration,

    /// Interval at which a Konnectivity agent checks its connections. Accepted and ignored: the end
    /// of a tunnel is noticed without a check
    #[arg(long, help_heading = "Server set", value_name = "DURATION", default_value = "1s")]
    pub probe_interval: GoDuration,

    /// Continue to look for servers after all of them have been found
    #[arg(long, help_heading = "Server set")]
    pub sync_forever: bool,

    /// Count servers by their Leases, which servers publish with --enable-lease-controller
    #[arg(long, help_heading = "Server set")]
    pub count_server_leases: bool,

    /// Flags of kube-apiserver's client that server and agent share.
    #[command(flatten)]
    pub kubernetes: KubernetesFlags,

    /// Label selector of the servers' Leases (older name: --lease-label)
    #[arg(
        long,
        alias = "lease-label",
        help_heading = "Server set",
        value_name = "SELECTOR",
        default_value = "k8s-app=konnectivity-server"
    )]
    pub lease_label_selector: String,

    /// Number of servers that applies with --count-server-leases: default (the number of Leases) or
    /// max (the larger of that and the number that servers report)
    #[arg(
        long,
        help_heading = "Server set",
        value_name = "SOURCE",
        value_parser = ["default", "max"],
        default_value = "default"
    )]
    pub server_count_source: String,

    /// Name of this agent; unique among agents [default: a random UUID]
    #[arg(
        long,
        help_heading = "Agent",
        value_name = "ID",
        env = "PROXY_AGENT_ID",
        hide_env_values = true
    )]
    pub agent_id: Option<String>,

    /// Identifiers that the agent announces, by which servers choose it for targets: a URL query
    /// with the keys ipv4, ipv6, host, cidr and default-route, such as
    /// host=node1&ipv4=10.0.0.7&default-route=true
    #[arg(long, help_heading = "Agent", value_name = "QUERY", default_value = "")]
    pub agent_identifiers: String,

    /// Addresses that the agent refuses to connect to, after the lookup of their name: a list of
    /// addresses or networks, each with a port or range of ports behind a colon if it has some, such
    /// as 10.0.0.0/8:22,[fd00::/8]:1-1023. May be repeated. Link-local addresses, metadata services
    /// of clouds, multicast, broadcast and unspecified addresses are refused without a rule
    #[arg(long, help_heading = "Egress policy", value_name = "RULES")]
    pub egress_deny: Vec<String>,

    /// The only addresses that the agent connects to, unless --egress-deny or a built-in denial
    /// refuses them; written as --egress-deny. May be repeated [default: every address]
    #[arg(long, help_heading = "Egress policy", value_name = "RULES")]
    pub egress_allow: Vec<String>,

    /// Addresses that the built-in denials do not apply to; written as --egress-deny. May be repeated
    #[arg(long, help_heading = "Egress policy", value_name = "RULES")]
    pub egress_exempt: Vec<String>,

    /// File with more rules, one line each: deny, allow or exempt, and addresses as in the flags. It
    /// is read again when its contents change
    #[arg(long, help_heading = "Egress policy", value_name = "FILE", default_value = "")]
    pub egress_policy_file: String,

    /// Count and log what the egress policy denies, and connect to it all the same
    #[arg(long, help_heading = "Egress policy")]
    pub egress_audit: bool,

    /// Time limit of the connection to a target, including the lookup of its name
    #[arg(long, help_heading = "Agent", value_name = "DURATION", default_value = "5s")]
    pub dial_timeout: GoDuration,

    /// Maximum number of open proxied connections per tunnel; further dials fail
    #[arg(long, help_heading = "Agent", value_name = "COUNT", default_value_t = 10_000)]
    pub max_streams: i64,

    /// Time for proxied connections to end after SIGTERM, during which servers open no new ones;
    /// then the agent exits. Set it below the pod's terminationGracePeriodSeconds
    #[arg(long, help_heading = "Agent", value_name = "DURATION", default_value = "20s")]
    pub drain_timeout: GoDuration,

    /// Has no effect.
    #[arg(
        long,
        help = channel_flags::CHANNEL_SIZE,
        help_heading = "Agent",
        value_name = "COUNT",
        default_value_t = DEFAULT_CHANNEL_SIZE
    )]
    pub xfr_channel_size: i64,

    /// Has no effect.
    #[arg(long, help = channel_flags::WARN_ON_CHANNEL_LIMIT, help_heading = "Agent")]
    pub warn_on_channel_limit: bool,

    /// Port of /healthz, /readyz and /metrics [default: 8136, or 8093 when started as proxy-agent]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub health_server_port: Option<i64>,

    /// Address to listen on for health checks; empty means every interface
    #[arg(
        long,
        help_heading = "Health and administration",
        value_name = "ADDRESS",
        default_value = ""
    )]
    pub health_server_host: String,

    /// Port of the administration endpoint (/metrics, a redirect to the health port) [default:
    /// 8135, or 8094 when started as proxy-agent]
    #[arg(long, help_heading = "Health and administration", value_name = "PORT")]
    pub admin_server_port: Option<i64>,

    /// Flags of the admin port and of operators that server and agent share.
    #[command(flatten)]
    pub admin: AdminFlags,

    /// Flags of TLS that server and agent share.
    #[command(flatten)]
    pub tls: TlsFlags,

    /// Flags of tunnel and log that server and agent share.
    #[command(flatten)]
    pub tunnel: TunnelFlags,
}
