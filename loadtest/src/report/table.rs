//! A report for a terminal.

use super::Report;

/// The report as text.
pub fn table(report: &Report) -> String {
    let goals = report.goals.iter().map(|goal| {
        let measured = goal.measured.map_or_else(|| "–".into(), |x| format!("{x:.2}"));
        let mark = if goal.reached { "reached" } else { "MISSED" };
        format!("{mark:8} {:18} {} (measured {measured})\n", goal.peer, goal.goal)
    });
    goals.collect()
}
