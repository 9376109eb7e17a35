//! A server and its agents in this process, on loopback, with real QUIC and real TLS.
//!
//! ```text
//! let rig = Rig::new().agents(2).start().await?;
//! let stream = rig.connect(target).await?;
//! ```

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use culvert_agent::{Agent, config::Transport, metrics::AgentMetrics, tunnels::ServerTunnels};
use culvert_process::{
    kubernetes::KubernetesConfig,
    logging::{LogConfig, LogFormat},
    tunnel_flags::TunnelConfig,
};
use culvert_server::{
    Server,
    backends::Backends,
    config::{
        AgentsConfig, DialConfig, FrontendConfig, FrontendListen, Mode, Strategy, TlsConfig,
        TlsVersion,
    },
    frontend::listen::FrontendAddress,
    metrics::ServerMetrics,
};
use culvert_transport::tcp::Proxies;
use rustls::pki_types::ServerName;
use tokio::{sync::oneshot, task::JoinHandle, time::timeout};

use crate::certificates::Certificates;

/// How long anything in the rig may take to come up or go down.
const PATIENCE: Duration = Duration::from_secs(30);

/// What to start.
#[derive(Clone, Debug)]
pub struct Rig {
    mode: Mode,
    tcp_frontend: bool,
    agents: usize,
    tunnel: TunnelConfig,
    dial: DialConfig,
    agent_dial_timeout: Duration,
    max_streams: u32,
    grace: Duration,
    header_timeout: Duration,
    transport: Transport,
    quic_retry_interval: Duration,
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    /// One agent, and HTTP CONNECT on a Unix socket.
    pub fn new() -> Self {
        Self {
            mode: Mode::HttpConnect,
            tcp_frontend: false,
            agents: 1,
            tunnel: TunnelConfig::default(),
            dial: DialConfig { limit: Some(Duration::from_secs(10)), optimistic: false },
            agent_dial_timeout: Duration::from_secs(5),
            max_streams: 10_000,
            grace: Duration::ZERO,
            header_timeout: Duration::from_secs(10),
            transport: Transport::Quic,
            quic_retry_interval: Duration::from_secs(10),
        }
    }

    /// Speaks this to frontends.
    #[must_use]
    pub fn mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    /// Takes frontends in over TCP with mutual TLS instead of the Unix socket.
    #[must_use]
    pub fn tcp_frontend(self) -> Self {
        Self { tcp_frontend: true, ..self }
    }

    /// Starts this many agents.
    #[must_use]
    pub fn agents(self, agents: usize) -> Self {
        Self { agents, ..self }
    }

    /// Uses these tunnel options on both sides.
    #[must_use]
    pub fn tunnel(self, tunnel: TunnelConfig) -> Self {
        Self { tunnel, ..self }
    }

    /// Waits this long for an agent's answer to a dial.
    #[must_use]
    pub fn dial_timeout(self, limit: Duration) -> Self {
        let dial = DialConfig { limit: Some(limit), ..self.dial };
        Self { dial, ..self }
    }

    /// Answers frontends at once for targets that were reached a short while ago.
    #[must_use]
    pub fn optimistic_dial(self) -> Self {
        let dial = DialConfig { optimistic: true, ..self.dial };
        Self { dial, ..self }
    }

    /// Lets agents try this long to reach a target.
    #[must_use]
    pub fn agent_dial_timeout(self, limit: Duration) -> Self {
        Self { agent_dial_timeout: limit, ..self }
    }

    /// Lets each agent carry this many streams.
    #[must_use]
    pub fn max_streams(self, max_streams: u32) -> Self {
        Self { max_streams, ..self }
    }

    /// Gives server and agents this long to drain.
    #[must_use]
    pub fn grace(self, grace: Duration) -> Self {
        Self { grace, ..self }
    }

    /// Gives tunnels this carrier.
    #[must_use]
    pub fn transport(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    /// Lets agents try QUIC again this long after it has failed.
    #[must_use]
    pub fn quic_retry_interval(self, quic_retry_interval: Duration) -> Self {
        Self { quic_retry_interval, ..self }
    }

    /// Gives frontends this long to say what they want.
    #[must_use]
    pub fn header_timeout(self, header_timeout: Duration) -> Self {
        Self { header_timeout, ..self }
    }

    /// Starts everything and waits until every agent has joined.
    ///
    /// # Errors
    /// When a part cannot start, or an agent does not join in time.
    pub async fn start(self) -> anyhow::Result<Running> {
        let certificates = Arc::new(Certificates::generate()?);
        let (server, server_task) = self.start_server(&certificates, loopback())?;
        let mut running =
            Running { server, server_task, agents: Vec::new(), certificates, rig: self };
        for index in 0..running.rig.agents {
            running.add_agent(&format!("agent-{index}"))?;
        }
        running.until_joined(running.rig.agents).await?;
        Ok(running)
    }

    fn server_config(
        &self,
        certificates: &Certificates,
        address: SocketAddr,
    ) -> culvert_server::Config {
        let listen = if self.tcp_frontend {
            FrontendListen::Tcp {
                address: loopback(),
                certificate: certificates.server(),
                client_ca: certificates.ca(),
            }
        } else {
            FrontendListen::Unix {
                path: certificates.folder().join("frontend.sock"),
                delete_existing: true,
            }
        };
        culvert_server::Config {
            server_id: "server-0".parse().expect("a valid name"),
            server_count: 1,
            frontend: FrontendConfig {
                mode: self.mode,
                listen,
                keep_alive_interval: Duration::from_secs(3600),
                header_timeout: self.header_timeout,
                max_connections: 20_000,
            },
            agents: AgentsConfig {
                address,
                certificate: certificates.server(),
                client_ca: Some(certificates.ca()),
                token: None,
                strategies: vec![Strategy::Default],
                keep_alive_interval: Duration::from_secs(3600),
                dial: self.dial,
                max_streams: self.max_streams,
                reset_key_file: None,
            },
            tunnel: self.tunnel,
            tls: TlsConfig { min_version: TlsVersion::Tls12 },
            kubernetes: KubernetesConfig::default(),
            leases: None,
            health_address: loopback(),
            admin_address: loopback(),
            graceful_shutdown_timeout: self.grace,
            log: log(),
            warnings: Vec::new(),
        }
    }

    fn start_server(
        &self,
        certificates: &Certificates,
        address: SocketAddr,
    ) -> anyhow::Result<(RunningServer, Task)> {
        let server = Server::bind(&self.server_config(certificates, address))?;
        let running = RunningServer {
            frontend: server.frontend_address()?,
            tunnel: server.tunnel_address()?,
            health: server.health_address(),
            admin: server.admin_address(),
            backends: server.backends().clone(),
            metrics: server.metrics().clone(),
        };
        let task = Task::spawn(|stop| server.run(stop));
        Ok((running, task))
    }
}

/// Everything that was started. Dropping it ends all of it at once.
#[derive(Debug)]
pub struct Running {
    /// The server.
    pub server: RunningServer,
    server_task: Task,
    agents: Vec<RunningAgent>,
    certificates: Arc<Certificates>,
    rig: Rig,
}

/// A server that runs, and where it is reached.
#[derive(Clone, Debug)]
pub struct RunningServer {
    /// Where frontends come in.
    pub frontend: FrontendAddress,
    /// Where agents come in.
    pub tunnel: SocketAddr,
    /// Health, readiness, metrics.
    pub health: SocketAddr,
    /// The admin port.
    pub admin: SocketAddr,
    /// The agents that have joined.
    pub backends: Backends,
    /// What it counts.
    pub metrics: Arc<ServerMetrics>,
}

/// An agent that runs.
#[derive(Debug)]
pub struct RunningAgent {
    /// Its name.
    pub name: String,
    /// Health, readiness, metrics.
    pub health: SocketAddr,
    /// What it counts.
    pub metrics: Arc<AgentMetrics>,
    /// The servers that have taken it in.
    pub servers: Arc<ServerTunnels>,
    task: Task,
}

impl Running {
    /// The certificates that everybody here trusts.
    pub fn certificates(&self) -> &Certificates {
        &self.certificates
    }

    /// The carrier that tunnels get.
    pub fn transport(&self) -> Transport {
        self.rig.transport
    }

    /// The agents, in the order in which they were started.
    pub fn agents(&self) -> &[RunningAgent] {
        &self.agents
    }

    /// The path of the frontend's Unix socket.
    ///
    /// # Panics
    /// When the rig was started with a TCP frontend.
    pub fn uds(&self) -> PathBuf {
        match &self.server.frontend {
            FrontendAddress::Unix(path) => path.clone(),
            FrontendAddress::Tcp(_) => panic!("this rig takes frontends in over TCP"),
        }
    }

    /// Starts another agent, which joins in its own time.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn add_agent(&mut self, name: &str) -> anyhow::Result<()> {
        self.add_agent_with(&self.agent_config(name))
    }

    /// Starts an agent with this configuration; it joins when it joins.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn add_agent_with(&mut self, config: &culvert_agent::Config) -> anyhow::Result<()> {
        let agent = Agent::bind(config)?;
        let (health, metrics) = (agent.health_address(), agent.metrics().clone());
        let servers = agent.servers().clone();
        let task = Task::spawn(|stop| agent.run(stop));
        let name = config.agent_id.clone();
        self.agents.push(RunningAgent { name, health, metrics, servers, task });
        Ok(())
    }

    /// What an agent of this rig is configured with.
    pub fn agent_config(&self, name: &str) -> culvert_agent::Config {
        let tunnel = self.server.tunnel;
        culvert_agent::Config {
            agent_id: name.into(),
            transport: self.rig.transport,
            quic_retry_interval: self.rig.quic_retry_interval,
            proxies: Proxies::default(),
            identifiers: String::new(),
            identifier_pairs: Vec::new(),
            servers: culvert_agent::config::ServersConfig {
                host: tunnel.ip().to_string(),
                port: tunnel.port(),
                name: ServerName::from(tunnel.ip()),
                ca: self.certificates.ca(),
                certificate: Some(self.certificates.agent()),
                token_file: None,
                extra_alpn: Vec::new(),
                keep_alive_interval: Duration::from_secs(3600),
            },
            sync: culvert_agent::config::SyncConfig {
                interval: Duration::from_millis(50),
                interval_cap: Duration::from_millis(500),
                probe_interval: Duration::from_secs(1),
                forever: false,
                leases: None,
                count_source: culvert_agent::config::CountSource::Leases,
            },
            tunnel: self.rig.tunnel,
            dial_timeout: self.rig.agent_dial_timeout,
            max_streams: self.rig.max_streams,
            drain_timeout: self.rig.grace,
            health_address: loopback(),
            admin_address: loopback(),
            log: log(),
            warnings: Vec::new(),
        }
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

    /// Tells an agent to drain; completes when it has ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn drain_agent(&mut self, index: usize) -> anyhow::Result<()> {
        self.agents.remove(index).task.stop().await
    }

    /// Ends an agent without a word, as a crash of its tasks would.
    pub fn abort_agent(&mut self, index: usize) {
        drop(self.agents.remove(index));
    }

    /// Tells the server to stop; completes when it has ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn stop_server(&mut self) -> anyhow::Result<()> {
        self.server_task.stop().await
    }

    /// Starts the server anew at the same tunnel port.
    ///
    /// # Errors
    /// When it cannot start.
    pub async fn restart_server(&mut self) -> anyhow::Result<()> {
        self.server_task.stop().await?;
        let (server, task) = self.rig.start_server(&self.certificates, self.server.tunnel)?;
        (self.server, self.server_task) = (server, task);
        Ok(())
    }
}

/// A part that runs in a task until told to stop, and is aborted when dropped.
#[derive(Debug)]
struct Task {
    stop: Option<oneshot::Sender<()>>,
    handle: JoinHandle<()>,
}

impl Task {
    fn spawn<F>(run: impl FnOnce(StopFuture) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped: StopFuture = Box::pin(async { drop(stopped.await) });
        Self { stop: Some(stop), handle: tokio::spawn(run(stopped)) }
    }

    async fn stop(&mut self) -> anyhow::Result<()> {
        self.stop.take();
        match timeout(PATIENCE, &mut self.handle).await {
            Ok(ended) => Ok(ended?),
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }
}

type StopFuture = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

impl Drop for Task {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

fn loopback() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn log() -> LogConfig {
    LogConfig { format: LogFormat::Text, verbosity: 4 }
}
