//! A server or agent as a process on its host: weighed, signalled, and never left behind.

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use nix::{
    sys::signal::{self, kill},
    unistd::{Pid, SysconfVar, sysconf},
};
use serde::Deserialize;
use tokio::{
    process::{Child, Command},
    runtime::Handle,
    time::{Instant, sleep, timeout},
};

use super::Stage;
use crate::{link::Host, page::Page};

/// How long a process may take to become ready: an agent of upstream waits seconds to try again.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked.
const ASK_INTERVAL: Duration = Duration::from_millis(20);

/// What can be done to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signal {
    /// Ends it without a word.
    Kill,
    /// Asks it to end in order.
    Terminate,
    /// Stops it where it is.
    Freeze,
    /// Lets it go on.
    Thaw,
    /// Starts it again after its end.
    Start,
}

/// A running process. It is killed with this value, and with the process that started it.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
    runtime: Handle,
    host: Arc<Host>,
    loadtest: PathBuf,
    program: PathBuf,
    args: Vec<String>,
    /// Processor time of the lives before this one.
    spent: f64,
}

impl Daemon {
    pub(super) fn start(
        stage: &Stage,
        name: &str,
        host: &Arc<Host>,
        runtime: &Handle,
        program: PathBuf,
        args: Vec<String>,
    ) -> anyhow::Result<Self> {
        let log = stage.certificates.folder().join(format!("{name}.log"));
        let loadtest = stage.programs.loadtest.clone();
        File::create(&log)?;
        let child = spawn(&loadtest, host, runtime, &program, &args, &log)?;
        let (host, runtime) = (Arc::clone(host), runtime.clone());
        Ok(Self { child, log, runtime, host, loadtest, program, args, spent: 0.0 })
    }

    /// Waits until the process answers 200 on this port of its loopback device.
    pub(super) async fn until_answering(
        &self,
        port: u16,
        path: &'static str,
    ) -> anyhow::Result<()> {
        let asking = self.runtime.spawn(async move {
            let end = Instant::now() + PATIENCE;
            while Instant::now() < end {
                let asked = timeout(Duration::from_secs(1), Page::get(port, path)).await;
                if asked.is_ok_and(|answered| answered.is_ok_and(|page| page.is_ok())) {
                    return true;
                }
                sleep(ASK_INTERVAL).await;
            }
            false
        });
        anyhow::ensure!(
            asking.await?,
            "{} did not become ready within {PATIENCE:?}; the end of its log:\n{}",
            self.program.display(),
            self.log_end()
        );
        Ok(())
    }

    /// Does this to the process.
    ///
    /// # Errors
    /// When it is gone, or cannot be started.
    pub async fn signal(&mut self, what: Signal) -> anyhow::Result<()> {
        let signal = match what {
            Signal::Kill => signal::SIGKILL,
            Signal::Terminate => signal::SIGTERM,
            Signal::Freeze => signal::SIGSTOP,
            Signal::Thaw => signal::SIGCONT,
            Signal::Start => {
                self.spent += self.cpu_seconds_of_this_life().unwrap_or(0.0);
                let _ = self.child.kill().await;
                let (runtime, host) = (&self.runtime, &self.host);
                self.child =
                    spawn(&self.loadtest, host, runtime, &self.program, &self.args, &self.log)?;
                return Ok(());
            }
        };
        let id = self.child.id().context("the process has ended")?;
        Ok(kill(Pid::from_raw(i32::try_from(id)?), signal)?)
    }

    /// Processor time that it has used so far, in seconds.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu_seconds(&self) -> io::Result<f64> {
        Ok(self.spent + self.cpu_seconds_of_this_life()?)
    }

    /// The same without its lives before it was started again.
    ///
    /// # Errors
    /// When it has ended.
    pub fn cpu_seconds_of_this_life(&self) -> io::Result<f64> {
        let stat = self.proc_file("stat")?;
        // The name in parentheses may hold anything; the times are fields 14 and 15.
        let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
        let ticks: u64 =
            fields.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
        let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
        Ok(ticks as f64 / per_second as f64)
    }

    /// Memory that is resident now, in bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn memory(&self) -> io::Result<u64> {
        self.status("VmRSS:")
    }

    /// Most memory that was ever resident, in bytes.
    ///
    /// # Errors
    /// When it has ended.
    pub fn peak_memory(&self) -> io::Result<u64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> io::Result<u64> {
        let status = self.proc_file("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        let kibibytes = line.split_whitespace().next().unwrap_or_default().parse::<u64>();
        Ok(kibibytes.map_err(io::Error::other)? * 1024)
    }

    fn proc_file(&self, name: &str) -> io::Result<String> {
        let id = self.child.id().ok_or(io::ErrorKind::NotFound)?;
        fs::read_to_string(format!("/proc/{id}/{name}"))
    }

    /// The last lines of its log.
    pub fn log_end(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }
}

fn spawn(
    loadtest: &PathBuf,
    host: &Host,
    runtime: &Handle,
    program: &PathBuf,
    args: &[String],
    log: &PathBuf,
) -> anyhow::Result<Child> {
    let log = File::options().append(true).open(log)?;
    // Needed for the child's reaper, which lives in the runtime.
    let _runtime = runtime.enter();
    Command::new(loadtest)
        .arg("exec")
        .arg(host.path())
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .with_context(|| format!("cannot start {}", loadtest.display()))
}
