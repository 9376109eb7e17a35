//! The last seconds of a peer.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::load::Sample;

/// Time that figures are of.
const WINDOW: Duration = Duration::from_secs(5);
/// Time without an echo that is shown.
const SILENCE: Duration = Duration::from_millis(500);

/// Workloads of the plan, by their index.
pub(super) const KEYS: usize = 0;
pub(super) const DOWNLOAD: usize = 1;

/// What has arrived lately.
#[derive(Debug)]
pub(super) struct View {
    started: Instant,
    echoes: VecDeque<(Instant, u64)>,
    bytes: VecDeque<(Instant, u64)>,
    last_echo: Instant,
    errors: u64,
}

impl View {
    /// Nothing has arrived yet.
    pub(super) fn new(now: Instant) -> Self {
        let (echoes, bytes) = (VecDeque::new(), VecDeque::new());
        Self { started: now, echoes, bytes, last_echo: now, errors: 0 }
    }

    /// Adds a sample, and forgets what is older than the window.
    pub(super) fn take(&mut self, sample: &Sample, now: Instant) {
        match sample {
            Sample::Latency(KEYS, _, micros) => {
                self.echoes.push_back((now, *micros));
                self.last_echo = now;
            }
            Sample::Bytes(DOWNLOAD, _, bytes) => self.bytes.push_back((now, *bytes)),
            Sample::Error(..) => self.errors += 1,
            _ => {}
        }
        let is_old = |(at, _): &mut (Instant, u64)| now.duration_since(*at) > WINDOW;
        while self.echoes.pop_front_if(is_old).is_some() {}
        while self.bytes.pop_front_if(is_old).is_some() {}
    }

    /// The cells of a table: median and 99th percentile of keystrokes, time since the last echo if
    /// that is long, rate of the download, and how many sessions were cut.
    pub(super) fn cells(&self, now: Instant) -> [String; 5] {
        let is_new = |(at, _): &&(Instant, u64)| now.duration_since(*at) <= WINDOW;
        let mut micros: Vec<_> = self.echoes.iter().filter(is_new).map(|(_, took)| *took).collect();
        micros.sort_unstable();
        let at = |percent: usize| match micros.len() {
            0 => "–".to_owned(),
            count => format!("{:.0} ms", micros[(count - 1) * percent / 100] as f64 / 1e3),
        };
        let silence = now.duration_since(self.last_echo);
        let last = match silence > SILENCE {
            true => format!("{:.1} s ago", silence.as_secs_f64()),
            false => "now".to_owned(),
        };
        let bytes: u64 = self.bytes.iter().filter(is_new).map(|(_, bytes)| bytes).sum();
        let window = now.duration_since(self.started).min(WINDOW).as_secs_f64().max(0.25);
        let rate = format!("{:.1} Mbit/s", bytes as f64 * 8.0 / 1e6 / window);
        [at(50), at(99), last, rate, self.errors.to_string()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_the_last_seconds_and_silence_is_shown() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let mut view = View::new(start);
        assert_eq!(view.cells(start), ["–", "–", "now", "0.0 Mbit/s", "0"]);
        for number in 1..=100 {
            view.take(&Sample::Latency(KEYS, 0, number * 1000), at(number * 10));
        }
        view.take(&Sample::Bytes(DOWNLOAD, 0, 625_000), at(1000));
        view.take(&Sample::Error(KEYS, 0, "cut".into()), at(1000));
        assert_eq!(view.cells(at(1000)), ["50 ms", "99 ms", "now", "5.0 Mbit/s", "1"]);
        assert_eq!(view.cells(at(3000))[2], "2.0 s ago");
        assert_eq!(view.cells(at(7000)), ["–", "–", "6.0 s ago", "0.0 Mbit/s", "1"]);
        view.take(&Sample::Latency(KEYS, 0, 1000), at(7000));
        assert_eq!((view.echoes.len(), view.bytes.len()), (1, 0), "old ones are forgotten");
    }
}
