//! ServerTunnels and agents of either make as processes on loopback: whoever may meet in a rollout.

use std::{
    fs::File,
    io,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use culvert_konnectivity::ALPN_H2;
use culvert_loadtest::{
    certificates::Certificates,
    frontend::{Connection, connect::ConnectError},
    konnectivity_client::KonnectivityClient,
    peer::{Frontend, konnectivity::Programs},
    process::free_port,
    targets::{self, Target},
};
use culvert_transport::tls::{Identity, KeyExchange, authorities, certificates, tunnel_client};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    sync::OnceCell,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{echo, metric, until_stopped, within};

/// How long a process may take to do what it is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// Agents that a server can choose among.
const READY_BACKENDS: &str =
    "konnectivity_network_proxy_server_ready_backends{proxy_strategy=\"default\"}";
/// Connections of a server between a frontend and a target.
pub(crate) const ESTABLISHED: &str = "konnectivity_network_proxy_server_established_connections";
/// ServerTunnels that an agent has joined.
pub(crate) const OPEN_SERVERS: &str = "konnectivity_network_proxy_agent_open_server_connections";
/// ServerTunnels that an agent has heard of.
pub(crate) const KNOWN_SERVERS: &str = "konnectivity_network_proxy_agent_known_server_count";
/// Connections to targets that an agent has.
pub(crate) const OPEN_TARGETS: &str = "konnectivity_network_proxy_agent_open_endpoint_connections";

/// Both frontends.
pub(crate) const FRONTENDS: [Frontend; 2] = [Frontend::Grpc, Frontend::Connect];

/// Who made a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Make {
    /// This workspace.
    Culvert,
    /// Upstream.
    Konnectivity,
}

/// Who meets whom, and how frontends come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    pub(crate) agent: Make,
    pub(crate) server: Make,
    pub(crate) frontend: Frontend,
}

/// What Konnectivity does not do right, whoever is at the other end.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Feat {
    /// Hands on what a target says before it was asked.
    ServerFirst,
    /// Hands on everything that was written before a close.
    WrittenThenClosed,
}

impl Mix {
    /// Every mix.
    pub(crate) fn all() -> Vec<Self> {
        let mut all = Vec::new();
        for agent in [Make::Culvert, Make::Konnectivity] {
            for server in [Make::Culvert, Make::Konnectivity] {
                all.extend(FRONTENDS.map(|frontend| Self { agent, server, frontend }));
            }
        }
        all
    }

    /// A Konnectivity agent at our server.
    pub(crate) fn konnectivity_agent() -> [Self; 2] {
        FRONTENDS.map(|frontend| Self {
            agent: Make::Konnectivity,
            server: Make::Culvert,
            frontend,
        })
    }

    /// Why this cannot be asked of the mix: what its Konnectivity half does.
    pub(crate) fn excuse(self, feat: Feat) -> Option<&'static str> {
        match (feat, self.agent, self.server, self.frontend) {
            (Feat::ServerFirst, _, Make::Konnectivity, Frontend::Grpc) => Some(
                "the client library drops what comes right behind a dial's answer, and a Konnectivity \
                 server does not give it the moment it needs",
            ),
            (Feat::ServerFirst, _, Make::Konnectivity, Frontend::Connect) => {
                Some("a Konnectivity server writes its 200 and the target's bytes in no order")
            }
            (Feat::WrittenThenClosed, Make::Konnectivity, _, _) => Some(
                "a Konnectivity agent closes the target's socket before it has written what it holds",
            ),
            _ => None,
        }
    }
}

/// A server, and an agent that has joined it.
#[derive(Debug)]
pub(crate) struct Met {
    pub(crate) mix: Mix,
    pub(crate) site: Site,
    pub(crate) agent: Daemon,
}

/// Runs a test with each of these mixes; with none, and a word about it, where Konnectivity's programs
/// cannot be built.
pub(crate) async fn with_each(mixes: impl IntoIterator<Item = Mix>, test: impl AsyncFn(Met)) {
    for mix in mixes {
        println!("{mix:?}");
        within(async {
            let Some(site) = Site::start(mix.server, mix.frontend, &[]).await else { return };
            let agent = site.start_agent(mix.agent, "agent", &[]).await;
            site.until_joined(1).await;
            test(Met { mix, site, agent }).await;
        })
        .await;
    }
}

/// Upstream's programs.
#[derive(Debug)]
struct Konnectivity {
    programs: Programs,
    client: KonnectivityClient,
}

/// Upstream's programs, built once; `None`, and a word about it, where there is no Go.
async fn konnectivity() -> Option<&'static Konnectivity> {
    static KONNECTIVITY: OnceCell<Option<Konnectivity>> = OnceCell::const_new();
    let build = || async {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let programs = Programs::build(folder).await.unwrap()?;
        let client = KonnectivityClient::build(folder).await.unwrap()?;
        Some(Konnectivity { programs, client })
    };
    let konnectivity = KONNECTIVITY.get_or_init(build).await.as_ref();
    if konnectivity.is_none() {
        eprintln!(
            "SKIPPED: Go is not installed, so the Konnectivity server and agent cannot be built"
        );
    }
    konnectivity
}

/// One place for a server, which may be started again, and what its agents need to find it.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) server: Daemon,
    /// Its CA and certificates. The folder is free for sockets and logs.
    pub(crate) certificates: Certificates,
    frontend: Frontend,
    tunnel: u16,
    admin: u16,
    konnectivity: &'static Konnectivity,
}

impl Site {
    /// Starts a server; `None`, and a word about it, where Konnectivity's cannot be built.
    pub(crate) async fn start(make: Make, frontend: Frontend, flags: &[&str]) -> Option<Self> {
        let mut site = Self::idle(frontend).await?;
        site.start_server(make, flags).await;
        Some(site)
    }

    /// A place where no server runs yet; `None`, and a word about it, where Konnectivity's cannot be built.
    pub(crate) async fn idle(frontend: Frontend) -> Option<Self> {
        let konnectivity = konnectivity().await?;
        Some(Self {
            server: Daemon::default(),
            certificates: Certificates::generate().unwrap(),
            frontend,
            tunnel: free_port().unwrap(),
            admin: free_port().unwrap(),
            konnectivity,
        })
    }

    /// Starts a server where the last one was, and waits until it answers.
    pub(crate) async fn start_server(&mut self, make: Make, more: &[&str]) {
        let pair = self.certificates.server();
        let mode = match self.frontend {
            Frontend::Grpc => "grpc",
            Frontend::Connect => "http-connect",
        };
        let health = free_port().unwrap();
        let mut flags = vec![
            flag("uds-name", &self.socket()),
            format!("--mode={mode}"),
            "--server-port=0".into(),
            flag("cluster-cert", &pair.certificate),
            flag("cluster-key", &pair.key),
            flag("cluster-ca-cert", &self.certificates.ca()),
            "--agent-bind-address=127.0.0.1".into(),
            format!("--agent-port={}", self.tunnel),
            format!("--admin-port={}", self.admin),
            format!("--health-port={health}"),
            "--health-bind-address=127.0.0.1".into(),
            "--server-id=the-server".into(),
        ];
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        let log = self.certificates.folder().join("server.log");
        let program = (make, "server", &*self.konnectivity.programs.server);
        self.server = Daemon::start(program, &flags, log, health);
        self.server.until_answering().await;
    }

    /// Starts an agent and waits until it says that it has joined.
    pub(crate) async fn start_agent(&self, make: Make, name: &str, more: &[&str]) -> Daemon {
        let pair = self.certificates.agent();
        let mut flags = vec![flag("agent-cert", &pair.certificate), flag("agent-key", &pair.key)];
        flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        let agent = self.start_agent_unproven(make, name, flags);
        // Asking Konnectivity for its readiness fills its log.
        let joined =
            async || agent.scrape().await.is_ok_and(|scrape| metric(&scrape, OPEN_SERVERS) > 0.0);
        until(&format!("{name} has joined"), joined).await;
        agent
    }

    /// Starts an agent that shows no certificate.
    pub(crate) fn start_agent_unproven(&self, make: Make, name: &str, more: Vec<String>) -> Daemon {
        let health = free_port().unwrap();
        let mut flags = vec![
            format!("--agent-id={name}"),
            flag("ca-cert", &self.certificates.ca()),
            "--proxy-server-host=127.0.0.1".into(),
            format!("--proxy-server-port={}", self.tunnel),
            format!("--health-server-port={health}"),
            "--health-server-host=127.0.0.1".into(),
            format!("--admin-server-port={}", free_port().unwrap()),
            "--sync-interval=100ms".into(),
            "--sync-interval-cap=500ms".into(),
            "--probe-interval=100ms".into(),
        ];
        flags.extend(more);
        let log = self.certificates.folder().join(format!("{name}.log"));
        Daemon::start((make, "agent", &self.konnectivity.programs.agent), &flags, log, health)
    }

    /// The path of the frontend's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.certificates.folder().join("frontend.sock")
    }

    /// Waits until the server can choose among exactly so many agents.
    pub(crate) async fn until_joined(&self, agents: u32) {
        let joined = async || self.ready_backends().await == f64::from(agents);
        until(&format!("{agents} agents have joined"), joined).await;
    }

    /// Agents that the server can choose among.
    pub(crate) async fn ready_backends(&self) -> f64 {
        self.server.metric(READY_BACKENDS).await
    }

    /// Dials a target.
    pub(crate) async fn dial(&self, target: impl ToString) -> Result<Connection, ConnectError> {
        Connection::dial_unix(self.frontend, &self.socket(), target).await
    }

    /// Connects where agents come in, with the certificate of one, as Konnectivity agents do.
    pub(crate) async fn as_konnectivity_agent(&self) -> TlsStream<TcpStream> {
        let pair = self.certificates.agent();
        let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
        let roots = authorities(&certificates(&self.certificates.ca()).unwrap()).unwrap();
        let mut tls = tunnel_client(roots, Some(identity), KeyExchange::Hybrid).unwrap();
        tls.alpn_protocols = vec![ALPN_H2.to_vec()];
        let address = (Ipv4Addr::LOCALHOST, self.tunnel);
        let socket = TcpStream::connect(address).await.unwrap();
        let name = IpAddr::from(address.0).into();
        TlsConnector::from(Arc::new(tls)).connect(name, socket).await.unwrap()
    }

    /// Dials an echo, uses it once and lets it go.
    pub(crate) async fn touch(&self, echo: &Target) -> Result<(), ConnectError> {
        touch(self.frontend, &self.socket(), echo.address()).await
    }

    /// Waits until dials work, and goes on for a while.
    pub(crate) async fn until_dials_work(&self, echo: &Target) {
        until("a dial works", async || self.touch(echo).await.is_ok()).await;
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

    /// Both ends of a connection through the tunnel, and the target that it goes to.
    pub(crate) async fn both_ends(&self) -> (Connection, TcpStream, Target) {
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let frontend = self.dial(target.address()).await.unwrap();
        (frontend, accepted.recv().await.unwrap(), target)
    }

    /// Runs a command of the Konnectivity client: what it printed, and its exit code.
    pub(crate) async fn konnectivity_client(
        &self,
        command: &str,
        target: impl ToString,
        flags: &[&str],
    ) -> (serde_json::Value, Option<i32>) {
        let (client, target) = (&self.konnectivity.client, target.to_string());
        client.run(command, &self.socket(), &target, flags).await.unwrap()
    }
}

/// Dials an echo through this socket, uses it once and lets it go.
pub(crate) async fn touch(
    frontend: Frontend,
    socket: &Path,
    target: impl ToString,
) -> Result<(), ConnectError> {
    let mut connection = Connection::dial_unix(frontend, socket, target).await?;
    echo(&mut connection, b"touched").await?;
    Ok(connection.close().await?)
}

fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}

/// A process, killed when dropped. The end of its log is then printed, for a test that fails.
#[derive(Debug, Default)]
pub(crate) struct Daemon {
    child: Option<Child>,
    health: u16,
    log: PathBuf,
}

impl Daemon {
    fn start(
        (make, side, konnectivity): (Make, &str, &Path),
        flags: &[String],
        log: PathBuf,
        health: u16,
    ) -> Self {
        let mut command = match make {
            Make::Culvert => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"));
                command.arg(side);
                command
            }
            Make::Konnectivity => Command::new(konnectivity),
        };
        let file = File::options().create(true).append(true).open(&log).unwrap();
        command.args(flags).env_remove("RUST_LOG").stdin(Stdio::null()).kill_on_drop(true);
        command.stdout(file.try_clone().unwrap()).stderr(file);
        Self { child: Some(command.spawn().unwrap()), health, log }
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().expect("it was started")
    }

    fn id(&self) -> u32 {
        self.child.as_ref().and_then(Child::id).expect("it runs")
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.id().cast_signed()), signal).unwrap();
    }

    /// Stops it where it is, until SIGCONT; its connections stay open.
    pub(crate) async fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
        until_stopped(self.id()).await;
    }

    /// Ends it without a word.
    pub(crate) async fn kill(&mut self) {
        self.child().kill().await.unwrap();
    }

    /// Waits for its end; how it ended.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let ended = timeout(PATIENCE, self.child().wait()).await;
        ended.expect("the process does not end").unwrap()
    }

    /// The value of one line of its metrics; 0 when it is not there.
    pub(crate) async fn metric(&self, line: &str) -> f64 {
        metric(&self.scrape().await.unwrap(), line)
    }

    async fn scrape(&self) -> io::Result<String> {
        get(self.health, "/metrics").await
    }

    /// Everything it has logged.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    async fn until_answering(&self) {
        let answers = async || self.scrape().await.is_ok();
        until(&format!("{} is written by a process that answers", self.log.display()), answers)
            .await;
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        println!("--- {}", self.log.display());
        lines[lines.len().saturating_sub(20)..].iter().for_each(|line| println!("{line}"));
    }
}

/// Waits until something has become true that nobody announces.
pub(crate) async fn until(what: &str, mut is_true: impl AsyncFnMut() -> bool) {
    let looking = async {
        let mut looks = tokio::time::interval(Duration::from_millis(10));
        while !is_true().await {
            looks.tick().await;
        }
    };
    timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Everything that a GET is answered with.
async fn get(port: u16, path: &str) -> io::Result<String> {
    let mut socket = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?;
    socket.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    Ok(answer)
}
