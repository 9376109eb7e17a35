//! The targets that an agent reached in the last minutes.

use std::{collections::HashMap, time::Duration};

use culvert_wire::Target;
use parking_lot::Mutex;
use tokio::time::Instant;

/// Time for which a target counts as recently reached: a few scrapes of its metrics.
pub(crate) const MEMORY: Duration = Duration::from_secs(5 * 60);
/// Maximum number of targets kept for one agent. A node has fewer that are dialed repeatedly.
const MAX_TARGETS: usize = 1024;

/// Targets that an agent reached, and when it last did.
#[derive(Debug, Default)]
pub(crate) struct RecentlyReached(Mutex<HashMap<Target, Instant>>);

impl RecentlyReached {
    /// Remembers a target that was reached.
    pub(crate) fn note(&self, target: &Target, now: Instant) {
        let mut targets = self.0.lock();
        if targets.len() >= MAX_TARGETS && !targets.contains_key(target) {
            targets.retain(|_, reached| now.saturating_duration_since(*reached) < MEMORY);
            let oldest = targets.iter().min_by_key(|(_, reached)| **reached);
            if let Some(oldest) = oldest.map(|(target, _)| target.clone())
                && targets.len() >= MAX_TARGETS
            {
                targets.remove(&oldest);
            }
        }
        targets.insert(target.clone(), now);
    }

    /// Forgets a target that could not be reached.
    pub(crate) fn forget(&self, target: &Target) {
        self.0.lock().remove(target);
    }

    /// Whether the target was reached in the last five minutes, and no dial failed since.
    pub(crate) fn is_recent(&self, target: &Target, now: Instant) -> bool {
        let reached = self.0.lock().get(target).copied();
        reached.is_some_and(|reached| now.saturating_duration_since(reached) < MEMORY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(port: u16) -> Target {
        Target::new("10.0.0.9", port).unwrap()
    }

    #[test]
    fn a_target_is_remembered_for_five_minutes_or_until_a_dial_fails() {
        let (recently_reached, start) = (RecentlyReached::default(), Instant::now());
        assert!(!recently_reached.is_recent(&target(1), start));
        recently_reached.note(&target(1), start);
        recently_reached.note(&target(2), start);
        assert!(recently_reached.is_recent(&target(1), start + Duration::from_secs(299)));
        assert!(!recently_reached.is_recent(&target(1), start + Duration::from_secs(300)));
        recently_reached.forget(&target(2));
        assert!(!recently_reached.is_recent(&target(2), start));
    }

    #[test]
    fn the_oldest_target_makes_room() {
        let (recently_reached, start) = (RecentlyReached::default(), Instant::now());
        for port in 0..=MAX_TARGETS as u16 {
            recently_reached.note(&target(port), start + Duration::from_millis(port.into()));
        }
        assert_eq!(recently_reached.0.lock().len(), MAX_TARGETS);
        assert!(!recently_reached.is_recent(&target(0), start));
        assert!(recently_reached.is_recent(&target(1), start));
    }

    #[test]
    fn targets_that_are_forgotten_anyway_make_room_before_the_oldest() {
        let (recently_reached, start) = (RecentlyReached::default(), Instant::now());
        for port in 0..MAX_TARGETS as u16 {
            recently_reached.note(&target(port), start);
        }
        recently_reached.note(&target(u16::MAX), start + MEMORY);
        assert_eq!(recently_reached.0.lock().len(), 1);
        assert!(recently_reached.is_recent(&target(u16::MAX), start + MEMORY));
    }
}
