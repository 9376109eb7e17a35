//! The listener for agents, what is asked of them, and how targets are dialed.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use culvert_process::{
    channel_flags::check_channel_size,
    faults::{CertificatePair, Faults},
    invocation::Invocation,
    kubernetes::KubernetesConfig,
};
use culvert_transport::tls::certificates;

use super::{
    Flags, Strategy,
    claims::{self, ClaimRules},
    flags::DEFAULT_CHANNEL_SIZE,
};

/// Time for an agent to answer a dial when no flag says otherwise. Konnectivity waits for ever, and
/// dials to an agent that hangs accumulate.
const DEFAULT_BACKEND_DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Minimum time between two reviews of one token.
const MIN_RECHECK_INTERVAL: Duration = Duration::from_secs(10);

/// Listener for agents, and what is asked of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentsConfig {
    /// Address for UDP and TCP alike; `[::]` means every interface, both families.
    pub address: SocketAddr,
    /// Certificate that the server presents.
    pub certificate: CertificatePair,
    /// CA of the agents' certificates; `None` admits agents without a certificate.
    pub client_ca: Option<PathBuf>,
    /// Service account that an agent's token must belong to; `None` asks for no token.
    pub token: Option<TokenConfig>,
    /// What an agent's id and identifiers must be.
    pub claims: ClaimRules,
    /// Which agents lose their tunnel when their proof of identity has expired.
    pub expire: ExpireAgents,
    /// Mean time between two reviews of the token of an agent that is connected; `None` for no
    /// reviews.
    pub recheck_interval: Option<Duration>,
    /// Maximum number of tunnels of all agents together.
    pub max_tunnels: u32,
    /// Strategies that choose an agent, in the order in which they are asked; never empty.
    pub strategies: Vec<Strategy>,
    /// Idle time after which a Konnectivity agent's connection is pinged, unless the tunnels'
    /// keep-alive interval, which holds for it too, is shorter; zero leaves it to that interval.
    pub keep_alive_interval: Duration,
    /// Dials.
    pub dial: DialConfig,
    /// Maximum number of streams that one agent carries at once.
    pub max_streams: u32,
    /// File with the secret of stateless-reset tokens; `None` derives them from the private key.
    pub reset_key_file: Option<PathBuf>,
}

/// Dials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DialConfig {
    /// Time for an agent to answer; `None` waits for ever.
    pub limit: Option<Duration>,
    /// Whether a frontend is answered at once for a target that the same agent reached recently.
    pub optimistic: bool,
}

/// What an agent's id and its identifiers must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentIdentity {
    /// Anything that no live agent of another identity has.
    Any,
    /// The name of the node that the agent has proved to be on, by a token or a certificate.
    Node,
    /// A name in the agent's certificate.
    Certificate,
}

/// Which agents lose their tunnel when their proof of identity has expired and was not renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpireAgents {
    /// Those that can renew it while they are connected.
    Renewing,
    /// All.
    All,
    /// None.
    None,
}

/// Service account and audience that an agent's token must be of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenConfig {
    /// Namespace of the service account.
    pub namespace: String,
    /// Name of the service account.
    pub service_account: String,
    /// Audience.
    pub audience: String,
}

/// Checks the flags of agents. `None` only along with a fault.
pub(super) fn check(
    flags: &Flags,
    invocation: Invocation,
    faults: &mut Faults,
) -> Option<AgentsConfig> {
    let port = flags.agent_port.unwrap_or_else(|| invocation.choose(8091, 8132));
    let port = faults.registered_port("agent-port", port);
    let address = faults.bind_address("agent-bind-address", &flags.agent_bind_address, port);
    let certificate =
        faults.pair(("cluster-cert", &flags.cluster_cert), ("cluster-key", &flags.cluster_key));
    if flags.cluster_cert.is_empty() && flags.cluster_key.is_empty() {
        faults.add("cluster-cert", "must be given: agents need something to know the server by");
    }
    let client_ca = faults.authorities("cluster-ca-cert", &flags.cluster_ca_cert);
    let token = token(flags, faults);
    authentication(flags, client_ca.is_some(), token.is_some(), faults);
    let identity = identity(flags, client_ca.is_some(), token.is_some(), faults);
    let claims = claims::check(flags, identity, faults);
    let expire = expire(flags, faults);
    let recheck_interval = recheck_interval(flags, faults);
    let max_tunnels = faults.count("max-agent-tunnels", flags.max_agent_tunnels, 1);
    let limit = match flags.backend_dial_timeout {
        None => Some(DEFAULT_BACKEND_DIAL_TIMEOUT),
        Some(timeout) => {
            let timeout = faults.duration("backend-dial-timeout", timeout);
            (!timeout.is_zero()).then_some(timeout)
        }
    };
    check_channel_size(flags.xfr_channel_size, DEFAULT_CHANNEL_SIZE, faults);
    let strategies = strategies(&flags.proxy_strategies, faults);
    let keep_alive_interval = faults.duration("keepalive-time", flags.keepalive_time);
    let max_streams = faults.count("max-streams-per-agent", flags.max_streams_per_agent, 1);
    let reset_key_file = faults.secret("reset-key-file", &flags.reset_key_file);
    Some(AgentsConfig {
        address,
        certificate: certificate?,
        client_ca,
        token,
        claims,
        expire,
        recheck_interval,
        max_tunnels,
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

/// The rule for ids and identifiers, which needs a proof of what it asks for.
fn identity(
    flags: &Flags,
    by_certificate: bool,
    by_token: bool,
    faults: &mut Faults,
) -> AgentIdentity {
    const FLAG: &str = "agent-identity";
    match flags.agent_identity.as_str() {
        "any" => AgentIdentity::Any,
        "node" => {
            let reason = "node needs --cluster-ca-cert or --agent-service-account: an agent \
                          proves its node with a certificate or a token";
            faults.require(by_certificate || by_token, FLAG, reason);
            AgentIdentity::Node
        }
        "certificate" => {
            faults.require(by_certificate, FLAG, "certificate needs --cluster-ca-cert");
            AgentIdentity::Certificate
        }
        other => {
            faults.add(FLAG, format!("{other:?} is unknown; use any, node or certificate"));
            AgentIdentity::Any
        }
    }
}

/// Warns where every certificate of the cluster is an agent's, and may be any agent's.
pub(super) fn warn_of_cluster_authorities(
    flags: &Flags,
    kubernetes: &KubernetesConfig,
    faults: &mut Faults,
) {
    let is_bound = flags.agent_identity != "any" || !flags.agent_service_account.is_empty();
    if flags.cluster_ca_cert.is_empty() || is_bound {
        return;
    }
    let ours = certificates(Path::new(&flags.cluster_ca_cert)).unwrap_or_default();
    if kubernetes.cluster_authorities().iter().any(|other| ours.contains(other)) {
        faults.warn(
            "cluster-ca-cert",
            "is the cluster's CA, which also signs certificates of kubelets and users: each of \
             them can join as any agent that is not connected; use another CA, or \
             --agent-identity=node",
        );
    }
}

fn expire(flags: &Flags, faults: &mut Faults) -> ExpireAgents {
    match flags.expire_agents.as_str() {
        "renewing" => ExpireAgents::Renewing,
        "all" => ExpireAgents::All,
        "none" => ExpireAgents::None,
        other => {
            let reason = format!("{other:?} is unknown; use renewing, all or none");
            faults.add("expire-agents", reason);
            ExpireAgents::Renewing
        }
    }
}

fn recheck_interval(flags: &Flags, faults: &mut Faults) -> Option<Duration> {
    const FLAG: &str = "agent-recheck-interval";
    let interval = faults.duration(FLAG, flags.agent_recheck_interval);
    let reason = format!("must be 0 or at least {MIN_RECHECK_INTERVAL:?}");
    faults.require(interval.is_zero() || interval >= MIN_RECHECK_INTERVAL, FLAG, reason);
    (!interval.is_zero()).then_some(interval)
}

/// Refuses to admit unauthenticated agents unless a flag allows it.
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
        match Strategy::from_name(name) {
            Some(strategy) => strategies.push(strategy),
            None => faults.add(
                "proxy-strategies",
                format!("{name:?} is unknown; use default, destHost or defaultRoute"),
            ),
        }
    }
    let named_none = text.split(',').all(str::is_empty);
    faults.require(!named_none, "proxy-strategies", "must name at least one strategy");
    strategies
}
