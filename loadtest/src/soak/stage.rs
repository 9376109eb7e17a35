//! The servers and agents of a soak, as processes on the two hosts of a link.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicI32, AtomicU32, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    runtime::Handle,
    sync::Mutex,
    time::{Instant, sleep, timeout},
};

use super::sample::{self, Sample};
use crate::{
    carrier::{Carrier, Serving},
    certificates::Certificates,
    flags::{AgentFlags, Ports, SYNC_OFTEN, ServerFlags},
    frontend::Protocol,
    http,
    link::{self, Link},
    process::{Launch, Namespace, Process},
};

/// Time for a process to answer a request to its health port.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for all agents to return to QUIC. They wait longer after each failure.
const QUIC_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for all processes to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval between two looks at the processes.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);
/// Flags of every server: it does not wait long for streams when it is stopped.
const SERVER_FLAGS: [&str; 1] = ["--graceful-shutdown-timeout=1s"];
/// Flags of every agent.
const AGENT_FLAGS: [&str; 2] = ["--drain-timeout=1s", "--quic-retry-interval=1s"];

/// Side of the link that a process is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    /// Control plane.
    Server,
    /// Node.
    Agent,
}

/// A process, started again as often as a disturbance ends it.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) side: Side,
    health_port: u16,
    runtime: Handle,
    process: Mutex<Process>,
    /// Id of the running process; 0 while it is started again.
    pid: AtomicI32,
    /// How often it was started again.
    restarts: AtomicU32,
}

impl Member {
    fn start(name: &'static str, side: Side, launch: Launch) -> anyhow::Result<Arc<Self>> {
        let health_port = launch.health_port;
        let runtime = launch.namespace.as_ref().map(|namespace| namespace.runtime.clone());
        let process = Process::start(launch)?;
        Ok(Arc::new(Self {
            name,
            side,
            health_port,
            runtime: runtime.context("a member of a soak is on a host")?,
            pid: process.id()?.as_raw().into(),
            process: process.into(),
            restarts: AtomicU32::new(0),
        }))
    }

    /// Ends it with this signal, waits for its end, and starts it again.
    pub(super) async fn restart(&self, signal: Signal) -> anyhow::Result<()> {
        let mut process = self.process.lock().await;
        self.pid.store(0, Ordering::Release);
        kill(process.id()?, signal)?;
        let status = process.ended().await.with_context(|| format!("{} was stopped", self.name))?;
        anyhow::ensure!(
            signal == Signal::SIGKILL || status.success(),
            "{} ended with {status} after {signal}",
            self.name
        );
        process.restart().await?;
        self.restarts.fetch_add(1, Ordering::AcqRel);
        self.pid.store(process.id()?.as_raw(), Ordering::Release);
        Ok(())
    }

    /// Stops it for good; an error when it does not end in time with code 0.
    pub(super) async fn stop(&self) -> anyhow::Result<()> {
        let mut process = self.process.lock().await;
        self.pid.store(0, Ordering::Release);
        kill(process.id()?, Signal::SIGTERM)?;
        let status = process.ended().await.with_context(|| format!("{} was stopped", self.name))?;
        anyhow::ensure!(status.success(), "{} ended with {status} after SIGTERM", self.name);
        Ok(())
    }

    /// Has it read its files again.
    pub(super) fn reload(&self) -> anyhow::Result<()> {
        let (pid, _) = self.running().context("the process is being started")?;
        Ok(kill(Pid::from_raw(pid), Signal::SIGHUP)?)
    }

    /// Its process id, and how often it was started again; `None` while it is started.
    pub(super) fn running(&self) -> Option<(i32, u32)> {
        let pid = self.pid.load(Ordering::Acquire);
        (pid != 0).then(|| (pid, self.restarts.load(Ordering::Acquire)))
    }

    /// Gets a page of its health port.
    pub(super) async fn get(&self, path: &'static str) -> anyhow::Result<http::Response> {
        let address = (Ipv4Addr::LOCALHOST, self.health_port);
        let get = self.runtime.spawn(timeout(ANSWER_TIMEOUT, http::get(address, path)));
        Ok(get.await?.with_context(|| format!("no answer within {ANSWER_TIMEOUT:?}"))??)
    }

    /// What it holds now.
    pub(super) async fn sample(&self, pid: i32) -> anyhow::Result<Sample> {
        let page = self.get("/metrics").await?;
        anyhow::ensure!(page.status == 200, "/metrics was answered with {}", page.status);
        Ok(sample::read(pid, &page.body)?)
    }

    async fn is_ready(&self) -> bool {
        self.get("/readyz").await.is_ok_and(|page| page.status == 200)
    }

    /// Whether it is a server, or an agent whose dials come over QUIC.
    async fn is_on_quic(&self) -> bool {
        let page = self.get("/readyz?verbose").await;
        let serving = page.ok().and_then(|page| Serving::from_readiness(&page.body));
        self.side == Side::Server || serving.is_some_and(|it| it.carrier == Carrier::Quic)
    }

    /// The last lines of its log.
    pub(super) async fn log_end(&self) -> String {
        self.process.lock().await.log_end()
    }
}

/// Number of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RouteId(pub(super) usize);

/// A route from a frontend to the target.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub(super) id: RouteId,
    pub(super) name: &'static str,
    pub(super) protocol: Protocol,
    pub(super) socket: PathBuf,
    /// Address of the target's host, which chooses the agent.
    pub(super) host: Ipv4Addr,
}

/// Every process and route.
pub(super) struct Stage {
    pub(super) members: Vec<Arc<Member>>,
    pub(super) routes: Vec<Route>,
    pub(super) certificates: Certificates,
    pub(super) link: Link,
}

/// Server of the two agents whose hosts differ; neither it nor the first of them is restarted.
const STEADY: usize = 0;
/// Server with the gRPC frontend, never restarted.
const GRPC: usize = 1;
/// Server that is restarted.
const RESTARTED: usize = 2;
/// Name, frontend and strategies of each server.
const SERVERS: [(&str, Protocol); 3] = [
    ("server-steady", Protocol::Connect),
    ("server-grpc", Protocol::Grpc),
    ("server-restarted", Protocol::Connect),
];
/// Hosts of the agents: loopback addresses of the node.
const HOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
const OTHER_HOST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
/// Name, server and host of each agent. The route to it has the same number.
const AGENTS: [(&str, usize, Ipv4Addr); 4] = [
    ("agent-steady", STEADY, HOST),
    ("agent-restarted", STEADY, OTHER_HOST),
    ("agent-grpc", GRPC, HOST),
    ("agent-of-restarted", RESTARTED, HOST),
];
/// The agent that is restarted.
pub(super) const RESTARTED_AGENT: &str = "agent-restarted";
/// The server that is restarted.
pub(super) const RESTARTED_SERVER: &str = "server-restarted";
/// The routes that these restarts disturb.
pub(super) const ROUTE_OF_RESTARTED_AGENT: RouteId = RouteId(1);
pub(super) const ROUTE_OF_RESTARTED_SERVER: RouteId = RouteId(3);

/// Runtimes and programs for a stage.
#[derive(Debug)]
pub(super) struct Surroundings {
    pub(super) server_runtime: Handle,
    pub(super) node_runtime: Handle,
    pub(super) loadtest: PathBuf,
    pub(super) server_program: Option<PathBuf>,
    pub(super) agent_program: Option<PathBuf>,
    /// Folder of the logs; that of the certificates, which is removed, when `None`.
    pub(super) logs: Option<PathBuf>,
}

impl Stage {
    /// Starts every process, and waits until all are ready.
    pub(super) async fn start(link: Link, surroundings: &Surroundings) -> anyhow::Result<Self> {
        let mut stage = Self {
            members: Vec::new(),
            routes: Vec::new(),
            certificates: Certificates::generate()?,
            link,
        };
        for number in 0..SERVERS.len() {
            stage.start_server(surroundings, number)?;
        }
        for number in 0..AGENTS.len() {
            stage.start_agent(surroundings, number)?;
        }
        stage.until_ready().await?;
        Ok(stage)
    }

    fn socket(&self, server: usize) -> PathBuf {
        self.certificates.folder().join(format!("{}.sock", SERVERS[server].0))
    }

    fn start_server(&mut self, surroundings: &Surroundings, number: usize) -> anyhow::Result<()> {
        let (name, frontend) = SERVERS[number];
        let mut args = ServerFlags {
            certificates: &self.certificates,
            socket: &self.socket(number),
            frontend,
            address: IpAddr::V4(link::SERVER),
            ports: ports(number),
            id: name,
            count: 1,
        }
        .args();
        args.extend(SERVER_FLAGS.map(str::to_owned));
        args.push("--proxy-strategies=destHost".into());
        let launch = self.launch(surroundings, Side::Server, name, args, ports(number).health);
        self.members.push(Member::start(name, Side::Server, launch)?);
        Ok(())
    }

    fn start_agent(&mut self, surroundings: &Surroundings, number: usize) -> anyhow::Result<()> {
        let (name, server, host) = AGENTS[number];
        let own = ports(SERVERS.len() + number);
        let mut args = AgentFlags {
            certificates: &self.certificates,
            shows_certificate: true,
            // The restarted agent has another id each time, as a random one is: the server must
            // not keep anything for ids that are gone.
            id: (name != RESTARTED_AGENT).then_some(name),
            server: SocketAddr::from((link::SERVER, ports(server).tunnel)),
            admin_port: own.admin,
            health_port: own.health,
        }
        .args();
        args.extend([&SYNC_OFTEN[..], &AGENT_FLAGS].concat().into_iter().map(str::to_owned));
        args.push(format!("--agent-identifiers=ipv4={host}"));
        let launch = self.launch(surroundings, Side::Agent, name, args, own.health);
        self.members.push(Member::start(name, Side::Agent, launch)?);
        self.routes.push(Route {
            id: RouteId(number),
            name,
            protocol: SERVERS[server].1,
            socket: self.socket(server),
            host,
        });
        Ok(())
    }

    fn launch(
        &self,
        surroundings: &Surroundings,
        side: Side,
        name: &str,
        args: Vec<String>,
        health_port: u16,
    ) -> Launch {
        let (host, runtime, program, command) = match side {
            Side::Server => {
                let program = &surroundings.server_program;
                (&self.link.server, &surroundings.server_runtime, program, "server")
            }
            Side::Agent => {
                let program = &surroundings.agent_program;
                (&self.link.node, &surroundings.node_runtime, program, "agent")
            }
        };
        let command = program.is_none().then(|| command.to_owned());
        let folder = surroundings.logs.as_deref().unwrap_or_else(|| self.certificates.folder());
        Launch {
            program: program.as_ref().unwrap_or(&surroundings.loadtest).clone(),
            args: command.into_iter().chain(args).collect(),
            log: folder.join(format!("{name}.log")),
            health_port,
            namespace: Some(Namespace {
                host: Arc::clone(host),
                runtime: runtime.clone(),
                loadtest: surroundings.loadtest.clone(),
            }),
        }
    }

    /// The member of this name.
    pub(super) fn member(&self, name: &str) -> anyhow::Result<&Arc<Member>> {
        let found = self.members.iter().find(|member| member.name == name);
        found.with_context(|| format!("no process is called {name}"))
    }

    /// Waits for a moment until every tunnel is over QUIC again, so that checkpoints are alike.
    pub(super) async fn until_quic(&self) {
        let looking = async {
            for member in &self.members {
                while !member.is_on_quic().await {
                    sleep(LOOK_INTERVAL).await;
                }
            }
        };
        let _ = timeout(QUIC_TIMEOUT, looking).await;
    }

    /// Waits until every process is ready.
    pub(super) async fn until_ready(&self) -> anyhow::Result<()> {
        let end = Instant::now() + READY_TIMEOUT;
        for member in &self.members {
            while !member.is_ready().await {
                if Instant::now() > end {
                    let (name, log) = (member.name, member.log_end().await);
                    anyhow::bail!("{name} is not ready within {READY_TIMEOUT:?}; log:\n{log}");
                }
                sleep(LOOK_INTERVAL).await;
            }
        }
        Ok(())
    }

    /// Addresses of every port of a server or agent that strangers can reach: the runtime of the
    /// host to reach them from, and the address.
    pub(super) fn ports(&self) -> Vec<(Handle, SocketAddr)> {
        let mut found = Vec::new();
        for (number, member) in self.members.iter().enumerate() {
            let own = ports(number);
            let local = |port| (member.runtime.clone(), (Ipv4Addr::LOCALHOST, port).into());
            found.extend([local(own.admin), local(own.health)]);
            if member.side == Side::Server {
                found.push((member.runtime.clone(), (link::SERVER, own.tunnel).into()));
            }
        }
        found
    }
}

/// Ports of a process, by its number.
fn ports(number: usize) -> Ports {
    let number = u16::try_from(number).unwrap_or_default();
    Ports { tunnel: 10_000 + number, admin: 11_000 + number, health: 12_000 + number }
}
