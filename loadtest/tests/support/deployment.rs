//! Servers and agents of Culvert and Konnectivity as processes on loopback, in every combination
//! that occurs while a cluster is upgraded.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use culvert_konnectivity::ALPN_H2;
use culvert_loadtest::{
    certificates::Certificates,
    flags::{AgentFlags, Ports, SYNC_OFTEN, ServerFlags},
    frontend::{Connection, Protocol, connect::ConnectError},
    process::{Launch, Process, free_port},
    targets::{self, Target},
};
use culvert_transport::tls::{Identity, KeyExchange, authorities, certificates, tunnel_client};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{echo, eventually, konnectivity::konnectivity, start_culvert_under, within};

/// Agents that a server can choose among.
const READY_BACKENDS: &str =
    "konnectivity_network_proxy_server_ready_backends{proxy_strategy=\"default\"}";
/// Connections of a server between a frontend and a target.
pub(crate) const ESTABLISHED: &str = "konnectivity_network_proxy_server_established_connections";
/// Servers that an agent has joined.
pub(crate) const OPEN_SERVERS: &str = "konnectivity_network_proxy_agent_open_server_connections";
/// Number of servers that an agent looks for.
pub(crate) const KNOWN_SERVERS: &str = "konnectivity_network_proxy_agent_known_server_count";
/// Connections of an agent to targets.
pub(crate) const OPEN_TARGETS: &str = "konnectivity_network_proxy_agent_open_endpoint_connections";

/// Whose program a server or agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Implementation {
    Culvert,
    Konnectivity,
}

/// What some combinations with Konnectivity cannot do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Capability {
    /// Delivers what a target writes before it is written to.
    ServerFirst,
    /// Delivers everything that was written before a close.
    WriteThenClose,
}

/// A combination of an agent, a server and a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Combination {
    pub(crate) agent: Implementation,
    pub(crate) server: Implementation,
    pub(crate) frontend: Protocol,
}

impl Combination {
    /// Why the combination lacks a capability, because of its Konnectivity half; `None` when it
    /// has it.
    pub(crate) fn lacks(self, capability: Capability) -> Option<&'static str> {
        use Capability::{ServerFirst, WriteThenClose};
        use Implementation::Konnectivity;
        match (capability, self.agent, self.server, self.frontend) {
            (ServerFirst, _, Konnectivity, Protocol::Grpc) => Some(
                "the client library drops data that follow a dial's answer at once, and a \
                 Konnectivity server does not hold them back",
            ),
            (ServerFirst, _, Konnectivity, Protocol::Connect) => {
                Some("a Konnectivity server does not order its 200 and the target's bytes")
            }
            (WriteThenClose, Konnectivity, _, _) => {
                Some("a Konnectivity agent closes the target's socket before it has written all")
            }
            _ => None,
        }
    }
}

/// A server, and an agent that has joined it.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) combination: Combination,
    pub(crate) deployment: Deployment,
    pub(crate) agent: Process,
}

/// Runs a test with this combination, unless it needs Go and such tests are skipped.
pub(crate) async fn with_joined(combination: Combination, test: impl AsyncFnOnce(Joined)) {
    let Combination { agent, server, frontend } = combination;
    if !can_run(&[agent, server]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(server, frontend, &[]).await;
        let agent = deployment.start_agent(agent, "agent", &[]).await;
        deployment.until_joined(1).await;
        test(Joined { combination, deployment, agent }).await;
    })
    .await;
}

/// Whether the tests of these implementations are to run.
pub(crate) async fn can_run(implementations: &[Implementation]) -> bool {
    !implementations.contains(&Implementation::Konnectivity) || konnectivity().await.is_some()
}

/// A server at fixed ports, which may be replaced, and what its agents need to find it.
#[derive(Debug)]
pub(crate) struct Deployment {
    server: Option<Process>,
    /// Certificates. Their folder takes sockets and logs too.
    pub(crate) certificates: Certificates,
    frontend: Protocol,
    tunnel_port: u16,
    admin_port: u16,
}

impl Deployment {
    /// A deployment with a server that answers.
    pub(crate) async fn start(
        implementation: Implementation,
        frontend: Protocol,
        flags: &[&str],
    ) -> Self {
        let mut deployment = Self::without_server(frontend);
        deployment.start_server(implementation, flags).await;
        deployment
    }

    /// A deployment without a server yet.
    pub(crate) fn without_server(frontend: Protocol) -> Self {
        Self {
            server: None,
            certificates: Certificates::generate().unwrap(),
            frontend,
            tunnel_port: free_port().unwrap(),
            admin_port: free_port().unwrap(),
        }
    }

    /// Starts a server at the ports of the deployment, and waits until it answers.
    pub(crate) async fn start_server(&mut self, implementation: Implementation, more: &[&str]) {
        self.start_server_under(&[], implementation, more).await;
    }

    /// The same, by the command `tracer`.
    pub(crate) async fn start_server_under(
        &mut self,
        tracer: &[String],
        implementation: Implementation,
        more: &[&str],
    ) {
        let health = free_port().unwrap();
        let flags = ServerFlags {
            certificates: &self.certificates,
            socket: &self.socket(),
            frontend: self.frontend,
            address: Ipv4Addr::LOCALHOST.into(),
            ports: Ports { tunnel: self.tunnel_port, admin: self.admin_port, health },
            id: "the-server",
            count: 1,
        };
        let args = flags.args().into_iter().chain(more.iter().map(|flag| (*flag).to_owned()));
        let server =
            self.start_process(tracer, implementation, "server", args, "server", health).await;
        server.until_ok("/healthz").await.unwrap();
        self.server = Some(server);
    }

    /// The server.
    pub(crate) fn server(&mut self) -> &mut Process {
        self.server.as_mut().expect("a server was started")
    }

    /// Value of one series of the server's metrics; 0 when it is absent.
    pub(crate) async fn server_metric(&self, series: &str) -> f64 {
        self.server.as_ref().expect("a server was started").metric(series).await.unwrap()
    }

    /// Everything that the servers of the deployment have logged.
    pub(crate) fn server_log(&self) -> String {
        self.server.as_ref().expect("a server was started").log()
    }

    /// Starts an agent and waits until its metrics show that it has joined.
    pub(crate) async fn start_agent(
        &self,
        implementation: Implementation,
        name: &str,
        more: &[&str],
    ) -> Process {
        let more = more.iter().map(|flag| (*flag).to_owned());
        let agent = self.spawn_agent(implementation, name, true, more).await;
        // Each readiness check would add a line to Konnectivity's log.
        let joined = async || agent.metric(OPEN_SERVERS).await.is_ok_and(|open| open > 0.0);
        eventually(&format!("{name} has joined"), joined).await;
        agent
    }

    /// Starts an agent that shows no certificate.
    pub(crate) async fn spawn_agent_without_certificate(
        &self,
        implementation: Implementation,
        name: &str,
        more: impl IntoIterator<Item = String>,
    ) -> Process {
        self.spawn_agent(implementation, name, false, more).await
    }

    /// Starts an agent and does not wait until it has joined.
    pub(crate) async fn spawn_agent(
        &self,
        implementation: Implementation,
        name: &str,
        shows_certificate: bool,
        more: impl IntoIterator<Item = String>,
    ) -> Process {
        self.spawn_agent_under(&[], implementation, name, shows_certificate, more).await
    }

    /// The same, by the command `tracer`.
    pub(crate) async fn spawn_agent_under(
        &self,
        tracer: &[String],
        implementation: Implementation,
        name: &str,
        shows_certificate: bool,
        more: impl IntoIterator<Item = String>,
    ) -> Process {
        let health_port = free_port().unwrap();
        let flags = AgentFlags {
            certificates: &self.certificates,
            shows_certificate,
            id: Some(name),
            server: self.tunnel(),
            admin_port: free_port().unwrap(),
            health_port,
        };
        let args = flags.args().into_iter().chain(SYNC_OFTEN.map(str::to_owned)).chain(more);
        self.start_process(tracer, implementation, "agent", args, name, health_port).await
    }

    async fn start_process(
        &self,
        tracer: &[String],
        implementation: Implementation,
        side: &str,
        args: impl Iterator<Item = String>,
        name: &str,
        health_port: u16,
    ) -> Process {
        let log = self.certificates.folder().join(format!("{name}.log"));
        if implementation == Implementation::Culvert {
            return start_culvert_under(tracer, side, args, log, health_port);
        }
        let programs = &konnectivity().await.expect("can_run was true").programs;
        let program = if side == "server" { &programs.server } else { &programs.agent };
        let program = program.display().to_string();
        let mut command = tracer.iter().cloned().chain([program]).chain(args);
        let program = command.next().expect("the program is there").into();
        let (args, namespace) = (command.collect(), None);
        Process::start(Launch { program, args, log, health_port, namespace }).unwrap()
    }

    /// Address for agents.
    pub(crate) fn tunnel(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.tunnel_port))
    }

    /// Path of the frontend's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.certificates.folder().join("frontend.sock")
    }

    /// Waits until the server can choose among exactly this many agents.
    pub(crate) async fn until_joined(&self, agents: u32) {
        let joined = async || self.ready_backends().await == f64::from(agents);
        eventually(&format!("{agents} agents have joined"), joined).await;
    }

    /// Waits until an agent announces a host, to a server that chooses by host alone.
    pub(crate) async fn until_host_is_served(&self) {
        let series = READY_BACKENDS.replace("default", "destHost");
        let is_served = async || self.server_metric(&series).await >= 1.0;
        eventually("a host is served", is_served).await;
    }

    /// Agents that the server can choose among.
    pub(crate) async fn ready_backends(&self) -> f64 {
        self.server_metric(READY_BACKENDS).await
    }

    /// Dials a target.
    pub(crate) async fn dial(&self, target: impl ToString) -> Result<Connection, ConnectError> {
        Connection::dial_unix(self.frontend, &self.socket(), target).await
    }

    /// Connects to the port for agents over TLS as a Konnectivity agent does.
    pub(crate) async fn connect_as_konnectivity_agent(&self) -> TlsStream<TcpStream> {
        let pair = self.certificates.agent();
        let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
        let roots = authorities(&certificates(&self.certificates.ca()).unwrap()).unwrap();
        let mut tls = tunnel_client(roots, Some(identity), KeyExchange::Hybrid).unwrap();
        tls.alpn_protocols = vec![ALPN_H2.to_vec()];
        let socket = TcpStream::connect(self.tunnel()).await.unwrap();
        let name = self.tunnel().ip().into();
        TlsConnector::from(Arc::new(tls)).connect(name, socket).await.unwrap()
    }

    /// Dials an echo, uses the connection once and closes it.
    pub(crate) async fn touch(&self, echo: &Target) -> Result<(), ConnectError> {
        touch(self.frontend, &self.socket(), echo.address()).await
    }

    /// Waits until a dial works, and asserts that the next twenty do.
    pub(crate) async fn until_dials_work(&self, echo: &Target) {
        eventually("a dial works", async || self.touch(echo).await.is_ok()).await;
        for _ in 0..20 {
            self.touch(echo).await.unwrap();
        }
    }

    /// An echo, and a connection to it that has been used.
    pub(crate) async fn open_echo(&self) -> (Target, Connection) {
        let target = targets::echo().await.unwrap();
        let mut connection = self.dial(target.address()).await.unwrap();
        echo(&mut connection, b"alive").await.unwrap();
        (target, connection)
    }

    /// Both ends of a connection through the tunnel, and its target.
    pub(crate) async fn both_ends(&self) -> (Connection, TcpStream, Target) {
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let frontend = self.dial(target.address()).await.unwrap();
        (frontend, accepted.recv().await.unwrap(), target)
    }

    /// Runs a command of kube-apiserver's client library: its output, and its exit code.
    pub(crate) async fn run_client(
        &self,
        command: &str,
        target: impl ToString,
        flags: &[&str],
    ) -> (serde_json::Value, Option<i32>) {
        let client = &konnectivity().await.expect("can_run was true").client;
        client.run(command, &self.socket(), &target.to_string(), flags).await.unwrap()
    }
}

/// Dials an echo through this socket, uses the connection once and closes it.
pub(crate) async fn touch(
    frontend: Protocol,
    socket: &Path,
    target: impl ToString,
) -> Result<(), ConnectError> {
    let mut connection = Connection::dial_unix(frontend, socket, target).await?;
    echo(&mut connection, b"touched").await?;
    Ok(connection.close().await?)
}
