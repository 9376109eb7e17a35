//! The maximum of a sliding window.

use std::collections::VecDeque;

/// Keeps the maximum of the values of the last `length` rounds.
#[derive(Clone, Debug)]
pub(super) struct MaxFilter {
    length: u64,
    /// Rounds and values, by ascending round and descending value: each is the maximum since its
    /// round.
    candidates: VecDeque<(u64, f64)>,
}

impl MaxFilter {
    pub(super) fn new(length: u64) -> Self {
        Self { length, candidates: VecDeque::new() }
    }

    pub(super) fn update(&mut self, round: u64, value: f64) {
        while self.candidates.back().is_some_and(|(_, smaller)| *smaller <= value) {
            self.candidates.pop_back();
        }
        self.candidates.push_back((round, value));
        self.expire(round);
    }

    /// Forgets what is too old; the last value is kept however old it is.
    pub(super) fn expire(&mut self, round: u64) {
        while self.candidates.len() > 1
            && self.candidates.front().is_some_and(|(seen, _)| seen + self.length <= round)
        {
            self.candidates.pop_front();
        }
    }

    pub(super) fn max(&self) -> f64 {
        self.candidates.front().map_or(0.0, |(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_maximum_is_kept_for_as_many_rounds() {
        let mut filter = MaxFilter::new(3);
        assert_eq!(filter.max(), 0.0);
        for (round, value, largest) in [
            (0, 5.0, 5.0),
            (1, 9.0, 9.0),
            (2, 3.0, 9.0),
            (3, 4.0, 9.0),
            (4, 2.0, 4.0),
            (9, 1.0, 1.0),
        ] {
            filter.update(round, value);
            assert_eq!(filter.max(), largest, "round {round}");
        }
        filter.expire(100);
        assert_eq!(filter.max(), 1.0);
    }
}
