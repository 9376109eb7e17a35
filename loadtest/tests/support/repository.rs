//! Files of the repository.

use std::{collections::BTreeMap, fs, path::Path};

/// The rules of alerts for Prometheus.
pub(crate) const RULES: &str = "deploy/monitoring/alerts.yaml";
/// The dashboard for Grafana.
pub(crate) const DASHBOARD: &str = "deploy/monitoring/dashboard.json";

/// Its top level.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The text of a file.
pub(crate) fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// The alerts of the rules, with the value of one of their keys.
pub(crate) fn alerts(rules: &str, key: &str) -> BTreeMap<String, String> {
    let blocks = rules.split("- alert: ").skip(1);
    let value = |block: &str| {
        let line = block.lines().find_map(|line| line.split_once(key));
        line.map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    blocks.map(|block| (block.lines().next().unwrap().to_owned(), value(block))).collect()
}
