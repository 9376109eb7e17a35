//! A report for a terminal.

use std::io::{IsTerminal as _, stdout};

use comfy_table::{Table, presets};

use super::{Report, summary};

/// Columns of a terminal whose width is not known; what is no terminal has as many as it takes.
const USUAL_WIDTH: u16 = 80;

/// How a report is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Number of columns; all peers are in one table without it.
    pub width: Option<u16>,
    /// Whether verdicts have colours.
    pub colours: bool,
}

impl Look {
    /// That of standard output: as wide as its terminal, and with colours unless the variable
    /// `NO_COLOR` is set.
    pub fn of_stdout() -> Self {
        if !stdout().is_terminal() {
            return Self::default();
        }
        let width = terminal_size::terminal_size().map_or(USUAL_WIDTH, |(width, _)| width.0);
        let is_plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { width: Some(width), colours: !is_plain }
    }

    fn verdict(self, reached: bool) -> String {
        let (text, colour) = if reached { ("✓ reached", 32) } else { ("✗ MISSED ", 31) };
        if self.colours { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.into() }
    }
}

/// The report as text: a line per figure, then what the figures are, then the goals.
pub fn table(report: &Report, look: Look) -> String {
    let summary = summary::summary(report);
    let mut text = format!("\n{}: {}\n{}\n", report.scenario, report.title, report.link);
    let mut first = 0;
    while first < summary.rows.len() {
        let count = fitting(&summary, first, look.width);
        text += &format!("\n{}\n", part(&summary, first, count));
        first += count;
    }
    text += "\n";
    for note in summary::notes(&summary.columns) {
        text += &format!("{note}\n");
    }
    for run in &report.runs {
        if let Some(failure) = &run.failure {
            text += &format!("{} with seed {} failed: {failure}\n", run.peer, run.seed);
        }
    }
    for goal in &report.goals {
        let mark = look.verdict(goal.reached);
        let measured = goal.measured.map_or_else(|| "nothing".into(), summary::figure);
        text += &format!("{mark}  {:18} {}: {measured} {}\n", goal.peer, goal.goal, goal.unit);
    }
    text
}

/// How many peers from this one on fit into the width; at least one.
fn fitting(summary: &summary::Summary, first: usize, width: Option<u16>) -> usize {
    let left = summary.rows.len() - first;
    let fits = |count: &usize| {
        let widest = part(summary, first, *count).lines().map(|line| line.chars().count()).max();
        width.is_none_or(|width| widest.unwrap_or_default() <= usize::from(width))
    };
    (1..=left).rev().find(fits).unwrap_or(1)
}

/// A table of some peers. One line per figure: there are more of them than peers.
fn part(summary: &summary::Summary, first: usize, count: usize) -> String {
    let rows = &summary.rows[first..first + count];
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let peers = rows.iter().map(|(peer, _)| peer.clone());
    table.set_header(std::iter::once(String::new()).chain(peers));
    for (index, column) in summary.columns.iter().enumerate() {
        let cells = rows.iter().map(|(_, cells)| cells[index].clone());
        table.add_row(std::iter::once(column.clone()).chain(cells));
    }
    table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
}
