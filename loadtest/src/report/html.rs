//! A report as one self-contained page: tables, and plots as SVG.

mod plot;

use std::{
    fmt::Write as _,
    time::{Duration, UNIX_EPOCH},
};

use self::plot::{Plot, Scale, Series, bars, plot};
use super::{Latency, Report, Run, WorkloadResult, headline, summary};

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
    text += &headline(report);
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
    let versions = escape(&report.versions.join(", "));
    let _ = writeln!(
        text,
        "<footer><code>{command}</code><br>{machine}; {versions}; commit {commit}; {}</footer>\
         </section>",
        httpdate::fmt_http_date(UNIX_EPOCH + Duration::from_secs(report.started))
    );
    text
}

/// What the runs show, and how many there were.
fn headline(report: &Report) -> String {
    let mut text = String::new();
    for sentence in headline::sentences(report) {
        let _ = writeln!(text, "<p class=\"headline\">{}</p>", escape(&sentence));
    }
    let seconds = report.runs.iter().find(|run| run.failure.is_none()).map(|run| run.seconds);
    let runs = match summary::seeds(report) {
        1 => "One run of each peer".to_owned(),
        seeds => format!("{seeds} runs of each peer with seeds of their own: median (least–most)"),
    };
    let _ = writeln!(
        text,
        "<p class=\"runs\">{runs}; {} measured seconds. One run says little about the spread.</p>",
        seconds.map_or_else(|| "no".into(), summary::figure)
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
    let notes = summary::notes(&summary.columns).join(". ");
    format!(
        "<div class=\"wide\" tabindex=\"0\"><table><tr><th>peer</th>{head}</tr>\n{rows}</table>\
         </div><p class=\"runs\">{}. The table scrolls to the right on a narrow screen.</p>\n",
        escape(&notes)
    )
}

/// Peers that have a panel of their own, with the others in grey: by the begin of their names.
const PANELS: [&str; 3] = ["culvert", "konnectivity", "direct"];

fn plots(report: &Report) -> String {
    let peers = summary::peers(report);
    let first =
        |peer: &str| report.runs.iter().find(|run| run.peer == *peer && run.failure.is_none());
    let runs: Vec<&Run> = peers.iter().filter_map(|peer| first(peer)).collect();
    let names = runs.first().map(|run| &*run.workloads).unwrap_or_default();
    let mut text = String::new();
    if summary::seeds(report) > 1 && !names.is_empty() {
        let seed = runs.first().map_or(1, |run| run.seed);
        let _ = writeln!(text, "<p class=\"runs\">The plots show seed {seed}.</p>");
    }
    for workload in names {
        let of_runs = || runs.iter().filter_map(|run| Some((*run, result(run, &workload.name)?)));
        let latencies: Vec<(&Run, &Latency)> = of_runs()
            .filter_map(|(run, result)| Some((run, result.latency.as_ref()?)))
            .filter(|(_, latency)| latency.count > 0)
            .collect();
        if !latencies.is_empty() {
            text += &panels(&distribution(report, &workload.name, &latencies));
            text += &panels(&over_time(report, &workload.name, &latencies));
        }
        let rates: Vec<_> = of_runs().filter(|(_, result)| !result.throughput.is_empty()).collect();
        if !rates.is_empty() {
            text += &panels(&throughput(report, workload, &rates));
        }
    }
    text += "<p class=\"runs\">On a link the kernel's work for TCP is in no process: compare \
             processor time on loopback.</p>\n<div class=\"plots\">\n";
    let cpu = runs.iter().filter_map(|run| {
        let moved = run.payload_bytes as f64 * 8.0 / 1e6 / run.seconds;
        let label = format!("at {} Mbit/s of payload", summary::figure(moved));
        Some((run.peer.clone(), summary::cpu_percent(run)?, label))
    });
    text += &bars("Processor time of server and agent, % of a core", &cpu.collect::<Vec<_>>());
    let memory = runs.iter().filter_map(|run| {
        let bytes = run.server?.peak_memory + run.agent?.peak_memory;
        Some((run.peer.clone(), summary::mebibytes(bytes), String::new()))
    });
    text += &bars("Peak memory of server and agent, MiB", &memory.collect::<Vec<_>>());
    text + "</div>\n"
}

fn result<'a>(run: &'a Run, name: &str) -> Option<&'a WorkloadResult> {
    run.workloads.iter().find(|result| result.name == name)
}

/// The same plot for each group of peers that are in it.
fn panels(whole: &Plot) -> String {
    let is_in = |panel: &&&str| whole.series.iter().any(|series| series.is_of(panel));
    let panels = PANELS.iter().filter(is_in).map(|panel| plot(whole, panel));
    let title = escape(&whole.title);
    let panels = panels.collect::<String>();
    format!("<h3>{title}</h3>\n<div class=\"plots panels\">\n{panels}</div>\n")
}

/// The path's round trip, on an axis of latencies.
fn path(report: &Report) -> Option<(f64, String)> {
    let round_trip = summary::round_trip(report.settings.as_ref()?);
    (round_trip > 0.0).then(|| (round_trip, format!("path: {} ms", summary::figure(round_trip))))
}

/// No further than one answer in all that there were.
fn distribution(report: &Report, name: &str, latencies: &[(&Run, &Latency)]) -> Plot {
    let series = latencies.iter().map(|(run, latency)| {
        let last = 1.0 - 1.0 / latency.count as f64;
        let points = latency.distribution.iter().filter(|point| point.share <= last);
        Series::new(&run.peer, points.map(|point| (point.ms, point.share)).collect())
    });
    let counts = latencies.iter().map(|(_, latency)| latency.count);
    let (least, most) = (counts.clone().min().unwrap_or(0), counts.max().unwrap_or(0));
    Plot {
        title: format!("{name}: how many took at most how long, of {least} to {most} answers"),
        x: Scale::Log("latency, ms"),
        y: Scale::Nines("share of answers, %"),
        series: series.collect(),
        events: Vec::new(),
        is_over_time: false,
        x_bound: path(report),
        y_bound: None,
    }
}

fn over_time(report: &Report, name: &str, latencies: &[(&Run, &Latency)]) -> Plot {
    let mut series = Vec::new();
    for (run, latency) in latencies {
        let points = |of: fn(&super::LatencyPoint) -> f64| {
            latency.over_time.iter().map(|point| (point.second, of(point))).collect()
        };
        series.push(Series::new(&run.peer, points(|point| point.p50)));
        series.push(Series::faint(&run.peer, points(|point| point.max)));
    }
    Plot {
        title: format!("{name}: median and (faint) maximum of each quarter second"),
        x: Scale::Linear("seconds since the measured part began"),
        y: Scale::Log("latency, ms"),
        series,
        events: events(latencies.iter().map(|(run, _)| *run)),
        is_over_time: true,
        x_bound: None,
        y_bound: path(report),
    }
}

fn throughput(
    report: &Report,
    workload: &WorkloadResult,
    rates: &[(&Run, &WorkloadResult)],
) -> Plot {
    let series = rates.iter().map(|(run, result)| {
        let points = result.throughput.iter().map(|point| (point.second, point.mbit));
        Series::new(&run.peer, points.collect())
    });
    let settings = report.settings.as_ref();
    let capacity = settings.and_then(|link| summary::capacity(link, workload.kind));
    Plot {
        title: format!(
            "{}: payload read in each quarter second, in bursts above the link's rate",
            workload.name
        ),
        x: Scale::Linear("seconds since the measured part began"),
        y: Scale::Linear("Mbit/s"),
        series: series.collect(),
        events: events(rates.iter().map(|(run, _)| *run)),
        is_over_time: true,
        x_bound: None,
        y_bound: capacity.map(|rate| (rate, format!("link: {} Mbit/s", summary::figure(rate)))),
    }
}

/// Events are the same in every run; those of the first.
fn events<'a>(mut runs: impl Iterator<Item = &'a Run>) -> Vec<(f64, String)> {
    let events = runs.next().map(|run| &*run.events).unwrap_or_default();
    events.iter().map(|event| (event.second, event.what.clone())).collect()
}

/// Text escaped for HTML.
pub(super) fn escape(text: &str) -> String {
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
        link::{LinkSettings, settings::Direction},
        load::Kind,
        report::{
            DistributionPoint, Event, GoalResult, LatencyPoint, Switch, ThroughputPoint, Usage,
            table::Look,
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
            over_time: [-1.0, 0.0]
                .map(|second| LatencyPoint { second, p50: 50.0, max: 90.0 })
                .to_vec(),
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
            versions: vec!["Culvert 1".into()],
            settings: None,
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

    /// A report of two peers and two seeds on a link.
    fn compared() -> Report {
        let mut report = report();
        let ours = report.runs[0].clone();
        let run = |peer: &str, seed, p50: f64, mbit: f64| {
            let mut run = Run { peer: peer.into(), seed, ..ours.clone() };
            run.workloads[0].latency.as_mut().unwrap().p50 = p50;
            run.workloads[1].mbit_per_second = Some(mbit);
            run
        };
        report.runs = vec![
            run("culvert-grpc", 1, 53.0, 91.0),
            run("konnectivity-grpc", 1, 700.0, 2.0),
            run("konnectivity-grpc-bbr", 1, 230.0, 88.0),
            run("culvert-grpc", 2, 55.0, 92.0),
            run("konnectivity-grpc", 2, 900.0, 3.0),
        ];
        let each_way = Direction { rate_mbit: Some(100.0), delay_ms: 25.0, ..Direction::default() };
        report.settings = Some(LinkSettings { each_way, ..LinkSettings::default() });
        report
    }

    #[test]
    fn the_headline_compares_with_both_congestion_controls_and_has_the_spread_of_the_seeds() {
        let page = page(&[compared()]);
        for part in [
            "keys, median (the path: 50.0 ms): Konnectivity, CUBIC: 800 (700–900) ms; Konnectivity, \
             BBR: 230 ms; Culvert: 54.0 (53.0–55.0) ms.",
            "bulk, all together (the link: 100 Mbit/s): Konnectivity, CUBIC: 2.50 (2.00–3.00) Mbit/s",
            "2 runs of each peer",
            "path: 50.0 ms",
            "link: 100 Mbit/s",
            "class=\"warm-up\"",
            "Culvert 1",
        ] {
            assert!(page.contains(part), "{part}");
        }
        let picture = headline::picture(Some(&compared()));
        for part in [
            "<svg xmlns",
            "Konnectivity, BBR",
            "the path: 50.0",
            "range of 2 runs",
            "54.0 (53.0–55.0)",
        ] {
            assert!(picture.contains(part), "{part}: {picture}");
        }
        assert!(!picture.contains("NaN") && !headline::picture(None).contains("NaN"));
    }

    #[test]
    fn a_distribution_goes_no_further_than_its_samples() {
        let report = compared();
        let run = &report.runs[0];
        let latency = run.workloads[0].latency.as_ref().unwrap();
        let shares = |count| {
            let latency = Latency { count, ..latency.clone() };
            distribution(&report, "keys", &[(run, &latency)]).series[0].shares()
        };
        assert_eq!(shares(100), [0.0, 0.5, 0.9, 0.99]);
        assert_eq!(shares(99), [0.0, 0.5, 0.9]);
        assert_eq!(shares(1), [0.0]);
    }

    #[test]
    fn a_table_is_no_wider_than_its_terminal_and_verdicts_have_colours_where_they_may() {
        let report = compared();
        let narrow = Look { width: Some(70), colours: true };
        let text = crate::report::table::table(&report, narrow);
        let of_figures = text.lines().take_while(|line| !line.contains("overdue:"));
        let widest = of_figures.skip(3).map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= 70, "{text}");
        assert_eq!(text.matches("keys p50, ms").count(), 2, "{text}");
        assert!(text.contains("\x1b[31m✗ MISSED"), "{text}");
        let plain = crate::report::table::table(&report, Look::default());
        assert_eq!(plain.matches("keys p50, ms").count(), 1, "{plain}");
        assert!(!plain.contains('\x1b'));
    }

    #[test]
    fn a_report_without_anything_is_a_page_too() {
        let empty = Report { runs: Vec::new(), goals: Vec::new(), ..report() };
        assert!(!page(std::slice::from_ref(&empty)).contains("NaN"));
        assert!(!page(&[]).contains("NaN"));
        let table = crate::report::table::table(&empty, Look::default());
        assert!(table.contains("A title"), "{table}");
    }

    #[test]
    fn the_table_names_figures_goals_and_failures() {
        let table = crate::report::table::table(&report(), Look::default());
        let parts = ["keys p99, ms", "120", "MISSED", "failed: did <not> start", "95.0"];
        for part in parts.into_iter().chain(["switched to tcp after, s", "2.75"]) {
            assert!(table.contains(part), "{part}: {table}");
        }
    }
}
