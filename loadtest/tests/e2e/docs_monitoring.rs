//! Rules and dashboard that match the metrics, their runbook, and the chart's copies.

use std::{collections::BTreeSet, process::Command};

use culvert_process::metrics::Metrics;

use crate::{
    docs::{documented, is_metric, read, root},
    support::{
        has_program,
        repository::{DASHBOARD, RULES, alerts},
    },
};

/// Names that look like metrics of Culvert or of its process.
fn named(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| is_metric(word) || word.starts_with("process_")).collect()
}

/// Metrics of the process itself, which the operator's tables do not name one by one.
fn of_the_process() -> BTreeSet<String> {
    let scrape = Metrics::new("1", &[]).unwrap().render(|_| {});
    let types = scrape.lines().filter_map(|line| line.strip_prefix("# TYPE process_"));
    types.map(|line| format!("process_{}", line.split(' ').next().unwrap())).collect()
}

#[test]
fn every_metric_of_the_rules_and_of_the_dashboard_is_in_the_operators_tables() {
    let mut known = documented(&read("docs/operations.md"));
    known.extend(of_the_process());
    known.insert("culvert_build_info".into());
    for (file, least) in [(RULES, 30), (DASHBOARD, 40)] {
        let text = read(file);
        let names = named(&text);
        assert!(names.len() > least, "only {names:?} found in {file}");
        for name in names {
            let suffixes = ["_bucket", "_sum", "_count"].into_iter();
            let families = suffixes.filter_map(|suffix| name.strip_suffix(suffix));
            let mut names = families.chain([name]);
            assert!(names.any(|name| known.contains(name)), "{name} of {file} does not exist");
        }
    }
}

#[test]
fn every_alert_has_its_section_of_the_runbook_and_every_section_its_alert() {
    let urls = alerts(&read(RULES), "runbook_url: ");
    assert!(urls.len() > 30, "only {urls:?} found");
    let operations = read("docs/operations.md");
    let sections: BTreeSet<_> =
        operations.lines().filter_map(|line| line.strip_prefix("### Culvert")).collect();
    let named: BTreeSet<_> = urls.keys().map(|name| name.trim_start_matches("Culvert")).collect();
    assert_eq!(sections, named);
    for (name, url) in urls {
        assert_eq!(url, format!("docs/operations.md#{}", name.to_lowercase()));
    }
}

#[test]
fn every_alert_has_a_severity_and_few_are_to_wake_someone() {
    let severities = alerts(&read(RULES), "severity: ");
    let count = |severity: &str| {
        severities.values().filter(|value| value.trim_end_matches(" }") == severity).count()
    };
    let (critical, others) = (count("critical"), count("warning") + count("info"));
    assert_eq!(critical + others, severities.len());
    assert!((1..=5).contains(&critical), "{critical} alerts are critical");
}

/// Runs promtool in the folder of the rules.
fn promtool(args: &[&str]) {
    let folder = root().join("deploy/monitoring");
    let done = Command::new("promtool").args(args).current_dir(folder).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "promtool {args:?}:\n{out}{err}");
}

#[test]
fn each_alert_fires_after_its_time_for_its_series_alone() {
    if !has_program("promtool") {
        return;
    }
    promtool(&["check", "rules", "alerts.yaml"]);
    promtool(&["test", "rules", "alerts_test.yaml"]);
    let tests = read("deploy/monitoring/alerts_test.yaml");
    for name in alerts(&read(RULES), "").keys() {
        assert!(tests.contains(&format!("  - name: {name}\n")), "{name} has no test for promtool");
    }
}
