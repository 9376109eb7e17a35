//! What was built: version, commit, protocol, features.

use std::fmt::Write as _;

use culvert_wire::version::{ALPN, Features, REVISION};

/// Version of the programs.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Maximum length of a commit, in characters.
const COMMIT_LEN: usize = 12;

/// The commit that was built, in hexadecimal, as the variable `CULVERT_COMMIT` named it at build
/// time; `None` without the variable, as in a build from an archive.
pub fn commit() -> Option<&'static str> {
    shortened(option_env!("CULVERT_COMMIT")?)
}

fn shortened(commit: &str) -> Option<&str> {
    let is_commit = !commit.is_empty() && commit.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_commit.then(|| &commit[..commit.len().min(COMMIT_LEN)])
}

/// The program's name and version for its peers, with the commit behind a plus sign if it is known.
pub fn software(program: &str) -> String {
    let mut text = format!("{program} {VERSION}");
    if let Some(commit) = commit() {
        let _ = write!(text, "+{commit}");
    }
    text
}

/// The text of `--version` behind the program's name.
pub fn text() -> String {
    let features: Vec<_> = Features::supported().names().collect();
    format!(
        "{VERSION}\ncommit {}\nprotocol {}, revision {REVISION}\nfeatures {}",
        commit().unwrap_or("unknown"),
        String::from_utf8_lossy(ALPN),
        features.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_is_hexadecimal_and_short() {
        assert_eq!(shortened("0123456789abcdef"), Some("0123456789ab"));
        assert_eq!(shortened("01ab"), Some("01ab"));
        for text in ["", "main", "01 ab", "ä1"] {
            assert_eq!(shortened(text), None);
        }
    }

    #[test]
    fn the_text_names_version_commit_protocol_and_features() {
        let text = text();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], VERSION);
        assert!(lines[1].starts_with("commit "), "{text}");
        assert_eq!(lines[2], format!("protocol culvert/1, revision {REVISION}"));
        assert_eq!(lines[3], "features ping, drain, hedge, renewal, server_set, repair, resume");
        assert!(software("culvert-agent").starts_with(&format!("culvert-agent {VERSION}")));
    }
}
