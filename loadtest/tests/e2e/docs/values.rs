//! The YAML and TOML of the documents parses, and values of the chart are ones that it has.

use std::path::Path;

use serde_json::Value;

use super::{documents, read};

/// The blocks of a document in this language, without their indentation.
fn blocks(document: &Path, language: &str) -> Vec<String> {
    let text = read(document);
    let mut lines = text.lines();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        if line.trim_start().strip_prefix("```") == Some(language) {
            let indent = line.len() - line.trim_start().len();
            let body = lines.by_ref().take_while(|line| line.trim() != "```");
            let body: Vec<_> = body.map(|line| line.get(indent..).unwrap_or_default()).collect();
            found.push(body.join("\n"));
        }
    }
    found
}

#[test]
fn every_block_of_toml_parses() {
    let mut count = 0;
    for document in documents() {
        for block in blocks(&document, "toml") {
            let parsed = block.parse::<toml::Table>();
            assert!(parsed.is_ok(), "{}: {parsed:?}\n{block}", document.display());
            count += 1;
        }
    }
    assert!(count > 0, "no block found");
}

/// The first key of `given` that the chart does not have. What is an empty map or a list there is
/// free.
fn unknown(given: &Value, chart: &Value) -> Option<String> {
    let (given, chart) = (given.as_object()?, chart.as_object().filter(|map| !map.is_empty())?);
    given.iter().find_map(|(key, value)| match chart.get(key) {
        None => Some(key.clone()),
        Some(of_chart) => unknown(value, of_chart).map(|inner| format!("{key}.{inner}")),
    })
}

#[test]
fn every_block_of_yaml_parses_and_has_keys_of_the_chart_if_it_is_its_values() {
    let chart: Value = serde_saphyr::from_str(&read("deploy/helm/culvert/values.yaml")).unwrap();
    let (mut count, mut values) = (0, 0);
    for document in documents() {
        for block in blocks(&document, "yaml") {
            let parsed: Result<Vec<Value>, _> = serde_saphyr::from_multiple(&block);
            let parsed = parsed.unwrap_or_else(|error| {
                panic!("{}: {error}\n{block}", document.display());
            });
            count += 1;
            let is_values =
                |key: &String| ["agent", "server", "networkPolicy"].contains(&key.as_str());
            let maps = parsed
                .iter()
                .filter(|map| map.as_object().is_some_and(|map| map.keys().any(is_values)));
            for map in maps {
                let unknown = unknown(map, &chart);
                assert_eq!(unknown, None, "{}: the chart has no such value", document.display());
                values += 1;
            }
        }
    }
    assert!(count > 5 && values > 1, "{count} blocks, {values} of values");
}
