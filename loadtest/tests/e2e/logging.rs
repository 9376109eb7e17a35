//! Processes whose standard error is full, slow or gone: they serve, and lose log lines alone.

use std::{
    fs::File,
    io::{PipeReader, Read as _, pipe},
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    time::{Duration, Instant},
};

use culvert_loadtest::{
    certificates::Certificates,
    flags::{AgentFlags, Ports, SYNC_OFTEN, ServerFlags},
    frontend::Protocol,
    http,
    process::free_port,
    targets,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use socket2::SockRef;
use tokio::{
    process::{Child, Command},
    time::timeout,
};

use crate::support::{at_once, deployment::touch, eventually, within};

/// Time for a process to answer, however busy the machine is.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Counter of the lines that a process lost.
const DROPPED: &str = "culvert_log_lines_dropped_total";

/// A server and an agent at fixed ports.
struct Sides {
    certificates: Certificates,
    ports: Ports,
    agent_health: u16,
}

impl Sides {
    fn new() -> Self {
        let port = || free_port().unwrap();
        Self {
            certificates: Certificates::generate().unwrap(),
            ports: Ports { tunnel: port(), admin: port(), health: port() },
            agent_health: port(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.certificates.folder().join("frontend.sock")
    }

    /// Starts a server that logs there, and waits until it answers.
    async fn server(&self, stderr: impl Into<Stdio>) -> Child {
        let args = ServerFlags {
            certificates: &self.certificates,
            socket: &self.socket(),
            frontend: Protocol::Connect,
            address: Ipv4Addr::LOCALHOST.into(),
            ports: self.ports,
            id: "the-server",
            count: 1,
        };
        let child = start("server", args.args(), stderr);
        eventually("the server answers", async || answers(self.ports.health).await).await;
        child
    }

    /// Starts an agent that logs there.
    fn agent(&self, stderr: impl Into<Stdio>) -> Child {
        let args = AgentFlags {
            certificates: &self.certificates,
            shows_certificate: true,
            id: Some("the-agent"),
            server: SocketAddr::from((Ipv4Addr::LOCALHOST, self.ports.tunnel)),
            admin_port: free_port().unwrap(),
            health_port: self.agent_health,
        };
        start("agent", args.args().into_iter().chain(SYNC_OFTEN.map(str::to_owned)), stderr)
    }

    /// Waits until a dial works.
    async fn until_joined(&self) {
        let echo = targets::echo().await.unwrap();
        let dials = async || touch(Protocol::Connect, &self.socket(), echo.address()).await.is_ok();
        eventually("a dial works", dials).await;
    }

    /// Uses this many connections, some at the same time; all must work.
    async fn dial(&self, count: usize) {
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
}

fn start(side: &str, args: impl IntoIterator<Item = String>, stderr: impl Into<Stdio>) -> Child {
    Command::new(env!("CARGO_BIN_EXE_culvert-loadtest"))
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

async fn answers(health_port: u16) -> bool {
    let get = http::get((Ipv4Addr::LOCALHOST, health_port), "/healthz");
    timeout(ANSWER_TIMEOUT, get).await.is_ok_and(|got| got.is_ok_and(|got| got.status == 200))
}

async fn dropped(health_port: u16) -> f64 {
    let scrape = http::get((Ipv4Addr::LOCALHOST, health_port), "/metrics").await.unwrap().body;
    http::metric(&scrape, DROPPED).expect("the counter exists")
}

/// Ends a process with SIGTERM; it ends in order and soon.
async fn stop(child: &mut Child) {
    kill(Pid::from_raw(child.id().unwrap().cast_signed()), Signal::SIGTERM).unwrap();
    let ended = timeout(ANSWER_TIMEOUT, child.wait()).await.expect("it ends").unwrap();
    assert_eq!(ended.code(), Some(0));
}

/// The events in a pipe whose writer has ended; every line is whole.
async fn events(mut pipe: PipeReader) -> Vec<serde_json::Value> {
    let read = move || {
        let mut text = String::new();
        pipe.read_to_string(&mut text).unwrap();
        text
    };
    let text = tokio::task::spawn_blocking(read).await.unwrap();
    text.lines().map(|line| serde_json::from_str(line).expect(line)).collect()
}

fn count(events: &[serde_json::Value], message: &str) -> usize {
    events.iter().filter(|event| event["message"] == message).count()
}

#[tokio::test]
async fn processes_whose_log_is_not_read_serve_three_thousand_dials() {
    within(async {
        let sides = Sides::new();
        let ((server_log, server), (agent_log, agent)) = (pipe().unwrap(), pipe().unwrap());
        let mut server = sides.server(server).await;
        let mut agent = sides.agent(agent);
        sides.until_joined().await;
        sides.dial(3_000).await;
        assert!(answers(sides.ports.health).await && answers(sides.agent_health).await);
        // A stuck log delays the end for a bounded time.
        let begun = Instant::now();
        stop(&mut agent).await;
        stop(&mut server).await;
        assert!(begun.elapsed() < ANSWER_TIMEOUT);
        drop((server_log, agent_log));
    })
    .await;
}

#[tokio::test]
async fn an_agent_whose_logs_reader_has_ended_joins_again() {
    within(async {
        let sides = Sides::new();
        let ((server_log, server), (agent_log, agent)) = (pipe().unwrap(), pipe().unwrap());
        let mut server = sides.server(server).await;
        let mut agent = sides.agent(agent);
        sides.until_joined().await;
        drop((server_log, agent_log));
        server.kill().await.unwrap();
        let (server_log, server) = pipe().unwrap();
        let mut server = sides.server(server).await;
        drop(server_log);
        sides.until_joined().await;
        sides.dial(100).await;
        assert!(dropped(sides.agent_health).await > 0.0);
        assert!(answers(sides.ports.health).await && answers(sides.agent_health).await);
        stop(&mut agent).await;
        stop(&mut server).await;
    })
    .await;
}

#[tokio::test]
async fn a_full_disk_under_the_log_costs_its_lines_alone() {
    within(async {
        let sides = Sides::new();
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let mut server = sides.server(full()).await;
        let mut agent = sides.agent(full());
        sides.until_joined().await;
        sides.dial(100).await;
        assert!(dropped(sides.ports.health).await > 100.0);
        assert!(dropped(sides.agent_health).await > 100.0);
        stop(&mut agent).await;
        stop(&mut server).await;
    })
    .await;
}

#[tokio::test]
async fn a_pipe_in_non_blocking_mode_that_is_full_for_a_while_loses_nothing() {
    const DIALS: usize = 1_000; // four lines each, of 200 bytes or more: a pipe holds 64 KiB
    within(async {
        let sides = Sides::new();
        let (log, write) = pipe().unwrap();
        SockRef::from(&write).set_nonblocking(true).unwrap();
        let mut agent = sides.agent(write);
        let mut server = sides.server(Stdio::null()).await;
        sides.until_joined().await;
        sides.dial(DIALS).await;
        assert_eq!(dropped(sides.agent_health).await, 0.0);
        let reading = tokio::spawn(events(log));
        stop(&mut agent).await;
        stop(&mut server).await;
        let events = reading.await.unwrap();
        assert!(count(&events, "ended") >= DIALS, "{}", events.len());
        assert_eq!(count(&events, "culvert-agent ends"), 1);
    })
    .await;
}
