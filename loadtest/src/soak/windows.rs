//! When a disturbance explains a failure.

use parking_lot::Mutex;
use tokio::time::Instant;

use super::stage::RouteId;

/// What may fail while a disturbance lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum MayFail {
    /// Streams may be cut; dials move to another tunnel and succeed.
    Streams,
    /// Streams may be cut and dials may fail.
    Dials,
}

#[derive(Debug)]
struct Window {
    route: RouteId,
    may_fail: MayFail,
    until: Option<Instant>,
}

/// The times of all disturbances, by route.
#[derive(Debug, Default)]
pub(super) struct Windows(Mutex<Vec<Window>>);

impl Windows {
    /// Begins a window for these routes now.
    pub(super) fn open(&self, routes: &[RouteId], may_fail: MayFail) {
        let window = |&route| Window { route, may_fail, until: None };
        self.0.lock().extend(routes.iter().map(window));
    }

    /// Ends every open window now.
    pub(super) fn close(&self) {
        let now = Instant::now();
        for window in self.0.lock().iter_mut() {
            window.until.get_or_insert(now);
        }
    }

    /// Whether something that failed on a route, and lasted from `from` until now, touched a window
    /// in which it may fail.
    pub(super) fn explain(&self, route: RouteId, what: MayFail, from: Instant) -> bool {
        self.0.lock().iter().any(|window| {
            window.route == route
                && window.may_fail >= what
                && window.until.is_none_or(|until| until >= from)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_window_explains_what_began_before_its_end_on_its_route() {
        let (windows, second) = (Windows::default(), Duration::from_secs(1));
        let before = Instant::now();
        assert!(!windows.explain(RouteId(0), MayFail::Streams, before));
        windows.open(&[RouteId(0)], MayFail::Streams);
        advance(second).await;
        let within = Instant::now();
        advance(second).await;
        windows.close();
        advance(second).await;
        let after = Instant::now();
        for (from, explained) in [(before, true), (within, true), (after, false)] {
            assert_eq!(windows.explain(RouteId(0), MayFail::Streams, from), explained);
            assert!(!windows.explain(RouteId(1), MayFail::Streams, from));
            assert!(!windows.explain(RouteId(0), MayFail::Dials, from));
        }
        windows.open(&[RouteId(1)], MayFail::Dials);
        assert!(windows.explain(RouteId(1), MayFail::Dials, after));
        assert!(windows.explain(RouteId(1), MayFail::Streams, after));
    }
}
