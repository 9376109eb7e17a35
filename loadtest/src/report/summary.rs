//! A summary of a report's runs: one line per peer, one figure per column.

use std::{collections::BTreeSet, fmt};

use super::{Report, Run, WorkloadResult};
use crate::{carrier::Carrier, link::LinkSettings, load::Kind};

/// The figures of a report, ready to be shown.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Summary {
    /// Titles of the columns, with units.
    pub(super) columns: Vec<String>,
    /// Peers in the order in which they ran.
    pub(super) rows: Vec<(String, Vec<String>)>,
}

/// Medians over each peer's runs, with their range.
pub(super) fn summary(report: &Report) -> Summary {
    let mut columns: Vec<Column> = Vec::new();
    let first = report.runs.iter().find(|run| run.failure.is_none());
    for workload in first.map(|run| &*run.workloads).unwrap_or_default() {
        columns.extend(of_workload(workload));
    }
    columns.extend([
        Column::new("ready after, s", |run| run.ready_seconds),
        Column::new("switched to tcp after, s", |run| slowest_switch(run, Carrier::Tcp)),
        Column::new("switched to quic after, s", |run| slowest_switch(run, Carrier::Quic)),
        Column::new("CPU, % of a core", cpu_percent),
        Column::new("CPU per GiB, s", cpu_per_gib),
        Column::new("server peak, MiB", |run| Some(mebibytes(run.server?.peak_memory))),
        Column::new("agent peak, MiB", |run| Some(mebibytes(run.agent?.peak_memory))),
        Column::new("link bytes per byte", |run| {
            let bytes = run.link?.bytes as f64 / run.payload_bytes as f64;
            bytes.is_finite().then_some(bytes)
        }),
    ]);
    columns.extend([
        Column::new("all joined after, s", |run| run.fleet?.joined_seconds),
        Column::new("all back after, s", |run| run.fleet?.rejoined_seconds),
        Column::new("server memory per agent, KiB", |run| Some(run.fleet?.memory_per_agent)),
        Column::new("servers idle, % of a core", |run| Some(run.fleet?.idle_cpu_percent)),
        Column::new("server CPU per return, ms", |run| run.fleet?.cpu_per_return),
    ]);
    columns.retain(|column| report.runs.iter().any(|run| column.value(run).is_some()));
    let rows = peers(report).into_iter().map(|peer| {
        let runs: Vec<_> = report.runs.iter().filter(|run| run.peer == peer).collect();
        let cell = |column: &Column| match Spread::of(runs.iter().map(|run| column.value(run))) {
            _ if runs.iter().all(|run| run.failure.is_some()) => "failed".into(),
            Some(spread) => spread.to_string(),
            None => "–".into(),
        };
        (peer.to_owned(), columns.iter().map(cell).collect())
    });
    let rows = rows.collect();
    Summary { columns: columns.into_iter().map(|column| column.title).collect(), rows }
}

/// The peers of a report, in the order in which they ran first.
pub(super) fn peers(report: &Report) -> Vec<&str> {
    let mut peers: Vec<&str> = Vec::new();
    for run in &report.runs {
        if !peers.contains(&&*run.peer) {
            peers.push(&run.peer);
        }
    }
    peers
}

/// Payload below which processor time is that of an idle process, in bytes.
const MIN_PAYLOAD: u64 = 64 << 20;

/// Processor time of server and agent as a share of one core, in percent.
pub(super) fn cpu_percent(run: &Run) -> Option<f64> {
    Some(100.0 * (run.server?.cpu_seconds + run.agent?.cpu_seconds) / run.seconds)
}

/// Processor time of server and agent for each GiB of payload, in seconds; `None` where they moved
/// little.
pub(super) fn cpu_per_gib(run: &Run) -> Option<f64> {
    if run.payload_bytes < MIN_PAYLOAD {
        return None;
    }
    let seconds = run.server?.cpu_seconds + run.agent?.cpu_seconds;
    let per_gib = seconds * f64::from(1 << 30) / run.payload_bytes as f64;
    per_gib.is_finite().then_some(per_gib)
}

/// Seconds from an event to a tunnel of this carrier, the slowest of the run.
fn slowest_switch(run: &Run, to: Carrier) -> Option<f64> {
    let switches = run.events.iter().filter_map(|event| event.switch);
    switches.filter(|switch| switch.to == to).map(|switch| switch.seconds).reduce(f64::max)
}

pub(super) fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A number with three significant digits.
pub(super) fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

type Value = Box<dyn Fn(&Run) -> Option<f64>>;

struct Column {
    title: String,
    value: Value,
}

impl Column {
    fn new(title: impl Into<String>, value: impl Fn(&Run) -> Option<f64> + 'static) -> Self {
        Self { title: title.into(), value: Box::new(value) }
    }

    fn value(&self, run: &Run) -> Option<f64> {
        (self.value)(run).filter(|value| value.is_finite())
    }
}

fn of_workload(workload: &WorkloadResult) -> Vec<Column> {
    let column = |what: &str, value: fn(&WorkloadResult) -> Option<f64>| {
        let name = workload.name.clone();
        Column::new(format!("{name} {what}"), move |run: &Run| {
            value(run.workloads.iter().find(|result| result.name == name)?)
        })
    };
    let mut columns = Vec::new();
    if workload.latency.is_some() {
        columns.push(column("p50, ms", |result| Some(result.latency.as_ref()?.p50)));
        columns.push(column("p99, ms", |result| Some(result.latency.as_ref()?.p99)));
        columns.push(column("max, ms", |result| Some(result.latency.as_ref()?.max)));
        columns.push(column("per s", |result| result.per_second));
        columns.push(column("overdue", |result| {
            result.latency.as_ref().map(|latency| latency.overdue as f64).filter(|n| *n > 0.0)
        }));
    }
    if workload.mbit_per_second.is_some() {
        columns.push(column("Mbit/s", |result| result.mbit_per_second));
    }
    columns.push(column("errors", |result| {
        Some(result.errors.values().sum::<u64>() as f64).filter(|errors| *errors > 0.0)
    }));
    columns
}

/// What the runs of a peer have measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) least: f64,
    pub(super) median: f64,
    pub(super) most: f64,
}

impl Spread {
    /// The spread of those runs that have a value.
    fn of(values: impl Iterator<Item = Option<f64>>) -> Option<Self> {
        let mut values: Vec<_> = values.flatten().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = |index: usize| values[index];
        let median = f64::midpoint(middle((values.len() - 1) / 2), middle(values.len() / 2));
        Some(Self { least, median, most })
    }
}

/// The median, and the least and the most where they are others.
impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [least, median, most] = [self.least, self.median, self.most].map(figure);
        match least == most {
            true => f.write_str(&median),
            false => write!(f, "{median} ({least}–{most})"),
        }
    }
}

/// The spread of a value over a peer's runs.
pub(super) fn spread(
    report: &Report,
    peer: &str,
    value: impl Fn(&Run) -> Option<f64>,
) -> Option<Spread> {
    let runs = report.runs.iter().filter(|run| run.peer == peer && run.failure.is_none());
    Spread::of(runs.map(value))
}

/// Number of seeds that ran.
pub(super) fn seeds(report: &Report) -> usize {
    report.runs.iter().map(|run| run.seed).collect::<BTreeSet<_>>().len()
}

/// The time of a round trip of an idle link, in milliseconds.
pub(super) fn round_trip(link: &LinkSettings) -> f64 {
    link.to_node().delay_ms + link.to_server().delay_ms
}

/// The rate of the link in the direction of this kind of transfer, in Mbit/s, if it has a limit.
pub(super) fn capacity(link: &LinkSettings, kind: Kind) -> Option<f64> {
    let direction = if kind.is_upload() { link.to_node() } else { link.to_server() };
    direction.rate_mbit
}

/// Explanations of those figures that need one.
pub(super) fn notes(columns: &[String]) -> Vec<&'static str> {
    let all = [
        (
            "overdue",
            "overdue: requests without an answer when their connection or the run ended; they count \
             with their wait",
        ),
        (
            "CPU per GiB",
            "CPU per GiB: of both processes; on a link the kernel's TCP is not in it; none where a \
             run carried less than 64 MiB, because it would be that of idle processes",
        ),
        ("link bytes", "link bytes per byte: bytes on the link for each byte of payload"),
        ("per s", "per s: answers in each second"),
    ];
    let is_shown = |part: &str| columns.iter().any(|column| column.contains(part));
    all.into_iter().filter(|(part, _)| is_shown(part)).map(|(_, note)| note).collect()
}
