//! Documentation that cannot drift: what the code names, the documents name too.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{collections::BTreeSet, fs, path::Path};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

/// Every string literal of a source file.
fn literals(source: &str) -> impl Iterator<Item = &str> {
    source.split('"').skip(1).step_by(2)
}

#[test]
fn every_metric_is_in_the_operators_tables() {
    let document = read("docs/operations.md");
    let mut names = BTreeSet::new();
    for source in ["server/src/metrics.rs", "agent/src/metrics.rs"] {
        let source = read(source);
        names.extend(
            literals(&source)
                .filter(|text| text.starts_with("konnectivity_") || text.starts_with("culvert_"))
                .map(str::to_owned),
        );
    }
    assert!(names.len() > 25, "{names:?}");
    for name in names {
        assert!(document.contains(&name), "{name} is not in docs/operations.md");
    }
}

#[test]
fn every_log_event_is_in_the_operators_table() {
    let document = read("docs/operations.md");
    let mut events = 0;
    for crate_name in ["wire", "server", "agent"] {
        for source in sources(&root().join(crate_name).join("src")) {
            let text = fs::read_to_string(&source).unwrap();
            let text = text.split("#[cfg(test)]").next().unwrap();
            for level in ["info!(", "warn!(", "error!("] {
                for call in text.split(level).skip(1) {
                    let call = call.split(");").next().unwrap();
                    let Some(event) = literals(call).last().filter(|text| !text.contains('{'))
                    else {
                        continue;
                    };
                    events += 1;
                    assert!(
                        document.contains(event),
                        "{event:?} of {} is not in docs/operations.md",
                        source.display()
                    );
                }
            }
        }
    }
    assert!(events > 15, "only {events} events found");
}

fn sources(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}
