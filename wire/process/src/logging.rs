//! The log of a process: its format, its verbosity, and a rate limit for repeated events.

use std::{
    io::{self, IsTerminal},
    time::{Duration, Instant},
};

use clap::ValueEnum;
use parking_lot::Mutex;
#[doc(hidden)]
pub use tracing;
use tracing::Subscriber;
use tracing_subscriber::{EnvFilter, filter::ParseError, fmt::MakeWriter};

/// Environment variable that takes precedence over `-v`, in tracing-subscriber's notation.
const FILTER_VARIABLE: &str = "RUST_LOG";

/// Format of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Plain text, one line per event, coloured on a terminal
    Text,
    /// One JSON object per event and line
    Json,
}

/// Log settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogConfig {
    /// Format of the lines.
    pub format: LogFormat,
    /// Verbosity as in klog: 0 to 4 is info, 5 to 9 is debug, 10 and more is trace.
    pub verbosity: i32,
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
}

/// Sends the log of the whole process to standard error.
///
/// # Errors
/// If `RUST_LOG` cannot be parsed, or at the second call.
pub fn init(config: LogConfig) -> Result<(), LogError> {
    let filter = std::env::var(FILTER_VARIABLE).ok();
    let coloured = io::stderr().is_terminal();
    let subscriber = subscriber(config, filter.as_deref(), io::stderr, coloured)?;
    Ok(tracing::subscriber::set_global_default(subscriber)?)
}

/// The filter for a verbosity.
///
/// Kamaji starts every agent with `-v=8`, so debug must stay readable: libraries, which log each
/// packet at debug, stay at info below 10. kube-apiserver's client is off, because Culvert logs its
/// failures already.
fn filter_of(verbosity: i32) -> &'static str {
    match verbosity {
        ..=4 => "info,kube_client=off,kube_runtime=off",
        5..=9 => "info,kube_client=off,kube_runtime=off,culvert=debug", // a prefix: all our crates
        // At trace, kube-apiserver's client would log tokens.
        10.. => "trace,kube_client=off,kube_runtime=off",
    }
}

fn subscriber<W>(
    config: LogConfig,
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
        .with_ansi(coloured && config.format == LogFormat::Text);
    Ok(match config.format {
        LogFormat::Text => Box::new(lines.finish()),
        LogFormat::Json => Box::new(lines.json().flatten_event(true).finish()),
    })
}

/// Logs an event at most once per interval; for faults that can repeat with every packet or dial.
///
/// Takes the interval (a constant expression), the level in tracing's spelling, fields, and the
/// message as a literal. Each place of use has a limit of its own. The line has one more field,
/// `suppressed`: the number of events of this place that were left out since its last line.
///
/// ```
/// use std::time::Duration;
///
/// let error = std::io::Error::other("too many open files");
/// culvert_process::rate_limited!(
///     Duration::from_secs(10), WARN, listener = "agents", %error, "a connection was not accepted"
/// );
/// ```
#[macro_export]
macro_rules! rate_limited {
    ($interval:expr, $level:ident, $($event:tt)+) => {{
        static LIMIT: $crate::logging::RateLimit = $crate::logging::RateLimit::new($interval);
        if let Some(suppressed) = LIMIT.admit(::std::time::Instant::now()) {
            $crate::rate_limited!(@event $level, suppressed, [] $($event)+);
        }
    }};
    // Moves the fields into the brackets, so that `suppressed` can follow them.
    (@event $level:ident, $suppressed:ident, [$($fields:tt)*] $message:literal) => {
        $crate::logging::tracing::event!(
            $crate::logging::tracing::Level::$level, $($fields)* $suppressed, $message
        )
    };
    (@event $level:ident, $suppressed:ident, [$($fields:tt)*] $next:tt $($rest:tt)+) => {
        $crate::rate_limited!(@event $level, $suppressed, [$($fields)* $next] $($rest)+)
    };
}

/// The state behind one use of [`rate_limited!`](crate::rate_limited).
#[doc(hidden)]
#[derive(Debug)]
pub struct RateLimit {
    interval: Duration,
    state: Mutex<LimitState>,
}

#[derive(Debug)]
struct LimitState {
    last_line: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// At most one line per `interval`; the first event always gets one.
    pub const fn new(interval: Duration) -> Self {
        let state = LimitState { last_line: None, suppressed: 0 };
        Self { interval, state: parking_lot::const_mutex(state) }
    }

    /// The number of events suppressed since the last line if an event at `now` gets a line;
    /// `None` if it is suppressed.
    pub fn admit(&self, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        match state.last_line {
            Some(last) if now.saturating_duration_since(last) < self.interval => {
                state.suppressed += 1;
                None
            }
            _ => {
                state.last_line = Some(now);
                Some(std::mem::take(&mut state.suppressed))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

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
        let config = LogConfig { format, verbosity };
        let subscriber = subscriber(config, filter, move || writer.clone(), false).unwrap();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = captured.0.lock().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn logged(format: LogFormat, verbosity: i32, filter: Option<&str>) -> String {
        captured(format, verbosity, filter, || {
            tracing::info!(target: "culvert_agent", port = 8132, "ours at info");
            tracing::debug!(target: "culvert_agent", "ours at debug");
            tracing::debug!(target: "quinn_proto", "theirs at debug");
            tracing::trace!(target: "quinn_proto", "theirs at trace");
        })
    }

    #[test]
    fn verbosity_maps_to_levels_and_libraries_stay_quiet_at_debug() {
        for (verbosity, lines) in
            [(-1, 1), (0, 1), (4, 1), (5, 2), (8, 2), (9, 2), (10, 4), (99, 4)]
        {
            let text = logged(LogFormat::Text, verbosity, None);
            assert_eq!(text.lines().count(), lines, "-v={verbosity}: {text}");
        }
    }

    #[test]
    fn the_environment_takes_precedence_over_verbosity() {
        assert_eq!(logged(LogFormat::Text, 10, Some("warn")), "");
        assert_eq!(logged(LogFormat::Text, 4, Some("")).lines().count(), 1);
        let config = LogConfig { format: LogFormat::Text, verbosity: 4 };
        let refused = subscriber(config, Some("a=b=c"), io::sink, false).map(drop).unwrap_err();
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
    fn repeated_events_get_one_line_per_interval_with_the_number_of_the_others() {
        let limit = RateLimit::new(Duration::from_secs(10));
        let start = Instant::now();
        for (seconds, admitted) in [
            (0, Some(0)),
            (1, None),
            (9, None),
            (10, Some(2)),
            (11, None),
            (60, Some(1)),
            (70, Some(0)),
        ] {
            assert_eq!(limit.admit(start + Duration::from_secs(seconds)), admitted, "{seconds}");
        }
    }

    #[test]
    fn a_rate_limited_event_has_its_fields_and_the_count_of_those_left_out() {
        let text = captured(LogFormat::Text, 4, None, || {
            for attempt in 0..3 {
                crate::rate_limited!(
                    Duration::from_secs(3600), WARN, attempt, reason = %"full", "no room"
                );
                crate::rate_limited!(Duration::ZERO, INFO, "each time");
            }
        });
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].contains("WARN culvert_process::logging::tests: no room"), "{text}");
        assert!(lines[0].ends_with("attempt=0 reason=full suppressed=0"), "{text}");
        assert_eq!(text.matches("each time suppressed=0").count(), 3, "{text}");
    }
}
