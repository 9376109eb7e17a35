//! Progress of a comparison, on standard error.

use std::io::{IsTerminal as _, Write as _, stderr};

/// One line on standard error, rewritten in place on a terminal.
#[derive(Debug)]
pub(super) struct Progress {
    terminal: bool,
    title: String,
}

impl Progress {
    pub(super) fn start(title: String) -> Self {
        let progress = Self { terminal: stderr().is_terminal(), title };
        progress.show("starting");
        progress
    }

    /// Shows the progress; on a terminal only.
    pub(super) fn show(&self, state: &str) {
        if self.terminal {
            eprint!("\r\x1b[2K{}: {state}", self.title);
            let _ = stderr().flush();
        }
    }

    /// Shows the result.
    pub(super) fn end(&self, result: &str) {
        let erase = if self.terminal { "\r\x1b[2K" } else { "" };
        eprintln!("{erase}{}: {result}", self.title);
    }
}
