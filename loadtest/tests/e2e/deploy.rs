//! The manifests' arguments are ones that the programs take.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use culvert_process::go_flags;

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}

/// Files below `deploy/` that an operator applies or copies: manifests, recipes and units.
fn files() -> Vec<PathBuf> {
    let folders = ["kubernetes", "helm/rendered", "recipes"];
    let entries = folders.iter().flat_map(|folder| fs::read_dir(deploy().join(folder)).unwrap());
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Command lines of one of the programs: the lists of items after `command:` lines that name it.
fn command_lines(text: &str, program: &str) -> Vec<Vec<OsString>> {
    let command = |line: &str| line.trim() == format!("command: [\"/{program}\"]");
    let lines: Vec<_> = text.lines().collect();
    let starts = (0..lines.len()).filter(|&start| command(lines[start]));
    let of = |start: usize| {
        let items = lines[start..].iter().skip_while(|line| line.trim() != "args:").skip(1);
        let items = items.filter_map(|line| match line.trim().strip_prefix("- ") {
            Some(item) => Some(Some(item.trim_matches('"'))),
            None if line.trim().starts_with('#') => None,
            None => Some(None),
        });
        let items = items.map_while(|item| item.filter(|item| item.starts_with('-')));
        std::iter::once(program).chain(items).map(OsString::from).collect()
    };
    starts.map(of).collect()
}

#[test]
fn the_server_takes_the_arguments_of_all_manifests() {
    let mut count = 0;
    for file in files() {
        let text = fs::read_to_string(&file).unwrap();
        for program in ["culvert-server", "proxy-server"] {
            for args in command_lines(&text, program) {
                assert!(args.len() > 5, "{file:?} {args:?}");
                let parsed = go_flags::try_parse_from::<culvert_server::config::Flags>(args);
                assert!(parsed.is_ok(), "{file:?} {parsed:?}");
                count += 1;
            }
        }
    }
    assert!(count >= 2, "{count} command lines of servers were found");
}

#[test]
fn the_agent_takes_the_arguments_of_all_manifests() {
    let mut count = 0;
    for file in files() {
        let text = fs::read_to_string(&file).unwrap();
        for program in ["culvert-agent", "proxy-agent"] {
            for args in command_lines(&text, program) {
                assert!(args.len() > 5, "{file:?} {args:?}");
                let parsed = go_flags::try_parse_from::<culvert_agent::config::Flags>(args);
                assert!(parsed.is_ok(), "{file:?} {parsed:?}");
                count += 1;
            }
        }
    }
    assert!(count >= 4, "{count} command lines of agents were found");
}

#[test]
fn the_variables_in_arguments_are_set() {
    let mut count = 0;
    for file in files().iter().filter(|file| file.extension().is_some_and(|end| end == "yaml")) {
        let text = fs::read_to_string(file).unwrap();
        for name in text.split("=$(").skip(1).map(|rest| rest.split(')').next().unwrap()) {
            assert!(text.contains(&format!("name: {name}")), "{name} in {file:?}");
            count += 1;
        }
    }
    assert!(count >= 4, "{count} variables were found");
}

#[test]
fn the_charts_readme_lists_every_value() {
    let chart = deploy().join("helm/culvert");
    let values = fs::read_to_string(chart.join("values.yaml")).unwrap();
    let readme = fs::read_to_string(chart.join("README.md")).unwrap();
    let mut section = "";
    let mut count = 0;
    for line in values.lines() {
        let indent = line.len() - line.trim_start().len();
        let Some((key, _)) = line.trim().split_once(':') else { continue };
        let name = match indent {
            0 if line.starts_with('#') => continue,
            0 => {
                section = key;
                continue;
            }
            2 => format!("`{section}.{key}`"),
            _ => continue,
        };
        assert!(readme.contains(&name), "{name} is missing in the chart's README");
        count += 1;
    }
    assert!(count > 40, "{count} values were found");
}

#[test]
fn the_charts_copies_of_rules_and_dashboard_are_equal() {
    for name in ["alerts.yaml", "dashboard.json"] {
        let copy = deploy().join("helm/culvert/files").join(name);
        let original = deploy().join("monitoring").join(name);
        let is_equal = fs::read(copy).unwrap() == fs::read(original).unwrap();
        assert!(is_equal, "{name} in the chart is out of date: run deploy/monitoring/render");
    }
}
