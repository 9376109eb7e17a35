//! The texts that docs/troubleshooting.md quotes are those that the programs print.

use super::{SOURCES, read, sources, uncommented};

/// First words of the headers of tables whose first column quotes texts of the programs.
const QUOTING: [&str; 6] =
    ["text", "text contains", "text in parentheses", "`reason`", "`quic` line", "`waits for`"];

/// What others print: the C library, Go and kube-apiserver.
const OF_OTHERS: [&str; 7] = [
    "Permission denied",
    "connect: connection refused",
    "no route to host",
    "i/o timeout",
    "dial unix",
    "no such file",
    "permission denied",
];

/// The quoted texts in the first column of those tables, without what `…` stands for.
fn quoted(document: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut is_quoting = false;
    let mut lines = document.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(row) = line.strip_prefix("| ") else { continue };
        let cell = row.split(" | ").next().unwrap();
        if lines.peek().is_some_and(|next| next.starts_with("| --- ")) {
            is_quoting = QUOTING.iter().any(|header| cell.starts_with(header));
            lines.next();
        } else if is_quoting {
            let texts = cell.split('`').skip(1).step_by(2);
            found.extend(texts.flat_map(|text| text.split('…')).map(str::trim));
        }
    }
    found.retain(|text| text.len() > 2);
    found
}

#[test]
fn the_texts_of_the_troubleshooting_tables_are_in_the_sources() {
    let document = read("docs/troubleshooting.md");
    let quoted = quoted(&document);
    assert!(quoted.len() > 40, "only {} texts found", quoted.len());
    let sources: String = sources(&SOURCES).iter().map(|(_, text)| uncommented(text)).collect();
    for text in quoted {
        // A placeholder of the source stands for what follows a colon, or for a number.
        for part in text.split(": ") {
            let part = part.trim_end_matches(|c: char| c == ':' || c == ' ' || c.is_numeric());
            let is_theirs = OF_OTHERS.contains(&part);
            assert!(is_theirs || sources.contains(part), "{part:?} of {text:?} is in no source");
        }
    }
}

#[test]
fn the_first_column_of_a_table_of_texts_is_quoted() {
    let document = "| text | cause |\n| --- | --- |\n| `one … two`, `three` | `four` |\n\n\
                    | cause | text |\n| --- | --- |\n| `five` | six |\n";
    assert_eq!(quoted(document), ["one", "two", "three"]);
}
