//! The sessions, each with a connection and a task of its own.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    frontend::connect,
    rig::Running,
    targets::{self, Target},
};

/// Typing.
pub(super) const EXEC: &str = "exec";
/// Following a container's log.
pub(super) const LOGS: &str = "logs -f";
/// Requests over a forwarded port.
pub(super) const PORT_FORWARD: &str = "port-forward";
/// Downloading a large file meanwhile.
pub(super) const DOWNLOAD: &str = "cp (download)";

/// Bytes of a keystroke with its terminal's overhead.
const KEYSTROKE: usize = 64;
/// Interval between keystrokes: of a fast typist, or of a program that redraws.
const KEYSTROKE_INTERVAL: Duration = Duration::from_millis(50);
/// Interval between lines of a busy log.
const LINE_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes of a page.
const PAGE: usize = 16 * 1024;
/// Pause between requests.
const PAGE_INTERVAL: Duration = Duration::from_millis(20);

/// The running sessions.
pub(super) struct Sessions {
    running: Vec<(Arc<Meter>, AbortOnDropHandle<anyhow::Result<()>>)>,
    stop: Arc<AtomicBool>,
    _targets: Vec<Target>,
}

/// Results of a session so far.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) name: &'static str,
    pub(super) elapsed: Duration,
    pub(super) up: u64,
    pub(super) down: u64,
    /// Answers, or lines of a log.
    pub(super) count: u64,
    pub(super) p50: Duration,
    pub(super) p99: Duration,
    pub(super) max: Duration,
}

impl Report {
    /// The rate of both directions together.
    pub(super) fn megabits_per_second(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a demo's bytes are far below 2^52")]
        let bits = (self.up + self.down) as f64 * 8.0;
        bits / 1e6 / self.elapsed.as_secs_f64().max(1e-3)
    }
}

/// Counters of one session.
struct Meter {
    name: &'static str,
    started: Instant,
    up: AtomicU64,
    down: AtomicU64,
    count: AtomicU64,
    latency: Mutex<Histogram<u64>>,
}

impl Meter {
    fn new(name: &'static str) -> anyhow::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            name,
            started: Instant::now(),
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            count: AtomicU64::new(0),
            // From a microsecond to a minute, to three digits.
            latency: Mutex::new(Histogram::new_with_bounds(1, 60_000_000, 3)?),
        }))
    }

    fn sent(&self, bytes: usize) {
        self.up.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn received(&self, bytes: usize) {
        self.down.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn answered(&self, asked: Instant) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.latency.lock().saturating_record(micros);
    }

    fn report(&self) -> Report {
        let latency = self.latency.lock();
        let at = |quantile| Duration::from_micros(latency.value_at_quantile(quantile));
        Report {
            name: self.name,
            elapsed: self.started.elapsed(),
            up: self.up.load(Ordering::Relaxed),
            down: self.down.load(Ordering::Relaxed),
            count: self.count.load(Ordering::Relaxed),
            p50: at(0.5),
            p99: at(0.99),
            max: Duration::from_micros(latency.max()),
        }
    }
}

impl Sessions {
    /// Starts the targets and a session with each.
    ///
    /// # Errors
    /// When a target cannot be reached through the tunnel.
    pub(super) async fn start(rig: &Running) -> anyhow::Result<Self> {
        let (echo, log) = (targets::echo().await?, targets::log(LINE_INTERVAL).await?);
        let (page, file) = (targets::http(PAGE).await?, targets::source(u64::MAX).await?);
        let uds = rig.uds();
        let mut sessions = Self { running: Vec::new(), stop: Arc::default(), _targets: Vec::new() };
        sessions.spawn(EXEC, &uds, &echo, exec).await?;
        sessions.spawn(LOGS, &uds, &log, follow).await?;
        sessions.spawn(PORT_FORWARD, &uds, &page, browse).await?;
        sessions.spawn(DOWNLOAD, &uds, &file, download).await?;
        sessions._targets = vec![echo, log, page, file];
        Ok(sessions)
    }

    async fn spawn<F>(
        &mut self,
        name: &'static str,
        uds: &Path,
        target: &Target,
        session: impl FnOnce(UnixStream, Arc<Meter>, Stop) -> F,
    ) -> anyhow::Result<()>
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let uds: PathBuf = uds.into();
        let socket = connect::dial(&uds, target.address()).await.context(name)?;
        let meter = Meter::new(name)?;
        let task =
            culvert_transport::task::owned(session(socket, meter.clone(), Stop(self.stop.clone())));
        self.running.push((meter, task));
        Ok(())
    }

    /// Results of each session so far.
    pub(super) fn reports(&self) -> Vec<Report> {
        self.running.iter().map(|(meter, _)| meter.report()).collect()
    }

    /// Fails when a session has ended too early.
    ///
    /// # Errors
    /// Names the session; [`stop`](Self::stop) returns its error.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        match self.running.iter().find(|(_, task)| task.is_finished()) {
            Some((meter, _)) => bail!("the session {:?} ended too early", meter.name),
            None => Ok(()),
        }
    }

    /// Ends every session; the results of each.
    ///
    /// # Errors
    /// When one of them failed.
    pub(super) async fn stop(self) -> anyhow::Result<Vec<Report>> {
        let reports = self.reports();
        self.stop.store(true, Ordering::Relaxed);
        for (meter, task) in self.running {
            task.await?.context(meter.name)?;
        }
        Ok(reports)
    }
}

/// Signal to sessions to end.
struct Stop(Arc<AtomicBool>);

impl Stop {
    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Types at a steady rate: a late echo delays no other key.
async fn exec(socket: UnixStream, meter: Arc<Meter>, stop: Stop) -> anyhow::Result<()> {
    let (mut reader, mut writer) = socket.into_split();
    let (typed, mut expected) = mpsc::unbounded_channel::<(u8, Instant)>();
    let typing = async {
        let mut keys = interval(KEYSTROKE_INTERVAL);
        for key in (0..=u8::MAX).cycle() {
            let due = keys.tick().await;
            if stop.is_set() {
                break;
            }
            // Latency counts from when the key was due.
            typed.send((key, due.into_std()))?;
            writer.write_all(&[key; KEYSTROKE]).await?;
            meter.sent(KEYSTROKE);
        }
        writer.shutdown().await?;
        drop(typed);
        anyhow::Ok(())
    };
    let reading = async {
        let mut echoed = [0; KEYSTROKE];
        while let Some((key, due)) = expected.recv().await {
            reader.read_exact(&mut echoed).await?;
            if echoed != [key; KEYSTROKE] {
                bail!("a keystroke came back as another");
            }
            meter.received(KEYSTROKE);
            meter.answered(due);
        }
        Ok(())
    };
    // The typing half owns the channel: the reading ends with it.
    tokio::try_join!(typing, reading)?;
    Ok(())
}

/// Reads a log.
async fn follow(mut socket: UnixStream, meter: Arc<Meter>, stop: Stop) -> anyhow::Result<()> {
    let mut lines = vec![0; 4096];
    while !stop.is_set() {
        match socket.read(&mut lines).await? {
            0 => bail!("the log ended"),
            count => {
                meter.received(count);
                let ends = lines[..count].iter().filter(|byte| **byte == b'\n').count();
                meter.count.fetch_add(ends as u64, Ordering::Relaxed);
            }
        }
    }
    Ok(())
}

/// Requests a page again and again.
async fn browse(mut socket: UnixStream, meter: Arc<Meter>, stop: Stop) -> anyhow::Result<()> {
    let request = b"GET / HTTP/1.1\r\nHost: target\r\n\r\n";
    let mut ticks = interval(PAGE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut answer = Vec::with_capacity(PAGE + 1024);
    while !stop.is_set() {
        ticks.tick().await;
        let asked = Instant::now();
        socket.write_all(request).await?;
        meter.sent(request.len());
        answer.clear();
        read_page(&mut socket, &mut answer).await?;
        meter.received(answer.len());
        meter.answered(asked);
    }
    Ok(())
}

async fn read_page(socket: &mut UnixStream, answer: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let head = answer.windows(4).position(|end| end == b"\r\n\r\n");
        if head.is_some_and(|head| answer.len() >= head + 4 + PAGE) {
            return Ok(());
        }
        if socket.read_buf(answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// Reads as fast as the tunnel delivers.
async fn download(mut socket: UnixStream, meter: Arc<Meter>, stop: Stop) -> anyhow::Result<()> {
    let mut chunk = vec![0; 256 * 1024];
    while !stop.is_set() {
        match socket.read(&mut chunk).await? {
            0 => bail!("the download ended"),
            count => meter.received(count),
        }
    }
    Ok(())
}
