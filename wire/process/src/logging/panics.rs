//! Panics as log events. The standard library would write them to standard error itself, and wait
//! there.

use std::{
    any::Any,
    backtrace::{Backtrace, BacktraceStatus},
    panic, thread,
    time::Duration,
};

use tracing::{Level, enabled, error};

/// Maximum time that a panic waits until it is written: the process may be aborted next.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(100);

/// Logs every panic from now on, also where a filter hides errors.
pub(super) fn log_panics() {
    panic::set_hook(Box::new(|panic| {
        let text = text(panic.payload());
        let location = panic.location().map(ToString::to_string);
        let thread = thread::current();
        let thread = thread.name();
        // Captured where RUST_BACKTRACE asks for it.
        let backtrace = Backtrace::capture();
        let captured = backtrace.status() == BacktraceStatus::Captured;
        let backtrace = captured.then(|| backtrace.to_string());
        if enabled!(Level::ERROR) {
            error!(panic = text, location, thread, backtrace, "internal error: a panic");
        } else {
            super::print(format_args!("{}", line(text, location.as_deref(), thread)));
        }
        super::flush_for(FLUSH_TIMEOUT);
    }));
}

/// A line about a panic that a filter would hide.
fn line(text: &str, location: Option<&str>, thread: Option<&str>) -> String {
    let (location, thread) = (location.unwrap_or("?"), thread.unwrap_or("?"));
    // Quoted: the text may be a peer's in part.
    format!("internal error: a panic: {text:?} at {location} in thread {thread:?}\n")
}

/// The message of a panic.
pub fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_that_a_filter_would_hide_is_one_line() {
        let line = line("scripted\nfault", Some("a.rs:1:2"), None);
        let expected = r#"internal error: a panic: "scripted\nfault" at a.rs:1:2 in thread "?""#;
        assert_eq!(line, format!("{expected}\n"));
    }
}
