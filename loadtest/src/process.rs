//! Servers and agents as processes of their own, for what cannot be done inside one: killing,
//! freezing and weighing them.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    path::Path,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStderr, Command},
    time::timeout,
};

/// How long a process may take to say what it is waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// A process of Culvert that writes its log as JSON lines. It is killed when this is dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
}

impl Process {
    /// Starts `program` (a path of `culvert-loadtest`) as this side, with these flags.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(program: &Path, side: &str, flags: &[String]) -> io::Result<Self> {
        let mut child = Command::new(program)
            .arg(side)
            .args(flags)
            .args(["--log-format=json", "-v=5"])
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let stderr = child.stderr.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Self { child, log: BufReader::new(stderr).lines() })
    }

    /// Waits for a log line with this message.
    ///
    /// # Errors
    /// When it does not come in time, or the process ends first; what it logged is told.
    pub async fn until_logged(&mut self, message: &str) -> anyhow::Result<serde_json::Value> {
        let mut seen = String::new();
        let found = timeout(PATIENCE, async {
            while let Some(line) = self.log.next_line().await? {
                if let Ok(event) = serde_json::from_str::<serde_json::Value>(&line)
                    && event["message"] == message
                {
                    return Ok(event);
                }
                seen.push_str(&line);
                seen.push('\n');
            }
            Err(io::Error::from(io::ErrorKind::UnexpectedEof))
        });
        let found = found.await.map_err(anyhow::Error::from).and_then(|found| Ok(found?));
        found.with_context(|| format!("waited for {message:?}, saw:\n{seen}"))
    }

    /// The process's id.
    pub fn id(&self) -> Option<u32> {
        self.child.id()
    }

    /// Sends a signal by its name, such as `TERM`.
    ///
    /// # Errors
    /// When the process is gone.
    pub async fn signal(&self, name: &str) -> io::Result<()> {
        let id = self.id().ok_or(io::ErrorKind::NotFound)?;
        let sent = Command::new("kill").args([format!("-{name}"), id.to_string()]).status().await?;
        if sent.success() { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
    }

    /// Waits for the process to end; how it ended.
    ///
    /// # Errors
    /// When it does not end in time.
    pub async fn ended(&mut self) -> io::Result<ExitStatus> {
        timeout(PATIENCE, self.child.wait()).await?
    }
}

/// A port that TCP and UDP both have free on loopback, inside the range that flags accept.
///
/// # Errors
/// When none is found.
pub fn free_port() -> io::Result<u16> {
    for _ in 0..1000 {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, fastrand::u16(20_000..32_000)));
        if TcpListener::bind(address).is_ok() && UdpSocket::bind(address).is_ok() {
            return Ok(address.port());
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}
