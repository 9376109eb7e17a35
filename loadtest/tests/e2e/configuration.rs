//! `docs/configuration.md`, whose tables of flags are made from the flags themselves.
//!
//! `UPDATE=1 cargo test -p culvert-loadtest --test e2e configuration` writes them anew.

use std::{collections::BTreeSet, fs, path::Path};

use clap::{Arg, Command};
use culvert_process::command_line;

/// Flags of Konnectivity's `proxy-server` v0.36.
const OF_KONNECTIVITY_SERVER: &str = "\
    admin-bind-address admin-port agent-bind-address agent-namespace agent-port agent-service-account \
    authentication-audience backend-dial-timeout cipher-suites cluster-ca-cert cluster-cert \
    cluster-key delete-existing-uds-file enable-contention-profiling enable-lease-controller \
    enable-profiling frontend-keepalive-time graceful-shutdown-timeout health-bind-address \
    health-port keepalive-time kube-api-content-type kubeconfig kubeconfig-burst kubeconfig-qps \
    lease-label lease-namespace mode proxy-strategies server-bind-address server-ca-cert \
    server-cert server-count server-id server-key server-port tls-min-version uds-name \
    warn-on-channel-limit xfr-channel-size";

/// Flags of Konnectivity's `proxy-agent` v0.36.
const OF_KONNECTIVITY_AGENT: &str = "\
    admin-bind-address admin-server-port agent-cert agent-id agent-identifiers agent-key alpn-proto \
    ca-cert count-server-leases enable-contention-profiling enable-profiling health-server-host \
    health-server-port keepalive-time kube-api-content-type kubeconfig lease-label lease-namespace \
    probe-interval proxy-server-host proxy-server-port server-count-source \
    service-account-token-path sync-forever sync-interval sync-interval-cap \
    warn-on-channel-limit xfr-channel-size";

/// Flags of klog, which both have.
const OF_KLOG: &str = "\
    add-dir-header alsologtostderr alsologtostderrthreshold legacy-stderr-threshold-behavior \
    log-backtrace-at log-dir log-file log-file-max-size logtostderr one-output skip-headers \
    skip-log-headers stderrthreshold v vmodule";

/// The version that all flags are in but those of [`LATER`].
const FIRST_VERSION: &str = "0.1";
/// Flags that came later, each with its first version.
const LATER: [(&str, &str); 0] = [];

const DOCUMENT: &str = "docs/configuration.md";

fn path() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(DOCUMENT)
}

/// A program's command, and the names of Konnectivity's flags.
fn programs() -> [(&'static str, Command, BTreeSet<&'static str>); 2] {
    let names = |own: &'static str| own.split_whitespace().chain(OF_KLOG.split_whitespace());
    let server = command_line::command::<culvert_server::config::Flags>();
    let agent = command_line::command::<culvert_agent::config::Flags>();
    [
        ("culvert-server", server, names(OF_KONNECTIVITY_SERVER).collect()),
        ("culvert-agent", agent, names(OF_KONNECTIVITY_AGENT).collect()),
    ]
}

/// The flags of a command that its help shows, and that do something for the process.
fn flags(command: &Command) -> impl Iterator<Item = &Arg> {
    command.get_arguments().filter(|flag| {
        !flag.is_hide_set() && !["help", "version"].contains(&flag.get_id().as_str())
    })
}

/// A text as the cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('<', "&lt;").replace('*', "\\*").replace('\n', " ")
}

/// Meaning and default of a flag: a default that no value expresses is at the end of its help.
fn meaning_and_default(flag: &Arg) -> (String, String) {
    let help = flag.get_help().unwrap_or_else(|| panic!("{:?} has no help", flag.get_long()));
    let help = help.to_string();
    let (mut meaning, default) = match help.split_once(" [default: ") {
        Some((meaning, default)) => (cell(meaning), cell(default.trim_end_matches(']'))),
        None => {
            let values: Vec<_> = flag
                .get_default_values()
                .iter()
                .map(|value| value.to_string_lossy().into_owned())
                .collect();
            let text = values.join(",");
            (cell(&help), if text.is_empty() { "–".into() } else { format!("`{text}`") })
        }
    };
    let is_boolean = flag.get_value_names().is_some_and(|names| names == ["BOOL"]);
    let values: Vec<_> = flag
        .get_possible_values()
        .iter()
        .filter(|value| !value.is_hide_set() && !is_boolean)
        .map(|value| match value.get_help() {
            Some(help) => format!("`{}` ({})", value.get_name(), cell(&help.to_string())),
            None => format!("`{}`", value.get_name()),
        })
        .collect();
    if !values.is_empty() {
        meaning += &format!(". Values: {}", values.join(", "));
    }
    if let Some(name) = flag.get_env().and_then(|name| name.to_str()) {
        meaning += &format!(". Variable: `{name}`");
    }
    (meaning, default)
}

/// The tables of a program's flags, one for each heading of its help.
fn tables(command: &Command, konnectivity: &BTreeSet<&str>) -> String {
    let mut headings: Vec<&str> = Vec::new();
    for flag in flags(command) {
        let heading = flag.get_help_heading().unwrap_or_else(|| panic!("{flag} has no heading"));
        if !headings.contains(&heading) {
            headings.push(heading);
        }
    }
    let mut text = String::new();
    for heading in headings {
        text += &format!("\n### {heading}\n\n");
        text += "| flag | default | meaning | since | Konnectivity's |\n";
        text += "| --- | --- | --- | --- | --- |\n";
        for flag in flags(command).filter(|flag| flag.get_help_heading() == Some(heading)) {
            let name = flag.get_long().unwrap();
            let value = flag.get_value_names().unwrap_or_default().join(" ");
            let (meaning, default) = meaning_and_default(flag);
            let aliases = flag.get_all_aliases().unwrap_or_default();
            let theirs = [name].into_iter().chain(aliases).find(|name| konnectivity.contains(name));
            let theirs = theirs.map_or_else(|| "–".into(), |name| format!("`--{name}`"));
            let since = LATER.iter().find(|(later, _)| *later == name);
            let since = since.map_or(FIRST_VERSION, |(_, version)| version);
            let value = cell(&value);
            text +=
                &format!("| `--{name}` {value} | {default} | {meaning} | {since} | {theirs} |\n");
        }
    }
    text + "\n"
}

/// The document with the text between the marks of a program replaced.
fn replaced(document: &str, program: &str, tables: &str) -> String {
    let begin = format!("<!-- flags of {program}, written by a test -->\n");
    let end = format!("<!-- end of the flags of {program} -->");
    let (before, rest) = document.split_once(&begin).unwrap_or_else(|| panic!("no {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("no {end}"));
    format!("{before}{begin}{tables}{end}{after}")
}

#[test]
fn the_configuration_reference_is_that_of_the_flags() {
    let written = fs::read_to_string(path()).unwrap();
    let document =
        programs().iter().fold(written.clone(), |document, (program, command, theirs)| {
            let mut command = command.clone();
            command.build();
            replaced(&document, program, &tables(&command, theirs))
        });
    if std::env::var_os("UPDATE").is_some() {
        fs::write(path(), document).unwrap();
        return;
    }
    let difference = written.lines().zip(document.lines()).find(|(old, new)| old != new);
    assert!(
        written == document,
        "{DOCUMENT} is out of date: UPDATE=1 cargo test -p culvert-loadtest --test e2e \
         configuration writes it; first difference: {difference:#?}"
    );
}

#[test]
fn every_flag_of_konnectivity_is_there() {
    for (program, command, theirs) in programs() {
        for name in theirs {
            let is_there = flags(&command).any(|flag| {
                flag.get_long() == Some(name)
                    || flag.get_all_aliases().is_some_and(|aliases| aliases.contains(&name))
            });
            assert!(is_there, "--{name} of {program}");
        }
    }
}

#[test]
fn every_variable_of_a_flag_is_in_the_table_of_variables() {
    let document = fs::read_to_string(path()).unwrap();
    let variables = document.split("\n## 3. Environment variables").nth(1).unwrap();
    let variables = variables.split("\n## ").next().unwrap();
    let mut found = 0;
    for (_, command, _) in programs() {
        for name in flags(&command).filter_map(|flag| flag.get_env()?.to_str()) {
            assert!(variables.contains(&format!("| `{name}`")), "{name}");
            found += 1;
        }
    }
    assert_eq!(found, 2);
}
