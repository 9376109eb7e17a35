//! The log of a process: its format, its verbosity, and a rate limit for repeated events.
//!
//! To log never waits and never fails, whatever standard error or the file is: lines go into a bounded queue,
//! and a thread of its own writes them. Lines that do not fit, or that cannot be written, are
//! counted.

mod file;
mod panics;
mod queue;
mod rate_limit;
mod writer;

use std::{
    fmt,
    io::{self, IsTerminal, Write as _},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use clap::ValueEnum;
use culvert_wire::bounded::misleads;
pub use panics::text as panic_text;
#[doc(hidden)]
pub use rate_limit::RateLimit;
#[doc(hidden)]
pub use tracing;
use tracing::Subscriber;
use tracing_subscriber::{EnvFilter, filter::ParseError, fmt::MakeWriter};

pub use self::file::LogFileConfig;
pub(crate) use self::file::open;
use self::{
    file::LogFile,
    queue::Queue,
    writer::{Sinks, Writer},
};

/// Environment variable that takes precedence over `-v`, in tracing-subscriber's notation.
const FILTER_VARIABLE: &str = "RUST_LOG";
/// Maximum time that the end of the process waits for the log to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// The lines of this process that are not written yet.
static QUEUE: Queue = Queue::new();
/// Whether the thread that writes them runs.
static WRITER_RUNS: AtomicBool = AtomicBool::new(false);
/// Whether the log goes to a file and not to standard error.
static FILE_ALONE: AtomicBool = AtomicBool::new(false);

/// Format of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Plain text, one line per event, coloured on a terminal
    Text,
    /// One JSON object per event and line
    Json,
}

/// Log settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// Format of the lines.
    pub format: LogFormat,
    /// Verbosity as in klog: 0 to 4 is info, 5 to 9 is debug, 10 and more is trace.
    pub verbosity: i32,
    /// File that the log goes to in place of standard error.
    pub file: Option<LogFileConfig>,
}

/// The log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter in the environment cannot be parsed.
    #[error("RUST_LOG is not a log filter: {0}")]
    Filter(#[from] ParseError),
    /// The process has a log already.
    #[error("the log was set up twice")]
    Twice(#[from] tracing::subscriber::SetGlobalDefaultError),
    /// The file of the log cannot be opened.
    #[error("the log file {} cannot be opened for appending: {error}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The thread that writes the log cannot be started.
    #[error("the thread that writes the log cannot be started: {0}")]
    Thread(#[source] io::Error),
}

/// Sends the log of the whole process to standard error or a file, panics included.
///
/// # Errors
/// If `RUST_LOG` cannot be parsed, if the file cannot be opened, if no thread can be started, or at
/// the second call.
pub fn init(config: &LogConfig) -> Result<(), LogError> {
    let filter = std::env::var(FILTER_VARIABLE).ok();
    let format = config.format;
    let to_stderr = config.file.as_ref().is_none_or(|file| file.also_stderr);
    let coloured = io::stderr().is_terminal() && format == LogFormat::Text && config.file.is_none();
    let file = config.file.as_ref().map(open_file).transpose()?;
    let lines = move || Line { escaped: format == LogFormat::Text, coloured };
    let subscriber = subscriber(config, filter.as_deref(), lines, coloured)?;
    tracing::subscriber::set_global_default(subscriber)?;
    FILE_ALONE.store(!to_stderr, Ordering::Relaxed);
    let sinks = Sinks::new(to_stderr.then(io::stderr), file);
    let writer = Writer::new(&QUEUE, sinks, format);
    let thread = thread::Builder::new().name("log".to_owned());
    thread.spawn(move || writer.run()).map_err(LogError::Thread)?;
    WRITER_RUNS.store(true, Ordering::Relaxed);
    panics::log_panics();
    Ok(())
}

fn open_file(config: &LogFileConfig) -> Result<LogFile, LogError> {
    let opened = LogFile::new(config);
    opened.map_err(|error| LogError::File { path: config.path.clone(), error })
}

/// Number of log lines of this process that could not be written since its start: the queue was
/// full, or the sink failed.
pub fn dropped_lines() -> u64 {
    QUEUE.dropped()
}

/// Writes text to the log behind its lines, in any format of its own, and always to standard error.
/// For what a process that cannot go on reports; errors are ignored.
pub fn print(text: fmt::Arguments<'_>) {
    let writer_runs = WRITER_RUNS.load(Ordering::Relaxed);
    if writer_runs {
        QUEUE.push(text.to_string().into_bytes());
    }
    if !writer_runs || FILE_ALONE.load(Ordering::Relaxed) {
        let _ = io::stderr().write_fmt(text);
    }
}

/// Waits until the log is written, at most 1 s. Blocks the thread: for the end of the process.
pub fn flush() {
    if WRITER_RUNS.load(Ordering::Relaxed) {
        rate_limit::LIMITS.report_all();
    }
    flush_for(FLUSH_TIMEOUT);
}

/// Waits until the log is written, at most this long. Blocks the thread.
fn flush_for(limit: Duration) {
    if WRITER_RUNS.load(Ordering::Relaxed) {
        QUEUE.flush(limit);
    }
}

/// Has the writer look at the limited events.
fn wake_writer() {
    QUEUE.wake();
}

/// Takes the line of one event, which tracing-subscriber writes at once.
#[derive(Debug)]
struct Line {
    /// Whether control characters within the line are escaped; JSON has escaped them already.
    escaped: bool,
    coloured: bool,
}

impl io::Write for Line {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        QUEUE.push(if self.escaped { escape(line, self.coloured) } else { line.to_vec() });
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A line whose characters, other than the end of the line and those of colours, cannot pretend to be another line or command a terminal.
fn escape(line: &[u8], coloured: bool) -> Vec<u8> {
    let (text, end) = match line {
        [text @ .., b'\n'] => (text, &b"\n"[..]),
        text => (text, &b""[..]),
    };
    let is_plain = |c: char| !misleads(c) || (c == '\x1b' && coloured);
    // tracing-subscriber writes UTF-8.
    let text = String::from_utf8_lossy(text);
    let mut escaped = String::with_capacity(line.len());
    for c in text.chars() {
        match c {
            c if is_plain(c) => escaped.push(c),
            c => escaped.extend(c.escape_default()),
        }
    }
    let mut escaped = escaped.into_bytes();
    escaped.extend_from_slice(end);
    escaped
}

/// The filter for a verbosity.
///
/// Kamaji starts every agent with `-v=8`, so debug must stay readable: libraries, which log each
/// packet at debug, stay at warnings below 10. Below 5 they log errors alone, because Culvert logs
/// their failures in its own terms. kube-apiserver's client is off for the same reason.
fn filter_of(verbosity: i32) -> &'static str {
    match verbosity {
        // `culvert` is a prefix: all our crates.
        ..=4 => "error,kube_client=off,kube_runtime=off,culvert=info",
        5..=9 => "warn,kube_client=off,kube_runtime=off,culvert=debug",
        // At trace, kube-apiserver's client would log tokens.
        10.. => "trace,kube_client=off,kube_runtime=off",
    }
}

fn subscriber<W>(
    config: &LogConfig,
    filter: Option<&str>,
    writer: W,
    coloured: bool,
) -> Result<Box<dyn Subscriber + Send + Sync>, LogError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = match filter {
        Some(filter) if !filter.is_empty() => EnvFilter::builder().parse(filter)?,
        _ => EnvFilter::builder().parse(filter_of(config.verbosity))?,
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .log_internal_errors(false)
        .with_ansi(coloured);
    Ok(match config.format {
        LogFormat::Text => Box::new(lines.finish()),
        LogFormat::Json => Box::new(lines.json().flatten_event(true).finish()),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn captured(
        format: LogFormat,
        verbosity: i32,
        filter: Option<&str>,
        log: impl FnOnce(),
    ) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let config = LogConfig { format, verbosity, file: None };
        let subscriber = subscriber(&config, filter, move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = captured.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn logged(format: LogFormat, verbosity: i32, filter: Option<&str>) -> String {
        captured(format, verbosity, filter, || {
            tracing::info!(target: "culvert_agent", port = 8132, "ours at info");
            tracing::debug!(target: "culvert_agent", "ours at debug");
            tracing::error!(target: "quinn", "theirs at error");
            tracing::warn!(target: "rustls", "theirs at warn");
            tracing::warn!(target: "kube_client", "never");
            tracing::info!(target: "h2", "theirs at info");
            tracing::trace!(target: "quinn_proto", "theirs at trace");
        })
    }

    #[test]
    fn verbosity_maps_to_levels_and_libraries_stay_quiet_at_debug() {
        for (verbosity, lines) in
            [(-1, 2), (0, 2), (4, 2), (5, 4), (8, 4), (9, 4), (10, 6), (99, 6)]
        {
            let text = logged(LogFormat::Text, verbosity, None);
            assert_eq!(text.lines().count(), lines, "-v={verbosity}: {text}");
        }
    }

    #[test]
    fn the_environment_takes_precedence_over_verbosity() {
        assert_eq!(logged(LogFormat::Text, 10, Some("off")), "");
        assert_eq!(logged(LogFormat::Text, 4, Some("")).lines().count(), 2);
        let config = LogConfig { format: LogFormat::Text, verbosity: 4, file: None };
        let refused = subscriber(&config, Some("a=b=c"), io::sink, false).map(drop).unwrap_err();
        assert!(refused.to_string().contains("RUST_LOG"), "{refused}");
    }

    #[test]
    fn lines_are_plain_text_or_json() {
        let text = logged(LogFormat::Text, 4, None);
        assert!(text.contains("ours at info port=8132") && !text.contains('\u{1b}'), "{text}");
        let json = logged(LogFormat::Json, 4, None);
        assert!(json.starts_with('{') && json.contains(r#""port":8132"#), "{json}");
    }

    #[test]
    fn a_rate_limited_event_has_its_fields_and_the_count_of_those_left_out() {
        let text = captured(LogFormat::Text, 5, None, || {
            for attempt in 0..3 {
                crate::rate_limited!(
                    Duration::from_secs(3600), WARN, attempt, reason = %"full", "no room"
                );
                crate::rate_limited!(Duration::ZERO, INFO, "each time");
                let reason = "keyed";
                crate::rate_limited!(
                    Duration::from_secs(3600), per number = attempt, DEBUG, reason, "apart"
                );
            }
        });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 7, "{text}");
        assert!(lines[0].contains("WARN culvert_process::logging::tests: no room"), "{text}");
        assert!(lines[0].ends_with("attempt=0 reason=full suppressed=0"), "{text}");
        assert_eq!(text.matches("each time suppressed=0").count(), 3, "{text}");
        for number in 0..3 {
            let line = format!("apart number=\"{number}\" reason=\"keyed\" suppressed=0\n");
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn text_within_a_line_can_neither_end_it_nor_command_a_terminal() {
        let shown = |line: &str, coloured| String::from_utf8(escape(line.as_bytes(), coloured));
        let forged = "é\n2026 INFO \x1b[2J\r\x07\n";
        assert_eq!(shown(forged, false).unwrap(), "é\\n2026 INFO \\u{1b}[2J\\r\\u{7}\n");
        let marks = "\u{202e}a\u{2028}b\u{85}\n";
        assert_eq!(shown(marks, false).unwrap(), "\\u{202e}a\\u{2028}b\\u{85}\n");
        assert_eq!(shown("\x1b[1m a", true).unwrap(), "\x1b[1m a");
    }
}
