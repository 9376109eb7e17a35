//! Reports as Markdown, for the documentation.

use super::{Report, summary};

/// The reports, a section each.
pub fn markdown(reports: &[Report]) -> String {
    reports.iter().map(section).collect()
}

fn section(report: &Report) -> String {
    let summary = summary::summary(report);
    let row = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut text = format!("\n### {}\n\n{}. ", report.scenario, report.title);
    text += &format!("Link: {}.\n\n", report.link);
    let peers = summary.rows.iter().map(|(peer, _)| peer.clone());
    text += &row(std::iter::once(String::new()).chain(peers).collect());
    text += &row(vec!["---".into(); summary.rows.len() + 1]);
    for (index, column) in summary.columns.iter().enumerate() {
        let cells = summary.rows.iter().map(|(_, cells)| cells[index].clone());
        text += &row(std::iter::once(column.clone()).chain(cells).collect());
    }
    let goals = report.goals.iter().map(|goal| {
        let measured = goal.measured.map_or_else(|| "nothing".into(), summary::figure);
        let what = format!("{} {}: {measured} {}", goal.peer, goal.goal, goal.unit);
        let what = what.trim_end();
        if goal.reached {
            format!("- reached: {what}\n")
        } else {
            format!("- **missed: {what}**\n")
        }
    });
    text += "\n";
    text.extend(goals);
    text
}
