//! Servers and agents for faults: processes that are scraped, and others within the test's process.

use std::{future::pending, net::SocketAddr, path::PathBuf, sync::Arc};

use culvert_agent::Agent;
use culvert_loadtest::{
    certificates::Certificates,
    flags::{self, AgentFlags, Ports, SYNC_OFTEN, ServerFlags},
    frontend::{Connection, Protocol, connect::ConnectError},
    process::{Process, free_port},
};
use culvert_process::faults::CertificatePair;
use culvert_server::Server;
use culvert_transport::{task::owned, tcp::Proxies};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::prometheus::Target;
use crate::support::{deployment::OPEN_SERVERS, eventually, start_culvert_under};

const LOOPBACK: [u8; 4] = [127, 0, 0, 1];

/// A server or agent as a process.
pub(crate) struct Node {
    pub(crate) process: Process,
    pub(crate) target: Target,
}

/// The place of one server: its certificates, port and socket.
#[derive(Clone)]
pub(crate) struct Site {
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) name: &'static str,
    pub(crate) tunnel: SocketAddr,
    /// `--transport` of the agents. A busy machine must not make them use another one.
    pub(crate) transport: &'static str,
}

impl Site {
    pub(crate) fn new(certificates: &Arc<Certificates>, name: &'static str) -> Self {
        let tunnel = SocketAddr::from((LOOPBACK, free_port().unwrap()));
        Self { certificates: certificates.clone(), name, tunnel, transport: "quic" }
    }

    /// Path of a file of this site.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.certificates.folder().join(format!("{}-{name}", self.name))
    }

    fn server_args(&self, health: u16) -> Vec<String> {
        let flags = ServerFlags {
            certificates: &self.certificates,
            socket: &self.file("socket"),
            frontend: Protocol::Connect,
            address: self.tunnel.ip(),
            ports: Ports { tunnel: self.tunnel.port(), admin: free_port().unwrap(), health },
            id: self.name,
            count: 1,
        };
        let mut args = flags.args();
        args.push("--graceful-shutdown-timeout=0s".into());
        args
    }

    /// Starts a server.
    pub(crate) async fn server(&self, more: &[&str]) -> Node {
        let health = free_port().unwrap();
        let args = self.server_args(health).into_iter().chain(more.iter().map(|it| (*it).into()));
        let process = start_culvert_under(&[], "server", args, self.file("server.log"), health);
        process.until_ok("/healthz").await.unwrap();
        Node { process, target: Target { program: "culvert-server", health } }
    }

    /// Starts a server whose frontend is this port over TLS, with this certificate.
    pub(crate) async fn server_over_tls(&self, port: u16, pair: &CertificatePair) -> Node {
        let flags = [
            "--uds-name=".into(),
            format!("--server-port={port}"),
            "--server-bind-address=127.0.0.1".into(),
            format!("--server-cert={}", pair.certificate.display()),
            format!("--server-key={}", pair.key.display()),
            format!("--server-ca-cert={}", self.certificates.ca().display()),
        ];
        self.server(&flags.each_ref().map(String::as_str)).await
    }

    /// Starts a server within this process, once the one before has left its port.
    pub(crate) async fn inner_server(&self) -> AbortOnDropHandle<()> {
        let mut config: culvert_server::Config = flags::config(self.server_args(8134)).unwrap();
        config.health_address = (LOOPBACK, 0).into();
        config.admin_address = (LOOPBACK, 0).into();
        let mut bound = None;
        eventually("the port is free", async || {
            bound = Server::bind(&config).ok();
            bound.is_some()
        })
        .await;
        let server = bound.expect("it was bound");
        owned(async move { server.run(pending()).await.unwrap() })
    }

    fn agent_args(&self, id: &str, [health_port, admin_port]: [u16; 2]) -> Vec<String> {
        let flags = AgentFlags {
            certificates: &self.certificates,
            shows_certificate: true,
            id: Some(id),
            server: self.tunnel,
            admin_port,
            health_port,
        };
        let transport = format!("--transport={}", self.transport);
        let more = SYNC_OFTEN.map(str::to_owned).into_iter().chain([transport]);
        flags.args().into_iter().chain(more).collect()
    }

    /// Starts an agent.
    pub(crate) async fn agent(&self, id: &str, more: &[String]) -> Node {
        self.agent_under(&[], id, more).await
    }

    /// The same, by the command `tracer`.
    pub(crate) async fn agent_under(&self, tracer: &[String], id: &str, more: &[String]) -> Node {
        let ports = [free_port().unwrap(), free_port().unwrap()];
        let args = self.agent_args(id, ports).into_iter().chain(more.iter().cloned());
        let log = self.file(&format!("{id}.log"));
        let process = start_culvert_under(tracer, "agent", args, log, ports[0]);
        process.until_ok("/healthz").await.unwrap();
        Node { process, target: Target { program: "culvert-agent", health: ports[0] } }
    }

    /// Starts an agent within this process.
    pub(crate) fn inner_agent(&self, id: &str, more: &[&str]) -> AbortOnDropHandle<()> {
        let more = more.iter().map(|flag| (*flag).to_owned());
        let args = self.agent_args(id, [8136, 8135]).into_iter().chain(more);
        let mut config: culvert_agent::Config = flags::config(args).unwrap();
        config.proxies = Proxies::default();
        config.health_address = (LOOPBACK, 0).into();
        config.admin_address = (LOOPBACK, 0).into();
        let agent = Agent::bind(&config).unwrap();
        owned(async move { agent.run(pending()).await })
    }

    /// Dials a target through the server.
    pub(crate) async fn dial(&self, target: impl ToString) -> Result<Connection, ConnectError> {
        Connection::dial_unix(Protocol::Connect, &self.file("socket"), target).await
    }

    /// Dials a target so many times, all at the same time; the connections that came about.
    pub(crate) async fn dial_times(&self, count: usize, target: impl ToString) -> Vec<Connection> {
        let mut dials = JoinSet::new();
        for _ in 0..count {
            let (site, target) = (self.clone(), target.to_string());
            dials.spawn(async move { site.dial(target).await });
        }
        dials.join_all().await.into_iter().filter_map(Result::ok).collect()
    }
}

impl Node {
    /// Waits until a series of this process has at least this value.
    pub(crate) async fn until_at_least(&self, series: &str, least: f64) {
        let is_there = async || self.process.metric(series).await.is_ok_and(|value| value >= least);
        eventually(series, is_there).await;
    }

    /// Waits until this many agents have joined the server.
    pub(crate) async fn until_joined(&self, agents: u32) {
        self.until_at_least("culvert_server_tunnels", agents.into()).await;
    }

    /// Waits until the agent has a tunnel.
    pub(crate) async fn until_connected(&self) {
        self.until_at_least(OPEN_SERVERS, 1.0).await;
    }

    /// Waits until the agent has no tunnel.
    pub(crate) async fn until_without_server(&self) {
        let has_none =
            async || self.process.metric(OPEN_SERVERS).await.is_ok_and(|value| value == 0.0);
        eventually("the tunnel is lost", has_none).await;
    }
}
