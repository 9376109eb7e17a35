//! A whole agent: its ports bound, its tunnels kept until it is stopped, then drained.

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use culvert_process::{
    admin::{AdminServer, Port, Routes},
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
use culvert_wire::InstanceId;
use tokio::time::{Instant, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, ServersConfig},
    connector::{Connector, Direct, NetworkConnect, Plan},
    egress::{Egress, Gate},
    files::AgentFiles,
    leases::LeaseCount,
    metrics::AgentMetrics,
    operator::answers::Operated,
    readiness,
    tunnels::{ServerTunnels, session::SessionContext, sessions::Sessions},
};

/// Time for the connections to Konnectivity servers to close once their tunnels have ended.
const BRIDGE_TIMEOUT: Duration = Duration::from_secs(3);

/// Why an agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file cannot be used.
    #[error(transparent)]
    Files(#[from] ConfigErrors),
    /// The operator's socket cannot be bound.
    #[error("--operator-socket: cannot listen on {path}: {source}")]
    Operator {
        /// Path of the socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// A metric is misdeclared; the fault is ours.
    #[error(transparent)]
    Metrics(#[from] BuildError),
}

/// An agent that has bound its ports and does not connect yet.
#[derive(Debug)]
pub struct Agent {
    connector: Connector<NetworkConnect>,
    context: Arc<SessionContext>,
    bridges: TaskTracker,
    tunnels: Arc<ServerTunnels>,
    health: AdminServer,
    admin: AdminServer,
    operator: Option<(OperatorSocket, Operated)>,
    metrics: Arc<AgentMetrics>,
    leases: Option<LeaseCount>,
    reloads: Reloads,
    upkeep: Upkeep,
}

impl Agent {
    /// Reads the files, and serves health and administration as soon as their ports are free. It
    /// blocks for the files. Needs a tokio runtime.
    ///
    /// On the host's network another process may have the ports, and the tunnel matters more.
    ///
    /// # Errors
    /// When a file cannot be used, or the operator's socket cannot be bound.
    pub fn bind(config: &Config) -> Result<Self, StartError> {
        let metrics = Arc::new(AgentMetrics::new()?);
        let memory = config.tunnel.memory();
        metrics.set_memory(&memory);
        let bridges = TaskTracker::new();
        let mut files = AgentFiles::read(config, metrics.inner())?;
        let certificate = files.identity.clone();
        let (token, reloads) = (files.token.clone(), files.reloads.clone());
        let policy = files.policy.clone();
        let gate = Gate::new(files.policy.clone(), config.egress.audit, metrics.clone());
        let leases = config.sync.leases.as_ref().zip(files.leases.take());
        let leases = leases.map(|(config, client)| LeaseCount::new(config, client));
        let connect = NetworkConnect::new(config, files, &metrics, bridges.clone());
        let streams = LiveStreams::new(Side::Agent);
        let tunnels = Arc::new(ServerTunnels::new(config.sync.count_source));
        let connector = Connector {
            connect: Arc::new(connect),
            plan: Plan::new(config, Instant::now()),
            direct: Direct::new(&config.sync),
            certificate,
            tunnels: tunnels.clone(),
            metrics: metrics.clone(),
        };
        let context = Arc::new(SessionContext {
            egress: Egress::new(gate, config.dial_timeout, metrics.clone(), streams.clone()),
            agent_id: config.agent_id.clone(),
            instance: InstanceId(std::array::from_fn(|_| fastrand::u8(..))),
            identifiers: config.identifiers.clone(),
            token,
            max_streams: config.max_streams,
            memory,
            hedge_rate: config.tunnel.hedge_rate,
            keep_alive_interval: config.tunnel.transport.keep_alive_interval,
            sessions: Sessions::new(config.tunnel.resume_timeout, metrics.resumption.clone()),
            drain_timeout: config.drain_timeout,
            uses_proxy: {
                let ServersConfig { host, port, .. } = &config.servers;
                config.proxies.proxy_for(host, *port).is_some()
            },
            draining: CancellationToken::new(),
        });
        let operated = Operated {
            agent_id: config.agent_id.clone(),
            since: Instant::now(),
            transport: config.transport,
            tunnels: tunnels.clone(),
            streams,
            certificate: connector.certificate.clone(),
            token: context.token.clone(),
            policy,
            policy_source: config.egress.source(),
            audit: config.egress.audit,
            memory: context.memory.clone(),
        };
        let operator = config.operator_socket.as_ref().map(|path| {
            let socket = OperatorSocket::bind(path);
            socket.map_err(|source| StartError::Operator { path: path.clone(), source })
        });
        let operator = operator.transpose()?.map(|socket| (socket, operated));
        let upkeep = metrics.inner().spawn_upkeep();
        let health = start_health(config.health_address, &tunnels, &metrics);
        let routes = Routes::new()
            .metrics_on_port(health.local_address().port())
            .profiling(config.profiling);
        let flags = ListenFlags { port: "admin-server-port", address: "admin-bind-address" };
        let port = Port { listener: "admin", flags, address: config.admin_address };
        let admin = AdminServer::start(port, routes, metrics.inner());
        Ok(Self {
            connector,
            context,
            bridges,
            tunnels,
            health,
            admin,
            operator,
            metrics,
            leases,
            reloads,
            upkeep,
        })
    }

    /// The address of health, readiness and metrics.
    pub fn health_address(&self) -> SocketAddr {
        self.health.local_address()
    }

    /// The files that the agent reads, which it reads again while it runs.
    pub fn files(&self) -> &Reloads {
        &self.reloads
    }

    /// The tunnels to servers.
    pub fn servers(&self) -> &Arc<ServerTunnels> {
        &self.tunnels
    }

    /// The agent's metrics.
    pub fn metrics(&self) -> &Arc<AgentMetrics> {
        &self.metrics
    }

    /// Keeps tunnels to all servers until `stop` completes, then drains for the configured time.
    ///
    /// # Panics
    /// When one of the agent's own tasks panics, so that no process stays healthy without a tunnel.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut counting = self.leases.map(|leases| {
            let keep = leases.keep(self.tunnels.clone(), self.metrics.clone());
            culvert_transport::task::owned(keep)
        });
        let reloads = self.reloads;
        let keep = async move { reloads.keep().await };
        let mut reloading = culvert_transport::task::owned(keep);
        let mut connecting =
            culvert_transport::task::owned(self.connector.run(self.context.clone()));
        let mut operator = self.operator.map(|(socket, operated)| {
            culvert_transport::task::owned(socket.run(operated.answers()))
        });
        let supervised = [self.health.task(), self.admin.task(), &mut self.upkeep, &mut reloading];
        tokio::select! {
            () = stop => {}
            ended = &mut connecting => propagate_panic(ended),
            never = until_panic(supervised.into_iter().chain(&mut counting).chain(&mut operator)) => match never {},
        }
        drop(counting);
        self.context.draining.cancel();
        // Ends within the time for draining, which each session keeps.
        if !connecting.is_finished() {
            propagate_panic(connecting.await);
        }
        self.bridges.close();
        let _ = timeout(BRIDGE_TIMEOUT, self.bridges.wait()).await;
        self.health.stop().await;
        self.admin.stop().await;
    }
}

fn start_health(
    address: SocketAddr,
    tunnels: &Arc<ServerTunnels>,
    metrics: &Arc<AgentMetrics>,
) -> AdminServer {
    let (ready, rendered, counted) = (tunnels.clone(), tunnels.clone(), metrics.clone());
    let routes = Routes::new()
        .healthz()
        .readyz(move |request| {
            let lines = if request.is_verbose() { ready.describe() } else { Vec::new() };
            readiness::answer(ready.is_connected(), request.is_verbose(), &lines)
        })
        .metrics(metrics.inner(), move || counted.render(&rendered));
    let flags = ListenFlags { port: "health-server-port", address: "health-server-host" };
    let port = Port { listener: "health", flags, address };
    AdminServer::start(port, routes, metrics.inner())
}
