//! Debian's Prometheus with the rules, whose times are shortened.

use std::{
    fmt::Write as _,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Stdio,
};

use culvert_loadtest::{http, process::free_port};
use serde_json::Value;
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::support::{
    eventually,
    repository::{RULES, read},
};

/// A range that stands for those in minutes: ten scrapes.
pub(crate) const RANGE: &str = "20s";
/// A range that stands for those of half an hour and more: the whole test, because three restarts of a
/// process, or six losses of its tunnel, take longer than [`RANGE`] on a busy machine.
const LONG_RANGE: &str = "2m";
/// Shortest range of the rules that is a long one, in minutes.
const LONG: u32 = 30;
/// Time for which a condition holds before its alert fires. It covers the starts of processes.
const FOR: &str = "5s";

/// A process that is scraped.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// `culvert-server` or `culvert-agent`.
    pub(crate) program: &'static str,
    pub(crate) health: u16,
}

/// A running Prometheus. It is killed when dropped.
#[derive(Debug)]
pub(crate) struct Prometheus {
    port: u16,
    _process: Child,
    _folder: TempDir,
}

/// The rules for processes that live for a minute: short ranges and times, and the age of young
/// processes in seconds where it was in minutes.
fn shortened(rules: &str) -> String {
    let mut text = String::new();
    for line in rules.lines() {
        let line = match line.split_once("for: ") {
            Some((indent, _)) if indent.trim().is_empty() => format!("{indent}for: {FOR}"),
            _ => line.replace(" * 60)", ")"),
        };
        let mut parts = line.split('[');
        text.push_str(parts.next().unwrap());
        for part in parts {
            match range(part) {
                Some((minutes, rest)) if minutes < LONG => write!(text, "[{RANGE}]{rest}").unwrap(),
                Some((_, rest)) => write!(text, "[{LONG_RANGE}]{rest}").unwrap(),
                None => write!(text, "[{part}").unwrap(),
            }
        }
        text.push('\n');
    }
    text
}

/// A range in minutes, and what follows its bracket: `5m] > 0`.
fn range(text: &str) -> Option<(u32, &str)> {
    let (range, rest) = text.split_once(']')?;
    let (number, unit) = range.split_at_checked(range.len().checked_sub(1)?)?;
    let minutes = match unit {
        "m" => 1,
        "h" => 60,
        _ => return None,
    };
    Some((number.parse::<u32>().ok()? * minutes, rest))
}

/// A job of each fault and program.
fn configuration(targets: &[(&str, Vec<Target>)], rules: &Path) -> String {
    let mut text = format!(
        "global: {{ scrape_interval: 2s, scrape_timeout: 2s, evaluation_interval: 1s }}\n\
         rule_files: [{}]\nscrape_configs:\n  - job_name: all\n    static_configs:\n",
        rules.display()
    );
    for (fault, targets) in targets {
        for Target { program, health } in targets {
            let labels = format!("{{ job: {fault}/{program} }}");
            writeln!(text, "      - {{ targets: [127.0.0.1:{health}], labels: {labels} }}")
                .unwrap();
        }
    }
    text
}

fn write(folder: &TempDir, name: &str, text: &str) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    path
}

impl Prometheus {
    /// Starts one, and waits until it has scraped all targets.
    pub(crate) async fn start(targets: &[(&str, Vec<Target>)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let rules = write(&folder, "rules.yaml", &shortened(&read(RULES)));
        let config = write(&folder, "prometheus.yaml", &configuration(targets, &rules));
        let port = free_port().unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let process = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
            .arg(format!("--web.listen-address=127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let prometheus = Self { port, _process: process, _folder: folder };
        let all: usize = targets.iter().map(|(_, targets)| targets.len()).sum();
        let scraped = async || {
            prometheus
                .try_query("count(up == 1)")
                .await
                .is_some_and(|values| values.first().is_some_and(|(_, value)| *value == all as f64))
        };
        eventually("all targets are scraped", scraped).await;
        prometheus
    }

    /// The values of an expression now, with their labels.
    pub(crate) async fn query(&self, expr: &str) -> Vec<(Value, f64)> {
        self.try_query(expr).await.unwrap_or_else(|| panic!("{expr}"))
    }

    /// `None` when Prometheus does not answer, or refuses the expression.
    async fn try_query(&self, expr: &str) -> Option<Vec<(Value, f64)>> {
        let expr: String = form_urlencoded::byte_serialize(expr.as_bytes()).collect();
        let path = format!("/api/v1/query?query={expr}");
        let answer = http::get((Ipv4Addr::LOCALHOST, self.port), &path).await.ok()?;
        let answer: Value = serde_json::from_str(&answer.body).ok()?;
        let Some(result) = answer["data"]["result"].as_array() else {
            println!("{answer}");
            return None;
        };
        let row = |row: &Value| {
            let value = row["value"][1].as_str().unwrap().parse().unwrap();
            (row["metric"].clone(), value)
        };
        Some(result.iter().map(row).collect())
    }
}

#[test]
fn ranges_and_times_are_shortened() {
    let rules = "        expr: (a and (time() - b < 10 * 60)\n          or increase(a{b=\"[x]\"}[1h])) > 0\n        and c[5m] + d[30m]\n        for: 15m\n";
    let expected = "        expr: (a and (time() - b < 10)\n          or increase(a{b=\"[x]\"}[2m])) > 0\n        and c[20s] + d[2m]\n        for: 5s\n";
    assert_eq!(shortened(rules), expected);
}
