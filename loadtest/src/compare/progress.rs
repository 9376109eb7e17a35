//! Progress of a comparison, on standard error.

use std::{
    collections::VecDeque,
    io::{IsTerminal as _, Write as _, stderr},
    time::{Duration, Instant},
};

use crate::scenario::Scenario;

/// Time in which a run's processes start and end.
const AROUND: Duration = Duration::from_secs(3);

/// Time that a run of the scenario takes.
pub(super) fn planned(scenario: &Scenario) -> Duration {
    Duration::from_secs_f64(scenario.warmup_seconds + scenario.seconds) + AROUND
}

/// The runs that are left, and how well their times were planned so far.
#[derive(Debug)]
pub(super) struct Schedule {
    left: VecDeque<Duration>,
    count: usize,
    planned: Duration,
    started: Instant,
}

impl Default for Schedule {
    fn default() -> Self {
        Self::new(VecDeque::new())
    }
}

impl Schedule {
    /// A schedule of runs with these planned times, which begins now.
    pub(super) fn new(left: VecDeque<Duration>) -> Self {
        let count = left.len();
        Self { left, count, planned: Duration::ZERO, started: Instant::now() }
    }

    /// The place of the run that begins, and the time that is left with it, such as
    /// `[3 of 8, 2 min left]`.
    pub(super) fn next(&self) -> String {
        let number = self.count - self.left.len() + 1;
        let left = self.time_left(self.started.elapsed()).as_secs();
        let left =
            if left < 100 { format!("{left} s") } else { format!("{} min", left.div_ceil(60)) };
        format!("[{number} of {}, {left} left]", self.count)
    }

    /// Records that the run has ended.
    pub(super) fn ended(&mut self) {
        self.planned += self.left.pop_front().unwrap_or_default();
    }

    /// The planned time of the runs that are left, in the ratio of those before.
    fn time_left(&self, elapsed: Duration) -> Duration {
        let left: Duration = self.left.iter().sum();
        let is_first = self.planned.is_zero();
        let ratio = elapsed.as_secs_f64() / self.planned.as_secs_f64();
        if is_first { left } else { left.mul_f64(ratio) }
    }
}

/// One line on standard error, rewritten in place on a terminal.
#[derive(Debug)]
pub(super) struct Progress {
    /// Columns of the terminal, if it is one.
    width: Option<usize>,
    title: String,
}

impl Progress {
    pub(super) fn start(title: String) -> Self {
        let width = || terminal_size::terminal_size_of(stderr()).map(|(width, _)| width.0.into());
        let width = stderr().is_terminal().then(|| width().unwrap_or(80));
        let progress = Self { width, title };
        progress.show("starting");
        progress
    }

    /// Shows the progress; on a terminal only, and no more than one line of it.
    pub(super) fn show(&self, state: &str) {
        let Some(width) = self.width else { return };
        let line: String = format!("{}: {state}", self.title).chars().take(width).collect();
        eprint!("\r\x1b[2K{line}");
        let _ = stderr().flush();
    }

    /// Shows the result.
    pub(super) fn end(&self, result: &str) {
        let erase = if self.width.is_some() { "\r\x1b[2K" } else { "" };
        eprintln!("{erase}{}: {result}", self.title);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_the_runs_before() {
        let seconds = Duration::from_secs;
        let mut schedule = Schedule::new(VecDeque::from([seconds(10); 4]));
        assert_eq!(schedule.next(), "[1 of 4, 40 s left]");
        assert_eq!(schedule.time_left(seconds(7)), seconds(40));
        schedule.ended();
        assert_eq!(schedule.time_left(seconds(20)), seconds(60));
        schedule.ended();
        assert!(schedule.next().starts_with("[3 of 4, "), "{}", schedule.next());
    }
}
