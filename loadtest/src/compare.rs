//! The same load through every peer, one after another, and a report.

mod collect;
mod fleet;
pub mod goals;
mod machine;
mod measurement;
mod network;
mod progress;
mod run;
mod watch;

use std::{path::PathBuf, time::SystemTime};

use anyhow::Context as _;
use parking_lot::Mutex;
use tempfile::TempDir;

use self::progress::{Schedule, planned};
use crate::{
    frontend::Protocol,
    go,
    konnectivity_client::KonnectivityClient,
    peer::{Peer, Programs, konnectivity},
    report::{Report, Run},
    scenario::{Congestion, Scenario},
};

/// Options of a comparison.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Peer to compare; may be given several times. Without it, every peer of the scenario
    #[arg(long = "peer", value_name = "PEER")]
    pub peers: Vec<Peer>,
    /// Number of runs of each peer, each with a seed of its own [default: the scenario's]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    pub seeds: Option<u64>,
    /// Duration of the measurement, in seconds [default: the scenario's]
    #[arg(long, value_name = "SECONDS", value_parser = positive)]
    pub seconds: Option<f64>,
    /// Program to run as Culvert's server [default: this program]
    #[arg(long, value_name = "PATH")]
    pub server_program: Option<PathBuf>,
    /// Program to run as Culvert's agent [default: this program]
    #[arg(long, value_name = "PATH")]
    pub agent_program: Option<PathBuf>,
    /// Flag to pass to Culvert's server and agent, such as --culvert-flag=--congestion=cubic; may
    /// be given several times
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub culvert_flag: Vec<String>,
}

fn positive(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds: &f64| *seconds > 0.0 && seconds.is_finite());
    seconds.ok_or_else(|| "write a number above 0".into())
}

/// Programs that are built once for many scenarios.
#[derive(Debug)]
pub struct Comparison {
    options: Options,
    programs: Programs,
    konnectivity_client: Option<KonnectivityClient>,
    schedule: Mutex<Schedule>,
    _folder: TempDir,
}

impl Comparison {
    /// Builds the Konnectivity programs that these scenarios need.
    ///
    /// # Errors
    /// When Go is not found, or cannot build them.
    pub fn prepare(
        options: Options,
        loadtest: PathBuf,
        scenarios: &[Scenario],
    ) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new().prefix("culvert-programs-").tempdir()?;
        let wanted = |peer: &&Peer| options.peers.is_empty() || options.peers.contains(peer);
        let peers = || scenarios.iter().flat_map(|scenario| &scenario.peers).filter(wanted);
        let runtime = tokio::runtime::Runtime::new()?;
        let (mut konnectivity_client, mut konnectivity) = (None, None);
        let needs_go = |peer: &Peer| {
            matches!(peer, Peer::Konnectivity(_)) || peer.frontend() == Some(Protocol::Grpc)
        };
        anyhow::ensure!(go::find().is_some() || !peers().any(needs_go), go::missing());
        if peers().any(|peer| matches!(peer, Peer::Konnectivity(_))) {
            eprintln!("building Konnectivity; the first time takes some minutes");
            konnectivity = runtime.block_on(konnectivity::Programs::build(folder.path()))?;
        }
        if peers().any(|peer| peer.frontend() == Some(Protocol::Grpc)) {
            konnectivity_client = runtime.block_on(KonnectivityClient::build(folder.path()))?;
        }
        let programs = Programs {
            loadtest,
            server: options.server_program.clone(),
            agent: options.agent_program.clone(),
            culvert_flags: options.culvert_flag.clone(),
            konnectivity,
        };
        let mut comparison = Self {
            options,
            programs,
            konnectivity_client,
            schedule: Mutex::default(),
            _folder: folder,
        };
        let adjusted = scenarios.iter().map(|scenario| comparison.adjusted(scenario));
        let runs = adjusted.flat_map(|scenario| {
            let of_seed = comparison.field(&scenario).len() as u64;
            let count = of_seed * scenario.seeds;
            (0..count).map(move |_| planned(&scenario))
        });
        comparison.schedule = Mutex::new(Schedule::new(runs.collect()));
        Ok(comparison)
    }

    /// The scenario with the options of the command line.
    fn adjusted(&self, scenario: &Scenario) -> Scenario {
        let mut scenario = scenario.clone();
        scenario.seconds = self.options.seconds.unwrap_or(scenario.seconds);
        scenario.seeds = self.options.seeds.unwrap_or(scenario.seeds);
        scenario
    }

    /// Runs a scenario: every seed through every peer in turn, so that changes of the machine
    /// affect all of them.
    ///
    /// # Errors
    /// When it cannot be set up. The failure of a peer is part of its run.
    pub fn run(&self, scenario: &Scenario, command: &str) -> anyhow::Result<Report> {
        let scenario = self.adjusted(scenario);
        let started = SystemTime::UNIX_EPOCH.elapsed().context("the clock is before 1970")?;
        let mut runs = Vec::new();
        for seed in 1..=scenario.seeds {
            for (peer, congestion) in self.field(&scenario) {
                runs.push(self.run_one(&scenario, peer, congestion, seed)?);
            }
        }
        let link = scenario.link.map_or_else(|| "loopback".into(), |link| link.to_string());
        let goals = goals::judge(&scenario, &runs);
        Ok(Report {
            version: 1,
            scenario: scenario.name,
            title: scenario.title,
            link,
            command: command.into(),
            machine: machine::description(),
            commit: machine::commit(),
            started: started.as_secs(),
            versions: self.versions(),
            settings: scenario.link,
            runs,
            goals,
        })
    }

    /// Versions of the programs that are compared.
    fn versions(&self) -> Vec<String> {
        let konnectivity = self
            .programs
            .konnectivity
            .as_ref()
            .map(|_| format!("Konnectivity {}", konnectivity::version()));
        let culvert = format!("Culvert {}", env!("CARGO_PKG_VERSION"));
        std::iter::once(culvert).chain(konnectivity).collect()
    }

    /// The peers to run, each with its congestion controls.
    fn field(&self, scenario: &Scenario) -> Vec<(Peer, Congestion)> {
        let chosen = |peer: &Peer| {
            let options = &self.options.peers;
            let possible = match peer {
                Peer::Culvert(Protocol::Connect) | Peer::Direct => true,
                Peer::Culvert(Protocol::Grpc) => self.konnectivity_client.is_some(),
                Peer::Konnectivity(_) => self.programs.konnectivity.is_some(),
            };
            possible && (options.is_empty() || options.contains(peer))
        };
        let mut field = Vec::new();
        for peer in scenario.peers.iter().copied().filter(chosen) {
            let variants = if scenario.rides_on_tcp(peer) { scenario.congestion.len() } else { 1 };
            field.extend(scenario.congestion.iter().take(variants).map(|tcp| (peer, *tcp)));
        }
        field
    }

    fn run_one(
        &self,
        scenario: &Scenario,
        peer: Peer,
        congestion: Congestion,
        seed: u64,
    ) -> anyhow::Result<Run> {
        let konnectivity_client =
            self.konnectivity_client.as_ref().filter(|_| peer.frontend() == Some(Protocol::Grpc));
        let name = name(peer, congestion);
        let attempt = run::Attempt {
            scenario,
            peer,
            name: &name,
            congestion,
            seed,
            programs: &self.programs,
            konnectivity_client,
            place: self.schedule.lock().next(),
        };
        let run = attempt.run()?;
        self.schedule.lock().ended();
        Ok(run)
    }
}

/// Name of a run in reports.
fn name(peer: Peer, congestion: Congestion) -> String {
    match congestion {
        Congestion::Cubic => peer.to_string(),
        Congestion::Bbr => format!("{peer}-bbr"),
    }
}
