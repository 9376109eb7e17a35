//! Report of a comparison: stable JSON, a table for a terminal, and an HTML page.

pub mod headline;
pub mod html;
mod looks;
pub mod markdown;
mod summary;
pub mod table;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{carrier::Carrier, link::LinkSettings, load::Kind};

/// One comparison: the same workloads through every peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Of this format: 1. Fields are added, never renamed or given another meaning.
    pub version: u32,
    /// The scenario's name.
    pub scenario: String,
    /// Purpose, in one sentence.
    pub title: String,
    /// The link in words, such as `100 Mbit/s, 25 ms each way, 1 % loss`; `loopback` without one.
    pub link: String,
    /// The command that was run.
    pub command: String,
    /// The machine: processor, cores, kernel.
    pub machine: String,
    /// The commit of the working tree, with `+` behind it if that was changed; empty if unknown.
    pub commit: String,
    /// When it started, in seconds since 1970.
    pub started: u64,
    /// Programs that were compared, with their versions.
    #[serde(default)]
    pub versions: Vec<String>,
    /// Settings of the link, if there was one.
    #[serde(default)]
    pub settings: Option<LinkSettings>,
    /// Runs, in order.
    pub runs: Vec<Run>,
    /// Goals.
    pub goals: Vec<GoalResult>,
}

/// One run of one peer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Name of the peer, such as `culvert-grpc` or `direct-bbr`.
    pub peer: String,
    /// Seed of the link.
    pub seed: u64,
    /// Seconds that were measured, after the warm-up.
    pub seconds: f64,
    /// Results of each workload, in the scenario's order.
    pub workloads: Vec<WorkloadResult>,
    /// The server's process, unless the peer has none.
    pub server: Option<Usage>,
    /// The agent's process, unless the peer has none.
    pub agent: Option<Usage>,
    /// Packets on the link, if there is one.
    pub link: Option<LinkUsage>,
    /// Payload bytes that arrived, both ways.
    pub payload_bytes: u64,
    /// Events of link and processes.
    pub events: Vec<Event>,
    /// Seconds from the agent's start until it was ready, if the peer has one.
    #[serde(default)]
    pub ready_seconds: Option<f64>,
    /// Carriers of Culvert's newest tunnel, from the first on; empty unless an event changed the
    /// link.
    #[serde(default)]
    pub carriers: Vec<Carried>,
    /// Results of a fleet.
    #[serde(default)]
    pub fleet: Option<FleetResult>,
    /// Why the run failed, if it did; the other fields are empty then.
    pub failure: Option<String>,
}

/// Results of a fleet.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct FleetResult {
    /// Number of agents.
    pub agents: u32,
    /// Number of servers that each agent has to find.
    pub servers: u32,
    /// Seconds until all had joined; `None` when they did not.
    pub joined_seconds: Option<f64>,
    /// The same after all servers had been killed and started again.
    pub rejoined_seconds: Option<f64>,
    /// Memory that the servers took for each agent, in KiB.
    pub memory_per_agent: f64,
    /// Share of a core that the servers took while nothing happened, in percent.
    pub idle_cpu_percent: f64,
    /// Processor time of the servers for each agent that came back, in milliseconds.
    pub cpu_per_return: Option<f64>,
}

/// Results of one workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WorkloadResult {
    /// Name in the scenario.
    pub name: String,
    /// Kind of its sessions.
    pub kind: Kind,
    /// Latencies, if it timed any.
    pub latency: Option<Latency>,
    /// Payload throughput in Mbit/s, if it moved any in bulk.
    pub mbit_per_second: Option<f64>,
    /// The same over time.
    pub throughput: Vec<ThroughputPoint>,
    /// Answers per second, if it timed any.
    pub per_second: Option<f64>,
    /// Errors, with their numbers.
    pub errors: BTreeMap<String, u64>,
}

/// Latencies, in milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Latency {
    /// How many there were, with those that were still due at the end.
    pub count: u64,
    /// How many were still due at the end; they count with the time they had waited by then.
    pub overdue: u64,
    /// Half were at most this.
    pub p50: f64,
    /// Nine in ten were at most this.
    pub p90: f64,
    /// 99 in a hundred were at most this.
    pub p99: f64,
    /// The longest.
    pub max: f64,
    /// The distribution: ascending, at most a few hundred points.
    pub distribution: Vec<DistributionPoint>,
    /// The same over time.
    pub over_time: Vec<LatencyPoint>,
}

/// One point of a distribution.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct DistributionPoint {
    /// Milliseconds.
    pub ms: f64,
    /// The share of answers that took at most that: 0 to 1.
    pub share: f64,
}

/// Latency in one slice of time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct LatencyPoint {
    /// The slice's start, in seconds after the run's; negative during the warm-up.
    pub second: f64,
    /// Its median in milliseconds.
    pub p50: f64,
    /// Its maximum in milliseconds.
    pub max: f64,
}

/// Throughput in one slice of time.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ThroughputPoint {
    /// The slice's start, in seconds after the run's; negative during the warm-up.
    pub second: f64,
    /// Payload in Mbit/s.
    pub mbit: f64,
}

/// Resources that a process used while it was measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Usage {
    /// Processor time in seconds.
    pub cpu_seconds: f64,
    /// Most memory resident at any time, in bytes.
    pub peak_memory: u64,
    /// Memory that the run's connections took, in bytes: resident when all were there, less what
    /// was resident before.
    pub grown_memory: i64,
}

/// Packets on the link while it was measured, both ways.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct LinkUsage {
    /// Packets that went in.
    pub packets: u64,
    /// Their bytes, with IP headers.
    pub bytes: u64,
    /// Packets lost by chance.
    pub lost: u64,
    /// Packets dropped because the buffer was full.
    pub dropped: u64,
}

/// An event of link or processes during a run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Event {
    /// Seconds after the measured part's start.
    pub second: f64,
    /// Description.
    pub what: String,
    /// The carrier that Culvert's tunnels were to get because of it, if any.
    #[serde(default)]
    pub switches_to: Option<Carrier>,
    /// The change of carrier that came after it and before the next event, if any.
    #[serde(default)]
    pub switch: Option<Switch>,
}

/// A change of carrier after an event.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Switch {
    /// The new carrier.
    pub to: Carrier,
    /// Seconds from the event until a tunnel of that carrier served: at most a twentieth more than
    /// it was.
    pub seconds: f64,
}

/// Carrier of Culvert's newest tunnel from some time on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Carried {
    /// Seconds after the measured part's start; negative before it.
    pub second: f64,
    /// The carrier.
    pub carrier: Carrier,
    /// The agent's reason.
    pub reason: String,
}

/// Whether a goal was reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GoalResult {
    /// Name of the peer.
    pub peer: String,
    /// The goal in words, such as `keystrokes p99 ≤ 120 ms`.
    pub goal: String,
    /// The median of the peer's runs, as measured; `None` if there is none.
    pub measured: Option<f64>,
    /// The unit of `measured`, such as `ms`, `Mbit/s` or `×`.
    pub unit: String,
    /// Whether it was reached.
    pub reached: bool,
}
