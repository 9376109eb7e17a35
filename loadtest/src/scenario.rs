//! A scenario: a link, what goes through it, what happens meanwhile and what is to be reached.
//! They are TOML files in `loadtest/scenarios`.

use std::{fmt, path::Path};

use anyhow::Context as _;
use include_dir::{Dir, include_dir};
use serde::{Deserialize, Serialize};

use crate::{
    link::{LinkSettings, settings::Direction},
    load::{Kind, Workload},
    peer::{Peer, Signal},
};

static SCENARIOS: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/scenarios");

/// One scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its file's name.
    #[serde(skip)]
    pub name: String,
    /// What it shows, in one sentence.
    pub title: String,
    /// Who takes part; everybody unless it says so.
    #[serde(default = "everybody", deserialize_with = "peers")]
    pub peers: Vec<Peer>,
    /// Congestion control of the kernel's TCP, for those whose tunnel is TCP.
    #[serde(default = "cubic")]
    pub congestion: Vec<Congestion>,
    /// How long the load runs before it is measured, in seconds.
    #[serde(default = "few")]
    pub warmup_seconds: f64,
    /// How long it is measured, in seconds.
    pub seconds: f64,
    /// How often everybody runs, each time with another seed.
    #[serde(default = "three")]
    pub seeds: u64,
    /// Flags of Culvert's server that the scenario is about.
    #[serde(default)]
    pub server_flags: Vec<String>,
    /// What lies between control plane and node; nothing but loopback without one.
    #[serde(default)]
    pub link: Option<LinkSettings>,
    /// Many agents or several servers that find each other, instead of workloads.
    pub fleet: Option<Fleet>,
    /// What goes through the front door.
    #[serde(default, rename = "workload")]
    pub workloads: Vec<Workload>,
    /// What happens meanwhile.
    #[serde(default, rename = "event")]
    pub events: Vec<Event>,
    /// What is to be reached.
    #[serde(default, rename = "goal")]
    pub goals: Vec<Goal>,
}

fn everybody() -> Vec<Peer> {
    Peer::ALL.to_vec()
}

fn cubic() -> Vec<Congestion> {
    vec![Congestion::Cubic]
}

fn few() -> f64 {
    2.0
}

fn three() -> u64 {
    3
}

fn peers<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<Peer>, D::Error> {
    let names = Vec::<String>::deserialize(from)?;
    names.iter().map(|name| name.parse().map_err(serde::de::Error::custom)).collect()
}

/// Agents that find servers behind one address.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fleet {
    /// How many agents, in one process.
    pub agents: u32,
    /// How many servers, behind one address if it is more than one.
    pub servers: u32,
}

/// Congestion control of the kernel's TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// What most nodes run.
    Cubic,
    /// What some do.
    Bbr,
}

impl fmt::Display for Congestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cubic => "cubic",
            Self::Bbr => "bbr",
        })
    }
}

/// Something that happens to link or processes.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Event {
    /// When: seconds after the measured part's start; before it if negative.
    pub at: f64,
    /// What happens to the link.
    pub link: Option<LinkEvent>,
    /// The largest packet that the path carries from now on, in bytes.
    pub mtu: Option<u16>,
    /// Whether larger ones vanish without an ICMP message.
    #[serde(default)]
    pub silent: bool,
    /// What each direction is like from now on.
    pub set: Option<Direction>,
    /// What happens to the server's process.
    pub server: Option<Signal>,
    /// What happens to the agent's process.
    pub agent: Option<Signal>,
}

/// Something that happens to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkEvent {
    /// It loses everything.
    Down,
    /// It carries packets again.
    Up,
    /// It loses UDP without a word.
    DropUdp,
    /// It answers UDP with ICMP.
    RejectUdp,
    /// It carries UDP again.
    PassUdp,
    /// The node's NAT forgets its mappings.
    RebindNat,
    /// The node gets another address.
    ChangeAddress,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if let Some(link) = self.link {
            parts.push(match link {
                LinkEvent::Down => "link down".to_owned(),
                LinkEvent::Up => "link up".into(),
                LinkEvent::DropUdp => "UDP dropped".into(),
                LinkEvent::RejectUdp => "UDP rejected".into(),
                LinkEvent::PassUdp => "UDP passes".into(),
                LinkEvent::RebindNat => "NAT rebinds".into(),
                LinkEvent::ChangeAddress => "node's address changes".into(),
            });
        }
        if let Some(mtu) = self.mtu {
            parts.push(format!("MTU {mtu}{}", if self.silent { ", silently" } else { "" }));
        }
        if let Some(set) = self.set {
            parts.push(format!("link: {set}"));
        }
        for (side, signal) in [("server", self.server), ("agent", self.agent)] {
            if let Some(signal) = signal {
                parts.push(format!("{side}: {}", format!("{signal:?}").to_lowercase()));
            }
        }
        f.write_str(&parts.join(", "))
    }
}

/// Something to be reached.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// Who is to reach it; Culvert through every front door unless it says so.
    #[serde(default = "ours", deserialize_with = "peers")]
    pub peers: Vec<Peer>,
    /// What is measured: `WORKLOAD.p50`, `.p90`, `.p99`, `.max` (ms), `.mbit`, `.per_second`,
    /// `.errors`, `.overdue`; or `cpu_per_gib` (s), `server_memory_per_session`,
    /// `agent_memory_per_session` (KiB); or of a fleet `joined_seconds`, `rejoined_seconds`,
    /// `memory_per_agent` (KiB), `idle_cpu_percent`, `cpu_per_return` (ms).
    pub measure: String,
    /// It must not be more.
    pub at_most: Option<f64>,
    /// It must not be less.
    pub at_least: Option<f64>,
    /// It must not be more than this many times what Konnectivity has through the same door.
    pub at_most_times: Option<f64>,
    /// It must not be less than this many times what Konnectivity has through the same door.
    pub at_least_times: Option<f64>,
}

fn ours() -> Vec<Peer> {
    Peer::ALL.into_iter().filter(|peer| peer.is_culvert()).collect()
}

impl Scenario {
    /// The names of all that are built in, sorted.
    pub fn names() -> Vec<&'static str> {
        let names = SCENARIOS.files().filter_map(|file| file.path().file_stem()?.to_str());
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        names
    }

    /// The scenario of this name, or in this file if it ends in `.toml`.
    ///
    /// # Errors
    /// When there is none, or it is faulty; every fault is told.
    pub fn load(name: &str) -> anyhow::Result<Self> {
        let (stem, text) = match name.strip_suffix(".toml") {
            Some(stem) => {
                let text =
                    std::fs::read_to_string(name).with_context(|| format!("cannot read {name}"))?;
                let stem = Path::new(stem).file_name().unwrap_or_default();
                (stem.to_string_lossy().into_owned(), text)
            }
            None => {
                let file = SCENARIOS.get_file(format!("{name}.toml")).with_context(|| {
                    format!("no scenario {name:?}; there are {}", Self::names().join(", "))
                })?;
                (name.to_owned(), file.contents_utf8().unwrap_or_default().to_owned())
            }
        };
        let scenario: Self =
            toml::from_str(&text).with_context(|| format!("scenario {name} is faulty"))?;
        let scenario = Self { name: stem, ..scenario };
        let faults = scenario.faults();
        anyhow::ensure!(faults.is_empty(), "scenario {name} is faulty:\n{}", faults.join("\n"));
        Ok(scenario)
    }

    /// Sessions that stay from start to end.
    pub fn staying_sessions(&self) -> u32 {
        let staying = self.workloads.iter().filter(|workload| workload.kind.stays());
        staying.map(|workload| workload.sessions).sum()
    }

    fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self.link.iter().flat_map(LinkSettings::faults).collect();
        if self.fleet.is_some() != self.workloads.is_empty() {
            faults.push("there must be either workloads or a fleet".into());
        }
        if self.fleet.is_some_and(|fleet| !(1..=500).contains(&fleet.servers) || fleet.agents == 0)
        {
            faults.push("a fleet needs agents, and 1 to 500 servers".into());
        }
        if self.seconds <= 0.0 || self.warmup_seconds < 0.0 || self.seeds == 0 {
            faults.push("seconds and seeds must be positive".into());
        }
        let uploads = self.workloads.iter().filter(|workload| workload.kind == Kind::Upload);
        if uploads.count() > 1 {
            faults.push("the target cannot tell the uploads of two workloads apart".into());
        }
        for workload in &self.workloads {
            let open_loop = matches!(workload.kind, Kind::Echo | Kind::Request | Kind::Tail);
            if open_loop && workload.interval_ms <= 0.0 {
                faults.push(format!("workload {} needs an interval_ms", workload.name));
            }
        }
        if self.link.is_none()
            && self.events.iter().any(|e| e.link.is_some() || e.set.is_some() || e.mtu.is_some())
        {
            faults.push("an event happens to a link, and there is none".into());
        }
        for goal in &self.goals {
            let limits = [goal.at_most, goal.at_least, goal.at_most_times, goal.at_least_times];
            if limits.iter().flatten().count() != 1 {
                faults.push(format!("goal {} needs exactly one limit", goal.measure));
            }
            if let Some((name, _)) = goal.measure.split_once('.')
                && !self.workloads.iter().any(|workload| workload.name == name)
            {
                faults.push(format!("goal {} names no workload", goal.measure));
            }
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::goals::MEASURES;

    #[test]
    fn every_scenario_can_be_run() {
        assert!(!Scenario::names().is_empty());
        for name in Scenario::names() {
            let scenario = Scenario::load(name).unwrap();
            for goal in &scenario.goals {
                let measure = goal.measure.split_once('.').map_or(&*goal.measure, |(_, of)| of);
                assert!(MEASURES.iter().any(|(known, _)| *known == measure), "{name}: {measure}");
            }
        }
    }
}
