//! Peers: the routes from a client beside kube-apiserver to a target on the node, to be compared.
//!
//! Every peer is one small file that starts it on the two hosts of a [`Topology`].

mod culvert;
mod direct;
pub mod konnectivity;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use tokio::{runtime::Handle, time::Instant};

use crate::{
    certificates::Certificates,
    flags::{AgentFlags, Ports, ServerFlags},
    frontend::Protocol,
    link::Host,
    process::{Launch, Namespace, Process},
};

const AGENT_ADMIN_PORT: u16 = 8135;
/// Health port of the agent.
pub(crate) const AGENT_HEALTH_PORT: u16 = 8136;

/// A route: whose tunnel it is, and through which frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Culvert's server and agent.
    Culvert(Protocol),
    /// Konnectivity's server and agent.
    Konnectivity(Protocol),
    /// No tunnel: one TCP connection for each session, which the control plane of a real cluster
    /// behind NAT cannot have.
    Direct,
}

impl Peer {
    /// Every peer, in the order in which reports show them.
    pub const ALL: [Self; 5] = [
        Self::Culvert(Protocol::Grpc),
        Self::Culvert(Protocol::Connect),
        Self::Konnectivity(Protocol::Grpc),
        Self::Konnectivity(Protocol::Connect),
        Self::Direct,
    ];

    /// Whether its tunnel is always a TCP connection, whose congestion control is the kernel's.
    pub fn rides_on_tcp(self) -> bool {
        !matches!(self, Self::Culvert(_))
    }

    /// Whether it is Culvert.
    pub fn is_culvert(self) -> bool {
        matches!(self, Self::Culvert(_))
    }

    /// The peer that it has to beat: Konnectivity through the same frontend.
    pub fn incumbent(self) -> Option<Self> {
        match self {
            Self::Culvert(frontend) => Some(Self::Konnectivity(frontend)),
            _ => None,
        }
    }

    /// Protocol of the frontend.
    pub fn frontend(self) -> Option<Protocol> {
        match self {
            Self::Culvert(frontend) | Self::Konnectivity(frontend) => Some(frontend),
            Self::Direct => None,
        }
    }

    /// Starts server and agent and waits until both are ready.
    ///
    /// # Errors When one cannot be started or does not become ready; the end of its log is part of
    /// the error.
    pub async fn start(self, topology: &Topology) -> anyhow::Result<Started> {
        if self == Self::Direct {
            return Ok(direct::start());
        }
        let server = self.start_server(topology, 0, 1, Ports::DEFAULT, None).await?;
        let start = Instant::now();
        let agent = match self {
            Self::Culvert(_) => culvert::start_agent(topology),
            Self::Konnectivity(_) | Self::Direct => konnectivity::start_agent(topology),
        }?;
        agent.until_ok("/readyz").await?;
        let ready = start.elapsed();
        server.until_ok("/readyz").await?;
        Ok(Started {
            socket: Some(topology.socket(0)),
            server: Some(server),
            agent: Some(agent),
            ready: Some(ready),
        })
    }

    /// Starts one of several servers and waits until it answers. A server of Culvert has the
    /// addresses of the set.
    pub(crate) async fn start_server(
        self,
        topology: &Topology,
        number: usize,
        count: u32,
        ports: Ports,
        set: Option<&str>,
    ) -> anyhow::Result<Process> {
        let protocol = self.frontend().ok_or_else(|| anyhow::anyhow!("direct has no servers"))?;
        let mut args = ServerFlags {
            certificates: &topology.certificates,
            socket: &topology.socket(number),
            frontend: protocol,
            address: topology.server_address,
            ports,
            id: &server_id(number),
            count,
        }
        .args();
        let server = match self {
            Self::Culvert(_) => {
                args.extend(set.map(|set| format!("--server-addresses={set}")));
                culvert::start_server(topology, args, ports)
            }
            Self::Konnectivity(_) | Self::Direct => {
                konnectivity::start_server(topology, args, ports)
            }
        }?;
        server.until_ok("/healthz").await?;
        Ok(server)
    }

    /// Starts this many agents, many in each process. They look for their servers by themselves.
    pub(crate) fn start_fleet(
        self,
        topology: &Topology,
        agents: u32,
    ) -> anyhow::Result<Vec<Process>> {
        match self {
            Self::Culvert(_) => culvert::start_fleet(topology, agents),
            Self::Konnectivity(_) => Ok(vec![konnectivity::start_fleet(topology, agents)?]),
            Self::Direct => anyhow::bail!("direct has no agents"),
        }
    }
}

/// The name of one of several servers.
pub(crate) fn server_id(number: usize) -> String {
    format!("server-{number}")
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Culvert(Protocol::Grpc) => "culvert-grpc",
            Self::Culvert(Protocol::Connect) => "culvert-connect",
            Self::Konnectivity(Protocol::Grpc) => "konnectivity-grpc",
            Self::Konnectivity(Protocol::Connect) => "konnectivity-connect",
            Self::Direct => "direct",
        })
    }
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|peer| peer.to_string() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(ToString::to_string).collect();
            format!("{name:?} is none of {}", names.join(", "))
        })
    }
}

/// The hosts, addresses and programs of a run.
#[derive(Debug)]
pub struct Topology {
    /// Host of the servers.
    pub server: Arc<Host>,
    /// Host of the agent and the target; the same as `server` without a link between them.
    pub node: Arc<Host>,
    /// Address at which the agent finds the server.
    pub server_address: IpAddr,
    /// Runtime whose tasks run on the server's host.
    pub server_runtime: Handle,
    /// Runtime whose tasks run on the node's host.
    pub node_runtime: Handle,
    /// Certificates of a CA that every part trusts. Their folder takes sockets and logs too.
    pub certificates: Arc<Certificates>,
    /// Programs.
    pub programs: Programs,
    /// The scenario's flags for Culvert's server.
    pub server_flags: Vec<String>,
    /// The scenario's flags for Culvert's agent.
    pub agent_flags: Vec<String>,
}

impl Topology {
    /// Path of a server's frontend.
    fn socket(&self, server: usize) -> PathBuf {
        self.certificates.folder().join(format!("frontend-{server}.sock"))
    }

    /// Flags of the agent, for Culvert's and Konnectivity's alike.
    fn agent_args(&self) -> Vec<String> {
        AgentFlags {
            certificates: &self.certificates,
            shows_certificate: true,
            id: None,
            server: SocketAddr::new(self.server_address, Ports::DEFAULT.tunnel),
            admin_port: AGENT_ADMIN_PORT,
            health_port: AGENT_HEALTH_PORT,
        }
        .args()
    }

    /// Starts a program on the server's host.
    fn on_server(
        &self,
        program: PathBuf,
        args: Vec<String>,
        ports: Ports,
    ) -> anyhow::Result<Process> {
        let (host, runtime) = (self.server.clone(), self.server_runtime.clone());
        let namespace = Namespace { host, runtime, loadtest: self.programs.loadtest.clone() };
        let log = self.certificates.folder().join(format!("server-{}.log", ports.tunnel));
        let namespace = Some(namespace);
        Process::start(Launch { program, args, log, health_port: ports.health, namespace })
    }

    /// Starts a program on the node.
    fn on_node(&self, program: PathBuf, args: Vec<String>) -> anyhow::Result<Process> {
        let (host, runtime) = (self.node.clone(), self.node_runtime.clone());
        let namespace = Namespace { host, runtime, loadtest: self.programs.loadtest.clone() };
        let log = self.certificates.folder().join("agent.log");
        let namespace = Some(namespace);
        Process::start(Launch { program, args, log, health_port: AGENT_HEALTH_PORT, namespace })
    }
}

/// The programs of a run.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `culvert-loadtest`, which is also Culvert's server and agent and starts every process.
    pub loadtest: PathBuf,
    /// Culvert's server; that in `loadtest` when `None`.
    pub server: Option<PathBuf>,
    /// Culvert's agent; that in `loadtest` when `None`.
    pub agent: Option<PathBuf>,
    /// More flags for Culvert's server and agent.
    pub culvert_flags: Vec<String>,
    /// Konnectivity's programs, where Go is installed.
    pub konnectivity: Option<konnectivity::Programs>,
}

/// A peer that is ready.
#[derive(Debug)]
pub struct Started {
    /// Path of the frontend; sessions connect to their target themselves when `None`.
    pub socket: Option<PathBuf>,
    /// The server.
    pub server: Option<Process>,
    /// The agent.
    pub agent: Option<Process>,
    /// Time from the agent's start until it was ready.
    pub ready: Option<Duration>,
}
