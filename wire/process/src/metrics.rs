//! The metrics of one server or one agent.
//!
//! Tests run several servers and agents in one process, so nothing here is global: each has a
//! recorder of its own. A metric is made through [`Metrics`], and the part that counts keeps its
//! handle. [`Exposition`] adds values that are read at scrape time.

use std::{sync::Arc, time::Duration};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, SharedString};
pub use metrics_exporter_prometheus::BuildError;
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};
use tokio_util::task::AbortOnDropHandle;

use self::go_number::go_number;

mod durations;
mod exposition;
mod go_number;
mod packets;
mod resumed;
mod streams;

pub use durations::Durations;
pub use exposition::{Exposition, Kind, Labels, TunnelRow};
pub use packets::{PacketType, Segment, StreamErrors, StreamPackets};
pub use resumed::ResumedStreams;
pub use streams::{Counted, LiveCount, StreamEnds};

/// Whether a port cannot be listened on, by the listener's name.
const LISTENER_UNAVAILABLE: &str = "culvert_listener_unavailable";

/// Interval at which samples of histograms are added to their buckets. Without it, and without
/// scrapes, the samples would pile up in memory.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Requests of metrics by status, and those without an answer yet, as in Go's client library.
const SCRAPES: &str = "promhttp_metric_handler_requests_total";
const SCRAPES_IN_FLIGHT: &str = "promhttp_metric_handler_requests_in_flight";

const METADATA: Metadata<'static> = Metadata::new("culvert", Level::INFO, None);

/// The metrics of one server or agent. Clones share them.
///
/// A metric is part of a scrape from its first use on. Counters whose labels are known begin at 0,
/// because a rate sees no first event otherwise. Call `describe_*` once per name, before the first
/// use, so that the scrape has the HELP text.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
    /// Bounds of buckets as the recorder spells them, and as Go does, where that differs.
    bounds: Arc<[(String, String)]>,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Metrics with one value, `culvert_build_info`, whose label is `version`. `buckets` are the
    /// upper bounds of each histogram, by its full name.
    ///
    /// # Errors
    /// When a histogram has no bounds.
    pub fn new(version: &'static str, buckets: &[(&str, &[f64])]) -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, bounds) in buckets {
            builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), bounds)?;
        }
        let recorder = builder.build_recorder();
        let bounds = respelled(buckets.iter().flat_map(|(_, bounds)| *bounds));
        let metrics = Self { handle: recorder.handle(), recorder: Arc::new(recorder), bounds };
        metrics.describe_gauge("culvert_build_info", "Always 1; the label tells the version.");
        metrics.gauge("culvert_build_info", &[("version", version)]).set(1.0);
        let help = "1 while the port of the listener cannot be listened on, else 0.";
        metrics.describe_gauge(LISTENER_UNAVAILABLE, help);
        metrics.describe_counter(SCRAPES, "Total number of scrapes by HTTP status code.");
        metrics.register_counters(SCRAPES, "code", ["200", "500", "503"]);
        metrics.describe_gauge(SCRAPES_IN_FLIGHT, "Current number of scrapes being served.");
        let _ = metrics.scrapes_in_flight();
        Ok(metrics)
    }

    /// The gauge that is 1 while this listener's port is not available.
    pub(crate) fn listener_unavailable(&self, listener: &'static str) -> Gauge {
        self.gauge(LISTENER_UNAVAILABLE, &[("listener", listener)])
    }

    /// Number of requests of metrics that were answered.
    pub(crate) fn scrapes(&self) -> Counter {
        self.counter(SCRAPES, &[("code", "200")])
    }

    /// Number of requests of metrics that have no answer yet.
    pub(crate) fn scrapes_in_flight(&self) -> Gauge {
        self.gauge(SCRAPES_IN_FLIGHT, &[])
    }

    /// Gives a counter its HELP text.
    pub fn describe_counter(&self, name: &'static str, help: &'static str) {
        self.recorder.describe_counter(name.into(), None, help.into());
    }

    /// Gives a gauge its HELP text.
    pub fn describe_gauge(&self, name: &'static str, help: &'static str) {
        self.recorder.describe_gauge(name.into(), None, help.into());
    }

    /// Gives a histogram its HELP text.
    pub fn describe_histogram(&self, name: &'static str, help: &'static str) {
        self.recorder.describe_histogram(name.into(), None, help.into());
    }

    /// The counter of this name and these labels.
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder.register_counter(&key(name, labels), &METADATA)
    }

    /// Begins the counters of this name, one for each value of the label, at 0.
    pub fn register_counters(
        &self,
        name: &'static str,
        label: &'static str,
        values: impl IntoIterator<Item = &'static str>,
    ) {
        for value in values {
            let _ = self.counter(name, &[(label, value)]);
        }
    }

    /// The gauge of this name and these labels.
    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    /// The histogram of this name and these labels.
    pub fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        self.recorder.register_histogram(&key(name, labels), &METADATA)
    }

    /// All metrics in Prometheus' text format 0.0.4: the counted ones, the `process_*` metrics, and
    /// those that `collect` adds. The last two are read now, so they are never stale.
    pub fn render(&self, collect: impl FnOnce(&mut Exposition)) -> String {
        let mut text = self.handle.render();
        for (spelled, in_go) in &*self.bounds {
            text = text.replace(spelled, in_go);
        }
        let mut exposition = Exposition::new(text);
        exposition.process();
        collect(&mut exposition);
        exposition.into_text()
    }

    /// Starts the task that keeps histograms small between scrapes. Panics outside a tokio
    /// runtime.
    pub fn spawn_upkeep(&self) -> Upkeep {
        let handle = self.handle.clone();
        culvert_transport::task::owned(async move {
            let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
            loop {
                ticks.tick().await;
                handle.run_upkeep();
            }
        })
    }
}

/// The `le` labels that the recorder spells differently from Go, each with Go's spelling.
fn respelled<'a>(bounds: impl Iterator<Item = &'a f64>) -> Arc<[(String, String)]> {
    let mut labels: Vec<_> = bounds
        .map(|bound| (bound.to_string(), go_number(*bound)))
        .filter(|(spelled, in_go)| spelled != in_go)
        .map(|(spelled, in_go)| (format!("le=\"{spelled}\""), format!("le=\"{in_go}\"")))
        .collect();
    labels.sort();
    labels.dedup();
    labels.into()
}

/// The upkeep task; dropping this ends it.
pub type Upkeep = AbortOnDropHandle<()>;

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let label = |&(name, value): &(&'static str, &str)| {
        Label::new(name, SharedString::from(value.to_owned()))
    };
    Key::from_parts(name, labels.iter().map(label).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_do_not_share_what_they_count() {
        let (one, other) = (Metrics::new("1", &[]).unwrap(), Metrics::new("2", &[]).unwrap());
        one.describe_counter("dials_total", "Dials, by outcome.");
        one.counter("dials_total", &[("outcome", "ok")]).increment(3);
        let text = one.render(|_| {});
        assert!(text.contains("# HELP dials_total Dials, by outcome.\n"), "{text}");
        assert!(text.contains("# TYPE dials_total counter\n"), "{text}");
        assert!(text.contains("dials_total{outcome=\"ok\"} 3\n"), "{text}");
        assert!(text.contains("culvert_build_info{version=\"1\"} 1\n"), "{text}");
        let text = other.render(|_| {});
        assert!(!text.contains("dials_total"), "{text}");
        assert!(text.contains("culvert_build_info{version=\"2\"} 1\n"), "{text}");
    }

    #[test]
    fn a_described_name_without_handles_stays_out_of_the_scrape() {
        let metrics = Metrics::new("1", &[]).unwrap();
        metrics.describe_counter("failures_total", "Failures.");
        assert!(!metrics.render(|_| {}).contains("failures_total"));
        let gauge = metrics.gauge("open_connections", &[]);
        assert!(metrics.render(|_| {}).contains("\nopen_connections 0\n"));
        gauge.increment(2.0);
        gauge.decrement(1.0);
        assert!(metrics.render(|_| {}).contains("\nopen_connections 1\n"));
    }

    #[test]
    fn histograms_have_the_bounds_of_the_caller() {
        let metrics = Metrics::new("1", &[("dial_duration_seconds", &[0.000_01, 0.5])]).unwrap();
        metrics.histogram("dial_duration_seconds", &[]).record(0.1);
        let text = metrics.render(|_| {});
        for line in [
            "# TYPE dial_duration_seconds histogram",
            "dial_duration_seconds_bucket{le=\"1e-05\"} 0",
            "dial_duration_seconds_bucket{le=\"0.5\"} 1",
            "dial_duration_seconds_bucket{le=\"+Inf\"} 1",
            "dial_duration_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        assert!(Metrics::new("1", &[("empty", &[])]).is_err());
    }
}
