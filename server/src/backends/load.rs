//! How much a backend has to do, and how far away it is: what decides between two that both fit.

use std::{cmp::Ordering, time::Duration};

/// Round-trip times below this one are equal: what differs is the scheduler of the machine.
const MIN_RTT: Duration = Duration::from_millis(1);

/// The load of one backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Number of dials that wait for its reply.
    pub pending_dials: usize,
    /// Round-trip time to its agent; `None` where it is not known.
    pub rtt: Option<Duration>,
}

impl Load {
    /// The order of two backends by the time that one more dial would take. Costs that differ by
    /// less than a quarter are equal, so that noise does not send every dial to the same backend.
    pub(super) fn order(self, other: Self) -> Ordering {
        let cost = |load: Self, rtt: Duration| {
            rtt.max(MIN_RTT).as_micros() * (load.pending_dials as u128 + 1)
        };
        let (this, other) = match (self.rtt, other.rtt) {
            (Some(this), Some(that)) => (cost(self, this), cost(other, that)),
            _ => (cost(self, MIN_RTT), cost(other, MIN_RTT)),
        };
        if this * 5 < other * 4 {
            Ordering::Less
        } else if other * 5 < this * 4 {
            Ordering::Greater
        } else {
            Ordering::Equal
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_pending_dials_and_a_shorter_path_come_first() {
        let load = |pending_dials, millis: u64| Load {
            pending_dials,
            rtt: (millis > 0).then(|| Duration::from_millis(millis)),
        };
        for (one, two, order) in [
            (load(0, 10), load(1, 10), Ordering::Less),
            (load(0, 10), load(0, 11), Ordering::Equal),
            (load(0, 10), load(0, 13), Ordering::Less),
            (load(3, 10), load(0, 30), Ordering::Greater),
            (load(100, 10), load(99, 10), Ordering::Equal),
            (load(1, 0), load(0, 30), Ordering::Greater),
            (load(0, 0), load(0, 30), Ordering::Equal),
        ] {
            assert_eq!(one.order(two), order, "{one:?} {two:?}");
            assert_eq!(two.order(one), order.reverse(), "{one:?} {two:?}");
        }
    }
}
