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
/// interval it has one for each value, which is also a field of the line. The line has one more
/// field, `suppressed`: the number of events that were left out since its last line. If events were
/// left out and no other follows, a line with the message, the key and their number ends the
/// interval.
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
    (@limit [$interval:expr, $key:ident, $value:expr] $level:ident [$($fields:tt)*]
        $message:literal) => {{
        use $crate::logging::tracing::{Level, event};
        fn report(key: &str, suppressed: u64) {
            event!(Level::$level, $key = key, suppressed, $message);
        }
        static LIMIT: $crate::logging::RateLimit =
            $crate::logging::RateLimit::new($interval, report);
        let key = ::std::string::ToString::to_string(&$value);
        if let Some(suppressed) = LIMIT.admit(&key, ::std::time::Instant::now()) {
            event!(Level::$level, $key = key, $($fields)* suppressed, $message);
        }
    }};
    ($interval:expr, per $key:ident = $value:expr, $level:ident, $($event:tt)+) => {
        $crate::rate_limited!(@event [$interval, $key, $value] $level [] $($event)+)
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
    /// Logs the number of events with this key that were left out.
    report: fn(&str, u64),
    limits: &'static Limits,
    keys: Mutex<BTreeMap<String, Limited>>,
}

#[derive(Debug)]
struct Limited {
    last_line: Instant,
    suppressed: u64,
}

impl RateLimit {
    /// At most one line per `interval` and key; the first event always gets one. `report` logs the
    /// number of those that were left out, once the interval is over.
    pub const fn new(interval: Duration, report: fn(&str, u64)) -> Self {
        Self::among(&LIMITS, interval, report)
    }

    const fn among(limits: &'static Limits, interval: Duration, report: fn(&str, u64)) -> Self {
        Self { interval, report, limits, keys: parking_lot::const_mutex(BTreeMap::new()) }
    }

    /// The number of events with this key suppressed since their last line if the event at `now`
    /// gets a line; `None` if it is suppressed.
    pub fn admit(&'static self, key: &str, now: Instant) -> Option<u64> {
        let mut keys = self.keys.lock();
        let key = if keys.contains_key(key) || keys.len() < MAX_KEYS { key } else { OTHERS };
        let Some(limited) = keys.get_mut(key) else {
            keys.insert(key.to_owned(), Limited { last_line: now, suppressed: 0 });
            drop(keys);
            if self.limits.watch(self) {
                super::wake_writer();
            }
            return Some(0);
        };
        if now.saturating_duration_since(limited.last_line) < self.interval {
            limited.suppressed += 1;
            return None;
        }
        limited.last_line = now;
        Some(std::mem::take(&mut limited.suppressed))
    }

    /// Removes the keys whose interval is over at `now`, or all. Returns the number of events of
    /// each that no line has reported, and whether keys are left.
    fn take_due(&self, now: Instant, all: bool) -> (Vec<(String, u64)>, bool) {
        let mut keys = self.keys.lock();
        let interval = self.interval;
        let is_due = |limited: &mut Limited| {
            all || now.saturating_duration_since(limited.last_line) >= interval
        };
        let due = keys.extract_if(.., |_, limited| is_due(limited));
        let due: Vec<_> = due
            .filter(|(_, limited)| limited.suppressed > 0)
            .map(|(key, limited)| (key, limited.suppressed))
            .collect();
        (due, !keys.is_empty())
    }
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
        fn report(key: &str, suppressed: u64) {
            REPORTED.lock().push((key.to_owned(), suppressed));
        }
        let limits = Box::leak(Box::new(Limits::new()));
        Box::leak(Box::new(RateLimit::among(limits, Duration::from_secs(seconds), report)))
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
