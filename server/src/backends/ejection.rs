//! Backends that get no dials for a while, because dials through them time out while those through
//! others do not: the agent answers, but its node reaches nothing.
//!
//! An ejected backend is avoided, not removed: it gets dials while no other one will do, so that an
//! ejection never makes a dial fail. The rule is Envoy's outlier detection (consecutive failures,
//! ejection times that grow, a maximum share) with one addition: the time-outs must be those of two
//! targets, because one target may be at fault itself.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use culvert_wire::Target;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Number of dials in a row that must time out.
const IN_A_ROW: u32 = 3;
/// Time of the first ejection; the n-th in a row lasts n times as long.
pub(super) const EJECTION: Duration = Duration::from_secs(30);
/// Maximum time of one ejection.
const MAX_EJECTION: Duration = Duration::from_secs(300);

/// The outcomes of the dials through one backend.
#[derive(Debug, Default)]
pub(super) struct Outcomes(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    row: Option<Row>,
    replied: Option<Instant>,
    ejections: u32,
    ejected_until: Option<Instant>,
}

/// Dials in a row that timed out.
#[derive(Debug)]
struct Row {
    since: Instant,
    count: u32,
    first_target: u64,
    is_of_several: bool,
}

impl Outcomes {
    /// Records a dial that got a reply in time, whatever it was.
    pub(super) fn replied(&self, now: Instant) {
        let mut state = self.0.lock();
        state.row = None;
        state.replied = Some(now);
        // Who was as long without ejection as the longest one lasts begins anew.
        if state.ejected_until.is_some_and(|until| until + MAX_EJECTION < now) {
            (state.ejections, state.ejected_until) = (0, None);
        }
    }

    /// Records a dial that timed out. Returns since when all of them have, if these are enough to
    /// eject the backend.
    pub(super) fn timed_out(
        &self,
        target: &Target,
        hashes: &RandomState,
        now: Instant,
    ) -> Option<Instant> {
        let target = hashes.hash_one(target);
        let mut state = self.0.lock();
        let is_ejected = state.ejected_until.is_some_and(|until| now < until);
        let row = state.row.get_or_insert(Row {
            since: now,
            count: 0,
            first_target: target,
            is_of_several: false,
        });
        row.count = row.count.saturating_add(1);
        row.is_of_several |= row.first_target != target;
        let is_enough = row.count >= IN_A_ROW && row.is_of_several && !is_ejected;
        is_enough.then_some(row.since)
    }

    /// Whether a dial got a reply since then.
    pub(super) fn has_replied_since(&self, then: Instant) -> bool {
        self.0.lock().replied.is_some_and(|replied| replied >= then)
    }

    /// Ejects the backend. Returns for how long.
    pub(super) fn eject(&self, now: Instant) -> Duration {
        let mut state = self.0.lock();
        state.ejections += 1;
        state.row = None;
        let time = MAX_EJECTION.min(EJECTION * state.ejections);
        state.ejected_until = Some(now + time);
        time
    }

    /// Whether the backend is ejected.
    pub(super) fn is_ejected(&self, now: Instant) -> bool {
        self.0.lock().ejected_until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::target;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn time_outs_in_a_row_of_several_targets_are_enough_and_one_reply_ends_the_row() {
        let (outcomes, hashes, start) = (Outcomes::default(), RandomState::new(), Instant::now());
        let timed_out = |address: &str, seconds| {
            outcomes.timed_out(&target(address), &hashes, start + SECOND * seconds)
        };
        for second in 0..10 {
            assert_eq!(timed_out("a:1", second), None, "one target alone");
        }
        assert_eq!(timed_out("b:1", 10), Some(start));
        outcomes.replied(start + SECOND * 11);
        assert!(outcomes.has_replied_since(start + SECOND * 11));
        assert!(!outcomes.has_replied_since(start + SECOND * 12));
        assert_eq!(timed_out("a:1", 12), None);
        assert_eq!(timed_out("b:1", 13), None);
        assert_eq!(timed_out("a:1", 14), Some(start + SECOND * 12));
    }

    #[tokio::test(start_paused = true)]
    async fn ejections_grow_until_the_backend_was_well_for_long() {
        let (outcomes, hashes, mut now) = (Outcomes::default(), RandomState::new(), Instant::now());
        for time in [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300].map(Duration::from_secs) {
            assert_eq!(outcomes.eject(now), time);
            assert!(outcomes.is_ejected(now + time - SECOND));
            assert!(!outcomes.is_ejected(now + time));
            for (address, is_last) in [("a:1", false), ("b:1", false), ("c:1", true)] {
                let while_ejected = outcomes.timed_out(&target(address), &hashes, now);
                assert_eq!(while_ejected, None, "{is_last}");
            }
            now += time;
            outcomes.replied(now);
        }
        outcomes.replied(now + MAX_EJECTION + SECOND);
        assert_eq!(outcomes.eject(now), EJECTION);
    }
}
