//! A whole agent: its ports bound, its tunnels kept up until told to stop, then drained.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use culvert_process::{
    admin::{self, AdminServer, Routes},
    kubernetes::ClientError,
    metrics::{BuildError, Upkeep},
};
use culvert_transport::tls::TlsError;
use culvert_wire::{
    InstanceId,
    bounded::TooLong,
    identifiers::{Identifier, Identifiers},
    ids::InvalidId,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::warn;

use crate::{
    config::Config,
    connector::{Connector, attempt::Attempts, plan::Plan},
    egress::Egress,
    leases::LeaseCount,
    metrics::AgentMetrics,
    tunnels::{
        ServerTunnels,
        session::{FIRST_STREAM_LIMIT, TunnelContext},
    },
};

/// An agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Certificate, key or CA cannot be used.
    #[error("--ca-cert, --agent-cert, --agent-key: {0}")]
    Tls(#[from] TlsError),
    /// kube-apiserver cannot be asked about Leases.
    #[error(transparent)]
    Kubernetes(#[from] ClientError),
    /// The agent's name cannot be used.
    #[error("--agent-id: {0}")]
    AgentId(#[from] InvalidId),
    /// The identifiers are too many or too long.
    #[error("--agent-identifiers: {0}")]
    Identifiers(#[from] TooLong),
    /// The health port cannot be listened on.
    #[error(transparent)]
    Admin(#[from] admin::BindError),
    /// A metric is misdeclared; the fault is ours.
    #[error(transparent)]
    Metrics(#[from] BuildError),
}

/// An agent that has bound its ports and connects to nothing yet.
#[derive(Debug)]
pub struct Agent {
    connector: Connector,
    context: Arc<TunnelContext>,
    servers: Arc<ServerTunnels>,
    health: AdminServer,
    admin: Option<AdminServer>,
    metrics: Arc<AgentMetrics>,
    leases: Option<LeaseCount>,
    _upkeep: Upkeep,
}

impl Agent {
    /// Checks the files and binds health and admin. Needs a tokio runtime.
    ///
    /// An admin port that cannot be had is told in the log and done without: on the host's
    /// network another process may own it, and the tunnel matters more.
    ///
    /// # Errors
    /// When a file cannot be used or the health port cannot be had.
    pub fn bind(config: &Config) -> Result<Self, StartError> {
        let metrics = Arc::new(AgentMetrics::new()?);
        let first = FIRST_STREAM_LIMIT.min(config.max_streams);
        let attempts = Attempts {
            servers: config.servers.clone(),
            settings: config.tunnel.settings(first),
            key_exchange: config.tunnel.key_exchange,
            proxies: config.proxies.clone(),
        };
        attempts.check_files()?;
        let servers = Arc::new(ServerTunnels::new(config.sync.count_source));
        let leases = config.sync.leases.as_ref().map(LeaseCount::new).transpose()?;
        let connector = Connector {
            attempts: Arc::new(attempts),
            plan: Plan::new(config, Instant::now()),
            servers: servers.clone(),
            metrics: metrics.clone(),
        };
        let context = Arc::new(TunnelContext {
            egress: Egress { dial_timeout: config.dial_timeout, metrics: metrics.clone() },
            agent_id: config.agent_id.parse()?,
            instance: InstanceId(std::array::from_fn(|_| fastrand::u8(..))),
            identifiers: identifiers(&config.identifier_pairs)?,
            token_file: config.servers.token_file.clone(),
            max_streams: config.max_streams,
            hedge_rate: config.tunnel.hedge_rate,
            drain_timeout: config.drain_timeout,
            draining: CancellationToken::new(),
        });
        let upkeep = metrics.inner().spawn_upkeep();
        let (ready, shown, rendered) = (servers.clone(), servers.clone(), metrics.clone());
        let routes = Routes::new()
            .healthz()
            .readyz(move |ask| {
                let tunnels = if ask.is_verbose() { ready.describe() } else { Vec::new() };
                admin::agent_readiness(ready.is_connected(), ask.is_verbose(), &tunnels)
            })
            .metrics(move || rendered.render(&shown));
        let health = AdminServer::bind("health-server-port", config.health_address, routes)?;
        let routes = Routes::new().metrics_on_port(health.local_address().port());
        let admin = AdminServer::bind("admin-server-port", config.admin_address, routes)
            .inspect_err(|error| warn!(%error, "going on without the admin port"))
            .ok();
        Ok(Self { connector, context, servers, health, admin, metrics, leases, _upkeep: upkeep })
    }

    /// Where health, readiness and metrics are served.
    pub fn health_address(&self) -> SocketAddr {
        self.health.local_address()
    }

    /// The servers that have taken the agent in.
    pub fn servers(&self) -> &Arc<ServerTunnels> {
        &self.servers
    }

    /// What the agent counts.
    pub fn metrics(&self) -> &Arc<AgentMetrics> {
        &self.metrics
    }

    /// Keeps tunnels up until `stop` completes, then drains for the configured time.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let counting = self.leases.map(|leases| {
            let keep = leases.keep(self.servers.clone(), self.metrics.clone());
            AbortOnDropHandle::new(tokio::spawn(keep))
        });
        let connecting =
            AbortOnDropHandle::new(tokio::spawn(self.connector.run(self.context.clone())));
        stop.await;
        drop(counting);
        self.context.draining.cancel();
        // Ends within the time to drain, which the tunnel itself keeps.
        let _ = connecting.await;
        self.health.stop().await;
        if let Some(admin) = self.admin {
            admin.stop().await;
        }
    }
}

fn identifiers(pairs: &[(String, String)]) -> Result<Identifiers, TooLong> {
    let identifiers: Result<Vec<_>, _> =
        pairs.iter().map(|(key, value)| Identifier::new(key, value)).collect();
    identifiers?.try_into()
}
