//! What a server is told to do, checked: [`Flags`] in, [`Config`] or all their faults out.
//!
//! Flags, defaults and rules are those of Konnectivity v0.36 (`cmd/server/app/options`), so that
//! an image swap starts; `--help` tells what Culvert adds. `Config` holds
//! parsed types only and may be built by hand, with port 0 anywhere, which flags refuse.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

pub use culvert_process::faults::{CertificatePair, ConfigError, ConfigErrors};
use culvert_process::{
    faults::Faults, go_flags, invocation::Invocation, kubernetes::KubernetesConfig,
    logging::LogConfig, tunnel_flags::TunnelConfig,
};
use uuid::Uuid;

mod flags;

pub use flags::Flags;

/// Time for an agent to answer a dial when no flag says otherwise. Konnectivity waits for ever, and dials
/// to an agent that hangs pile up.
const DEFAULT_BACKEND_DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Everything a server needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name of this server, unlike any other's.
    pub server_id: String,
    /// Number of servers, told to agents; at least 1.
    pub server_count: u32,
    /// Where kube-apiserver comes in.
    pub frontend: FrontendConfig,
    /// Where agents come in.
    pub agents: AgentsConfig,
    /// How tunnels behave.
    pub tunnel: TunnelConfig,
    /// TLS over TCP.
    pub tls: TlsConfig,
    /// Kubernetes API client, for tokens and leases.
    pub kubernetes: KubernetesConfig,
    /// Leases of the set of servers; `None` when the controller is off.
    pub leases: Option<LeaseConfig>,
    /// Address of /healthz, /readyz and /metrics.
    pub health_address: SocketAddr,
    /// Address of the admin port.
    pub admin_address: SocketAddr,
    /// Time for open connections to end at shutdown; zero ends them at once.
    pub graceful_shutdown_timeout: Duration,
    /// How to log.
    pub log: LogConfig,
    /// What the operator should know at start, a line each.
    pub warnings: Vec<String>,
}

/// Where kube-apiserver comes in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrontendConfig {
    /// Protocol.
    pub mode: Mode,
    /// Listener.
    pub listen: FrontendListen,
    /// Quiet time after which a gRPC connection is pinged; zero never pings.
    pub keep_alive_interval: Duration,
    /// Time for a connection to say what it wants.
    pub header_timeout: Duration,
    /// Connections open at once.
    pub max_connections: u32,
}

/// What kube-apiserver speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// `ProxyService/Proxy`.
    Grpc,
    /// HTTP/1.1 `CONNECT`.
    HttpConnect,
}

/// Where kube-apiserver connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrontendListen {
    /// A Unix socket, protected by its mode.
    Unix {
        /// Path of the socket.
        path: PathBuf,
        /// Whether a file already there is removed first.
        delete_existing: bool,
    },
    /// TCP with mutual TLS.
    Tcp {
        /// Address; `[::]` means every interface, both families.
        address: SocketAddr,
        /// What the server shows.
        certificate: CertificatePair,
        /// CA of the clients.
        client_ca: PathBuf,
    },
}

/// Where agents come in, and what is asked of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentsConfig {
    /// Address for UDP and TCP alike; `[::]` means every interface, both families.
    pub address: SocketAddr,
    /// What the server shows.
    pub certificate: CertificatePair,
    /// CA of the agents' certificates; `None` lets agents in without one.
    pub client_ca: Option<PathBuf>,
    /// What an agent's token must be; `None` asks for no token.
    pub token: Option<TokenConfig>,
    /// Ways to choose an agent, in order; never empty.
    pub strategies: Vec<Strategy>,
    /// Quiet time after which a Konnectivity agent's connection is pinged, where tunnels are given signs of
    /// life less often; zero asks for nothing more than those.
    pub keep_alive_interval: Duration,
    /// How targets are dialed.
    pub dial: DialConfig,
    /// Streams one agent may carry at once.
    pub max_streams: u32,
    /// Secret for stateless-reset tokens that outlive this process.
    pub reset_key_file: Option<PathBuf>,
}

/// How targets are dialed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DialConfig {
    /// Time for an agent to answer; `None` waits for ever.
    pub limit: Option<Duration>,
    /// Whether a frontend is answered at once for a target that the same agent reached a short while
    /// ago.
    pub optimistic: bool,
}

/// What an agent's token must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenConfig {
    /// Namespace of the service account.
    pub namespace: String,
    /// Name of the service account.
    pub service_account: String,
    /// Audience.
    pub audience: String,
}

/// A way to choose an agent for a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Any agent.
    Default,
    /// The agent that announced the target's host.
    DestHost,
    /// An agent that announced the default route.
    DefaultRoute,
}

/// TLS over TCP; tunnels on UDP always have 1.3 and its suites.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// Oldest version to accept.
    pub min_version: TlsVersion,
    /// Go's names of the suites allowed at 1.2; empty leaves the choice to the TLS library.
    pub cipher_suites: Vec<String>,
}

/// A version of TLS that Culvert speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    /// 1.2
    Tls12,
    /// 1.3
    Tls13,
}

/// Leases of the set of servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseConfig {
    /// Namespace.
    pub namespace: String,
    /// Labels, in the order given.
    pub labels: Vec<(String, String)>,
}

/// Requests per second that can be kept to.
const RATES: std::ops::RangeInclusive<f32> = 0.01..=1_000_000.0;

/// Suites Go calls secure (`crypto/tls.CipherSuites`), which is what Konnectivity accepts.
const GO_CIPHER_SUITES: [&str; 13] = [
    "TLS_AES_128_GCM_SHA256",
    "TLS_AES_256_GCM_SHA384",
    "TLS_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA",
    "TLS_ECDHE_RSA_WITH_AES_256_CBC_SHA",
    "TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256",
    "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384",
    "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
    "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
];

impl Config {
    /// The configuration `flags` describe, with the default ports of `invocation`.
    ///
    /// Looks whether the files named exist, and resolves bind addresses given as names.
    ///
    /// # Errors
    /// All faults together, each naming its flag.
    pub fn from_flags(flags: Flags, invocation: Invocation) -> Result<Self, ConfigErrors> {
        let mut faults = Faults::new();
        let frontend = frontend(&flags, &mut faults);
        let agents = agents(&flags, invocation, &mut faults);
        let tls = tls(&flags, &mut faults);
        let kubernetes = kubernetes(&flags, &mut faults);
        let leases = leases(&flags, &mut faults);
        let health_port = flags.health_port.unwrap_or_else(|| invocation.choose(8092, 8134));
        let health_port = faults.registered_port("health-port", health_port);
        let health_address =
            faults.bind_address("health-bind-address", &flags.health_bind_address, health_port);
        let admin_port = flags.admin_port.unwrap_or_else(|| invocation.choose(8095, 8133));
        let admin_port = faults.registered_port("admin-port", admin_port);
        let admin_address =
            faults.bind_address("admin-bind-address", &flags.admin_bind_address, admin_port);
        profiling(&flags, &mut faults);
        let server_id = faults.id("server-id", flags.server_id.as_deref());
        let server_count = faults.count("server-count", flags.server_count, 0).max(1);
        let graceful_shutdown_timeout =
            faults.duration("graceful-shutdown-timeout", flags.graceful_shutdown_timeout);
        let (tunnel, log) = flags.tunnel.check(&mut faults);
        let warnings = faults.finish()?;
        // Without faults every part is there; the expectations below say which check saw to it.
        Ok(Self {
            server_id: server_id.unwrap_or_else(|| Uuid::new_v4().to_string()),
            server_count,
            frontend: frontend.expect("a frontend without a listener is a fault"),
            agents: agents.expect("agents without --cluster-cert are a fault"),
            tunnel,
            tls,
            kubernetes,
            leases,
            health_address,
            admin_address,
            graceful_shutdown_timeout,
            log,
            warnings,
        })
    }

    /// Quiet time after which a Konnectivity agent's connection is pinged; `None` never pings.
    pub fn konnectivity_keep_alive_interval(&self) -> Option<Duration> {
        let asked = Some(self.agents.keep_alive_interval).filter(|interval| !interval.is_zero());
        asked.into_iter().chain(self.tunnel.keep_alive_interval).min()
    }
}

/// `None` only along with a fault.
fn frontend(flags: &Flags, faults: &mut Faults) -> Option<FrontendConfig> {
    let mode = match flags.mode.as_str() {
        "grpc" => Mode::Grpc,
        "http-connect" => Mode::HttpConnect,
        other => {
            faults.add("mode", format!("must be grpc or http-connect, got {other:?}"));
            Mode::Grpc
        }
    };
    let listen = if flags.uds_name.is_empty() {
        frontend_on_tcp(flags, faults)
    } else {
        Some(frontend_on_unix(flags, faults))
    };
    let keep_alive_interval =
        faults.duration("frontend-keepalive-time", flags.frontend_keepalive_time);
    let header_timeout =
        faults.positive_duration("frontend-header-timeout", flags.frontend_header_timeout);
    let max_connections =
        faults.count("max-frontend-connections", flags.max_frontend_connections, 1);
    Some(FrontendConfig {
        mode,
        listen: listen?,
        keep_alive_interval,
        header_timeout,
        max_connections,
    })
}

fn frontend_on_unix(flags: &Flags, faults: &mut Faults) -> FrontendListen {
    faults.require(
        flags.server_port == 0,
        "server-port",
        format!("must be 0 along with --uds-name, got {}", flags.server_port),
    );
    for (flag, path) in [
        ("server-cert", &flags.server_cert),
        ("server-key", &flags.server_key),
        ("server-ca-cert", &flags.server_ca_cert),
    ] {
        faults.require(path.is_empty(), flag, "must not be given along with --uds-name");
    }
    FrontendListen::Unix {
        path: PathBuf::from(&flags.uds_name),
        delete_existing: flags.delete_existing_uds_file,
    }
}

fn frontend_on_tcp(flags: &Flags, faults: &mut Faults) -> Option<FrontendListen> {
    let port = faults.registered_port("server-port", flags.server_port);
    let address = faults.bind_address("server-bind-address", &flags.server_bind_address, port);
    let certificate =
        faults.pair(("server-cert", &flags.server_cert), ("server-key", &flags.server_key));
    if flags.server_cert.is_empty() && flags.server_key.is_empty() {
        faults.add("server-cert", "must be given unless --uds-name is");
    }
    let client_ca = faults.file("server-ca-cert", &flags.server_ca_cert);
    faults.require(
        client_ca.is_some(),
        "server-ca-cert",
        "must be given unless --uds-name is: without it anyone could pose as kube-apiserver",
    );
    Some(FrontendListen::Tcp { address, certificate: certificate?, client_ca: client_ca? })
}

/// `None` only along with a fault.
fn agents(flags: &Flags, invocation: Invocation, faults: &mut Faults) -> Option<AgentsConfig> {
    let port = flags.agent_port.unwrap_or_else(|| invocation.choose(8091, 8132));
    let port = faults.registered_port("agent-port", port);
    let address = faults.bind_address("agent-bind-address", &flags.agent_bind_address, port);
    let certificate =
        faults.pair(("cluster-cert", &flags.cluster_cert), ("cluster-key", &flags.cluster_key));
    if flags.cluster_cert.is_empty() && flags.cluster_key.is_empty() {
        faults.add("cluster-cert", "must be given: agents need something to know the server by");
    }
    let client_ca = faults.file("cluster-ca-cert", &flags.cluster_ca_cert);
    let token = token(flags, faults);
    authentication(flags, client_ca.is_some(), token.is_some(), faults);
    let limit = match flags.backend_dial_timeout {
        None => Some(DEFAULT_BACKEND_DIAL_TIMEOUT),
        Some(timeout) => {
            let timeout = faults.duration("backend-dial-timeout", timeout);
            (!timeout.is_zero()).then_some(timeout)
        }
    };
    faults.require(
        flags.xfr_channel_size > 0,
        "xfr-channel-size",
        format!("must be greater than 0, got {}", flags.xfr_channel_size),
    );
    if flags.xfr_channel_size != 10 {
        faults.warn("xfr-channel-size", "has no effect, see --stream-receive-window");
    }
    let strategies = strategies(&flags.proxy_strategies, faults);
    let keep_alive_interval = faults.duration("keepalive-time", flags.keepalive_time);
    let max_streams = faults.count("max-streams-per-agent", flags.max_streams_per_agent, 1);
    let reset_key_file = faults.file("reset-key-file", &flags.reset_key_file);
    Some(AgentsConfig {
        address,
        certificate: certificate?,
        client_ca,
        token,
        strategies,
        keep_alive_interval,
        dial: DialConfig { limit, optimistic: flags.optimistic_dial },
        max_streams,
        reset_key_file,
    })
}

/// Token authentication: all three flags or none.
fn token(flags: &Flags, faults: &mut Faults) -> Option<TokenConfig> {
    let parts = [
        ("agent-namespace", &flags.agent_namespace),
        ("agent-service-account", &flags.agent_service_account),
        ("authentication-audience", &flags.authentication_audience),
    ];
    if parts.iter().all(|(_, value)| value.is_empty()) {
        return None;
    }
    for (flag, value) in parts {
        let reason = "must be given: token authentication takes --agent-namespace, \
                      --agent-service-account and --authentication-audience together";
        faults.require(!value.is_empty(), flag, reason);
    }
    let [namespace, service_account, audience] = parts.map(|(_, value)| value.clone());
    Some(TokenConfig { namespace, service_account, audience })
}

/// Refuses to let agents in unproven unless told to.
fn authentication(flags: &Flags, by_certificate: bool, by_token: bool, faults: &mut Faults) {
    let allowed = flags.insecure_allow_unauthenticated_agents;
    let proof = match (by_certificate, by_token) {
        (true, _) => Some("--cluster-ca-cert"),
        (false, true) => Some("--agent-service-account"),
        (false, false) => None,
    };
    match proof {
        Some(proof) if allowed => faults.warn(
            "insecure-allow-unauthenticated-agents",
            format!("has no effect, {proof} authenticates agents"),
        ),
        Some(_) => {}
        None if allowed => faults.warn(
            "insecure-allow-unauthenticated-agents",
            "AGENTS ARE NOT AUTHENTICATED: anyone who reaches the agent port can pose as a node \
             and receive its traffic",
        ),
        None => faults.add(
            "cluster-ca-cert",
            "must be given, or --agent-namespace, --agent-service-account and \
             --authentication-audience: otherwise agents would go unauthenticated and anyone who \
             reaches the agent port could pose as a node; or accept the risk with \
             --insecure-allow-unauthenticated-agents",
        ),
    }
}

fn strategies(text: &str, faults: &mut Faults) -> Vec<Strategy> {
    let mut strategies = Vec::new();
    for name in text.split(',').filter(|name| !name.is_empty()) {
        match name {
            "default" => strategies.push(Strategy::Default),
            "destHost" => strategies.push(Strategy::DestHost),
            "defaultRoute" => strategies.push(Strategy::DefaultRoute),
            other => faults.add(
                "proxy-strategies",
                format!("{other:?} is unknown; use default, destHost or defaultRoute"),
            ),
        }
    }
    let named_none = text.split(',').all(str::is_empty);
    faults.require(!named_none, "proxy-strategies", "must name at least one strategy");
    strategies
}

fn tls(flags: &Flags, faults: &mut Faults) -> TlsConfig {
    let min_version = match flags.tls_min_version.as_str() {
        "" | "VersionTLS12" => TlsVersion::Tls12,
        "VersionTLS13" => TlsVersion::Tls13,
        "VersionTLS10" | "VersionTLS11" => {
            faults.warn("tls-min-version", "TLS below 1.2 is insecure (RFC 8996) and stays off");
            TlsVersion::Tls12
        }
        other => {
            let reason = format!(
                "{other:?} is unknown; use VersionTLS10, VersionTLS11, VersionTLS12 or VersionTLS13"
            );
            faults.add("tls-min-version", reason);
            TlsVersion::Tls12
        }
    };
    let cipher_suites = go_flags::parse_list(&flags.cipher_suites);
    for suite in &cipher_suites {
        faults.require(
            GO_CIPHER_SUITES.contains(&suite.as_str()),
            "cipher-suites",
            format!("{suite} does not exist or is insecure"),
        );
    }
    if !cipher_suites.is_empty() {
        faults.warn("cipher-suites", "has no effect yet, the TLS library's safe choice is used");
    }
    TlsConfig { min_version, cipher_suites }
}

fn kubernetes(flags: &Flags, faults: &mut Faults) -> KubernetesConfig {
    let (qps, burst) = (flags.kubeconfig_qps, flags.kubeconfig_burst);
    let is_rate = qps == 0.0 || RATES.contains(&qps);
    let reason = format!("must be 0, or from {} to {}, got {qps}", RATES.start(), RATES.end());
    faults.require(is_rate, "kubeconfig-qps", reason);
    if qps == 0.0 && burst != 0 {
        faults.warn("kubeconfig-burst", "has no effect without --kubeconfig-qps");
    }
    let burst = faults.count("kubeconfig-burst", burst, 0);
    KubernetesConfig {
        kubeconfig: faults.file("kubeconfig", &flags.kubeconfig),
        qps: (is_rate && qps > 0.0).then_some(qps),
        burst: (burst > 0).then_some(burst),
    }
}

fn leases(flags: &Flags, faults: &mut Faults) -> Option<LeaseConfig> {
    if !flags.enable_lease_controller {
        return None;
    }
    let labels = faults.labels("lease-label", &flags.lease_label);
    Some(LeaseConfig { namespace: flags.lease_namespace.clone(), labels })
}

fn profiling(flags: &Flags, faults: &mut Faults) {
    faults.require(
        flags.enable_profiling || !flags.enable_contention_profiling,
        "enable-contention-profiling",
        "needs --enable-profiling",
    );
    if flags.enable_profiling {
        faults.warn("enable-profiling", "has no effect, there is no Go profiler here");
    }
}

#[cfg(test)]
mod tests;
