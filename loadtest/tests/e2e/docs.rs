//! Documentation that matches the code: metrics, log events, sections, codes and examples.

mod commands;
mod links;
mod texts;
mod values;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use culvert_loadtest::{rig::Rig, targets};
use culvert_process::go_flags;

pub(crate) use self::commands::{block_with, command_lines};
pub(crate) use crate::support::repository::{read, root};

/// Folders with the source of the programs.
const SOURCES: [&str; 6] = [
    "wire/src",
    "wire/transport/src",
    "wire/konnectivity/src",
    "wire/process/src",
    "server/src",
    "agent/src",
];

/// Prefixes of the metrics of a tunnel, and of UDP sockets.
const PREFIXES: [&str; 4] =
    ["culvert_server_tunnel", "culvert_agent_tunnel", "culvert_server_udp", "culvert_agent_udp"];

/// Every source file below these folders, without its tests.
fn sources(folders: &[&str]) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders: Vec<_> = folders.iter().map(|folder| root().join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "tests") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && path.file_name().is_some_and(|name| name != "tests.rs")
            {
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
                found.push((path, code.to_owned()));
            }
        }
    }
    found
}

/// Every string literal of a source file.
fn literals(source: &str) -> impl Iterator<Item = &str> {
    source.split('"').skip(1).step_by(2)
}

/// Whether this is the name of a metric of Culvert's.
pub(crate) fn is_metric(name: &str) -> bool {
    let prefixes = [
        "konnectivity_network_proxy_server_",
        "konnectivity_network_proxy_agent_",
        "culvert_server_",
        "culvert_agent_",
        "culvert_build_info",
        "culvert_log_",
        "culvert_listener_",
    ];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
}

/// Names of the metrics of a scrape.
fn scraped(scrape: &str) -> impl Iterator<Item = &str> {
    let types = scrape.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.map(|line| line.split(' ').next().unwrap()).filter(|name| is_metric(name))
}

/// Names of the metrics in the first cells of a document's tables. `…_suffix` is the name of
/// another metric of the same tunnel.
pub(crate) fn documented(document: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for row in document.lines().filter_map(|line| line.strip_prefix("| `")) {
        let cell = row.split(" | ").next().unwrap();
        let quoted: Vec<_> = cell.split('`').step_by(2).collect();
        let prefix = PREFIXES.iter().find(|prefix| quoted[0].starts_with(**prefix));
        for name in quoted.into_iter().filter(|name| !name.is_empty()) {
            if is_metric(name) {
                names.insert(name.to_owned());
            } else if let (Some(suffix), Some(prefix)) = (name.strip_prefix('…'), prefix) {
                names.insert(format!("{prefix}{suffix}"));
            }
        }
    }
    names
}

/// The metrics of a server and an agent with a tunnel, a dial and a failed dial, and those that the
/// source names besides.
#[tokio::test]
async fn the_operators_tables_have_every_metric_and_no_other() {
    let rig = Rig::new().start().await.unwrap();
    let target = targets::echo().await.unwrap();
    rig.dial(target.address()).await.unwrap().close().await.unwrap();
    rig.dial("127.0.0.1").await.unwrap_err();
    let scrape = rig.server.scrape() + &rig.agents()[0].scrape();
    let mut names: BTreeSet<_> = scraped(&scrape).map(str::to_owned).collect();
    assert!(names.contains("culvert_agent_tunnel_copies_used_total"), "{names:?}");
    for (_, source) in sources(&["server/src", "agent/src"]) {
        let literals = literals(&source).filter(|text| is_metric(text)).map(str::to_owned);
        names.extend(literals.filter(|text| !PREFIXES.contains(&text.as_str())));
    }
    let documented = documented(&read("docs/operations.md"));
    let missing: Vec<_> = names.difference(&documented).collect();
    let stale: Vec<_> = documented.difference(&names).collect();
    assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
    assert!(stale.is_empty(), "only in docs/operations.md: {stale:?}");
}

#[test]
fn the_first_cell_of_a_row_names_its_metrics() {
    let table = "| `culvert_agent_tunnel_rtt_seconds`, `…_mtu_bytes` by `server_id` | see \
                 `culvert_server_tunnels` | – |\n| other | `culvert_server_streams_total` | – |\n";
    let expected = ["culvert_agent_tunnel_mtu_bytes", "culvert_agent_tunnel_rtt_seconds"];
    assert_eq!(documented(table), expected.map(str::to_owned).into());
}

/// A source without its comments, whose examples are no events, and with each literal in one line.
fn uncommented(source: &str) -> String {
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let mut text = String::new();
    for line in lines {
        match text.strip_suffix("\\\n").map(str::len) {
            Some(length) => {
                text.truncate(length);
                text.push_str(line.trim_start());
            }
            None => text.push_str(line),
        }
        text.push('\n');
    }
    text
}

/// The arguments of every call of an event's macro in a source.
fn event_calls(source: &str) -> Vec<&str> {
    let mut calls = Vec::new();
    for level in ["trace!(", "debug!(", "info!(", "warn!(", "error!(", "rate_limited!("] {
        for (start, _) in source.match_indices(level) {
            let rest = &source[start + level.len()..];
            let mut depth = 1;
            let end = rest.find(|c| {
                depth += i32::from(c == '(') - i32::from(c == ')');
                depth == 0
            });
            calls.push(&rest[..end.unwrap()]);
        }
    }
    calls
}

/// A collector of JSON lines gets numbers and texts, and keys once: the line itself has a target.
#[test]
fn no_event_logs_the_debug_form_of_a_value_or_takes_the_name_of_a_lines_own_field() {
    let mut calls = 0;
    for (path, source) in sources(&SOURCES) {
        let source = uncommented(&source);
        for call in event_calls(&source) {
            calls += 1;
            for field in call.split(',').map(str::trim) {
                let (name, value) = field.split_once(" = ").unwrap_or((field, field));
                let is_debug = value.starts_with('?');
                assert!(!is_debug, "{field:?} of {}", path.display());
                let name = name.trim_start_matches("per ").trim_start_matches('%');
                let is_taken = ["target", "level", "timestamp", "message"].contains(&name);
                assert!(!is_taken, "{field:?} of {}", path.display());
            }
        }
    }
    assert!(calls > 60, "only {calls} events found");
}

/// The line that ends an interval has the key alone beside the number of events.
#[test]
fn an_event_whose_line_is_limited_has_a_key_if_it_has_a_cause() {
    let mut calls = 0;
    for (path, source) in sources(&SOURCES) {
        let source = uncommented(&source);
        for call in source.split("rate_limited!(").skip(1) {
            let call = call.split(");").next().unwrap();
            let fields: Vec<_> = call.split(',').map(str::trim).collect();
            calls += 1;
            let is_keyed = fields.iter().any(|field| field.starts_with("per "));
            let has_cause = fields.iter().any(|field| {
                let name = field.split(" = ").next().unwrap().trim_start_matches('%');
                ["error", "reason", "fault"].contains(&name)
            });
            let remedy = "write `per error = error, at most 8 in all`";
            assert!(is_keyed || !has_cause, "{}: {remedy}: {call}", path.display());
        }
    }
    assert!(calls > 15, "only {calls} events found");
}

/// The words in backticks of the row that begins with this metric.
fn words_of_row<'a>(document: &'a str, metric: &str) -> Vec<&'a str> {
    let row = document.lines().find(|line| line.starts_with(&format!("| `{metric}`")));
    let meaning = row.unwrap_or_else(|| panic!("no row of {metric}")).split(" | ").nth(1).unwrap();
    meaning.split('`').skip(1).step_by(2).filter(|word| !word.starts_with('-')).collect()
}

/// The names in the second column of the table below a heading of the protocol.
fn codes_of_table<'a>(document: &'a str, heading: &str) -> Vec<&'a str> {
    let section = document.split(heading).nth(1).unwrap().split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| 0x"));
    rows.map(|row| row.split(" | ").nth(1).unwrap()).collect()
}

/// The reasons in the second column of the table of failed dials.
fn reasons_of_dials(document: &str) -> BTreeSet<&str> {
    let section = document.split("\n## 7. Failed dials").nth(1).unwrap();
    let rows = section.split("\n## ").next().unwrap().lines().filter(|row| row.starts_with("| `"));
    let rows = rows.chain(section.lines().filter(|row| row.starts_with("| – |")));
    let cells = rows.map(|row| row.rsplit(" | ").nth(1).unwrap());
    cells.filter_map(|cell| cell.strip_prefix('`')?.strip_suffix('`')).collect()
}

/// An alert on a rate sees no first event of a counter that did not exist before.
#[tokio::test]
async fn every_counter_with_documented_labels_exists_from_the_start() {
    let rig = Rig::new().agents(0).start().await.unwrap();
    let agent = culvert_agent::Agent::bind(&rig.agent_config("fresh").unwrap()).unwrap();
    let scrape = rig.server.scrape() + &agent.metrics().render(agent.servers());
    let (operations, protocol) = (read("docs/operations.md"), read("docs/protocol.md"));
    let closes = codes_of_table(&protocol, "## 8. Close codes");
    let mut expected = Vec::new();
    for (metric, label) in [
        ("culvert_server_dials_waited_total", "result"),
        ("culvert_server_optimistic_dials_total", "result"),
        ("culvert_server_join_failures_total", "reason"),
        ("culvert_server_lease_renewals_total", "result"),
        ("konnectivity_network_proxy_server_dial_failure_count", "reason"),
        ("culvert_agent_connect_attempts_total", "result"),
        ("culvert_agent_dial_failures_total", "kind"),
    ] {
        let words = words_of_row(&operations, metric);
        expected.extend(words.into_iter().map(|word| (metric, label, word)));
    }
    let dials = "culvert_server_dial_failures_total";
    expected.extend(reasons_of_dials(&operations).into_iter().map(|word| (dials, "reason", word)));
    for metric in ["culvert_server_tunnels_lost_total", "culvert_agent_tunnels_lost_total"] {
        let others = ["timed_out", "peer_restarted", "transport"];
        expected.extend(closes.iter().chain(&others).map(|word| (metric, "reason", *word)));
    }
    assert!(expected.len() > 60, "only {expected:?}");
    for (metric, label, value) in expected {
        let line = format!("\n{metric}{{{label}=\"{value}\"}} 0\n");
        assert!(scrape.contains(&line), "{metric} {label}={value} is not in\n{scrape}");
    }
}

/// The text of an event is the last literal of its call without a placeholder.
#[test]
fn every_log_event_is_in_the_operators_table() {
    let document = read("docs/operations.md");
    let mut events = BTreeSet::new();
    for (path, text) in sources(&SOURCES) {
        let text = uncommented(&text);
        for level in ["info!(", "warn!(", "error!(", "rate_limited!("] {
            for call in text.split(level).skip(1) {
                let call = call.split(");").next().unwrap();
                let event = literals(call).last().filter(|text| !text.contains('{'));
                let Some(event) = event else { continue };
                events.insert(event.to_owned());
                assert!(
                    document.contains(event),
                    "{event:?} of {} is not in docs/operations.md",
                    path.display()
                );
            }
        }
    }
    assert!(events.len() > 15, "only {events:?} found");
}

#[test]
fn every_event_of_the_operators_table_is_in_the_sources() {
    let document = read("docs/operations.md");
    let table = document.split("| event | process |").nth(1).unwrap();
    let rows = table.lines().skip(2).take_while(|line| line.starts_with("| "));
    let cells = rows.map(|row| row.split(" | ").next().unwrap());
    let events: Vec<_> = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect();
    assert!(events.len() > 30, "only {events:?} found");
    let sources: String = sources(&SOURCES).iter().map(|(_, text)| uncommented(text)).collect();
    for event in events {
        assert!(sources.contains(&format!("\"{event}\"")), "{event:?} is only in the table");
    }
}

#[test]
fn every_row_of_the_table_of_events_says_what_to_do() {
    let document = read("docs/operations.md");
    let table = document.split("| event | process | meaning | to do |").nth(1).unwrap();
    let rows: Vec<_> = table.lines().skip(2).take_while(|line| line.starts_with("| ")).collect();
    assert!(rows.len() > 60, "only {} rows found", rows.len());
    for row in rows {
        let cells: Vec<_> = row.trim_matches(['|', ' ']).split(" | ").collect();
        let to_do = cells.get(3).copied().unwrap_or_default().trim();
        assert!(cells.len() == 4 && to_do.len() > 3, "write `nothing` or what to do: {row}");
    }
}

/// `docs/protocol.md`'s headings as their anchors.
fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document.lines().filter_map(|line| line.strip_prefix("## "));
    headings.map(|heading| heading.to_lowercase().replace('.', "").replace(' ', "-")).collect()
}

#[test]
fn every_cited_section_exists() {
    let anchors = anchors(&read("docs/protocol.md"));
    let mut cited = 0;
    for (path, text) in sources(&SOURCES) {
        for citation in text.split("docs/protocol.md#").skip(1) {
            let anchor = citation.split_whitespace().next().unwrap();
            assert!(anchors.contains(anchor), "{anchor} of {}", path.display());
            cited += 1;
        }
    }
    assert!(cited > 8, "only {cited} citations found");
}

#[test]
fn every_code_is_in_the_tables() {
    let document = read("docs/protocol.md");
    let codes = culvert_wire::StreamCode::ALL.iter().map(|code| (code.as_u32(), code.name()));
    let closes = culvert_wire::CloseCode::ALL.iter().map(|code| (code.as_u32(), code.name()));
    for (number, name) in codes.chain(closes) {
        let row = format!("| {number:#04x} | {name} | ");
        assert!(document.contains(&row), "{row} is not in docs/protocol.md");
    }
}

#[test]
fn every_example_frame_decodes_to_what_it_is_called() {
    use culvert_wire::{
        control::ControlMessage,
        dial::{DialReply, DialRequest},
        frame::{Frame, FrameHead, HEAD_LEN},
        resume::{ResumeReply, ResumeRequest},
    };
    let document = read("docs/protocol.md");
    let mut examples = 0;
    for block in document.split("```hex ").skip(1) {
        let (name, rest) = block.split_once('\n').unwrap();
        let hex: String =
            rest.split("```").next().unwrap().split_whitespace().collect::<Vec<_>>().concat();
        let bytes: Vec<u8> = (0..hex.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
            .collect();
        let head = FrameHead::decode(*bytes.first_chunk::<HEAD_LEN>().unwrap());
        assert_eq!(bytes.len(), HEAD_LEN + head.length, "{name}");
        let frame = Frame { kind: head.kind, body: bytes[HEAD_LEN..].to_vec().into() };
        let is_right = match name {
            "dial-request" => frame.message::<DialRequest>().is_ok(),
            "dial-reply" => frame.message::<DialReply>().is_ok(),
            "resume-request" => frame.message::<ResumeRequest>().is_ok(),
            "resume-reply" => frame.message::<ResumeReply>().is_ok(),
            name => {
                let message = format!("{:?}", ControlMessage::decode(&frame).unwrap());
                message.to_lowercase().starts_with(&name.replace('-', ""))
            }
        };
        assert!(is_right, "{name}");
        examples += 1;
    }
    assert_eq!(examples, 18);
}

/// `--keepalive-time` differs: the server's is joined with the tunnels' interval, and the agent's has
/// a minimum.
#[test]
fn flags_of_server_and_agent_with_one_name_have_one_text() {
    let server = go_flags::command::<culvert_server::config::Flags>();
    let agent = go_flags::command::<culvert_agent::config::Flags>();
    let mut shared = 0;
    for flag in server.get_arguments().filter(|flag| flag.get_id() != "keepalive_time") {
        let same = agent.get_arguments().find(|other| other.get_long() == flag.get_long());
        let Some(same) = same else { continue };
        let text = |flag: &clap::Arg| flag.get_help().map(ToString::to_string);
        assert_eq!(text(flag), text(same), "{:?}", flag.get_long());
        shared += 1;
    }
    assert!(shared > 30, "only {shared} shared flags found");
}

/// Every document for readers of the repository.
fn documents() -> Vec<PathBuf> {
    let mut found = vec![PathBuf::from("README.md"), "CONTRIBUTING.md".into()];
    for folder in ["docs", "docs/decisions", "deploy", "deploy/recipes", "deploy/helm/culvert"] {
        for entry in fs::read_dir(root().join(folder)).unwrap() {
            let name = entry.unwrap().file_name();
            if Path::new(&name).extension().is_some_and(|extension| extension == "md") {
                found.push(Path::new(folder).join(name));
            }
        }
    }
    found
}
