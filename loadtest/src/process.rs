//! Servers and agents as processes: started, signalled, measured, and killed when dropped.

mod usage;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::PathBuf,
    process::{ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    sys::signal::{self, kill},
    unistd::Pid,
};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::{
    process::{Child, Command},
    runtime::Handle,
    time::{Instant, sleep, timeout},
};

use crate::{http, link::Host};

/// Time for a process to become ready, to log a message or to end. An agent of Konnectivity takes
/// seconds between two attempts to connect.
const PATIENCE: Duration = Duration::from_secs(60);
/// Interval between two looks at a process: at its health port, log or state.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// Time for a process to answer a request to its health port.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Last lines of a log that are shown with a failure.
const SHOWN_LINES: usize = 20;

/// An event of a process in a scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signal {
    /// SIGKILL.
    Kill,
    /// SIGTERM.
    Terminate,
    /// SIGSTOP: the process keeps its connections and does nothing.
    Freeze,
    /// SIGCONT.
    Thaw,
    /// SIGHUP: the process reads its files again.
    Reload,
    /// Kills the process, if it still runs, and starts it again with the same arguments.
    Start,
}

/// How a process is started.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Program.
    pub program: PathBuf,
    /// Arguments.
    pub args: Vec<String>,
    /// File that standard output and standard error are appended to.
    pub log: PathBuf,
    /// Port of /healthz, /readyz and /metrics on the loopback device; 0 when there is none.
    pub health_port: u16,
    /// Network namespace to run in; that of the caller when `None`.
    pub namespace: Option<Namespace>,
}

/// A network namespace for processes.
#[derive(Clone, Debug)]
pub struct Namespace {
    /// The namespace.
    pub host: Arc<Host>,
    /// A runtime whose threads are in it.
    pub runtime: Handle,
    /// `culvert-loadtest`, whose command `exec` enters a namespace.
    pub loadtest: PathBuf,
}

/// A running process. It is killed when dropped. In a test that fails, the end of its log is
/// printed then.
#[derive(Debug)]
pub struct Process {
    launch: Launch,
    child: Child,
    /// Bytes of the log that [`Self::until_logged`] has passed.
    read: usize,
    /// Processor time of the processes that this one replaced, in seconds.
    cpu_seconds_before: f64,
}

impl Process {
    /// Starts a process.
    ///
    /// # Errors
    /// When the program or the log cannot be opened.
    pub fn start(launch: Launch) -> anyhow::Result<Self> {
        let child = launch.spawn()?;
        Ok(Self { launch, child, read: 0, cpu_seconds_before: 0.0 })
    }

    /// Kills the process, if it still runs, and starts it again with the same arguments.
    ///
    /// # Errors
    /// When it cannot be started.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.cpu_seconds_before += self.cpu_seconds_since_start().unwrap_or(0.0);
        // Fails when the process has ended already.
        let _ = self.child.kill().await;
        self.child = self.launch.spawn()?;
        Ok(())
    }

    /// Process id, until the end of the process was awaited.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn id(&self) -> io::Result<Pid> {
        let id = self.child.id().ok_or(io::ErrorKind::NotFound)?;
        Ok(Pid::from_raw(id.cast_signed()))
    }

    /// Does this to the process.
    ///
    /// # Errors
    /// When the process has ended, or cannot be started.
    pub async fn signal(&mut self, what: Signal) -> anyhow::Result<()> {
        let signal = match what {
            Signal::Kill => signal::SIGKILL,
            Signal::Terminate => signal::SIGTERM,
            Signal::Freeze => signal::SIGSTOP,
            Signal::Thaw => signal::SIGCONT,
            Signal::Reload => signal::SIGHUP,
            Signal::Start => return self.restart().await,
        };
        Ok(kill(self.id()?, signal)?)
    }

    /// Sends SIGKILL and waits for the end.
    ///
    /// # Errors
    /// When the process has ended already.
    pub async fn kill(&mut self) -> io::Result<()> {
        self.child.kill().await
    }

    /// Sends SIGSTOP and waits until the process has stopped.
    ///
    /// # Errors
    /// When the process has ended, or does not stop.
    pub async fn freeze(&mut self) -> anyhow::Result<()> {
        self.signal(Signal::Freeze).await?;
        let looks = Looks::start();
        while !self.status()?.contains("State:\tT") {
            looks.next().await?;
        }
        Ok(())
    }

    /// Waits for the end of the process; how it ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn ended(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(timeout(PATIENCE, self.child.wait()).await.context("the process does not end")??)
    }

    /// How the process ended; `None` while it runs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn has_ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits until the process answers 200 on this path of its health port.
    ///
    /// # Errors
    /// When it does not in time; the end of its log is part of the error.
    pub async fn until_ok(&self, path: &'static str) -> anyhow::Result<()> {
        let looks = Looks::start();
        while !self.get(path).await.is_ok_and(|answer| answer.status == 200) {
            let next = looks.next().await;
            next.with_context(|| {
                format!("{path} was not answered with 200; the log ends:\n{}", self.log_end())
            })?;
        }
        Ok(())
    }

    /// Gets this path of the health port.
    ///
    /// # Errors
    /// When the process does not answer in time.
    pub async fn get(&self, path: &'static str) -> io::Result<http::Response> {
        let address = (Ipv4Addr::LOCALHOST, self.launch.health_port);
        let get = async move { timeout(ANSWER_TIMEOUT, http::get(address, path)).await? };
        match &self.launch.namespace {
            Some(namespace) => namespace.runtime.spawn(get).await?,
            None => get.await,
        }
    }

    /// Value of one series of /metrics; 0 when it is absent.
    ///
    /// # Errors
    /// When the process does not answer in time.
    pub async fn metric(&self, series: &str) -> io::Result<f64> {
        Ok(http::metric(&self.get("/metrics").await?.body, series).unwrap_or(0.0))
    }

    /// Waits for the next line of a log in JSON with this message, after those of the calls before.
    ///
    /// # Errors
    /// When there is none in time, or the process ends first; the lines read are part of the error.
    pub async fn until_logged(&mut self, message: &str) -> anyhow::Result<serde_json::Value> {
        let (looks, mut seen) = (Looks::start(), String::new());
        loop {
            let has_ended = self.child.try_wait()?.is_some();
            let log = self.log();
            while let Some(length) = log[self.read..].find('\n') {
                let line = &log[self.read..self.read + length];
                self.read += length + 1;
                seen.push_str(line);
                seen.push('\n');
                if let Ok(event) = serde_json::from_str::<serde_json::Value>(line)
                    && event["message"] == message
                {
                    return Ok(event);
                }
            }
            let seen = || format!("waited for {message:?}, read:\n{seen}");
            anyhow::ensure!(!has_ended, "the process has ended; {}", seen());
            looks.next().await.with_context(seen)?;
        }
    }

    /// Everything that was logged.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.launch.log).unwrap_or_default()).into_owned()
    }

    /// The last lines of the log.
    pub fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- {}\n{}", self.launch.log.display(), self.log_end());
        }
    }
}

impl Launch {
    fn spawn(&self) -> anyhow::Result<Child> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("cannot write {}", self.log.display()))?;
        let mut command = match &self.namespace {
            Some(namespace) => {
                let mut command = Command::new(&namespace.loadtest);
                command.arg("exec").arg(namespace.host.path()).arg(&self.program);
                command
            }
            None => Command::new(&self.program),
        };
        command
            .args(&self.args)
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true);
        // A child is reaped by the runtime that it was spawned in.
        let _entered = self.namespace.as_ref().map(|namespace| namespace.runtime.enter());
        command.spawn().with_context(|| format!("cannot start {}", self.program.display()))
    }
}

/// Looks at a process at intervals, for as long as the patience lasts.
struct Looks {
    end: Instant,
}

impl Looks {
    fn start() -> Self {
        Self { end: Instant::now() + PATIENCE }
    }

    /// Waits until it is time to look again.
    async fn next(&self) -> anyhow::Result<()> {
        anyhow::ensure!(Instant::now() < self.end, "not within {PATIENCE:?}");
        sleep(LOOK_INTERVAL).await;
        Ok(())
    }
}

/// Ports that [`free_port`] returned: their processes may not listen yet.
static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A port that is free on loopback for TCP and UDP, in the range that flags accept. This process
/// gets each one once.
///
/// # Errors
/// When none is found.
pub fn free_port() -> io::Result<u16> {
    for _ in 0..1000 {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, fastrand::u16(20_000..32_000)));
        let is_free = TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok();
        if is_free && GIVEN.lock().insert(address.port()) {
            return Ok(address.port());
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}
