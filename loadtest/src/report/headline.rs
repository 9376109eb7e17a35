//! The one comparison that a report is about, in words and as a picture.

use std::fmt::Write as _;

use super::{
    Report, WorkloadResult,
    html::escape,
    looks::look,
    summary::{self, Spread},
};

/// The peers of a headline, with the names that readers know.
const PEERS: [(&str, &str); 6] = [
    ("konnectivity-grpc", "Konnectivity, CUBIC"),
    ("konnectivity-grpc-bbr", "Konnectivity, BBR"),
    ("culvert-grpc", "Culvert"),
    ("konnectivity-connect", "Konnectivity, CUBIC"),
    ("konnectivity-connect-bbr", "Konnectivity, BBR"),
    ("culvert-connect", "Culvert"),
];

/// One figure of all peers.
struct Figure {
    title: String,
    unit: &'static str,
    peers: Vec<Measured>,
    /// What no peer can be better than, with its name.
    bound: Option<(f64, &'static str)>,
}

/// What one peer reached.
struct Measured {
    peer: &'static str,
    name: &'static str,
    spread: Spread,
}

/// The latency and the throughput of each workload, of the peers of one frontend.
fn figures(report: &Report) -> Vec<Figure> {
    let has = |name: &str| report.runs.iter().any(|run| run.peer == name && run.failure.is_none());
    let frontend = if has("culvert-grpc") { &PEERS[..3] } else { &PEERS[3..] };
    let first = report.runs.iter().find(|run| run.failure.is_none());
    let mut figures = Vec::new();
    for workload in first.map(|run| &*run.workloads).unwrap_or_default() {
        let mut add = |title, unit, bound, value: fn(&WorkloadResult) -> Option<f64>| {
            let measured = |&(peer, name): &(&'static str, &'static str)| {
                let spread = summary::spread(report, peer, |run| {
                    value(run.workloads.iter().find(|result| result.name == workload.name)?)
                })?;
                Some(Measured { peer, name, spread })
            };
            let peers: Vec<_> = frontend.iter().filter_map(measured).collect();
            if peers.len() > 1 {
                figures.push(Figure { title, unit, peers, bound });
            }
        };
        let settings = report.settings.as_ref();
        if workload.latency.is_some() {
            let title = format!("{}, median", workload.name);
            let path = settings.map(|link| (summary::round_trip(link), "the path"));
            add(title, "ms", path, |result| Some(result.latency.as_ref()?.p50));
            let title = format!("{}, 99 of 100 within", workload.name);
            add(title, "ms", path, |result| Some(result.latency.as_ref()?.p99));
        }
        if workload.mbit_per_second.is_some() {
            let title = format!("{}, all together", workload.name);
            let link = settings
                .and_then(|link| Some((summary::capacity(link, workload.kind)?, "the link")));
            add(title, "Mbit/s", link, |result| result.mbit_per_second);
        }
    }
    figures
}

/// The report in sentences, one for each figure; empty where Culvert and Konnectivity did not both
/// run.
pub(super) fn sentences(report: &Report) -> Vec<String> {
    let of = |figure: Figure| {
        let peers: Vec<_> = figure
            .peers
            .iter()
            .map(|Measured { name, spread, .. }| format!("{name}: {spread} {}", figure.unit))
            .collect();
        let bound = figure
            .bound
            .map(|(bound, name)| format!(" ({name}: {} {})", summary::figure(bound), figure.unit));
        format!("{}{}: {}.", figure.title, bound.unwrap_or_default(), peers.join("; "))
    };
    figures(report).into_iter().map(of).collect()
}

const WIDTH: f64 = 720.0;
const ROW: f64 = 26.0;
const STYLE: &str = "svg{color-scheme:light dark}text{font:13px system-ui,sans-serif;fill:#1d232b}\
    .t{font-weight:600}.w{fill:#66707c;font-size:12px}.s{stroke:#1d232b;stroke-width:1.5}\
    .b{stroke:#66707c;stroke-dasharray:3 3}@media(prefers-color-scheme:dark){text{fill:#e6e9ee}\
    .w{fill:#9aa4b0}.s{stroke:#e6e9ee}.b{stroke:#9aa4b0}}";

/// The figures as a picture of its own, in SVG: bars from zero, with whiskers from the least to the
/// most of the seeds. An empty picture without a report.
pub fn picture(report: Option<&Report>) -> String {
    let figures = report.map(figures).unwrap_or_default();
    let mut body = String::new();
    let mut top = 24.0;
    if let Some(report) = report {
        let (title, link) = (escape(&report.title), escape(&report.link));
        let _ = writeln!(
            body,
            "<text class=\"t\" x=\"8\" y=\"{top}\">{title}</text>\
             <text class=\"w\" x=\"8\" y=\"{}\">Link: {link}</text>",
            top + 18.0
        );
        top += 6.0;
    }
    for figure in &figures {
        top += 42.0;
        body += &group(figure, top);
        top += ROW * figure.peers.len() as f64;
    }
    if let Some(report) = report {
        top += 30.0;
        let footer = escape(&footer(report));
        let _ = writeln!(body, "<text class=\"w\" x=\"8\" y=\"{top}\">{footer}</text>");
    }
    let height = top + 12.0;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" role=\"img\"><style>{STYLE}</style>\n{body}</svg>\n"
    )
}

fn footer(report: &Report) -> String {
    let seeds = summary::seeds(report);
    let runs =
        if seeds == 1 { "one run".into() } else { format!("median and range of {seeds} runs") };
    format!("{runs}; {}; commit {}", report.versions.join(", "), report.commit)
}

fn group(figure: &Figure, top: f64) -> String {
    let (left, right) = (180.0, WIDTH - 130.0);
    let most = figure.peers.iter().map(|measured| measured.spread.most).fold(0.0, f64::max);
    let most = figure.bound.map_or(most, |(bound, _)| bound.max(most)).max(1e-9);
    let at = |value: f64| left + (right - left) * value / most;
    let better = if figure.unit == "ms" { "less is better" } else { "more is better" };
    let mut svg = format!(
        "<text x=\"8\" y=\"{top}\">{}, {} <tspan class=\"w\">({better})</tspan></text>\n",
        escape(&figure.title),
        figure.unit
    );
    for (index, Measured { peer, name, spread }) in figure.peers.iter().enumerate() {
        let look = look(peer);
        let y = top + 10.0 + ROW * index as f64;
        let (end, middle) = (at(spread.median), y + 8.0);
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{name}</text>\
             <rect x=\"{left}\" y=\"{y}\" width=\"{:.1}\" height=\"16\" fill=\"{}\" \
             fill-opacity=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\">{spread}</text>",
            left - 8.0,
            y + 13.0,
            (end - left).max(1.0),
            look.colour,
            look.opacity(),
            at(spread.most).max(end) + 6.0,
            y + 13.0
        );
        if spread.most > spread.least {
            let _ = writeln!(
                svg,
                "<line class=\"s\" x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle}\" y2=\"{middle}\"/>",
                at(spread.least),
                at(spread.most)
            );
        }
    }
    if let Some((bound, name)) = figure.bound {
        let (x, bottom) = (at(bound), top + 6.0 + ROW * figure.peers.len() as f64);
        let _ = writeln!(
            svg,
            "<line class=\"b\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{:.1}\" y2=\"{bottom:.1}\"/>\
             <text class=\"w\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}: {}</text>",
            top + 6.0,
            bottom + 12.0,
            summary::figure(bound)
        );
    }
    svg
}
