//! Documentation that cannot drift: what the code names, the documents name too.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{collections::BTreeSet, fs, path::Path};

const CRATES: [&str; 6] =
    ["wire", "wire/transport", "wire/konnectivity", "wire/process", "server", "agent"];

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
    for crate_name in CRATES {
        for source in sources(&root().join(crate_name).join("src")) {
            let text = fs::read_to_string(&source).unwrap();
            let text = text.split("#[cfg(test)]").next().unwrap();
            let text = uncommented(text);
            for level in ["info!(", "warn!(", "error!(", "rate_limited!("] {
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

/// The source without its comments, whose examples are no events.
fn uncommented(source: &str) -> String {
    let lines = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.flat_map(|line| [line, "\n"]).collect()
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

/// `docs/protocol.md`'s headings as their anchors.
fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document.lines().filter_map(|line| line.strip_prefix("## "));
    headings.map(|heading| heading.to_lowercase().replace('.', "").replace(' ', "-")).collect()
}

#[test]
fn every_cited_section_exists() {
    let anchors = anchors(&read("docs/protocol.md"));
    let mut cited = 0;
    for crate_name in CRATES {
        for source in sources(&root().join(crate_name).join("src")) {
            let text = fs::read_to_string(&source).unwrap();
            for citation in text.split("docs/protocol.md#").skip(1) {
                let anchor = citation.split_whitespace().next().unwrap();
                assert!(anchors.contains(anchor), "{anchor} of {}", source.display());
                cited += 1;
            }
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
            name => {
                let message = format!("{:?}", ControlMessage::decode(&frame).unwrap());
                message.to_lowercase().starts_with(name)
            }
        };
        assert!(is_right, "{name}");
        examples += 1;
    }
    assert_eq!(examples, 9);
}
