//! A whole server: every part bound at once, run until told to stop, then taken down in order.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use culvert_process::{
    admin::{self, AdminServer, Routes},
    kubernetes::ClientError,
    metrics::{BuildError, Upkeep},
};
use culvert_wire::CloseCode;
use tokio::time::timeout;
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use tracing::{info, warn};

use crate::{
    agents::{
        AgentContext,
        admission::Authenticator,
        listener::{AgentListener, ListenerError},
    },
    backends::Backends,
    config::Config,
    dial::Dialer,
    frontend::{
        FrontendContext,
        listen::{FrontendAddress, FrontendListener, ListenError},
    },
    leases::Leases,
    metrics::ServerMetrics,
    readiness::readiness,
};

/// Time for closed tunnels' last packets, and for tasks to notice that they are over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The frontend cannot be listened on.
    #[error(transparent)]
    Frontend(#[from] ListenError),
    /// Agents cannot be let in.
    #[error(transparent)]
    AgentListener(#[from] ListenerError),
    /// kube-apiserver cannot be asked.
    #[error(transparent)]
    Kubernetes(#[from] ClientError),
    /// The health or admin port cannot be listened on.
    #[error(transparent)]
    Admin(#[from] admin::BindError),
    /// A metric is misdeclared; the fault is ours.
    #[error(transparent)]
    Metrics(#[from] BuildError),
    /// The kernel does not tell what was bound.
    #[error(transparent)]
    Address(#[from] io::Error),
}

/// A server that has bound everything it needs and serves nothing yet.
#[derive(Debug)]
pub struct Server {
    frontend: FrontendListener,
    frontend_context: Arc<FrontendContext>,
    agents: Arc<AgentListener>,
    agent_context: Arc<AgentContext>,
    health: AdminServer,
    admin: AdminServer,
    leases: Option<Leases>,
    grace: Duration,
    _upkeep: Upkeep,
}

impl Server {
    /// Binds the frontend, the tunnel port, health and admin. Needs a tokio runtime.
    ///
    /// # Errors
    /// When one of them cannot be had; those bound before it are given back.
    pub fn bind(config: &Config) -> Result<Self, StartError> {
        let metrics = Arc::new(ServerMetrics::new()?);
        let backends = Backends::new(&config.agents.strategies);
        let agents = AgentListener::bind(config)?;
        metrics.set_udp_buffers(agents.buffer_sizes());
        let frontend = FrontendListener::bind(&config.frontend, &config.tls)?;
        let frontend_context = Arc::new(FrontendContext {
            dialer: Dialer::new(backends.clone(), config.agents.dial, metrics.clone()),
            metrics: metrics.clone(),
            mode: config.frontend.mode,
            header_timeout: config.frontend.header_timeout,
            keep_alive_interval: config.frontend.keep_alive_interval,
            stopping: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let (authenticator, leases) = kubernetes(config, &metrics)?;
        let agent_context = Arc::new(AgentContext {
            backends: backends.clone(),
            authenticator,
            metrics: metrics.clone(),
            server_id: config.server_id.clone(),
            server_count: config.server_count,
            max_streams: config.agents.max_streams,
            hedge_rate: config.tunnel.hedge_rate,
            drain_timeout: config.graceful_shutdown_timeout,
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            settings: agents.settings(),
            konnectivity_keep_alive_interval: config.konnectivity_keep_alive_interval(),
            tasks: TaskTracker::new(),
        });
        let upkeep = metrics.inner().spawn_upkeep();
        let routes = || {
            let (metrics, backends) = (metrics.clone(), backends.clone());
            Routes::new().metrics(move || metrics.render(&backends))
        };
        let ready = backends.clone();
        let health_routes = routes().healthz().readyz(move |_| readiness(ready.is_ready()));
        Ok(Self {
            health: AdminServer::bind("health-port", config.health_address, health_routes)?,
            admin: AdminServer::bind("admin-port", config.admin_address, routes())?,
            frontend,
            frontend_context,
            agents: Arc::new(agents),
            agent_context,
            leases,
            grace: config.graceful_shutdown_timeout,
            _upkeep: upkeep,
        })
    }

    /// Where frontends are accepted.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn frontend_address(&self) -> io::Result<FrontendAddress> {
        self.frontend.address()
    }

    /// Where agents are accepted, over UDP and TCP.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn tunnel_address(&self) -> io::Result<SocketAddr> {
        self.agents.address()
    }

    /// The agents that have joined.
    pub fn backends(&self) -> &Backends {
        &self.agent_context.backends
    }

    /// What the server counts.
    pub fn metrics(&self) -> &Arc<ServerMetrics> {
        &self.agent_context.metrics
    }

    /// Where health, readiness and metrics are served.
    pub fn health_address(&self) -> SocketAddr {
        self.health.local_address()
    }

    /// Where the admin port is served.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.local_address()
    }

    /// Serves until `stop` completes, then drains for the configured time and takes everything
    /// down: agents are told, frontends still open are cut off, the Unix socket is removed.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let FrontendContext { stopping, closing, tasks, .. } = &*self.frontend_context;
        let agents = self.agent_context.tasks.clone();
        let stop_lease = CancellationToken::new();
        let lease_task = self
            .leases
            .map(|leases| AbortOnDropHandle::new(tokio::spawn(leases.keep(stop_lease.clone()))));
        let frontend =
            AbortOnDropHandle::new(tokio::spawn(self.frontend.run(self.frontend_context.clone())));
        tokio::select! {
            () = stop => {}
            () = self.agents.run(&self.agent_context) => {}
        }

        // No new requests first; the frontend's task ends within a moment and removes its socket.
        stopping.cancel();
        let _ = frontend.await;
        self.agents.refuse_new();
        self.agent_context.backends.close();
        self.agent_context.draining.cancel();
        tasks.close();
        if !self.grace.is_zero() && !tasks.is_empty() {
            info!(open = tasks.len(), grace = ?self.grace, "draining");
            let _ = timeout(self.grace, tasks.wait()).await;
        }
        let cut = tasks.len();
        if cut > 0 {
            warn!(cut, "connections were still open and are cut off");
        }
        // Until now this server's tunnels were lease_task, and so its Lease was.
        stop_lease.cancel();
        self.agent_context.closing.cancel();
        agents.close();
        let _ = timeout(CLOSE_TIMEOUT, agents.wait()).await;
        self.agents.close(CloseCode::SHUTDOWN, "the server stops", CLOSE_TIMEOUT).await;
        closing.cancel();
        let _ = timeout(CLOSE_TIMEOUT, tasks.wait()).await;
        if let Some(lease_task) = lease_task {
            let _ = timeout(CLOSE_TIMEOUT, lease_task).await;
        }
        self.health.stop().await;
        self.admin.stop().await;
    }
}

/// What kube-apiserver is asked for: who may come in, and who is lease_task.
fn kubernetes(
    config: &Config,
    metrics: &Arc<ServerMetrics>,
) -> Result<(Authenticator, Option<Leases>), ClientError> {
    let authenticator = match &config.agents.token {
        Some(expected) => Authenticator::by_token(&config.kubernetes, expected.clone())?,
        None => Authenticator::open(),
    };
    // With a client of its own: a Lease must be renewed in time, however many agents wait.
    let leases = match &config.leases {
        Some(leases) => {
            let client = config.kubernetes.client()?;
            Some(Leases::new(client, leases, &config.server_id, metrics.clone()))
        }
        None => None,
    };
    Ok((authenticator, leases))
}
