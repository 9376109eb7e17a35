//! A server and an agent as processes whose standard error, limits and ports the test chooses.

use std::{
    ffi::OsString,
    io::{PipeReader, Read as _},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    time::Duration,
};

use culvert_loadtest::{
    certificates::Certificates,
    flags::{AgentFlags, Ports, SYNC_OFTEN, ServerFlags},
    frontend::{Connection, Protocol, connect::ConnectError},
    http,
    process::free_port,
    targets,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use super::{at_once, deployment::touch, eventually};

/// Time for a process to answer, however busy the machine is.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A server and an agent at fixed ports.
pub(crate) struct Sides {
    pub(crate) certificates: Certificates,
    /// Ports of the server.
    pub(crate) ports: Ports,
    pub(crate) agent_admin: u16,
    pub(crate) agent_health: u16,
    /// Host name of the server for the agent, in place of its address.
    pub(crate) host: Option<&'static str>,
    /// More flags for the agent.
    pub(crate) agent_flags: Vec<String>,
    /// A command that sets limits and runs the rest of its arguments.
    pub(crate) wrapper: Vec<OsString>,
}

impl Sides {
    pub(crate) fn new() -> Self {
        let port = || free_port().unwrap();
        Self {
            certificates: Certificates::generate().unwrap(),
            ports: Ports { tunnel: port(), admin: port(), health: port() },
            agent_admin: port(),
            agent_health: port(),
            host: None,
            agent_flags: Vec::new(),
            wrapper: Vec::new(),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.certificates.folder().join("frontend.sock")
    }

    /// Starts a server that logs there, and waits until it answers.
    pub(crate) async fn server(&self, stderr: impl Into<Stdio>) -> Child {
        let child = self.start_server(stderr);
        eventually("the server answers", async || answers(self.ports.health).await).await;
        child
    }

    /// Starts a server that logs there.
    pub(crate) fn start_server(&self, stderr: impl Into<Stdio>) -> Child {
        let args = ServerFlags {
            certificates: &self.certificates,
            socket: &self.socket(),
            frontend: Protocol::Connect,
            address: Ipv4Addr::LOCALHOST.into(),
            ports: self.ports,
            id: "the-server",
            count: 1,
        };
        self.start("server", args.args(), stderr)
    }

    /// Starts an agent that logs there.
    pub(crate) fn agent(&self, stderr: impl Into<Stdio>) -> Child {
        let args = AgentFlags {
            certificates: &self.certificates,
            shows_certificate: true,
            id: Some("the-agent"),
            server: SocketAddr::from((Ipv4Addr::LOCALHOST, self.ports.tunnel)),
            admin_port: self.agent_admin,
            health_port: self.agent_health,
        };
        let host = self.host.map(|host| format!("--proxy-server-host={host}"));
        let more =
            SYNC_OFTEN.map(str::to_owned).into_iter().chain(host).chain(self.agent_flags.clone());
        self.start("agent", args.args().into_iter().chain(more), stderr)
    }

    /// Waits until a dial works.
    pub(crate) async fn until_joined(&self) {
        let echo = targets::echo().await.unwrap();
        let dials = async || touch(Protocol::Connect, &self.socket(), echo.address()).await.is_ok();
        eventually("a dial works", dials).await;
    }

    /// Uses this many connections, some at the same time; all must work.
    pub(crate) async fn dial(&self, count: usize) {
        const AT_ONCE: usize = 20;
        let echo = targets::echo().await.unwrap();
        let (socket, target) = (self.socket(), echo.address());
        at_once(AT_ONCE, || {
            let socket = socket.clone();
            async move {
                for _ in 0..count / AT_ONCE {
                    touch(Protocol::Connect, &socket, target).await.unwrap();
                }
            }
        })
        .await;
    }

    /// One connection to a target.
    pub(crate) async fn connect(&self, target: impl ToString) -> Result<Connection, ConnectError> {
        Connection::dial_unix(Protocol::Connect, &self.socket(), target).await
    }

    fn start(
        &self,
        side: &str,
        args: impl IntoIterator<Item = String>,
        stderr: impl Into<Stdio>,
    ) -> Child {
        let program = OsString::from(env!("CARGO_BIN_EXE_culvert-loadtest"));
        let mut line = self.wrapper.iter().chain([&program]);
        Command::new(line.next().expect("the program at least"))
            .args(line)
            .arg(side)
            .args(args)
            .args(["--log-format=json", "-v=8"])
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }
}

/// Whether a process answers on its health port.
pub(crate) async fn answers(health_port: u16) -> bool {
    let get = http::get((Ipv4Addr::LOCALHOST, health_port), "/healthz");
    timeout(ANSWER_TIMEOUT, get).await.is_ok_and(|got| got.is_ok_and(|got| got.status == 200))
}

/// Ends a process with SIGTERM; it ends in order and soon.
pub(crate) async fn stop(child: &mut Child) {
    kill(Pid::from_raw(child.id().unwrap().cast_signed()), Signal::SIGTERM).unwrap();
    let ended = timeout(ANSWER_TIMEOUT, child.wait()).await.expect("it ends").unwrap();
    assert_eq!(ended.code(), Some(0));
}

/// The events in a pipe whose writer has ended; every line is whole.
pub(crate) async fn events(mut pipe: PipeReader) -> Vec<serde_json::Value> {
    let read = move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    };
    let text = tokio::task::spawn_blocking(read).await.unwrap();
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}
