//! A whole server: every part bound at once, run until it is stopped, then shut down in order.

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
    leases::LeaseController,
    metrics::ServerMetrics,
    readiness::readiness,
};

/// Time for the last packets of closed tunnels, and for tasks to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A server could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The frontend's listener cannot be bound.
    #[error(transparent)]
    Frontend(#[from] ListenError),
    /// The agents' listener cannot be bound.
    #[error(transparent)]
    AgentListener(#[from] ListenerError),
    /// There is no client for kube-apiserver.
    #[error(transparent)]
    Kubernetes(#[from] ClientError),
    /// The health or admin port cannot be bound.
    #[error(transparent)]
    Admin(#[from] admin::BindError),
    /// A metric is misdeclared; the fault is ours.
    #[error(transparent)]
    Metrics(#[from] BuildError),
    /// The kernel does not report a bound address.
    #[error(transparent)]
    Address(#[from] io::Error),
}

/// A server whose ports are bound, and which serves nothing yet.
#[derive(Debug)]
pub struct Server {
    frontend: FrontendListener,
    frontend_context: Arc<FrontendContext>,
    agents: AgentListener,
    agent_context: Arc<AgentContext>,
    health: AdminServer,
    admin: AdminServer,
    leases: Option<LeaseController>,
    grace: Duration,
    _upkeep: Upkeep,
}

impl Server {
    /// Binds the ports for frontends, agents, health and administration. Needs a tokio runtime.
    ///
    /// # Errors
    /// When one of them cannot be bound; those bound before it are released.
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
            agents,
            agent_context,
            leases,
            grace: config.graceful_shutdown_timeout,
            _upkeep: upkeep,
        })
    }

    /// The address for frontends.
    ///
    /// # Errors
    /// When the kernel does not report it.
    pub fn frontend_address(&self) -> io::Result<FrontendAddress> {
        self.frontend.address()
    }

    /// The address for agents, over UDP and TCP.
    ///
    /// # Errors
    /// When the kernel does not report it.
    pub fn tunnel_address(&self) -> io::Result<SocketAddr> {
        self.agents.address()
    }

    /// The backends of the agents that have joined.
    pub fn backends(&self) -> &Backends {
        &self.agent_context.backends
    }

    /// The server's metrics.
    pub fn metrics(&self) -> &Arc<ServerMetrics> {
        &self.agent_context.metrics
    }

    /// The address of health, readiness and metrics.
    pub fn health_address(&self) -> SocketAddr {
        self.health.local_address()
    }

    /// The address of the admin port.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.local_address()
    }

    /// Serves until `stop` completes, then drains for the configured time and closes everything:
    /// agents are sent a goodbye, frontends still open are cut off, the Unix socket is removed.
    ///
    /// # Panics
    /// When an accept loop has panicked: a server that accepts nothing must not look healthy.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let FrontendContext { stopping, closing, tasks, .. } = &*self.frontend_context;
        let mut agents = self.agents.start(&self.agent_context);
        let stop_lease = CancellationToken::new();
        let lease_task = self
            .leases
            .map(|leases| AbortOnDropHandle::new(tokio::spawn(leases.keep(stop_lease.clone()))));
        let mut frontend =
            AbortOnDropHandle::new(tokio::spawn(self.frontend.run(self.frontend_context.clone())));
        tokio::select! {
            () = stop => {}
            () = agents.panicked() => {}
            Err(error) = &mut frontend => std::panic::resume_unwind(error.into_panic()),
        }

        // No new requests first; the frontend's task ends within a moment and removes its socket.
        stopping.cancel();
        let _ = frontend.await;
        agents.refuse_new().await;
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
        // The Lease is kept for as long as the tunnels are.
        stop_lease.cancel();
        self.agent_context.closing.cancel();
        self.agent_context.tasks.close();
        let _ = timeout(CLOSE_TIMEOUT, self.agent_context.tasks.wait()).await;
        agents.close(CloseCode::SHUTDOWN, "the server stops", CLOSE_TIMEOUT).await;
        closing.cancel();
        let _ = timeout(CLOSE_TIMEOUT, tasks.wait()).await;
        if let Some(lease_task) = lease_task {
            let _ = timeout(CLOSE_TIMEOUT, lease_task).await;
        }
        self.health.stop().await;
        self.admin.stop().await;
    }
}

/// The parts that ask kube-apiserver: whether agents are authentic, and for Leases.
fn kubernetes(
    config: &Config,
    metrics: &Arc<ServerMetrics>,
) -> Result<(Authenticator, Option<LeaseController>), ClientError> {
    let authenticator = match &config.agents.token {
        Some(expected) => Authenticator::by_token(&config.kubernetes, expected.clone())?,
        None => Authenticator::open(),
    };
    // With a client of its own: a Lease is renewed in time, however many reviews wait.
    let leases = match &config.leases {
        Some(leases) => {
            let client = config.kubernetes.client()?;
            Some(LeaseController::new(client, leases, &config.server_id, metrics.clone()))
        }
        None => None,
    };
    Ok((authenticator, leases))
}
