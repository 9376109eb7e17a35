//! The agent's configuration: [`Flags`] in, [`Config`] or all their faults out.
//!
//! Flags, defaults and rules are those of Konnectivity v0.36 (`cmd/agent/app/options`), so that
//! an agent whose image was swapped starts; `--help` shows what Culvert adds. `Config` holds parsed
//! types only and may be built by hand, with port 0 anywhere, which flags refuse.

use std::{
    net::{Ipv6Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::ValueEnum;
pub use culvert_process::faults::{CertificatePair, ConfigError, ConfigErrors};
use culvert_process::{
    channel_flags::check_channel_size, cli::ProcessConfig, faults::Faults, go_flags,
    invocation::Invocation, kubernetes::KubernetesConfig, logging::LogConfig, tls_flags::TlsConfig,
    tunnel_flags::TunnelConfig,
};
use culvert_transport::tcp::Proxies;
use culvert_wire::{AgentId, identifiers::Identifiers};
use rustls::pki_types::ServerName;

mod egress;
mod flags;
mod identifiers;

pub use egress::EgressConfig;
pub use flags::Flags;

pub use crate::egress::policy::{AddressRule, InvalidRule, Policy};

/// File descriptors besides those of targets: listeners, tunnels over TCP, health and metrics.
const OTHER_DESCRIPTORS: u64 = 512;

/// Everything that configures an agent.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name of this agent; no other agent may have it.
    pub agent_id: AgentId,
    /// Identifiers that the agent announces, by which servers choose it for targets.
    pub identifiers: Identifiers,
    /// Address and identity of the servers.
    pub servers: ServersConfig,
    /// Number of servers to look for, and the intervals.
    pub sync: SyncConfig,
    /// Carriers that tunnels may have.
    pub transport: Transport,
    /// Time for which a first failure of QUIC is believed.
    pub quic_retry_interval: Duration,
    /// Proxies for TCP, from the environment.
    pub proxies: Proxies,
    /// Settings of the tunnels.
    pub tunnel: TunnelConfig,
    /// Addresses that the agent may connect to.
    pub egress: EgressConfig,
    /// Time to connect to a target.
    pub dial_timeout: Duration,
    /// Maximum number of streams on one tunnel.
    pub max_streams: u32,
    /// Time for open streams to end after SIGTERM.
    pub drain_timeout: Duration,
    /// Address of /healthz, /readyz and /metrics.
    pub health_address: SocketAddr,
    /// Address of the admin port.
    pub admin_address: SocketAddr,
    /// Unix socket for operators; `None` for no such socket.
    pub operator_socket: Option<PathBuf>,
    /// Whether the admin port serves profiles.
    pub profiling: bool,
    /// Form and verbosity of the log.
    pub log: LogConfig,
    /// Lines to log as warnings at start.
    pub warnings: Vec<String>,
}

/// Carriers that tunnels may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// QUIC first, and TCP once QUIC has failed or taken 300 ms. Tunnels move from TCP to QUIC when
    /// UDP passes again, and from QUIC to TCP when UDP stops passing.
    #[default]
    Auto,
    /// QUIC over UDP.
    Quic,
    /// TLS over TCP, on the same port: QMux to a Culvert server, gRPC to a Konnectivity server.
    Tcp,
}

/// Place of Culvert's own ALPN name among those that are offered over TCP. Servers choose by their
/// own order, so it matters to load balancers that route by ALPN alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum AlpnOrder {
    /// --alpn-proto, h2, culvert/1: begins as a Konnectivity agent's.
    #[default]
    CulvertLast,
    /// culvert/1, --alpn-proto, h2.
    CulvertFirst,
    /// --alpn-proto, h2: exactly a Konnectivity agent's. Tunnels over TCP use Konnectivity's protocol.
    Konnectivity,
}

/// Address and identity of the servers, and the agent's own identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServersConfig {
    /// Address or DNS name of all servers together; an IPv6 address has no brackets.
    pub host: String,
    /// Agent port, UDP and TCP.
    pub port: u16,
    /// Name or address that the servers' certificate must have. A name is sent as SNI.
    pub name: ServerName<'static>,
    /// CA of the servers' certificates, PEM.
    pub ca: PathBuf,
    /// Certificate that the agent presents, if it has one.
    pub certificate: Option<CertificatePair>,
    /// File with the agent's token, if it has one.
    pub token_file: Option<PathBuf>,
    /// ALPN names offered over TCP before `h2`.
    pub extra_alpn: Vec<String>,
    /// Place of Culvert's own ALPN name among those that are offered over TCP.
    pub alpn_order: AlpnOrder,
    /// What TLS accepts.
    pub tls: TlsConfig,
    /// Quiet time after which a Konnectivity server is pinged; zero disables pings.
    pub keep_alive_interval: Duration,
}

/// Number of servers to look for, and the intervals.
#[derive(Debug, Clone, PartialEq)]
pub struct SyncConfig {
    /// Delay after a first failure, and the interval of `forever`.
    pub interval: Duration,
    /// Longest delay after repeated failures; at least `interval`.
    pub interval_cap: Duration,
    /// Whether to look for servers although none is missing.
    pub forever: bool,
    /// Leases to count servers by; `None` counts no Leases.
    pub leases: Option<LeaseConfig>,
    /// Count of servers that applies where Leases are counted.
    pub count_source: CountSource,
}

/// Where the servers' Leases are.
#[derive(Debug, Clone, PartialEq)]
pub struct LeaseConfig {
    /// Namespace.
    pub namespace: String,
    /// Label selector of the servers' Leases.
    pub selector: String,
    /// Access to kube-apiserver.
    pub kubernetes: KubernetesConfig,
}

/// Count of servers that applies where Leases are counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CountSource {
    /// The number of Leases.
    #[default]
    Leases,
    /// The larger of the number of Leases and the number that servers report.
    Larger,
}

/// Maximum length of an ALPN name, in bytes (RFC 7301 §3.1).
const MAX_ALPN_BYTES: usize = 255;

impl ProcessConfig for Config {
    type Flags = Flags;

    /// The configuration of `flags`, with the default ports of `invocation`.
    ///
    /// Checks that the named files exist, and resolves bind addresses that are names.
    ///
    /// # Errors
    /// All faults together, each naming its flag.
    fn from_flags(flags: Flags, invocation: Invocation) -> Result<Self, ConfigErrors> {
        let mut faults = Faults::new();
        let servers = servers(&flags, invocation, &mut faults);
        let sync = sync(&flags, &mut faults);
        let agent_id = faults.id("agent-id", flags.agent_id.as_deref());
        let identifiers = identifiers::parse(&flags.agent_identifiers, &mut faults);
        let health_port = flags.health_server_port.unwrap_or_else(|| invocation.choose(8093, 8136));
        let health_port = faults.port("health-server-port", health_port);
        let health_address =
            faults.bind_address("health-server-host", &flags.health_server_host, health_port);
        let admin_port = flags.admin_server_port.unwrap_or_else(|| invocation.choose(8094, 8135));
        let admin_port = faults.port("admin-server-port", admin_port);
        let admin_address = flags.admin.check(admin_port, &mut faults);
        let spare = [("health-server-port", health_address), ("admin-server-port", admin_address)];
        faults.distinct_ports(&[], &spare);
        let dial_timeout = faults.positive_duration("dial-timeout", flags.dial_timeout);
        let drain_timeout = faults.duration("drain-timeout", flags.drain_timeout);
        let max_streams = faults.count("max-streams", flags.max_streams, 1);
        let egress = egress::check(&flags, &mut faults);
        let quic_retry_interval =
            faults.positive_duration("quic-retry-interval", flags.quic_retry_interval);
        let proxies =
            proxies(&flags, servers.as_ref(), |name| std::env::var(name).ok(), &mut faults);
        check_channel_size(flags.xfr_channel_size, flags::DEFAULT_CHANNEL_SIZE, &mut faults);
        let (tunnel, log) = flags.tunnel.check(&mut faults);
        let warnings = faults.finish()?;
        Ok(Self {
            agent_id,
            identifiers,
            operator_socket: flags.admin.operator_socket(),
            servers: servers.expect("servers without a name or --ca-cert are a fault"),
            sync,
            transport: flags.transport,
            quic_retry_interval,
            proxies,
            tunnel,
            egress,
            dial_timeout,
            max_streams,
            drain_timeout,
            health_address,
            admin_address,
            profiling: flags.admin.enable_profiling,
            log,
            warnings,
        })
    }

    fn log(&self) -> LogConfig {
        self.log.clone()
    }

    fn profiling(&self) -> bool {
        self.profiling
    }

    fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn descriptors(&self) -> u64 {
        u64::from(self.max_streams) + OTHER_DESCRIPTORS
    }
}

/// `None` only along with a fault.
fn servers(flags: &Flags, invocation: Invocation, faults: &mut Faults) -> Option<ServersConfig> {
    let host = without_brackets(&flags.proxy_server_host).to_owned();
    let port = flags.proxy_server_port.unwrap_or_else(|| invocation.choose(8091, 8132));
    let port = faults.port("proxy-server-port", port);
    let own_name = server_name("proxy-server-host", &host, faults);
    let name = if flags.server_name.is_empty() {
        own_name
    } else {
        server_name("server-name", &flags.server_name, faults)
    };
    let ca = faults.authorities("ca-cert", &flags.ca_cert);
    faults.require(ca.is_some(), "ca-cert", "must be given: it alone identifies servers");
    let certificate =
        faults.pair(("agent-cert", &flags.agent_cert), ("agent-key", &flags.agent_key));
    let token_file = faults.token("service-account-token-path", &flags.service_account_token_path);
    let lists = flags.alpn_proto.iter();
    let extra_alpn: Vec<_> = lists.flat_map(|list| go_flags::parse_list(list)).collect();
    faults.require(
        extra_alpn.iter().all(|name| name.len() <= MAX_ALPN_BYTES),
        "alpn-proto",
        "a name must not be longer than 255 bytes",
    );
    let keep_alive_interval = faults.duration("keepalive-time", flags.keepalive_time);
    Some(ServersConfig {
        host,
        port,
        name: name?,
        ca: ca?,
        certificate,
        token_file,
        extra_alpn,
        alpn_order: flags.alpn_order,
        tls: flags.tls.check(faults),
        keep_alive_interval,
    })
}

/// The proxies of the environment. One that cannot be used is a fault only where it would be used.
fn proxies(
    flags: &Flags,
    servers: Option<&ServersConfig>,
    variable: impl Fn(&'static str) -> Option<String>,
    faults: &mut Faults,
) -> Proxies {
    Proxies::from_env(variable).unwrap_or_else(|invalid| {
        let applies = servers.is_none_or(|servers| invalid.applies_to(&servers.host, servers.port));
        let (name, reason) = (invalid.variable, invalid.fault.to_string());
        match applies && flags.transport != Transport::Quic {
            true => faults.add_variable(name, reason),
            false => faults.warn_of_variable(name, format!("{reason}; no server needs it")),
        }
        Proxies::default()
    })
}

/// An address, which may be in brackets, or a DNS name; `None` only along with a fault.
fn server_name(flag: &'static str, text: &str, faults: &mut Faults) -> Option<ServerName<'static>> {
    let name = ServerName::try_from(without_brackets(text).to_owned()).ok();
    // It may be an address with a port, or a URL.
    let remedy = match text.contains(':') {
        true => "; write it without a scheme and a port, which belongs to --proxy-server-port",
        false => "",
    };
    let reason = format!(
        "{text:?} is neither an IPv4 address, an IPv6 address without a zone, nor a DNS name{remedy}"
    );
    faults.require(name.is_some(), flag, reason);
    name
}

/// An IPv6 address without the brackets around it; any other text as it is.
fn without_brackets(text: &str) -> &str {
    let inner = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    inner.filter(|inner| inner.parse::<Ipv6Addr>().is_ok()).unwrap_or(text)
}

fn sync(flags: &Flags, faults: &mut Faults) -> SyncConfig {
    let interval = faults.positive_duration("sync-interval", flags.sync_interval);
    let interval_cap = faults.duration("sync-interval-cap", flags.sync_interval_cap);
    faults.require(
        interval <= interval_cap,
        "sync-interval-cap",
        format!("must not be shorter than --sync-interval={}", flags.sync_interval),
    );
    let count_source = match flags.server_count_source.as_str() {
        "" | "default" => CountSource::Leases,
        "max" => CountSource::Larger,
        other => {
            faults.add("server-count-source", format!("must be default or max, got {other:?}"));
            CountSource::Leases
        }
    };
    let (path, is_used) = (&flags.kubernetes.kubeconfig, flags.count_server_leases);
    let kubeconfig = faults.kubeconfig("kubeconfig", path, is_used);
    let leases = flags.count_server_leases.then(|| {
        let selector = flags.lease_label_selector.clone();
        let reason = "must be given along with --count-server-leases";
        faults.require(!selector.is_empty(), "lease-label-selector", reason);
        LeaseConfig {
            namespace: flags.kubernetes.lease_namespace.clone(),
            selector,
            kubernetes: KubernetesConfig { kubeconfig, ..KubernetesConfig::default() },
        }
    });
    // Without effect, but as in Konnectivity not negative.
    faults.duration("probe-interval", flags.probe_interval);
    SyncConfig { interval, interval_cap, forever: flags.sync_forever, leases, count_source }
}

#[cfg(test)]
mod tests;
