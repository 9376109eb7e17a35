//! A long run with mixed load and disturbances, in search of leaks.
//!
//! Servers and agents run as processes on the two hosts of an emulated link. Phases of load, each
//! with one disturbance, alternate with quiet checkpoints at which descriptors, threads, tasks,
//! memory, sockets and metric series are counted. What grows from checkpoint to checkpoint is a
//! leak.

mod disturb;
mod load;
pub mod report;
pub mod sample;
mod schedule;
mod stage;
mod target;
pub mod trend;
mod windows;

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    runtime::Runtime,
    select,
    signal::unix::{SignalKind, signal},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use self::{
    disturb::{LINK, disturb},
    load::{Load, Tally},
    report::{Happened, Report, Row},
    sample::{RESOURCES, Sample},
    stage::{Member, Stage, Surroundings},
    target::Target,
    trend::Trend,
    windows::Windows,
};
use crate::link::Link;

/// Threads of each host's runtime.
const WORKERS: usize = 2;
/// Interval between two samples under load.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);
/// Interval between two readings of a checkpoint.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);
/// Readings of a checkpoint at most, until two are the same.
const MAX_LOOKS: usize = 15;
/// Phases that a soak is divided into, as far as their length allows.
const PHASES: f64 = 40.0;
/// Shortest and longest time of load in a phase, in seconds.
const PHASE_SECONDS: (f64, f64) = (2.0, 20.0);

/// Options of a soak.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Duration, in minutes: 0.1 to 10080. A trend needs some 2 minutes; slow leaks show later
    #[arg(long, value_name = "MINUTES", default_value_t = 10.0, value_parser = minutes)]
    pub minutes: f64,
    /// Seed of the load and of the order of disturbances [default: random, and reported]
    #[arg(long, value_name = "SEED")]
    pub seed: Option<u64>,
    /// Let no dial fail while UDP is dropped or rejected: it has to move to a tunnel over TCP in time
    #[arg(long)]
    pub strict: bool,
    /// File to write the report to, as JSON
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Folder for the logs of the processes [default: a temporary one]
    #[arg(long, value_name = "PATH")]
    pub logs: Option<PathBuf>,
    /// Program to run as Culvert's server [default: this program]
    #[arg(long, value_name = "PATH")]
    pub server_program: Option<PathBuf>,
    /// Program to run as Culvert's agent [default: this program]
    #[arg(long, value_name = "PATH")]
    pub agent_program: Option<PathBuf>,
}

fn minutes(text: &str) -> Result<f64, String> {
    let minutes = text.parse::<f64>().map_err(|error| error.to_string())?;
    match (0.1..=10_080.0).contains(&minutes) {
        true => Ok(minutes),
        false => Err("must be 0.1 to 10080".into()),
    }
}

/// Runs a soak; `loadtest` is the path of `culvert-loadtest`. SIGINT and SIGTERM end it early, with a
/// report.
///
/// # Errors
/// When there is no right to make network namespaces, or a process does not start.
pub fn run(options: &Options, loadtest: PathBuf) -> anyhow::Result<Report> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
    eprintln!("soak: seed {seed}, {} minutes", options.minutes);
    let link = Link::start(&LINK, seed)?;
    let here = Runtime::new()?;
    let (server, node) = (link.server.runtime(WORKERS)?, link.node.runtime(WORKERS)?);
    let surroundings = Surroundings {
        server_runtime: server.handle().clone(),
        node_runtime: node.handle().clone(),
        loadtest,
        server_program: options.server_program.clone(),
        agent_program: options.agent_program.clone(),
        logs: options.logs.clone(),
    };
    let result = here.block_on(soak(link, &surroundings, seed, options));
    for runtime in [server, node] {
        runtime.shutdown_timeout(Duration::from_secs(5));
    }
    result
}

async fn soak(
    link: Link,
    surroundings: &Surroundings,
    seed: u64,
    options: &Options,
) -> anyhow::Result<Report> {
    let (mut interrupted, mut terminated) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let duration = Duration::from_secs_f64(options.minutes * 60.0);
    let stage = Stage::start(link, surroundings).await?;
    let target = Target::start(&surroundings.node_runtime).await?;
    let (windows, tally) = (Arc::new(Windows::default()), Arc::new(Tally::new()));
    let mut soak = Soak {
        load: Load::start(&stage.routes, target.port, seed, &windows, &tally),
        samples: Arc::default(),
        happened: Vec::new(),
        strict: options.strict,
        stage,
        windows,
        tally,
    };
    let mut sampling = JoinSet::new();
    for member in &soak.stage.members {
        let (member, samples) = (Arc::clone(member), Arc::clone(&soak.samples));
        sampling.spawn(watch(member, samples, Arc::clone(&soak.tally)));
    }
    let ended_early = select! {
        result = soak.phases(seed, duration) => {
            // What was measured until then is reported all the same.
            if let Err(error) = result {
                soak.tally.fail(&format!("{error:#}"));
            }
            false
        }
        _ = interrupted.recv() => true,
        _ = terminated.recv() => true,
    };
    drop(sampling);
    Ok(soak.end(seed, ended_early).await)
}

/// Samples of one process between its start and its end.
#[derive(Debug, Default)]
struct Lifetime {
    /// Largest amounts, under load too.
    max: Sample,
    checkpoints: Vec<Sample>,
}

/// Samples by the number of the process and the number of its restarts.
type Samples = Mutex<BTreeMap<(&'static str, u32), Lifetime>>;

struct Soak {
    load: Load,
    samples: Arc<Samples>,
    happened: Vec<Happened>,
    strict: bool,
    stage: Stage,
    windows: Arc<Windows>,
    tally: Arc<Tally>,
}

impl Soak {
    /// Phases of load with their checkpoints until the time is over.
    async fn phases(&mut self, seed: u64, duration: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + duration;
        let seconds = (duration.as_secs_f64() / PHASES).clamp(PHASE_SECONDS.0, PHASE_SECONDS.1);
        let third = Duration::from_secs_f64(seconds / 3.0);
        let mut disturbances = schedule::schedule(seed);
        while Instant::now() < end {
            let disturbance = disturbances.next().unwrap_or(schedule::Disturbance::None);
            self.tally.phase(disturbance.to_string());
            let second = self.tally.second();
            self.happened.push(Happened { second, what: disturbance.to_string() });
            sleep(third).await;
            disturb(&self.stage, &self.windows, disturbance, third, self.strict).await?;
            sleep(third).await;
            self.checkpoint().await?;
        }
        Ok(())
    }

    /// Pauses the load, waits until the processes are quiet, and takes a sample of each.
    async fn checkpoint(&self) -> anyhow::Result<()> {
        let _paused = self.load.pause().await;
        self.stage.until_ready().await?;
        self.stage.until_quic().await;
        for member in &self.stage.members {
            let Some((pid, restarts)) = member.running() else { continue };
            let sample = quiet_sample(member, pid).await?;
            let mut samples = self.samples.lock();
            samples.entry((member.name, restarts)).or_default().checkpoints.push(sample);
        }
        Ok(())
    }

    /// Stops every process; the report.
    async fn end(self, seed: u64, interrupted: bool) -> Report {
        drop(self.load);
        for member in self.stage.members.iter().rev() {
            if let Err(error) = member.stop().await
                && !interrupted
            {
                self.tally.fail(&format!("{error:#}"));
            }
        }
        let (phases, failures, failed) = self.tally.results();
        Report {
            seed,
            seconds: self.tally.second(),
            interrupted,
            disturbances: self.happened,
            phases,
            resources: rows(&self.samples.lock()),
            failures,
            failed,
        }
    }
}

/// The smallest amounts once two readings after one another hold the same.
async fn quiet_sample(member: &Member, pid: i32) -> anyhow::Result<Sample> {
    let mut before = member.sample(pid).await?;
    for _ in 0..MAX_LOOKS {
        sleep(LOOK_INTERVAL).await;
        let now = member.sample(pid).await?;
        // Memory and threads may change at any time.
        let settled = [0, 2, 4, 5, 6].iter().all(|&index| before[index] == now[index]);
        before = if settled { sample::smaller(before, now) } else { now };
        if settled {
            break;
        }
    }
    Ok(before)
}

/// Samples a process at intervals, also while there is load, and probes its health.
async fn watch(member: Arc<Member>, samples: Arc<Samples>, tally: Arc<Tally>) {
    let mut ticks = interval(SAMPLE_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some((pid, restarts)) = member.running() else { continue };
        let health = member.get("/healthz").await;
        let sampled = member.sample(pid).await;
        // What failed may have been ended meanwhile, or have begun a moment ago.
        let is_same = member.running() == Some((pid, restarts));
        let is_known = samples.lock().contains_key(&(member.name, restarts));
        match (health, sampled) {
            (Ok(health), Ok(sample)) if health.status == 200 => {
                let mut samples = samples.lock();
                let lifetime = samples.entry((member.name, restarts)).or_default();
                lifetime.max = sample::larger(lifetime.max, sample);
            }
            (health, sampled) if is_same && is_known => {
                let health = health.map(|page| page.status);
                tally.fail(&format!("{}: health {health:?}, sample {sampled:?}", member.name));
            }
            _ => {}
        }
    }
}

fn rows(samples: &BTreeMap<(&'static str, u32), Lifetime>) -> Vec<Row> {
    let mut rows = Vec::new();
    for (&(process, restarts), lifetime) in samples {
        for (index, resource) in RESOURCES.iter().enumerate() {
            let values: Vec<_> = lifetime.checkpoints.iter().map(|sample| sample[index]).collect();
            let Some(trend) = Trend::of(&values, resource.slack) else { continue };
            let max = lifetime.max[index].max(values.into_iter().max().unwrap_or_default());
            let (process, resource) = (process.to_owned(), resource.name.to_owned());
            rows.push(Row { process, restarts, resource, max, trend });
        }
    }
    rows
}
