//! A limit for events that can repeat with every packet or dial.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Maximum number of keys of one use of the macro. The events of further keys share one limit.
const MAX_KEYS: usize = 256;
/// The key that these events share.
const OTHERS: &str = "others";

/// The limits of this process.
pub(super) static LIMITS: Limits = Limits::new();

/// Logs an event at most once per interval, for events that can repeat with every packet or dial.
///
/// Takes the interval (a constant expression), the level in tracing's spelling, fields, and the
/// message as a literal. Each place of use has a limit of its own; with `per key = value` after the
/// interval it has one for each value, which is also a field of the line. Where strangers choose the
/// values, `at most number in all` after it bounds the lines of all values: so many per interval,
/// and as many more that end it. The line has one more field, `suppressed`: the number of events
/// that were left out since its last line. If events were left out and no other follows, a line with
/// the message, the key and their number ends the interval; what is beyond the bound has the key
/// `others`.
///
/// ```
/// use std::time::Duration;
///
/// let error = std::io::Error::other("too many open files");
/// culvert_process::rate_limited!(
///     Duration::from_secs(10), WARN, %error, "a connection was not accepted"
/// );
/// culvert_process::rate_limited!(
///     Duration::from_secs(1), per listener = "agents", WARN, %error,
///     "a connection was not accepted"
/// );
/// culvert_process::rate_limited!(
///     Duration::from_secs(1), per source = "192.0.2.7", at most 32 in all, WARN, %error,
///     "a peer was refused"
/// );
/// ```
#[macro_export]
macro_rules! rate_limited {
    // Moves the fields into the brackets, so that `suppressed` can follow them.
    (@event [$($limit:tt)+] $level:ident [$($fields:tt)*] $message:literal) => {
        $crate::rate_limited!(@limit [$($limit)+] $level [$($fields)*] $message)
    };
    (@event [$($limit:tt)+] $level:ident [$($fields:tt)*] $next:tt $($rest:tt)+) => {
        $crate::rate_limited!(@event [$($limit)+] $level [$($fields)* $next] $($rest)+)
    };
    (@limit [$interval:expr] $level:ident [$($fields:tt)*] $message:literal) => {{
        use $crate::logging::tracing::{Level, event};
        fn report(_: &str, suppressed: u64) {
            event!(Level::$level, suppressed, $message);
        }
        static LIMIT: $crate::logging::RateLimit =
            $crate::logging::RateLimit::new($interval, report);
        if let Some(suppressed) = LIMIT.admit("", ::std::time::Instant::now()) {
            event!(Level::$level, $($fields)* suppressed, $message);
        }
    }};
    (@limit [$interval:expr, $key:ident, $value:expr, $lines:expr] $level:ident [$($fields:tt)*]
        $message:literal) => {{
        use $crate::logging::tracing::{Level, event};
        fn report(key: &str, suppressed: u64) {
            event!(Level::$level, $key = key, suppressed, $message);
        }
        static LIMIT: $crate::logging::RateLimit =
            $crate::logging::RateLimit::per_key($interval, $lines, report);
        let key = ::std::string::ToString::to_string(&$value);
        if let Some(suppressed) = LIMIT.admit(&key, ::std::time::Instant::now()) {
            event!(Level::$level, $key = key, $($fields)* suppressed, $message);
        }
    }};
    ($interval:expr, per $key:ident = $value:expr, at most $lines:literal in all, $level:ident,
        $($event:tt)+) => {
        $crate::rate_limited!(@event [$interval, $key, $value, $lines] $level [] $($event)+)
    };
    ($interval:expr, per $key:ident = $value:expr, $level:ident, $($event:tt)+) => {
        $crate::rate_limited!(@event [$interval, $key, $value, usize::MAX] $level [] $($event)+)
    };
    ($interval:expr, $level:ident, $($event:tt)+) => {
        $crate::rate_limited!(@event [$interval] $level [] $($event)+)
    };
}

/// The state behind one use of [`rate_limited!`](crate::rate_limited).
#[doc(hidden)]
#[derive(Debug)]
pub struct RateLimit {
    interval: Duration,
    /// Maximum number of lines per interval.
    max_lines: usize,
    /// Logs the number of events with this key that were left out.
    report: fn(&str, u64),
    limits: &'static Limits,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    keys: BTreeMap<String, Limited>,
    /// When the interval began in which lines are counted.
    begun: Option<Instant>,
    /// Number of lines in this interval.
    lines: usize,
}

#[derive(Debug)]
struct Limited {
    last_line: Instant,
    suppressed: u64,
}

impl RateLimit {
    /// At most one line per `interval`; the first event always gets one. `report` logs the number of
    /// those that were left out, once the interval is over.
    pub const fn new(interval: Duration, report: fn(&str, u64)) -> Self {
        Self::among(&LIMITS, interval, usize::MAX, report)
    }

    /// The same for each key, and at most `max_lines` for all of them.
    pub const fn per_key(interval: Duration, max_lines: usize, report: fn(&str, u64)) -> Self {
        Self::among(&LIMITS, interval, max_lines, report)
    }

    const fn among(
        limits: &'static Limits,
        interval: Duration,
        max_lines: usize,
        report: fn(&str, u64),
    ) -> Self {
        let state = State { keys: BTreeMap::new(), begun: None, lines: 0 };
        Self { interval, max_lines, report, limits, state: parking_lot::const_mutex(state) }
    }

    /// The number of events with this key suppressed since their last line if the event at `now`
    /// gets a line; `None` if it is suppressed.
    pub fn admit(&'static self, key: &str, now: Instant) -> Option<u64> {
        let mut state = self.state.lock();
        let has_room = state.has_room(self.interval, self.max_lines, now);
        let may_add = has_room && state.keys.len() < MAX_KEYS;
        let key = if may_add || state.keys.contains_key(key) { key } else { OTHERS };
        let is_new = !state.keys.contains_key(key);
        let limited = state
            .keys
            .entry(key.to_owned())
            .or_insert_with(|| Limited { last_line: now, suppressed: 0 });
        let is_due = is_new || now.saturating_duration_since(limited.last_line) >= self.interval;
        let admitted = if is_due && has_room {
            limited.last_line = now;
            let suppressed = std::mem::take(&mut limited.suppressed);
            state.lines += 1;
            Some(suppressed)
        } else {
            limited.suppressed += 1;
            None
        };
        drop(state);
        if is_new && self.limits.watch(self) {
            super::wake_writer();
        }
        admitted
    }

    /// Removes the keys whose interval is over at `now`, or all. Returns the number of events of
    /// each that no line has reported, and whether keys are left.
    fn take_due(&self, now: Instant, all: bool) -> (Vec<(String, u64)>, bool) {
        let mut state = self.state.lock();
        let interval = self.interval;
        let is_due = |limited: &mut Limited| {
            all || now.saturating_duration_since(limited.last_line) >= interval
        };
        let due = state.keys.extract_if(.., |_, limited| is_due(limited));
        let due: Vec<_> = due
            .filter(|(_, limited)| limited.suppressed > 0)
            .map(|(key, limited)| (key, limited.suppressed))
            .collect();
        (bounded(due, self.max_lines), !state.keys.is_empty())
    }
}

impl State {
    /// Whether the interval at `now` has room for one more line.
    fn has_room(&mut self, interval: Duration, max_lines: usize, now: Instant) -> bool {
        let goes_on = |begun: Instant| now.saturating_duration_since(begun) < interval;
        if !self.begun.is_some_and(goes_on) {
            self.begun = Some(now);
            self.lines = 0;
        }
        self.lines < max_lines
    }
}

/// Joins the numbers of all keys but so many.
fn bounded(mut due: Vec<(String, u64)>, max_lines: usize) -> Vec<(String, u64)> {
    if due.len() > max_lines {
        due.sort_by_key(|(key, _)| key == OTHERS);
        let others = due.split_off(max_lines.saturating_sub(1));
        due.push((OTHERS.to_owned(), others.into_iter().map(|(_, count)| count).sum()));
    }
    due
}

/// The limits with events that no line has reported yet.
#[derive(Debug)]
pub(super) struct Limits(Mutex<Vec<&'static RateLimit>>);

impl Limits {
    const fn new() -> Self {
        Self(parking_lot::const_mutex(Vec::new()))
    }

    /// Whether a limit may have events that no line has reported.
    pub(super) fn has_unreported(&self) -> bool {
        !self.0.lock().is_empty()
    }

    /// Reports the events that were left out in intervals that are over at `now`.
    pub(super) fn report_due(&self, now: Instant) {
        self.report(now, false);
    }

    /// Reports all events that were left out.
    pub(super) fn report_all(&self) {
        self.report(Instant::now(), true);
    }

    /// Has the writer look at this limit from now on; whether it did not yet.
    fn watch(&self, limit: &'static RateLimit) -> bool {
        let mut unreported = self.0.lock();
        let is_new = !unreported.iter().any(|known| std::ptr::eq(*known, limit));
        if is_new {
            unreported.push(limit);
        }
        is_new
    }

    fn report(&self, now: Instant, all: bool) {
        let limits = std::mem::take(&mut *self.0.lock());
        for limit in limits {
            let (due, is_left) = limit.take_due(now, all);
            if is_left {
                self.watch(limit);
            }
            // Without a lock: the line may be limited itself.
            due.iter().for_each(|(key, suppressed)| (limit.report)(key, *suppressed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reported keys and numbers of the limit under test.
    static REPORTED: Mutex<Vec<(String, u64)>> = parking_lot::const_mutex(Vec::new());

    /// A limit among none but itself: another test's must not be reported with it.
    fn limit(seconds: u64) -> &'static RateLimit {
        limit_with(seconds, usize::MAX)
    }

    fn limit_with(seconds: u64, max_lines: usize) -> &'static RateLimit {
        fn report(key: &str, suppressed: u64) {
            REPORTED.lock().push((key.to_owned(), suppressed));
        }
        let limits = Box::leak(Box::new(Limits::new()));
        let interval = Duration::from_secs(seconds);
        Box::leak(Box::new(RateLimit::among(limits, interval, max_lines, report)))
    }

    #[test]
    fn repeated_events_get_one_line_per_interval_with_the_number_of_the_others() {
        let limit = limit(10);
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
            assert_eq!(
                limit.admit("", start + Duration::from_secs(seconds)),
                admitted,
                "{seconds}"
            );
        }
    }

    #[test]
    fn each_key_has_its_interval_and_too_many_share_one() {
        let limit = limit(10);
        let now = Instant::now();
        for key in 0..MAX_KEYS {
            assert_eq!(limit.admit(&key.to_string(), now), Some(0));
        }
        assert_eq!(limit.admit("0", now), None);
        assert_eq!(limit.admit("one more", now), Some(0));
        assert_eq!(limit.admit("two more", now), None);
        let (due, is_left) = limit.take_due(now + Duration::from_secs(10), false);
        assert_eq!((due, is_left), (vec![("0".into(), 1), (OTHERS.into(), 1)], false));
        assert_eq!(limit.admit("two more", now), Some(0), "there is room again");
    }

    #[test]
    fn all_keys_together_have_a_number_of_lines_per_interval() {
        let limit = limit_with(10, 3);
        let now = Instant::now();
        for key in ["a", "b", "c"] {
            assert_eq!(limit.admit(key, now), Some(0));
        }
        for key in ["a", "b", "b", "c", "d", "e"] {
            assert_eq!(limit.admit(key, now), None, "{key}");
        }
        let later = now + Duration::from_secs(10);
        assert_eq!(limit.admit("c", later), Some(1));
        let (due, is_left) = limit.take_due(later, false);
        assert_eq!(
            (due, is_left),
            (vec![("a".into(), 1), ("b".into(), 2), (OTHERS.into(), 2)], true)
        );
        for key in ["x", "y"] {
            assert_eq!(limit.admit(key, later), Some(0));
        }
        assert_eq!(limit.admit("z", later), None);
    }

    #[test]
    fn the_lines_that_end_an_interval_are_as_many_at_most() {
        let limit = limit_with(10, 3);
        let now = Instant::now();
        for (seconds, key) in [(0, "a"), (0, "b"), (0, "c"), (10, "d"), (10, "e")] {
            assert_eq!(limit.admit(key, now + Duration::from_secs(seconds)), Some(0), "{key}");
        }
        for key in ["a", "a", "b", "c", "d", "e"] {
            limit.admit(key, now + Duration::from_secs(10));
        }
        let (due, _) = limit.take_due(now + Duration::from_secs(20), false);
        assert_eq!(due.len(), 3, "{due:?}");
        assert_eq!(due.last().unwrap().0, OTHERS);
        let total: u64 = due.iter().map(|(_, count)| count).sum();
        assert_eq!(total, 5, "one of them had the last line of its interval");
    }

    #[test]
    fn events_that_no_line_followed_are_reported_when_the_interval_is_over() {
        let limit = limit(3600);
        let now = Instant::now();
        assert_eq!(limit.admit("a", now), Some(0));
        assert_eq!(limit.admit("a", now), None);
        assert_eq!(limit.admit("b", now), Some(0));
        limit.limits.report_due(now + Duration::from_secs(3599));
        assert!(limit.limits.has_unreported());
        assert_eq!(*REPORTED.lock(), []);
        limit.limits.report_due(now + Duration::from_secs(3600));
        assert_eq!(*REPORTED.lock(), [("a".to_owned(), 1)]);
        assert_eq!(limit.admit("a", now + Duration::from_secs(3600)), Some(0));
    }
}
