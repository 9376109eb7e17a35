//! The configuration of a server: [`Flags`] in, checked [`Config`] or all their faults out.
//!
//! Flags, defaults and rules are those of Konnectivity v0.36 (`cmd/server/app/options`), so that
//! an exchange of images starts; `--help` names what Culvert adds. `Config` holds parsed types only
//! and may be built by hand, with port 0 anywhere, which flags refuse.

mod agents;
mod claims;
mod flags;
mod frontend;
mod server_set;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

pub use culvert_process::faults::{CertificatePair, ConfigError, ConfigErrors};
use culvert_process::{
    cli::ProcessConfig, faults::Faults, invocation::Invocation, kubernetes::KubernetesConfig,
    logging::LogConfig, tls_flags::TlsConfig, tunnel_flags::TunnelConfig,
};
use culvert_wire::ServerId;

pub use crate::backends::Strategy;
pub use agents::{AgentIdentity, AgentsConfig, DialConfig, ExpireAgents, TokenConfig};
pub use claims::{AllowedRoute, ClaimRules};
pub use flags::Flags;
pub use frontend::{FrontendConfig, FrontendListen, Mode};
pub use server_set::ServerSetConfig;
pub(crate) use server_set::{MAX_ADDRESSES, MAX_SERVERS};

/// File descriptors besides those of frontends: listeners, tunnels over TCP, health and metrics.
const OTHER_DESCRIPTORS: u64 = 512;

/// Configuration of a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name of this server, different from every other one's.
    pub server_id: ServerId,
    /// Number of servers, which agents are sent; at least 1.
    pub server_count: u32,
    /// Addresses of servers, which agents are sent.
    pub server_set: ServerSetConfig,
    /// Listener for kube-apiserver.
    pub frontend: FrontendConfig,
    /// Listener for agents, and what is asked of them.
    pub agents: AgentsConfig,
    /// Tunnels.
    pub tunnel: TunnelConfig,
    /// What TLS accepts.
    pub tls: TlsConfig,
    /// Kubernetes API client, for tokens and leases.
    pub kubernetes: KubernetesConfig,
    /// Leases of the set of servers; `None` when the controller is off.
    pub leases: Option<LeaseConfig>,
    /// Address of /healthz, /readyz and /metrics.
    pub health_address: SocketAddr,
    /// Address of the admin port.
    pub admin_address: SocketAddr,
    /// Whether the admin port serves profiles.
    pub profiling: bool,
    /// Unix socket for operators; `None` for no such socket.
    pub operator_socket: Option<PathBuf>,
    /// Time for open connections to end at shutdown; zero ends them at once.
    pub graceful_shutdown_timeout: Duration,
    /// Logs.
    pub log: LogConfig,
    /// Warnings for the operator, one line each, to be logged at start.
    pub warnings: Vec<String>,
}

/// Leases of the set of servers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseConfig {
    /// Namespace.
    pub namespace: String,
    /// Labels, in the given order.
    pub labels: Vec<(String, String)>,
}

/// Limits of requests per second that can be kept.
const RATES: std::ops::RangeInclusive<f32> = 0.01..=1_000_000.0;

impl ProcessConfig for Config {
    type Flags = Flags;

    /// The configuration that `flags` describe, with the default ports of `invocation`.
    ///
    /// Checks whether the named files exist, and resolves bind addresses given as names.
    ///
    /// # Errors
    /// All faults together, each naming its flag.
    fn from_flags(flags: Flags, invocation: Invocation) -> Result<Self, ConfigErrors> {
        let mut faults = Faults::new();
        let frontend = frontend::check(&flags, &mut faults);
        let agents = agents::check(&flags, invocation, &mut faults);
        let tls = flags.tls.check(&mut faults);
        let kubernetes = kubernetes(&flags, &mut faults);
        frontend::warn_of_shared_authorities(&flags, &kubernetes, &mut faults);
        agents::warn_of_cluster_authorities(&flags, &kubernetes, &mut faults);
        let leases = leases(&flags, &mut faults);
        let health_port = flags.health_port.unwrap_or_else(|| invocation.choose(8092, 8134));
        let health_port = faults.registered_port("health-port", health_port);
        let health_address =
            faults.bind_address("health-bind-address", &flags.health_bind_address, health_port);
        let admin_port = flags.admin_port.unwrap_or_else(|| invocation.choose(8095, 8133));
        let admin_port = faults.registered_port("admin-port", admin_port);
        let admin_address = flags.admin.check(admin_port, &mut faults);
        let mut ports = Vec::from_iter(agents.iter().map(|agents| ("agent-port", agents.address)));
        if let Some(FrontendConfig { listen: FrontendListen::Tcp { address, .. }, .. }) = &frontend
        {
            ports.push(("server-port", *address));
        }
        let spare = [("health-port", health_address), ("admin-port", admin_address)];
        faults.distinct_ports(&ports, &spare);
        let server_id = faults.id("server-id", flags.server_id.as_deref());
        let server_count = faults.count("server-count", flags.server_count, 0).max(1);
        let agent_port = agents.as_ref().map_or(0, |agents| agents.address.port());
        let server_set = server_set::check(&flags, &server_id, agent_port, &mut faults);
        let graceful_shutdown_timeout =
            faults.duration("graceful-shutdown-timeout", flags.graceful_shutdown_timeout);
        let operator_socket = flags.admin.operator_socket();
        let is_taken = operator_socket.as_deref() == Some(Path::new(&flags.uds_name));
        let reason = "is the path of --uds-name too; give it a path of its own";
        faults.require(!is_taken, "operator-socket", reason);
        let (tunnel, log) = flags.tunnel.check(&mut faults);
        let warnings = faults.finish()?;
        // Without faults every part is there; the expectations below name the check.
        Ok(Self {
            server_id,
            server_count,
            server_set,
            frontend: frontend.expect("a frontend without a listener is a fault"),
            agents: agents.expect("agents without --cluster-cert are a fault"),
            tunnel,
            tls,
            kubernetes,
            leases,
            health_address,
            admin_address,
            profiling: flags.admin.enable_profiling,
            operator_socket,
            graceful_shutdown_timeout,
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
        u64::from(self.frontend.max_connections) + OTHER_DESCRIPTORS
    }
}

impl Config {
    /// Idle time after which a Konnectivity agent's connection is pinged; `None` never pings.
    pub(crate) fn konnectivity_keep_alive_interval(&self) -> Option<Duration> {
        let asked = Some(self.agents.keep_alive_interval).filter(|interval| !interval.is_zero());
        asked.into_iter().chain(self.tunnel.transport.keep_alive_interval).min()
    }
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
    let is_used = flags.enable_lease_controller || !flags.agent_service_account.is_empty();
    KubernetesConfig {
        kubeconfig: faults.kubeconfig("kubeconfig", &flags.kubernetes.kubeconfig, is_used),
        qps: (is_rate && qps > 0.0).then_some(qps),
        burst: (burst > 0).then_some(burst),
    }
}

fn leases(flags: &Flags, faults: &mut Faults) -> Option<LeaseConfig> {
    if !flags.enable_lease_controller {
        return None;
    }
    let labels = faults.labels("lease-label", &flags.lease_label);
    Some(LeaseConfig { namespace: flags.kubernetes.lease_namespace.clone(), labels })
}

#[cfg(test)]
mod tests;
