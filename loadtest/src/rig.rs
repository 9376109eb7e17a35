//! A server and its agents in this process, on loopback, with real QUIC, TCP and TLS.
//!
//! ```text
//! let rig = Rig::new().agents(2).start().await?;
//! let connection = rig.dial(target).await?;
//! ```

mod task;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use culvert_agent::{Agent, AgentMetrics, ServerTunnels, config::Transport};
use culvert_process::reload::Reloads;
use culvert_server::{
    Server, backends::Backends, config::FrontendListen, frontend::listen::FrontendAddress,
    metrics::ServerMetrics,
};
use culvert_transport::tcp::Proxies;
use tokio::time::timeout;

use crate::{
    carrier::Carrier,
    certificates::Certificates,
    flags::{self, AgentFlags, Ports, SYNC_OFTEN, ServerFlags},
    frontend::FrontendKind,
    http,
};
use task::Task;

/// Time for any part of the rig to start or stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// Description of what to start.
#[derive(Clone, Debug)]
pub struct Rig {
    frontend: FrontendKind,
    /// Carrier of every tunnel; the agents choose when `None`.
    carrier: Option<Carrier>,
    agents: usize,
    server_flags: Vec<String>,
    agent_flags: Vec<String>,
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    /// One agent whose tunnel is QUIC, and HTTP CONNECT on a Unix socket.
    pub fn new() -> Self {
        Self {
            frontend: FrontendKind::ConnectUnix,
            carrier: Some(Carrier::Quic),
            agents: 1,
            server_flags: vec!["--graceful-shutdown-timeout=0s".into()],
            agent_flags: vec!["--drain-timeout=0s".into()],
        }
    }

    /// Starts this frontend.
    #[must_use]
    pub fn frontend(self, frontend: FrontendKind) -> Self {
        Self { frontend, ..self }
    }

    /// Has every agent use this carrier, [`Carrier::Quic`] or [`Carrier::Tcp`].
    #[must_use]
    pub fn carrier(self, carrier: Carrier) -> Self {
        Self { carrier: Some(carrier), ..self }
    }

    /// Lets every agent choose its carrier.
    #[must_use]
    pub fn any_carrier(self) -> Self {
        Self { carrier: None, ..self }
    }

    /// Starts this many agents.
    #[must_use]
    pub fn agents(self, agents: usize) -> Self {
        Self { agents, ..self }
    }

    /// Gives the server one more flag.
    #[must_use]
    pub fn server_flag(mut self, flag: impl Into<String>) -> Self {
        self.server_flags.push(flag.into());
        self
    }

    /// Gives every agent one more flag.
    #[must_use]
    pub fn agent_flag(mut self, flag: impl Into<String>) -> Self {
        self.agent_flags.push(flag.into());
        self
    }

    /// Starts everything and waits until every agent has joined.
    ///
    /// # Errors
    /// When a part cannot start, or an agent does not join in time.
    pub async fn start(self) -> anyhow::Result<Running> {
        let certificates = Arc::new(Certificates::generate()?);
        let (server, server_task) = self.start_server(&certificates, "server-0", |_| ())?;
        let mut running = Running {
            server,
            server_task,
            other_servers: Vec::new(),
            agents: Vec::new(),
            certificates,
            rig: self,
        };
        for index in 0..running.rig.agents {
            running.add_agent(&format!("agent-{index}"))?;
        }
        running.until_joined(running.rig.agents).await?;
        Ok(running)
    }

    /// Configuration of the server, on free ports.
    fn server_config(
        &self,
        certificates: &Certificates,
        id: &str,
    ) -> anyhow::Result<culvert_server::Config> {
        let flags = ServerFlags {
            certificates,
            socket: &certificates.folder().join(format!("{id}.sock")),
            frontend: self.frontend.protocol(),
            address: Ipv4Addr::LOCALHOST.into(),
            ports: Ports::DEFAULT,
            id,
            count: 1,
        };
        let args = flags.args().into_iter().chain(self.server_flags.clone());
        let mut config: culvert_server::Config = flags::config(args)?;
        if self.frontend.is_tls() {
            config.frontend.listen = FrontendListen::Tcp {
                address: LOOPBACK,
                certificate: certificates.server(),
                client_ca: certificates.ca(),
            };
        }
        // Flags refuse port 0.
        config.agents.address = LOOPBACK;
        config.health_address = LOOPBACK;
        config.admin_address = LOOPBACK;
        Ok(config)
    }

    fn start_server(
        &self,
        certificates: &Certificates,
        id: &str,
        configure: impl FnOnce(&mut culvert_server::Config),
    ) -> anyhow::Result<(RunningServer, Task)> {
        let mut config = self.server_config(certificates, id)?;
        configure(&mut config);
        let server = Server::bind(&config)?;
        let running = RunningServer {
            frontend: server.frontend_address()?,
            tunnel: server.tunnel_address()?,
            health: server.health_address(),
            admin: server.admin_address(),
            backends: server.backends().clone(),
            metrics: server.metrics().clone(),
            files: server.files().clone(),
        };
        let task =
            Task::spawn(|stop| async { server.run(stop).await.expect("agents are accepted") });
        Ok((running, task))
    }
}

/// Everything that was started. It is aborted when dropped.
#[derive(Debug)]
pub struct Running {
    /// The server.
    pub server: RunningServer,
    server_task: Task,
    other_servers: Vec<Task>,
    agents: Vec<RunningAgent>,
    certificates: Arc<Certificates>,
    rig: Rig,
}

/// A running server.
#[derive(Clone, Debug)]
pub struct RunningServer {
    /// Address of the frontend.
    pub frontend: FrontendAddress,
    /// Address for agents.
    pub tunnel: SocketAddr,
    /// Address of health, readiness and metrics.
    pub health: SocketAddr,
    /// Address of the admin port.
    pub admin: SocketAddr,
    /// Agents that have joined.
    pub backends: Backends,
    /// Metrics.
    pub metrics: Arc<ServerMetrics>,
    /// The files that it reads.
    pub files: Reloads,
}

impl RunningServer {
    /// Its metrics, as a scrape shows them.
    pub fn scrape(&self) -> String {
        self.metrics.render(&self.backends)
    }

    /// Value of one series of the scrape; 0 when it is absent.
    pub fn metric(&self, series: &str) -> f64 {
        http::metric(&self.scrape(), series).unwrap_or(0.0)
    }

    /// Connections between frontends and targets.
    pub fn established(&self) -> f64 {
        self.metric("konnectivity_network_proxy_server_established_connections")
    }

    /// Dials that were not answered yet.
    pub fn pending_dials(&self) -> f64 {
        self.metric("konnectivity_network_proxy_server_pending_backend_dials")
    }

    /// Dials that failed for this reason.
    pub fn dial_failures(&self, reason: &str) -> f64 {
        let name = "culvert_server_dial_failures_total";
        self.metric(&format!("{name}{{reason=\"{reason}\"}}"))
    }

    /// Streams of the tunnels of this agent.
    pub fn open_streams(&self, agent_id: &str) -> f64 {
        let name = "culvert_server_tunnel_open_streams";
        self.metric(&format!("{name}{{agent_id=\"{agent_id}\"}}"))
    }

    /// Tunnels with this carrier.
    pub fn tunnels(&self, carrier: Carrier) -> usize {
        let (tunnels, carrier) = (self.backends.all(), carrier.to_string());
        tunnels.iter().filter(|backend| backend.tunnel.carrier().name() == carrier).count()
    }
}

/// A running agent.
#[derive(Debug)]
pub struct RunningAgent {
    /// Name.
    pub name: String,
    /// Address of health, readiness and metrics.
    pub health: SocketAddr,
    /// Metrics.
    pub metrics: Arc<AgentMetrics>,
    /// Tunnels to servers.
    pub servers: Arc<ServerTunnels>,
    task: Task,
}

impl RunningAgent {
    /// Its metrics, as a scrape shows them.
    pub fn scrape(&self) -> String {
        self.metrics.render(&self.servers)
    }

    /// Value of one series of the scrape; 0 when it is absent.
    pub fn metric(&self, series: &str) -> f64 {
        http::metric(&self.scrape(), series).unwrap_or(0.0)
    }
}

impl Running {
    /// Starts one more server with the same certificates and flags, on ports of its own. No agent
    /// is sent to it.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn add_server(&mut self, id: &str) -> anyhow::Result<RunningServer> {
        self.add_server_with(id, |_| ())
    }

    /// The same with another configuration.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn add_server_with(
        &mut self,
        id: &str,
        configure: impl FnOnce(&mut culvert_server::Config),
    ) -> anyhow::Result<RunningServer> {
        let (server, task) = self.rig.start_server(&self.certificates, id, configure)?;
        self.other_servers.push(task);
        Ok(server)
    }

    /// The certificates of the CA that every part trusts.
    pub fn certificates(&self) -> &Certificates {
        &self.certificates
    }

    /// Kind of the frontend.
    pub fn frontend(&self) -> FrontendKind {
        self.rig.frontend
    }

    /// Carrier of every tunnel; `None` when agents choose.
    pub fn carrier(&self) -> Option<Carrier> {
        self.rig.carrier
    }

    /// The agents, in the order in which they were started.
    pub fn agents(&self) -> &[RunningAgent] {
        &self.agents
    }

    /// Path of the frontend's Unix socket.
    ///
    /// # Panics
    /// When the frontend is on TCP.
    pub fn uds(&self) -> PathBuf {
        match &self.server.frontend {
            FrontendAddress::Unix(path) => path.clone(),
            FrontendAddress::Tcp(_) => panic!("the frontend of this rig is on TCP"),
        }
    }

    /// Starts another agent. [`Self::until_joined`] waits for it.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn add_agent(&mut self, name: &str) -> anyhow::Result<()> {
        self.add_agent_with(&self.agent_config(name)?)
    }

    /// Starts an agent with this configuration. [`Self::until_joined`] waits for it.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn add_agent_with(&mut self, config: &culvert_agent::Config) -> anyhow::Result<()> {
        let agent = Agent::bind(config)?;
        let (health, metrics) = (agent.health_address(), agent.metrics().clone());
        let servers = agent.servers().clone();
        let task = Task::spawn(|stop| agent.run(stop));
        let name = config.agent_id.to_string();
        self.agents.push(RunningAgent { name, health, metrics, servers, task });
        Ok(())
    }

    /// Configuration of an agent of this rig, on free ports.
    ///
    /// # Errors
    /// When a flag that the rig was given is wrong.
    pub fn agent_config(&self, name: &str) -> anyhow::Result<culvert_agent::Config> {
        let flags = AgentFlags {
            certificates: &self.certificates,
            shows_certificate: true,
            id: Some(name),
            server: self.server.tunnel,
            admin_port: Ports::DEFAULT.admin,
            health_port: Ports::DEFAULT.health,
        };
        let more = SYNC_OFTEN.map(str::to_owned).into_iter().chain(self.rig.agent_flags.clone());
        let mut config: culvert_agent::Config =
            flags::config(flags.args().into_iter().chain(more))?;
        config.transport = match self.rig.carrier {
            None => Transport::Auto,
            Some(Carrier::Quic) => Transport::Quic,
            Some(Carrier::Tcp | Carrier::Grpc) => Transport::Tcp,
        };
        // Not those of the environment.
        config.proxies = Proxies::default();
        // Flags refuse port 0.
        config.health_address = LOOPBACK;
        config.admin_address = LOOPBACK;
        Ok(config)
    }

    /// Waits until exactly this many agents have joined.
    ///
    /// # Errors
    /// When they do not in time.
    pub async fn until_joined(&self, agents: usize) -> anyhow::Result<()> {
        timeout(PATIENCE, self.server.backends.until(agents))
            .await
            .with_context(|| format!("{agents} agents did not join within {PATIENCE:?}"))
    }

    /// Has an agent drain; completes when it has ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn drain_agent(&mut self, index: usize) -> anyhow::Result<()> {
        self.agents.remove(index).task.stop(PATIENCE).await
    }

    /// Aborts an agent, as a crash of its tasks would.
    pub fn abort_agent(&mut self, index: usize) {
        drop(self.agents.remove(index));
    }

    /// Stops the server; completes when it has ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop_server(&mut self) -> anyhow::Result<()> {
        self.server_task.stop(PATIENCE).await
    }
}

const LOOPBACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
