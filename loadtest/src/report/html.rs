//! A report as one self-contained page: tables, and plots as SVG.

mod plot;

use std::{
    fmt::Write as _,
    time::{Duration, UNIX_EPOCH},
};

use self::plot::{Plot, Scale, Series, bars, plot};
use super::{Latency, Report, Run, WorkloadResult, summary};

const STYLE: &str = include_str!("html/style.css");

/// Reports of several scenarios as one page of HTML.
pub fn page(reports: &[Report]) -> String {
    let mut body = String::from("<h1>Culvert beside Konnectivity and plain TCP</h1>\n");
    if reports.len() > 1 {
        body += &index(reports);
    }
    reports.iter().for_each(|report| body += &section(report));
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>culvert-loadtest</title><style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )
}

fn index(reports: &[Report]) -> String {
    let mut rows = String::new();
    for report in reports {
        let reached = report.goals.iter().filter(|goal| goal.reached).count();
        let (name, title) = (escape(&report.scenario), escape(&report.title));
        let all = report.goals.len();
        let mark = if reached == all { "reached" } else { "missed" };
        let _ = writeln!(
            rows,
            "<tr><td><a href=\"#{name}\">{name}</a></td><td>{title}</td>\
             <td class=\"{mark}\">{reached} of {all}</td></tr>"
        );
    }
    format!(
        "<table><tr><th>scenario</th><th>what it shows</th><th>goals reached</th></tr>\n{rows}</table>\n"
    )
}

fn section(report: &Report) -> String {
    let (name, title) = (escape(&report.scenario), escape(&report.title));
    let link = escape(&report.link);
    let mut text =
        format!("<section id=\"{name}\"><h2>{name}</h2><p>{title}.<br>Link: {link}.</p>\n");
    text += &goals(report);
    text += &figures(report);
    for run in &report.runs {
        if let Some(failure) = &run.failure {
            let (peer, failure) = (escape(&run.peer), escape(failure));
            let _ = writeln!(text, "<p class=\"missed\">{peer}, seed {}: {failure}</p>", run.seed);
        }
    }
    text += &plots(report);
    let (command, machine) = (escape(&report.command), escape(&report.machine));
    let commit = escape(&report.commit);
    let _ = writeln!(
        text,
        "<footer><code>{command}</code><br>{machine}; commit {commit}; {}</footer></section>",
        httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(report.started))
    );
    text
}

fn goals(report: &Report) -> String {
    if report.goals.is_empty() {
        return String::new();
    }
    let mut rows = String::new();
    for goal in &report.goals {
        let (peer, text, unit) = (escape(&goal.peer), escape(&goal.goal), escape(&goal.unit));
        let measured = goal.measured.map_or_else(|| "–".into(), summary::figure);
        let (class, mark) =
            if goal.reached { ("reached", "✓ reached") } else { ("missed", "✗ missed") };
        let _ = writeln!(
            rows,
            "<tr><td>{peer}</td><td>{text}</td><td class=\"number\">{measured} {unit}</td>\
             <td class=\"{class}\">{mark}</td></tr>"
        );
    }
    format!(
        "<table><tr><th>peer</th><th>goal</th><th>measured</th><th></th></tr>\n{rows}</table>\n"
    )
}

fn figures(report: &Report) -> String {
    let summary = summary::summary(report);
    let cells = |tag: &str, cells: &[String]| {
        cells.iter().fold(String::new(), |row, cell| {
            row + &format!("<{tag} class=\"number\">{}</{tag}>", escape(cell))
        })
    };
    let rows = summary.rows.iter().fold(String::new(), |rows, (peer, row)| {
        rows + &format!("<tr><td class=\"name\">{}</td>{}</tr>\n", escape(peer), cells("td", row))
    });
    let head = cells("th", &summary.columns);
    format!("<div class=\"wide\"><table><tr><th>peer</th>{head}</tr>\n{rows}</table></div>\n")
}

fn plots(report: &Report) -> String {
    let mut text = String::from("<div class=\"plots\">\n");
    let peers = summary::peers(report);
    let first =
        |peer: &str| report.runs.iter().find(|run| run.peer == *peer && run.failure.is_none());
    let runs: Vec<&Run> = peers.iter().filter_map(|peer| first(peer)).collect();
    let names = runs.first().map(|run| &*run.workloads).unwrap_or_default();
    for workload in names {
        let of_runs = || runs.iter().filter_map(|run| Some((*run, result(run, &workload.name)?)));
        let latencies: Vec<(&Run, &Latency)> = of_runs()
            .filter_map(|(run, result)| Some((run, result.latency.as_ref()?)))
            .filter(|(_, latency)| latency.count > 0)
            .collect();
        if !latencies.is_empty() {
            text += &distribution(&workload.name, &latencies);
            text += &over_time(&workload.name, &latencies);
        }
        let rates: Vec<_> = of_runs().filter(|(_, result)| !result.throughput.is_empty()).collect();
        if !rates.is_empty() {
            text += &throughput(&workload.name, &rates);
        }
    }
    let of = |value: fn(&Run) -> Option<f64>| {
        let values = runs.iter().filter_map(|run| Some((run.peer.clone(), value(run)?)));
        values.collect::<Vec<_>>()
    };
    text += &bars("Processor time of server and agent per GiB, s", &of(summary::cpu_per_gib));
    text += &bars(
        "Peak memory of server and agent, MiB",
        &of(|run| Some(summary::mebibytes(run.server?.peak_memory + run.agent?.peak_memory))),
    );
    text + "</div>\n"
}

fn result<'a>(run: &'a Run, name: &str) -> Option<&'a WorkloadResult> {
    run.workloads.iter().find(|result| result.name == name)
}

fn distribution(name: &str, latencies: &[(&Run, &Latency)]) -> String {
    let series = latencies.iter().map(|(run, latency)| {
        let points = latency.distribution.iter().map(|point| (point.ms, point.share));
        Series::new(&run.peer, points.collect())
    });
    plot(&Plot {
        title: format!("{name}: how many took at most how long"),
        x: Scale::Log("latency, ms"),
        y: Scale::Nines("share of answers, %"),
        series: series.collect(),
        events: Vec::new(),
    })
}

fn over_time(name: &str, latencies: &[(&Run, &Latency)]) -> String {
    let mut series = Vec::new();
    for (run, latency) in latencies {
        let points = |of: fn(&super::LatencyPoint) -> f64| {
            latency.over_time.iter().map(|point| (point.second, of(point))).collect()
        };
        series.push(Series::new(&run.peer, points(|point| point.p50)));
        series.push(Series::faint(&run.peer, points(|point| point.max)));
    }
    plot(&Plot {
        title: format!("{name}: median and (faint) maximum of each quarter second"),
        x: Scale::Linear("seconds since the measured part began"),
        y: Scale::Log("latency, ms"),
        series,
        events: events(latencies.iter().map(|(run, _)| *run)),
    })
}

fn throughput(name: &str, rates: &[(&Run, &WorkloadResult)]) -> String {
    let series = rates.iter().map(|(run, result)| {
        let points = result.throughput.iter().map(|point| (point.second, point.mbit));
        Series::new(&run.peer, points.collect())
    });
    plot(&Plot {
        title: format!("{name}: throughput over time"),
        x: Scale::Linear("seconds since the measured part began"),
        y: Scale::Linear("payload, Mbit/s"),
        series: series.collect(),
        events: events(rates.iter().map(|(run, _)| *run)),
    })
}

/// Events are the same in every run; those of the first.
fn events<'a>(mut runs: impl Iterator<Item = &'a Run>) -> Vec<(f64, String)> {
    let events = runs.next().map(|run| &*run.events).unwrap_or_default();
    events.iter().map(|event| (event.second, event.what.clone())).collect()
}

/// Text escaped for HTML.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        carrier::Carrier,
        load::Kind,
        report::{
            DistributionPoint, Event, GoalResult, LatencyPoint, Switch, ThroughputPoint, Usage,
        },
    };

    fn report() -> Report {
        let point = |share: f64| DistributionPoint { ms: 50.0 + 100.0 * share, share };
        let latency = Latency {
            count: 100,
            overdue: 1,
            p50: 50.0,
            p90: 60.0,
            p99: 120.0,
            max: 400.0,
            distribution: [0.0, 0.5, 0.9, 0.99, 1.0].map(point).to_vec(),
            over_time: vec![LatencyPoint { second: 0.0, p50: 50.0, max: 90.0 }],
        };
        let keys = WorkloadResult {
            name: "keys".into(),
            kind: Kind::Echo,
            latency: Some(latency),
            mbit_per_second: None,
            throughput: Vec::new(),
            per_second: Some(20.0),
            errors: BTreeMap::from([("<refused>".to_owned(), 3)]),
        };
        let bulk = WorkloadResult {
            name: "bulk".into(),
            kind: Kind::Download,
            latency: None,
            mbit_per_second: Some(95.0),
            throughput: vec![ThroughputPoint { second: 0.0, mbit: 95.0 }],
            per_second: None,
            errors: BTreeMap::new(),
        };
        let usage = Usage { cpu_seconds: 1.0, peak_memory: 1 << 24, grown_memory: 1 };
        let run = Run {
            peer: "culvert-grpc".into(),
            seed: 1,
            seconds: 10.0,
            workloads: vec![keys, bulk],
            server: Some(usage),
            agent: Some(usage),
            link: None,
            payload_bytes: 1 << 30,
            events: vec![Event {
                second: 3.0,
                what: "link down & out".into(),
                switches_to: Some(Carrier::Tcp),
                switch: Some(Switch { to: Carrier::Tcp, seconds: 2.75 }),
            }],
            ready_seconds: Some(0.5),
            carriers: Vec::new(),
            fleet: None,
            failure: None,
        };
        let failed = Run {
            peer: "konnectivity-grpc".into(),
            failure: Some("did <not> start".into()),
            workloads: Vec::new(),
            ..run.clone()
        };
        let goal = GoalResult {
            peer: "culvert-grpc".into(),
            goal: "keys p50 ≤ 40 ms".into(),
            measured: Some(50.0),
            unit: "ms".into(),
            reached: false,
        };
        Report {
            version: 1,
            scenario: "one".into(),
            title: "A title".into(),
            link: "loopback".into(),
            command: "culvert-loadtest compare".into(),
            machine: "a machine".into(),
            commit: "abc".into(),
            started: 0,
            runs: vec![run, failed],
            goals: vec![goal],
        }
    }

    #[test]
    fn everything_is_reported_and_nothing_is_taken_for_markup() {
        let page = page(&[report(), report()]);
        for part in ["✗ missed", "0 of 1", "did &lt;not&gt; start", "link down &amp; out", "<svg"]
        {
            assert!(page.contains(part), "{part}");
        }
        for part in ["did <not>", "<refused>", "NaN", "inf"] {
            assert!(!page.contains(part), "{part}");
        }
    }

    #[test]
    fn a_report_without_anything_is_a_page_too() {
        let empty = Report { runs: Vec::new(), goals: Vec::new(), ..report() };
        assert!(!page(std::slice::from_ref(&empty)).contains("NaN"));
        assert!(!page(&[]).contains("NaN"));
        let table = crate::report::table::table(&empty);
        assert!(table.contains("A title"), "{table}");
    }

    #[test]
    fn the_table_names_figures_goals_and_failures() {
        let table = crate::report::table::table(&report());
        let parts = ["keys p99, ms", "120", "MISSED", "failed: did <not> start", "95.0"];
        for part in parts.into_iter().chain(["switched to tcp after, s", "2.75"]) {
            assert!(table.contains(part), "{part}: {table}");
        }
    }
}
