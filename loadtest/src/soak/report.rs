//! The result of a soak.

use std::{collections::BTreeMap, fmt};

use comfy_table::Table;
use serde::Serialize;

use super::trend::Trend;
use crate::tables::table;

/// Outcomes of the operations in all phases with one disturbance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Number of phases.
    pub phases: u64,
    /// Operations that succeeded.
    pub ok: u64,
    /// Dials that failed.
    pub dials_failed: u64,
    /// Streams that ended before their time.
    pub cut: u64,
}

/// A disturbance that was carried out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Happened {
    /// Seconds since the start.
    pub second: f64,
    /// The disturbance.
    pub what: String,
}

/// One resource of one process between its start and its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// Name of the process.
    pub process: String,
    /// How often the process had been started again before.
    pub restarts: u32,
    /// Name of the resource.
    pub resource: String,
    /// Largest value, under load too.
    pub max: u64,
    /// Values at the quiet checkpoints.
    #[serde(flatten)]
    pub trend: Trend,
}

/// The result of a soak.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Seed of load and disturbances.
    pub seed: u64,
    /// Duration, in seconds.
    pub seconds: f64,
    /// Whether a signal ended it early.
    pub interrupted: bool,
    /// Disturbances, in order.
    pub disturbances: Vec<Happened>,
    /// Outcomes by disturbance.
    pub phases: BTreeMap<String, Counts>,
    /// Resources of every process.
    pub resources: Vec<Row>,
    /// Failures that no disturbance explains, the first of them.
    pub failures: Vec<String>,
    /// Number of all such failures.
    pub failed: u64,
}

impl Report {
    /// Whether nothing grew and nothing failed without a disturbance that explains it.
    pub fn passed(&self) -> bool {
        self.failed == 0 && self.growing().next().is_none()
    }

    fn growing(&self) -> impl Iterator<Item = &Row> {
        self.resources.iter().filter(|row| row.trend.grows)
    }

    fn phase_table(&self) -> Table {
        let mut table = table(&["disturbance", "phases", "ok", "dials failed", "cut"]);
        for (name, counts) in &self.phases {
            let counts = [counts.phases, counts.ok, counts.dials_failed, counts.cut];
            table.add_row(
                std::iter::once(name.clone()).chain(counts.map(|count| count.to_string())),
            );
        }
        table
    }

    /// Resources of the lifetimes that were long enough for a trend, and of each process's last.
    fn resource_table(&self) -> Table {
        let header = ["process", "resource", "looks", "first", "last", "max", "early", "late", ""];
        let mut table = table(&header);
        let is_last = |row: &Row| {
            let others = self.resources.iter().filter(|other| other.process == row.process);
            others.map(|other| other.restarts).max() == Some(row.restarts)
        };
        let shown = |row: &&Row| row.trend.medians.is_some() || is_last(row);
        for row in self.resources.iter().filter(shown) {
            let process = match row.restarts {
                0 => row.process.clone(),
                restarts => format!("{} #{restarts}", row.process),
            };
            let median =
                |value: Option<u64>| value.map_or_else(|| "–".into(), |value| value.to_string());
            let trend = &row.trend;
            table.add_row([
                process,
                row.resource.clone(),
                trend.checkpoints.to_string(),
                trend.first.to_string(),
                trend.last.to_string(),
                row.max.to_string(),
                median(trend.medians.map(|(early, _)| early)),
                median(trend.medians.map(|(_, late)| late)),
                if trend.grows { "GROWS".into() } else { String::new() },
            ]);
        }
        table
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let interrupted = if self.interrupted { ", interrupted" } else { "" };
        writeln!(f, "soak: seed {}, {:.0} s{interrupted}", self.seed, self.seconds)?;
        writeln!(f, "{}\n{}", self.phase_table(), self.resource_table())?;
        if self.resources.iter().all(|row| row.trend.medians.is_none()) {
            writeln!(f, "too few checkpoints for a trend: use more --minutes")?;
        }
        for failure in &self.failures {
            writeln!(f, "FAILED  {failure}")?;
        }
        let growing = self.growing().count();
        match self.passed() {
            true => write!(f, "passed"),
            false => write!(f, "FAILED: {} failures, {growing} resources grow", self.failed),
        }
    }
}
