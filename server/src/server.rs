//! A whole server: every part bound at once, run until it is stopped, then shut down in order.

use std::{
    future::pending, io, net::SocketAddr, path::PathBuf, pin::pin, sync::Arc, time::Duration,
};

use culvert_process::{
    admin::{AdminServer, Port, Routes},
    descriptors,
    faults::ConfigErrors,
    listen::ListenFlags,
    metrics::{BuildError, Upkeep},
    operator::{
        socket::OperatorSocket,
        streams::{LiveStreams, Side},
    },
    reload::Reloads,
    supervision::{propagate_panic, until_panic},
};
use culvert_transport::budget::{StreamMemory, StreamRoom};
use culvert_wire::CloseCode;
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    agents::{
        AgentContext, UnadmittedTable,
        admission::{Authenticator, ReviewPace},
        identity::nodes::Nodes,
        listener::{AgentListener, ListenerError},
        sessions::Sessions,
    },
    backends::{Backends, silence},
    config::Config,
    dial::Dialer,
    files::ServerFiles,
    frontend::{
        FrontendContext,
        listen::{FrontendAddress, FrontendListener, ListenError},
    },
    leases::LeaseController,
    metrics::ServerMetrics,
    operator::answers::Operated,
    readiness::readiness,
    server_set::ServerSet,
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
    /// The operator's socket cannot be bound.
    #[error("--operator-socket: cannot listen on {path}: {source}")]
    Operator {
        /// Path of the socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A file cannot be used.
    #[error(transparent)]
    Files(#[from] ConfigErrors),
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
    operator: Option<OperatorSocket>,
    leases: Option<LeaseController>,
    reloads: Reloads,
    grace: Duration,
    upkeep: Upkeep,
}

impl Server {
    /// Reads the files, binds the ports for frontends and agents, and serves health and
    /// administration as soon as their ports are free. It blocks for the files. Needs a tokio
    /// runtime.
    ///
    /// # Errors
    /// When a file cannot be used, or the port for frontends or for agents cannot be bound.
    pub fn bind(config: &Config) -> Result<Self, StartError> {
        let metrics = Arc::new(ServerMetrics::new()?);
        let memory = config.tunnel.memory();
        metrics.set_memory(&memory);
        let backends = {
            let agents = &config.agents;
            Backends::limited(&agents.strategies, agents.max_tunnels as usize)
        };
        let mut files = ServerFiles::read(config, metrics.inner())?;
        let agents = AgentListener::bind(config, &files)?;
        backends.expect_first();
        metrics.set_udp(agents.buffer_sizes(), agents.udp_health());
        let credentials = files.frontend.take();
        let frontend = FrontendListener::bind(&config.frontend, &config.tls.tls12, credentials)?;
        let frontend_context = Arc::new(FrontendContext {
            dialer: Dialer::new(
                backends.clone(),
                config.agents.dial,
                metrics.clone(),
                StreamRoom::new(&memory, config.frontend.mode.connection_cost()),
            ),
            metrics: metrics.clone(),
            memory: StreamMemory::of(&memory),
            streams: LiveStreams::new(Side::Server),
            mode: config.frontend.mode,
            reach: Default::default(),
            header_timeout: config.frontend.header_timeout,
            keep_alive_interval: config.frontend.keep_alive_interval,
            stopping: CancellationToken::new(),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let authenticator = match &config.agents.token {
            Some(expected) => {
                let client = files.reviews.expect("what reviews tokens was read");
                let pace = ReviewPace::from(&config.kubernetes);
                Authenticator::by_token(client, expected.clone(), pace, metrics.clone())
            }
            None => Authenticator::open(),
        };
        let nodes = files.nodes.map(Nodes::new);
        let authenticator = authenticator.with_rules(config.agents.claims.clone(), nodes);
        let server_set = Arc::new(ServerSet::new(
            config.server_id.clone(),
            agents.address()?.port(),
            &config.server_set,
            config.server_count,
            config.leases.is_some(),
        ));
        metrics.set_servers(&server_set);
        let leases = config.leases.as_ref().zip(files.leases).map(|(leases, client)| {
            let (id, metrics) = (&config.server_id, metrics.clone());
            LeaseController::new(client, leases, id, server_set.clone(), metrics)
        });
        let agent_context = Arc::new(AgentContext {
            backends: backends.clone(),
            authenticator,
            unadmitted: Arc::new(UnadmittedTable::new(descriptors::limit(), metrics.clone())),
            metrics: metrics.clone(),
            server_id: config.server_id.clone(),
            server_count: config.server_count,
            server_set,
            max_streams: config.agents.max_streams,
            memory,
            hedge_rate: config.tunnel.hedge_rate,
            expire_agents: config.agents.expire,
            recheck_interval: config.agents.recheck_interval,
            sessions: Sessions::new(config.tunnel.resume_timeout, metrics.resumption.clone()),
            drain_timeout: config.graceful_shutdown_timeout,
            draining: CancellationToken::new(),
            closing: CancellationToken::new(),
            settings: agents.settings(),
            konnectivity_keep_alive_interval: config.konnectivity_keep_alive_interval(),
            tasks: TaskTracker::new(),
        });
        let operator = config.operator_socket.as_ref().map(|path| {
            OperatorSocket::bind(path)
                .map_err(|source| StartError::Operator { path: path.clone(), source })
        });
        let operator = operator.transpose()?;
        let upkeep = metrics.inner().spawn_upkeep();
        let flags = ListenFlags { port: "health-port", address: "health-bind-address" };
        let health_port = Port { listener: "health", flags, address: config.health_address };
        let flags = ListenFlags { port: "admin-port", address: "admin-bind-address" };
        let admin_port = Port { listener: "admin", flags, address: config.admin_address };
        let routes = || {
            let (metrics, backends) = (metrics.clone(), backends.clone());
            let counted = metrics.inner().clone();
            Routes::new().metrics(&counted, move || metrics.render(&backends))
        };
        let (ready, frontends) = (backends.clone(), frontend_context.clone());
        let health_routes = routes().healthz().readyz(move |_| {
            let is_draining = frontends.stopping.is_cancelled();
            readiness(is_draining, frontends.reach.fault(), ready.is_ready())
        });
        Ok(Self {
            health: AdminServer::start(health_port, health_routes, metrics.inner()),
            admin: AdminServer::start(
                admin_port,
                routes().profiling(config.profiling),
                metrics.inner(),
            ),
            frontend,
            frontend_context,
            agents,
            agent_context,
            operator,
            leases,
            reloads: files.reloads,
            grace: config.graceful_shutdown_timeout,
            upkeep,
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

    /// The files that the server reads, which it reads again while it runs.
    pub fn files(&self) -> &Reloads {
        &self.reloads
    }

    /// The address of health, readiness and metrics.
    pub fn health_address(&self) -> SocketAddr {
        self.health.local_address()
    }

    /// The address of the admin port.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin.local_address()
    }

    /// Serves until `stop` completes or an operator drains the server, then drains for the
    /// configured time and closes everything: the server is no longer ready, it takes no new tunnels
    /// and no new requests, agents are sent a goodbye, frontends still open are cut off, the Unix
    /// socket is removed. If `stop` completes while an operator's drain is under way, the
    /// configured time begins anew.
    ///
    /// # Errors
    /// When agents could no longer be accepted over QUIC; then everything was closed as well.
    ///
    /// # Panics
    /// When one of the server's own tasks has panicked: a server that does not accept, does not
    /// answer or does not keep its Lease must not look healthy.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), ListenerError> {
        let FrontendContext { stopping, closing, tasks, .. } = &*self.frontend_context;
        let mut agents = self.agents.start(&self.agent_context);
        let stop_lease = CancellationToken::new();
        let mut lease_task = self
            .leases
            .map(|leases| culvert_transport::task::owned(leases.keep(stop_lease.clone())));
        let reloads = self.reloads;
        let mut reloading = culvert_transport::task::owned(async move { reloads.keep().await });
        let mut frontend =
            culvert_transport::task::owned(self.frontend.run(self.frontend_context.clone()));
        let AgentContext { backends, settings, .. } = &*self.agent_context;
        let watch = silence::watch(backends.clone(), settings.keep_alive_interval);
        let mut watch = culvert_transport::task::owned(watch);
        let own = [&mut self.upkeep, &mut frontend, &mut reloading, &mut watch];
        let stop_by_operator = CancellationToken::new();
        let operated = Operated {
            backends: self.agent_context.backends.clone(),
            streams: self.frontend_context.streams.clone(),
            stop: stop_by_operator.clone(),
        };
        let mut operator = self
            .operator
            .map(|socket| culvert_transport::task::owned(socket.run(operated.answers())));
        let mut reviews = self.agent_context.authenticator.take_task();
        let supervised = [self.health.task(), self.admin.task()].into_iter().chain(own);
        let supervised = supervised.chain(&mut lease_task).chain(&mut reviews).chain(&mut operator);
        let (mut stop, mut is_stopped) = (pin!(stop), false);
        let ended = tokio::select! {
            () = &mut stop => {
                is_stopped = true;
                Ok(())
            }
            () = stop_by_operator.cancelled() => Ok(()),
            error = agents.failed() => Err(error),
            never = until_panic(supervised) => match never {},
        };

        // Not ready from here on. The frontend's task ends within a moment and removes its socket.
        stopping.cancel();
        agents.refuse_new().await;
        propagate_panic(frontend.await);
        self.agent_context.backends.close();
        self.agent_context.draining.cancel();
        tasks.close();
        if !self.grace.is_zero() && !tasks.is_empty() {
            info!(open = tasks.len(), grace_seconds = self.grace.as_secs_f64(), "draining");
            let stop = async { if is_stopped { pending().await } else { stop.await } };
            drain(tasks, self.grace, stop).await;
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
        ended
    }
}

/// Waits until all tasks have ended, for `grace` at most. When `stop` completes meanwhile, `grace`
/// begins anew, because the sender of the signal grants as much.
///
/// # Cancel safety
/// Cancel safe.
async fn drain(tasks: &TaskTracker, grace: Duration, stop: impl Future<Output = ()>) {
    tokio::select! {
        biased;
        () = tasks.wait() => return,
        () = stop => {}
        () = sleep(grace) => return,
    }
    info!(open = tasks.len(), grace_seconds = grace.as_secs_f64(), "draining");
    let _ = timeout(grace, tasks.wait()).await;
}

#[cfg(test)]
mod tests {
    use std::future::ready;

    use tokio::time::Instant;

    use super::*;

    const GRACE: Duration = Duration::from_secs(10);

    /// Time of a drain with a task that ends after `task`, and a signal after `signal`.
    async fn drained(task: Option<u64>, signal: Option<u64>) -> u64 {
        let (tasks, start) = (TaskTracker::new(), Instant::now());
        let after = |seconds: Option<u64>| async move {
            match seconds {
                Some(seconds) => sleep(Duration::from_secs(seconds)).await,
                None => pending().await,
            }
        };
        let task = tasks.spawn(after(task));
        tasks.close();
        drain(&tasks, GRACE, after(signal)).await;
        task.abort();
        start.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_with_its_last_task_or_its_time_which_a_signal_begins_anew() {
        assert_eq!(drained(Some(3), None).await, 3);
        assert_eq!(drained(None, None).await, 10);
        assert_eq!(drained(None, Some(4)).await, 14);
        assert_eq!(drained(Some(12), Some(4)).await, 12);
        let tasks = TaskTracker::new();
        tasks.close();
        drain(&tasks, GRACE, ready(())).await;
    }
}
