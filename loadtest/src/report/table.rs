//! A report for a terminal.

use comfy_table::{Table, presets};

use super::{Report, summary};

/// The report as text: a line per peer, then the goals.
pub fn table(report: &Report) -> String {
    let summary = summary::summary(report);
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    // One line per figure: there are more of them than peers, and a terminal is higher than wide.
    let peers = summary.rows.iter().map(|(peer, _)| peer.clone());
    table.set_header(std::iter::once(String::new()).chain(peers));
    for (index, column) in summary.columns.iter().enumerate() {
        let cells = summary.rows.iter().map(|(_, cells)| cells[index].clone());
        table.add_row(std::iter::once(column.clone()).chain(cells));
    }
    let mut text = format!("\n{}: {}\n{}\n\n{table}\n", report.scenario, report.title, report.link);
    for run in &report.runs {
        if let Some(failure) = &run.failure {
            text += &format!("{} with seed {} failed: {failure}\n", run.peer, run.seed);
        }
    }
    for goal in &report.goals {
        let mark = if goal.reached { "reached" } else { "MISSED " };
        let measured = goal.measured.map_or_else(|| "nothing".into(), summary::figure);
        text += &format!("{mark}  {:18} {}: {measured} {}\n", goal.peer, goal.goal, goal.unit);
    }
    text
}
