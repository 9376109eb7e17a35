//! Whether a resource grows, from its values at quiet checkpoints.

use serde::Serialize;

/// Smallest number of checkpoints, after the warm-up, that a trend is read from.
pub(super) const NEEDED: usize = 6;
/// One checkpoint in this many, and one at least, is the warm-up of a process.
const WARM_UP_SHARE: usize = 5;

/// Growth that is no leak: caches, pools of threads and the allocator fill up.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slack {
    /// In the resource's unit.
    pub(super) absolute: u64,
    /// In percent of the median of the first third.
    pub(super) percent: u64,
}

/// Course of one resource of one process between its start and its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Trend {
    /// Number of checkpoints, with those of the warm-up.
    pub checkpoints: usize,
    /// Value at the first checkpoint.
    pub first: u64,
    /// Value at the last checkpoint.
    pub last: u64,
    /// Median of the first third of the checkpoints after the warm-up, and of the last third;
    /// `None` when there are too few.
    pub medians: Option<(u64, u64)>,
    /// Whether the last third exceeds the first by more than the slack.
    pub grows: bool,
}

impl Trend {
    /// The trend of these values, oldest first; `None` without any.
    pub(super) fn of(values: &[u64], slack: Slack) -> Option<Self> {
        let (&first, &last) = values.first().zip(values.last())?;
        let warm = &values[values.len().div_ceil(WARM_UP_SHARE).min(values.len())..];
        let third = warm.len() / 3;
        let medians = (warm.len() >= NEEDED)
            .then(|| (median(&warm[..third]), median(&warm[warm.len() - third..])));
        let grows = medians.is_some_and(|(early, late)| {
            late > early + slack.absolute + early * slack.percent / 100
        });
        Some(Self { checkpoints: values.len(), first, last, medians, grows })
    }
}

/// The median; the lower one of an even number. `values` must not be empty.
fn median(values: &[u64]) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted[(sorted.len() - 1) / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLACK: Slack = Slack { absolute: 4, percent: 10 };

    fn grows(values: impl IntoIterator<Item = u64>) -> bool {
        Trend::of(&values.into_iter().collect::<Vec<_>>(), SLACK).unwrap().grows
    }

    #[test]
    fn a_steady_rise_is_growth_and_a_warm_up_is_none() {
        assert!(grows((0..30).map(|n| 20 + n)));
        assert!(!grows([5, 10, 20, 20].into_iter().chain([22; 20])));
    }

    #[test]
    fn a_peak_at_one_checkpoint_is_no_growth() {
        for at in [10, 19, 29] {
            let values = (0..30).map(|n| if n == at { 500 } else { 20 + n % 3 });
            assert!(!grows(values), "{at}");
        }
    }

    #[test]
    fn growth_begins_beyond_both_slacks() {
        let steps = |late| std::iter::repeat_n(100, 15).chain(std::iter::repeat_n(late, 15));
        assert!(!grows(steps(114)));
        assert!(grows(steps(115)));
    }

    #[test]
    fn few_checkpoints_have_no_trend() {
        let trend = Trend::of(&[1, 50, 100, 150, 200, 250, 300], SLACK).unwrap();
        assert_eq!((trend.first, trend.last), (1, 300));
        assert_eq!((trend.medians, trend.grows), (None, false));
        assert_eq!(Trend::of(&[], SLACK), None);
    }
}
