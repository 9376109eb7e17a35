//! Scenarios: a link, its load, events and goals. They are TOML files in `loadtest/scenarios`.
//!
//! The link loses packets by either model, or both together:
//! - `loss = 0.01` loses each packet with this chance (Bernoulli).
//! - `bursts = { mean_loss = 0.01, mean_length = 4 }` loses the same share in bursts of 4 packets on
//!   average (Gilbert–Elliott). With `bad_loss = 0.5` half of the packets of a burst arrive.

mod event;

use std::{fmt, path::Path};

use anyhow::Context as _;
use include_dir::{Dir, include_dir};
use serde::{Deserialize, Serialize};

use crate::{
    link::LinkSettings,
    load::{
        Kind, Workload,
        service::{EXCHANGE_HEADER, EXCHANGE_REQUEST_LIMIT},
    },
    peer::Peer,
};
pub use event::{Event, LinkEvent, When};

static SCENARIOS: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/scenarios");

/// What a scenario is about, in the order of the list of scenarios.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Topic {
    /// The begin and the end of a connection.
    Sessions,
    /// Connections beside each other on a link without loss.
    Clean,
    /// Links that lose packets.
    Loss,
    /// UDP that does not pass, or not every packet of it.
    Udp,
    /// Processes and networks that fail.
    Faults,
    /// Many agents, or many servers.
    Fleets,
    /// Processor time and memory, without a link.
    Cost,
    /// Anything else.
    #[default]
    Others,
}

/// The heading of the topic.
impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sessions => "Begin and end of a connection",
            Self::Clean => "Links without loss",
            Self::Loss => "Links that lose packets",
            Self::Udp => "UDP that does not pass",
            Self::Faults => "Processes and networks that fail",
            Self::Fleets => "Many agents, many servers",
            Self::Cost => "Processor time and memory, on loopback",
            Self::Others => "Others",
        })
    }
}

/// One scenario.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Name of its file.
    #[serde(skip)]
    pub name: String,
    /// Purpose, in one sentence.
    pub title: String,
    /// Group in the list of scenarios.
    #[serde(default)]
    pub topic: Topic,
    /// Peers; all by default.
    #[serde(default = "all_peers", deserialize_with = "peers")]
    pub peers: Vec<Peer>,
    /// Congestion control of the kernel's TCP, for those whose tunnel is TCP.
    #[serde(default = "cubic")]
    pub congestion: Vec<Congestion>,
    /// Time that the load runs before it is measured, in seconds.
    #[serde(default = "few")]
    pub warmup_seconds: f64,
    /// Time that it is measured, in seconds.
    pub seconds: f64,
    /// Number of runs of each peer, each with another seed.
    #[serde(default = "three")]
    pub seeds: u64,
    /// Flags of Culvert's server that the scenario is about.
    #[serde(default)]
    pub server_flags: Vec<String>,
    /// Flags of Culvert's agent that the scenario is about.
    #[serde(default)]
    pub agent_flags: Vec<String>,
    /// Link between control plane and node; loopback without one.
    #[serde(default)]
    pub link: Option<LinkSettings>,
    /// Many agents or several servers that find each other, instead of workloads.
    pub fleet: Option<Fleet>,
    /// Load.
    #[serde(default, rename = "workload")]
    pub workloads: Vec<Workload>,
    /// Events.
    #[serde(default, rename = "event")]
    pub events: Vec<Event>,
    /// Goals.
    #[serde(default, rename = "goal")]
    pub goals: Vec<Goal>,
}

fn all_peers() -> Vec<Peer> {
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
    /// Number of agents, in one process.
    pub agents: u32,
    /// Number of servers, behind one address when there are several.
    pub servers: u32,
    /// Whether servers of Culvert have one another's addresses. Konnectivity has no such thing.
    #[serde(default)]
    pub addresses: bool,
}

/// Congestion control of the kernel's TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Congestion {
    /// The default of Linux.
    Cubic,
    /// BBR, which some operators choose.
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

/// A goal.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Goal {
    /// Peers that have to reach it; Culvert through every frontend by default.
    #[serde(default = "ours", deserialize_with = "peers")]
    pub peers: Vec<Peer>,
    /// Measure: `WORKLOAD.p50`, `.p90`, `.p99`, `.max` (ms), `.mbit`, `.per_second`,
    /// `.errors`, `.overdue`; or `cpu_per_gib` (s), `server_memory_per_session`,
    /// `agent_memory_per_session` (KiB); or `ready_seconds`, from the agent's start until it is
    /// ready; of Culvert beside a link to which something happens `switch_seconds`, from an event
    /// that `switches_to` another carrier until a tunnel of that carrier serves (the slowest of
    /// them), and `switches`, how often the carrier changed; or of a fleet `joined_seconds`,
    /// `rejoined_seconds`, `memory_per_agent` (KiB), `idle_cpu_percent`, `cpu_per_return` (ms).
    pub measure: String,
    /// Maximum.
    pub at_most: Option<f64>,
    /// Minimum.
    pub at_least: Option<f64>,
    /// Maximum, as a multiple of Konnectivity's through the same frontend.
    pub at_most_times: Option<f64>,
    /// Minimum, as a multiple of Konnectivity's through the same frontend.
    pub at_least_times: Option<f64>,
}

fn ours() -> Vec<Peer> {
    Peer::ALL.into_iter().filter(|peer| peer.is_culvert()).collect()
}

impl Scenario {
    /// Names of the built-in scenarios, sorted.
    pub fn names() -> Vec<&'static str> {
        let names = SCENARIOS.files().filter_map(|file| file.path().file_stem()?.to_str());
        let mut names: Vec<_> = names.collect();
        names.sort_unstable();
        names
    }

    /// All scenarios by topic, and within it by name: headings, names and titles.
    ///
    /// # Errors
    /// When one has faults.
    pub fn list() -> anyhow::Result<String> {
        let scenarios = Self::names().into_iter().map(Self::load);
        let mut scenarios = scenarios.collect::<anyhow::Result<Vec<_>>>()?;
        scenarios.sort_by_key(|scenario| scenario.topic);
        let mut text = String::new();
        for topic in scenarios.chunk_by(|one, next| one.topic == next.topic) {
            let separator = if text.is_empty() { "" } else { "\n" };
            text += &format!("{separator}{}\n", topic[0].topic);
            for Self { name, title, .. } in topic {
                text += &format!("  {name:24} {title}\n");
            }
        }
        Ok(text)
    }

    /// The scenario of this name, or in this file if it ends in `.toml`.
    ///
    /// # Errors
    /// When there is none, or it has faults; the error names all of them.
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

    /// Whether the peer's tunnel is, or may become, a TCP connection.
    pub fn rides_on_tcp(&self, peer: Peer) -> bool {
        let mut named =
            self.agent_flags.iter().filter_map(|flag| flag.strip_prefix("--transport="));
        let may_leave_quic = named.next_back().is_some_and(|name| name != "quic");
        peer.rides_on_tcp() || peer.is_culvert() && may_leave_quic
    }

    /// The faults, which are checked before anything is started.
    pub fn from_the_start(&self) -> impl Iterator<Item = &Event> {
        self.events.iter().filter(|event| event.at == When::Start)
    }

    /// Whether an event changes the link, so that Culvert may change its carrier.
    pub fn tries_the_carrier(&self) -> bool {
        self.events.iter().any(Event::is_of_link)
    }

    fn faults(&self) -> Vec<String> {
        let mut faults: Vec<String> = self.link.iter().flat_map(LinkSettings::faults).collect();
        faults.extend(self.events.iter().flat_map(Event::faults));
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
        let uploads = self.workloads.iter().filter(|workload| workload.kind.is_upload());
        if uploads.count() > 1 {
            faults.push("the target cannot distinguish the uploads of two workloads".into());
        }
        for workload in &self.workloads {
            faults.extend(workload_faults(workload));
        }
        if self.link.is_none() && self.tries_the_carrier() {
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
            if goal.measure == "switch_seconds"
                && !self.events.iter().any(|event| event.switches_to.is_some())
            {
                faults.push("goal switch_seconds needs an event with switches_to".into());
            }
        }
        faults
    }
}

fn workload_faults(workload: &Workload) -> Vec<String> {
    use Kind::{Echo, Exchange, Request, ShortConnection, Tail};
    let (mut faults, name) = (Vec::new(), &workload.name);
    if matches!(workload.kind, Echo | Exchange | Request | Tail) && workload.interval_ms <= 0.0 {
        faults.push(format!("workload {name} needs an interval_ms"));
    }
    let has_exchanges = matches!(workload.kind, Exchange | ShortConnection);
    if has_exchanges == workload.exchanges.is_empty() {
        faults
            .push(format!("workload {name}: `exchanges` belong to exchange and short-connection"));
    }
    let sizes = EXCHANGE_HEADER..=EXCHANGE_REQUEST_LIMIT;
    if workload.exchanges.iter().any(|exchange| !sizes.contains(&exchange.request)) {
        let (least, most) = sizes.into_inner();
        faults.push(format!("workload {name}: a request has {least} to {most} bytes"));
    }
    faults
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

    #[test]
    fn the_list_has_each_scenario_once_below_the_heading_of_its_topic() {
        let list = Scenario::list().unwrap();
        for name in Scenario::names() {
            assert_eq!(list.matches(&format!("\n  {name} ")).count(), 1, "{name} in {list}");
        }
        let below = list.split("\n\n").find(|topic| topic.starts_with("Many agents"));
        assert!(below.unwrap().contains("  mesh-20 "), "{list}");
        assert!(!list.contains("\nOthers\n"), "give each scenario a topic: {list}");
    }

    const BLOCKED: &str = r#"
        title = "UDP is blocked"
        seconds = 3
        agent_flags = ["--transport=auto"]
        [link]
        [[workload]]
        name = "dials"
        kind = "dial"
        [[event]]
        at = "start"
        link = "drop-udp"
        [[event]]
        at = 1
        link = "pass-udp"
        switches_to = "quic"
        [[goal]]
        measure = "switch_seconds"
        at_most = 1
    "#;

    fn scenario(text: &str) -> Scenario {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn events_from_the_start_are_reported_apart_from_later_ones() {
        let scenario = scenario(BLOCKED);
        assert_eq!(scenario.faults(), Vec::<String>::new());
        let from_the_start: Vec<_> = scenario.from_the_start().map(ToString::to_string).collect();
        assert_eq!(from_the_start, ["UDP dropped from the start"]);
        assert_eq!(scenario.agent_flags, ["--transport=auto"]);
    }

    #[test]
    fn an_exchange_needs_sizes_and_an_interval() {
        let text = r#"
            title = "Answers"
            seconds = 3
            [[workload]]
            name = "answers"
            kind = "KIND"
            interval_ms = 100
            exchanges = [{ request = 16, answer = 1 }]
        "#;
        for kind in ["exchange", "short-connection"] {
            let text = text.replace("KIND", kind);
            assert_eq!(scenario(&text).faults(), Vec::<String>::new());
            let short = scenario(&text.replace("request = 16", "request = 15"));
            assert_eq!(short.faults(), ["workload answers: a request has 16 to 67108864 bytes"]);
            let none = scenario(&text.replace("{ request = 16, answer = 1 }", ""));
            assert_eq!(none.faults().len(), 1, "{kind}");
        }
        let echo = scenario(&text.replace("KIND", "echo"));
        assert_eq!(echo.faults().len(), 1, "sizes that nothing reads");
        let text = text.replace("interval_ms = 100", "");
        let unpaced = scenario(&text.replace("KIND", "exchange"));
        assert_eq!(unpaced.faults(), ["workload answers needs an interval_ms"]);
    }

    #[test]
    fn a_switch_is_a_goal_only_where_one_is_due() {
        let nothing_due = BLOCKED.replace("switches_to = \"quic\"", "");
        let faults = scenario(&nothing_due).faults();
        assert_eq!(faults, ["goal switch_seconds needs an event with switches_to"]);
    }

    #[test]
    fn an_agent_that_may_leave_quic_rides_on_tcp() {
        let [ours, theirs] =
            ["culvert-grpc", "konnectivity-grpc"].map(|name| name.parse().unwrap());
        for (flag, rides) in [("auto", true), ("tcp", true), ("quic", false)] {
            let scenario = scenario(&BLOCKED.replace("=auto", &format!("={flag}")));
            assert_eq!(scenario.rides_on_tcp(ours), rides, "{flag}");
            assert!(scenario.rides_on_tcp(theirs));
            assert!(scenario.rides_on_tcp(Peer::Direct));
        }
    }
}
