//! Panics as log events. The standard library would write them to standard error itself, and wait
//! there.

use std::{
    any::Any,
    backtrace::{Backtrace, BacktraceStatus},
    panic, thread,
};

use tracing::error;

/// Logs every panic from now on.
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
        error!(panic = text, location, thread, backtrace, "internal error: a panic");
    }));
}

/// The message of a panic.
pub fn text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}
