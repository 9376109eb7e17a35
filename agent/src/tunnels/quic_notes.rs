//! Why QUIC is not in use, for the operator: the last failures, and when it is tried next.

use std::collections::VecDeque;

use tokio::time::Instant;

/// Number of failures that are kept.
const MAX_FAILURES: usize = 5;

/// The last failures of QUIC, and the next try.
#[derive(Clone, Debug, Default)]
pub(crate) struct QuicNotes {
    failures: VecDeque<(Instant, &'static str)>,
    /// When a tunnel over QUIC is tried next; `None` while none is to be tried.
    pub(crate) next_try: Option<Instant>,
}

impl QuicNotes {
    /// Records a failure, with its reason as a metric label.
    pub(crate) fn failed(&mut self, reason: &'static str, now: Instant) {
        self.failures.truncate(MAX_FAILURES - 1);
        self.failures.push_front((now, reason));
    }

    /// The last failures, the newest first.
    pub(crate) fn failures(&self) -> impl Iterator<Item = &(Instant, &'static str)> {
        self.failures.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_failures_are_kept() {
        let mut notes = QuicNotes::default();
        for _ in 0..2 * MAX_FAILURES {
            notes.failed("quic_silent", Instant::now());
        }
        notes.failed("quic_refused", Instant::now());
        let reasons: Vec<_> = notes.failures().map(|(_, reason)| *reason).collect();
        assert_eq!(
            (reasons.len(), reasons[0], reasons[1]),
            (MAX_FAILURES, "quic_refused", "quic_silent")
        );
    }
}
