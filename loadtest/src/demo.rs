//! One command that shows the tunnel at work.
//!
//! ```text
//! sessions ─ samples ─▶ reports ─▶ table     every quarter of a second, and once at the end
//! ```

mod poke;
pub mod race;
mod screen;
mod session;
mod table;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use culvert_process::{go_duration::GoDuration, signals::StopSignals};
use tokio::time::interval;

use crate::{
    peer::Peer,
    rig::{Rig, Running},
};
use screen::Screen;
use session::{Report, Sessions};

/// Interval at which the table is drawn again on a terminal.
const FRAME: Duration = Duration::from_millis(250);

/// Options of the demo.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Number of agents, 1 to 20
    #[arg(long, default_value_t = 2, value_name = "COUNT",
          value_parser = clap::value_parser!(u8).range(1..=20))]
    pub agents: u8,

    /// Duration of the sessions, in seconds, 1 to 3600
    #[arg(long, default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,

    /// Keep server, agents and targets running after the sessions, until Ctrl-C, and print commands
    /// that use them
    #[arg(long)]
    pub hold: bool,

    /// Packets that are lost each way, in percent, 0 to 50: shows Culvert, Konnectivity and plain TCP
    /// side by side instead, each on an emulated link of its own. Keys block UDP, lose more, take the
    /// links down and kill the agents. Requires root or a user namespace, and for Konnectivity Go
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub loss: Option<f64>,

    /// Delay of the emulated links each way, such as 25ms; as --loss
    #[arg(long, value_name = "DURATION")]
    pub delay: Option<GoDuration>,

    /// Rate of the emulated links each way, in Mbit/s
    #[arg(long, value_name = "MBIT", default_value_t = 20.0)]
    pub rate: f64,

    /// Peer to show with --loss or --delay; may be given several times. Without it, all that run
    #[arg(long = "peer", value_name = "PEER")]
    pub peers: Vec<Peer>,
}

impl Options {
    /// Whether peers are shown side by side on emulated links.
    pub fn is_race(&self) -> bool {
        self.loss.is_some() || self.delay.is_some()
    }
}

fn percent(text: &str) -> Result<f64, String> {
    let percent = text.parse().ok().filter(|percent| (0.0..=50.0).contains(percent));
    percent.ok_or_else(|| "write a number from 0 to 50".into())
}

/// Runs the demo.
///
/// # Errors
/// When a part cannot start, a session fails or an answer is wrong.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let mut signals = StopSignals::catch()?;
    println!("Starting a server and {} agents on loopback …", options.agents);
    let rig = Rig::new().agents(options.agents.into()).start().await?;
    let sessions = Sessions::start(&rig).await.context("a session could not start")?;
    let interrupted = tokio::select! {
        shown = show(&rig, &sessions, Duration::from_secs(options.seconds)) => {
            shown?;
            false
        }
        _ = signals.next() => true,
    };
    let reports = sessions.stop().await?;
    println!("\n{}", summary(&reports));
    if options.hold && !interrupted {
        let poke = poke::Poke::start(&rig).await?;
        println!("\n{poke}\nHeld until Ctrl-C.");
        signals.next().await;
    }
    println!("Going down.");
    stop(rig).await
}

/// Draws the table until the time is over: repeatedly on a terminal, else once at the end.
async fn show(rig: &Running, sessions: &Sessions, time: Duration) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut frames = interval(FRAME);
    let mut screen = Screen::new();
    loop {
        frames.tick().await;
        sessions.check()?;
        let is_over = started.elapsed() >= time;
        screen.show(is_over, || table::draw(&sessions.reports(), &rig.server.backends.all()))?;
        if is_over {
            return Ok(());
        }
    }
}

/// The result in two sentences.
fn summary(reports: &[Report]) -> String {
    let find = |name: &str| reports.iter().find(|report| report.name == name);
    let (Some(keys), Some(bulk)) = (find(session::EXEC), find(session::DOWNLOAD)) else {
        return String::new();
    };
    format!(
        "{} keystrokes were echoed, half of them in {:.2} ms and 99 of 100 in {:.2} ms, while a \
         download took {:.0} Mbit/s beside them.\nEach session was a QUIC stream of its own on its \
         agent's one connection: a slow reader or a lost packet holds back one of them, not all.",
        keys.count,
        keys.p50.as_secs_f64() * 1e3,
        keys.p99.as_secs_f64() * 1e3,
        bulk.megabits_per_second()
    )
}

async fn stop(mut rig: Running) -> anyhow::Result<()> {
    while !rig.agents().is_empty() {
        rig.drain_agent(0).await?;
    }
    rig.stop_server().await
}
