//! What is compared: ways from a front door beside kube-apiserver to a target on the node.
//!
//! Every peer is one small file that starts it on the two hosts of a [`Stage`].

mod culvert;
mod daemon;
mod direct;
mod flags;
pub mod konnectivity;

use std::{fmt, net::IpAddr, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

pub use daemon::{Daemon, Signal};
pub(crate) use flags::AGENT_HEALTH_PORT;
use tokio::{runtime::Handle, time::Instant};

use crate::{certificates::Certificates, link::Host};

/// Who carries the bytes, and through which front door they come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Culvert's server and agent.
    Culvert(Frontend),
    /// Upstream's own server and agent.
    Konnectivity(Frontend),
    /// Nobody: one TCP connection for each session, which the control plane of a real cluster
    /// behind NAT cannot have.
    Direct,
}

/// A front door.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Frontend {
    /// gRPC on a Unix socket, knocked at by kube-apiserver's own client library.
    Grpc,
    /// HTTP CONNECT on a Unix socket.
    Connect,
}

impl Peer {
    /// Every peer, in the order in which reports show them.
    pub const ALL: [Self; 5] = [
        Self::Culvert(Frontend::Grpc),
        Self::Culvert(Frontend::Connect),
        Self::Konnectivity(Frontend::Grpc),
        Self::Konnectivity(Frontend::Connect),
        Self::Direct,
    ];

    /// Whether its tunnel is always a TCP connection, whose congestion control is the kernel's.
    pub fn rides_on_tcp(self) -> bool {
        !matches!(self, Self::Culvert(_))
    }

    /// Whether it is ours.
    pub fn is_culvert(self) -> bool {
        matches!(self, Self::Culvert(_))
    }

    /// Whom it has to beat: the incumbent through the same front door.
    pub fn incumbent(self) -> Option<Self> {
        match self {
            Self::Culvert(frontend) => Some(Self::Konnectivity(frontend)),
            _ => None,
        }
    }

    /// The front door it is reached through.
    pub fn frontend(self) -> Option<Frontend> {
        match self {
            Self::Culvert(frontend) | Self::Konnectivity(frontend) => Some(frontend),
            Self::Direct => None,
        }
    }

    /// Starts it on the stage and waits until it is ready.
    ///
    /// # Errors
    /// When it cannot be started or does not become ready; its log is told.
    pub async fn start(self, stage: &Stage) -> anyhow::Result<Started> {
        match self {
            Self::Culvert(frontend) => culvert::start(stage, frontend).await,
            Self::Konnectivity(frontend) => konnectivity::start(stage, frontend).await,
            Self::Direct => Ok(direct::start()),
        }
    }
}

impl Peer {
    /// Starts one of several servers and waits until it answers.
    pub(crate) async fn start_server(
        self,
        stage: &Stage,
        number: usize,
        count: u32,
        ports: Ports,
    ) -> anyhow::Result<Daemon> {
        let flags = |frontend| flags::server_of(stage, frontend, number, count, ports);
        match self {
            Self::Culvert(door) => culvert::start_server(stage, flags(door), ports).await,
            Self::Konnectivity(door) => konnectivity::start_server(stage, flags(door), ports).await,
            Self::Direct => anyhow::bail!("nobody has no servers"),
        }
    }

    /// Starts so many agents in one process, which look for servers by themselves.
    pub(crate) fn start_fleet(self, stage: &Stage, agents: u32) -> anyhow::Result<Daemon> {
        match self {
            Self::Culvert(_) => culvert::start_fleet(stage, agents),
            Self::Konnectivity(_) => konnectivity::start_fleet(stage, agents),
            Self::Direct => anyhow::bail!("nobody has no agents"),
        }
    }
}

/// The ports of a server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ports {
    /// Where agents come in.
    pub(crate) tunnel: u16,
    pub(crate) admin: u16,
    /// Where it says whether it is ready.
    pub(crate) health: u16,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Culvert(Frontend::Grpc) => "culvert-grpc",
            Self::Culvert(Frontend::Connect) => "culvert-connect",
            Self::Konnectivity(Frontend::Grpc) => "konnectivity-grpc",
            Self::Konnectivity(Frontend::Connect) => "konnectivity-connect",
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

/// Where a peer is started.
#[derive(Debug)]
pub struct Stage {
    /// Where the server is.
    pub server: Arc<Host>,
    /// Where the agent and the target are; the same host when nothing lies between.
    pub node: Arc<Host>,
    /// Where the agent finds the server.
    pub server_address: IpAddr,
    /// Tasks spawned on it are on the server's host.
    pub server_runtime: Handle,
    /// Tasks spawned on it are on the node's host.
    pub node_runtime: Handle,
    /// Whom everybody trusts. Its folder is free for sockets and logs.
    pub certificates: Arc<Certificates>,
    /// The programs.
    pub programs: Programs,
    /// Flags of Culvert's server that the scenario is about.
    pub server_flags: Vec<String>,
    /// Flags of Culvert's agent that the scenario is about.
    pub agent_flags: Vec<String>,
}

/// What is started.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `culvert-loadtest`, which is also Culvert's server and agent and starts every process.
    pub loadtest: PathBuf,
    /// Culvert's server, unless that in `loadtest` will do.
    pub server: Option<PathBuf>,
    /// Culvert's agent, unless that in `loadtest` will do.
    pub agent: Option<PathBuf>,
    /// More flags for Culvert's server and agent.
    pub culvert_flags: Vec<String>,
    /// Upstream's programs, where they could be built.
    pub konnectivity: Option<konnectivity::Programs>,
}

/// A peer that is ready.
#[derive(Debug)]
pub struct Started {
    /// Where sessions come in; without one they go to the target themselves.
    pub socket: Option<PathBuf>,
    /// Its server.
    pub server: Option<Daemon>,
    /// Its agent.
    pub agent: Option<Daemon>,
    /// How long the agent took from its start until it was ready, if there is one.
    pub ready: Option<Duration>,
}

impl Started {
    /// Waits until an agent that was just started has found its server, and the server it.
    async fn when_ready(stage: &Stage, server: Daemon, agent: Daemon) -> anyhow::Result<Self> {
        let start = Instant::now();
        agent.until_answering(AGENT_HEALTH_PORT, "/readyz").await?;
        let ready = start.elapsed();
        server.until_answering(flags::PORTS.health, "/readyz").await?;
        Ok(Self {
            socket: Some(flags::socket(stage)),
            server: Some(server),
            agent: Some(agent),
            ready: Some(ready),
        })
    }
}
