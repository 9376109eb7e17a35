//! What became of streams whose tunnels were lost.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use culvert_transport::{TunnelLost, resume::Observer};
use parking_lot::Mutex;

use super::{
    durations::Durations,
    exposition::{Exposition, Kind},
};

/// Upper bounds of the times that streams were without a tunnel, in seconds.
const GAPS: &[f64] = &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// Counts of resumed streams.
#[derive(Debug)]
pub struct ResumedStreams {
    by_reason: Mutex<BTreeMap<&'static str, u64>>,
    given_up: AtomicU64,
    sent_again: AtomicU64,
    waiting: AtomicI64,
    gaps: Durations,
}

impl Default for ResumedStreams {
    fn default() -> Self {
        Self {
            by_reason: Mutex::new(TunnelLost::resumable_labels().map(|it| (it, 0)).collect()),
            given_up: AtomicU64::new(0),
            sent_again: AtomicU64::new(0),
            waiting: AtomicI64::new(0),
            gaps: Durations::new(GAPS),
        }
    }
}

impl Observer for ResumedStreams {
    fn resumed(&self, reason: &'static str, gap: Duration, sent_again: u64) {
        *self.by_reason.lock().entry(reason).or_default() += 1;
        self.sent_again.fetch_add(sent_again, Relaxed);
        self.gaps.record(gap);
    }

    fn given_up(&self) {
        self.given_up.fetch_add(1, Relaxed);
    }

    fn waiting(&self, change: i64) {
        self.waiting.fetch_add(change, Relaxed);
    }
}

impl Exposition {
    /// Adds what became of streams whose tunnels were lost, in families whose names begin with
    /// `prefix`.
    pub fn resumed_streams(&mut self, prefix: &str, streams: &ResumedStreams) {
        let name = |name| format!("{prefix}_{name}");
        let by_reason = streams.by_reason.lock().clone();
        let rows = by_reason
            .into_iter()
            .map(|(reason, count)| (vec![("reason", reason.to_owned())], count));
        let help =
            "Streams that went on over another tunnel, by the reason for which theirs was lost.";
        self.family(&name("streams_resumed_total"), Kind::Counter, help, rows);
        let help = "Streams of lost tunnels that did not go on over another one.";
        self.counter(&name("streams_not_resumed_total"), help, streams.given_up.load(Relaxed));
        let help = "Bytes that were sent again when streams went on over another tunnel.";
        self.counter(
            &name("resume_sent_again_bytes_total"),
            help,
            streams.sent_again.load(Relaxed),
        );
        let help = "Streams that wait for another tunnel.";
        self.gauge(&name("streams_without_tunnel"), help, streams.waiting.load(Relaxed));
        let help = "Time for which streams that went on were without a tunnel, in seconds.";
        self.histogram(&name("resume_gap_seconds"), help, &streams.gaps);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_has_what_was_recorded() {
        let streams = ResumedStreams::default();
        streams.waiting(3);
        streams.resumed("timed_out", Duration::from_millis(300), 10);
        streams.resumed("timed_out", Duration::from_millis(20), 5);
        streams.given_up();
        streams.waiting(-2);
        let mut exposition = Exposition::new(String::new());
        exposition.resumed_streams("p", &streams);
        let text = exposition.into_text();
        for line in [
            "p_streams_resumed_total{reason=\"timed_out\"} 2",
            "p_streams_not_resumed_total 1",
            "p_resume_sent_again_bytes_total 15",
            "p_streams_without_tunnel 1",
            "p_resume_gap_seconds_bucket{le=\"0.05\"} 1",
            "p_resume_gap_seconds_count 2",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in {text}");
        }
    }
}
