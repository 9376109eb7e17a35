//! What both sides count about streams.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use culvert_transport::splice::{HalfEnd, Outcome};
use culvert_wire::StreamCode;
use metrics::Counter;

use super::Metrics;

/// Number of things of one kind that exist now. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct LiveCount(Arc<AtomicU64>);

/// One thing in a [`LiveCount`], until it is dropped.
#[derive(Debug)]
pub struct Counted(LiveCount);

impl LiveCount {
    /// Adds one thing.
    pub fn enter(&self) -> Counted {
        self.0.fetch_add(1, Ordering::Relaxed);
        Counted(self.clone())
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let Self(LiveCount(count)) = self;
        count.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counter of the ends of spliced streams, by direction, manner and code.
#[derive(Clone, Debug)]
pub struct StreamEnds {
    metrics: Metrics,
    name: &'static str,
    directions: [&'static str; 2],
}

impl StreamEnds {
    /// The counter `name`; `directions` label the half to the tunnel and the half from it.
    pub fn new(metrics: &Metrics, name: &'static str, directions: [&'static str; 2]) -> Self {
        metrics.describe_counter(name, "Ends of spliced streams by direction, manner and code.");
        let ends = Self { metrics: metrics.clone(), name, directions };
        ends.begin();
        ends
    }

    /// Begins the counters at 0.
    fn begin(&self) {
        let codes = || StreamCode::ALL.iter().map(|code| code.name()).chain(["unknown"]);
        for direction in self.directions {
            drop(self.counter(direction, "finished", "none"));
            codes().for_each(|code| drop(self.counter(direction, "stopped", code)));
        }
        codes().for_each(|code| drop(self.counter("both", "reset", code)));
    }

    /// Counts the end of a splice: each half by itself, or one reset of both.
    pub fn record(&self, outcome: &Outcome) {
        let [to_tunnel, from_tunnel] = self.directions;
        match &outcome.end {
            Ok((to, from)) => {
                self.half(to_tunnel, *to);
                self.half(from_tunnel, *from);
            }
            Err(cut) => self.count("both", "reset", cut.code().name()),
        }
    }

    fn half(&self, direction: &'static str, end: HalfEnd) {
        match end {
            HalfEnd::Finished => self.count(direction, "finished", "none"),
            HalfEnd::Stopped(code) => self.count(direction, "stopped", code.name()),
        }
    }

    fn count(&self, direction: &'static str, manner: &'static str, code: &'static str) {
        self.counter(direction, manner, code).increment(1);
    }

    fn counter(
        &self,
        direction: &'static str,
        manner: &'static str,
        code: &'static str,
    ) -> Counter {
        let labels = [("direction", direction), ("manner", manner), ("code", code)];
        self.metrics.counter(self.name, &labels)
    }
}

#[cfg(test)]
mod tests {
    use culvert_transport::splice::Cut;

    use super::*;

    #[test]
    fn a_live_count_follows_its_guards() {
        let count = LiveCount::default();
        let (first, second) = (count.enter(), count.enter());
        assert_eq!(count.get(), 2);
        drop(first);
        assert_eq!(count.get(), 1);
        drop(second);
        assert_eq!(count.get(), 0);
    }

    #[test]
    fn ends_are_counted_by_half_and_resets_once() {
        let metrics = Metrics::new("1", &[]).unwrap();
        let ends = StreamEnds::new(&metrics, "ends_total", ["to", "from"]);
        let ended = |end| Outcome { to_tunnel: 0, from_tunnel: 0, end };
        let stopped = HalfEnd::Stopped(StreamCode::OVERLOADED);
        ends.record(&ended(Ok((HalfEnd::Finished, stopped))));
        ends.record(&ended(Err(Cut::Stuck)));
        ends.record(&ended(Err(Cut::Stuck)));
        let text = metrics.render(|_| {});
        for line in [
            "ends_total{direction=\"to\",manner=\"finished\",code=\"none\"} 1",
            "ends_total{direction=\"from\",manner=\"stopped\",code=\"overloaded\"} 1",
            "ends_total{direction=\"both\",manner=\"reset\",code=\"io_error\"} 2",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
