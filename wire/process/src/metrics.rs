//! The metrics of one server or one agent, each with a recorder of its own.
//!
//! Tests run several of them in one process, so nothing here is global: a metric is made through
//! [`Metrics`] and its handle kept by whoever counts.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use culvert_transport::{Carrier, TunnelStats, splice::Meter};
use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, SharedString};
pub use metrics_exporter_prometheus::BuildError;
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

mod own_process;

/// How often samples of histograms are folded into their buckets between scrapes: bounds their
/// memory when nobody scrapes.
const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

const METADATA: Metadata<'static> = Metadata::new("culvert", Level::INFO, None);

/// Where the metrics of one server or agent live. Clones share them.
///
/// A labelled metric shows up with its first use, never before: upstream's tests compare whole
/// families and expect only what was observed. Call `describe_*` once per name, before the first
/// handle, so that the scrape carries the HELP text.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// An empty set; `buckets` are the upper bounds of each histogram by full name, and
    /// `version` goes into `culvert_build_info`.
    ///
    /// # Errors
    /// When a histogram has no bounds.
    pub fn new(version: &'static str, buckets: &[(&str, &[f64])]) -> Result<Self, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (name, bounds) in buckets {
            builder = builder.set_buckets_for_metric(Matcher::Full((*name).to_owned()), bounds)?;
        }
        let recorder = builder.build_recorder();
        let metrics = Self { handle: recorder.handle(), recorder: Arc::new(recorder) };
        metrics.describe_gauge("culvert_build_info", "Always 1; the label tells the version.");
        metrics.gauge("culvert_build_info", &[("version", version)]).set(1.0);
        Ok(metrics)
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

    /// The counter of that name and those labels; from now on part of every scrape.
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder.register_counter(&key(name, labels), &METADATA)
    }

    /// The gauge of that name and those labels; from now on part of every scrape.
    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    /// The histogram of that name and those labels; from now on part of every scrape.
    pub fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Histogram {
        self.recorder.register_histogram(&key(name, labels), &METADATA)
    }

    /// Everything in Prometheus' text format 0.0.4, with the `process_*` metrics read just now.
    pub fn render(&self) -> String {
        let mut text = self.handle.render();
        own_process::append(&mut text);
        text
    }

    /// Starts the task that keeps histograms small between scrapes. Needs a tokio runtime.
    pub fn spawn_upkeep(&self) -> Upkeep {
        let handle = self.handle.clone();
        let task = tokio::spawn(async move {
            let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
            loop {
                ticks.tick().await;
                handle.run_upkeep();
            }
        });
        Upkeep { task }
    }
}

/// Owns the upkeep task, which ends when this is dropped.
#[derive(Debug)]
pub struct Upkeep {
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Upkeep {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let label = |&(name, value): &(&'static str, &str)| {
        Label::new(name, SharedString::from(value.to_owned()))
    };
    Key::from_parts(name, labels.iter().map(label).collect::<Vec<_>>())
}

/// Whether a family's values only ever grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// They only grow.
    Counter,
    /// They go up and down.
    Gauge,
}

/// Appends a family whose values are read at scrape time: a line for each set of labels, and
/// nothing at all without one.
pub fn append_family<V: std::fmt::Display>(
    text: &mut String,
    name: &str,
    kind: Kind,
    help: &str,
    rows: impl IntoIterator<Item = (Vec<(&'static str, String)>, V)>,
) {
    let kind = match kind {
        Kind::Counter => "counter",
        Kind::Gauge => "gauge",
    };
    let mut rows = rows.into_iter().peekable();
    if rows.peek().is_none() {
        return;
    }
    // Writing to a String cannot fail.
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    for (labels, value) in rows {
        let labels: Vec<_> =
            labels.iter().map(|(label, value)| format!("{label}=\"{}\"", escape(value))).collect();
        let _ = match labels.is_empty() {
            true => writeln!(text, "{name} {value}"),
            false => writeln!(text, "{name}{{{}}} {value}", labels.join(",")),
        };
    }
    text.push('\n');
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// One tunnel in a scrape: the label that names its peer, its carrier, and its path.
pub type TunnelRow = ((&'static str, String), Carrier, TunnelStats);

/// Appends the paths of tunnels, in families that begin with `prefix`.
pub fn append_tunnels(text: &mut String, prefix: &str, tunnels: &[TunnelRow]) {
    let mut family = |name, kind, help, value: fn(&TunnelStats) -> f64| {
        let rows = tunnels.iter().map(|(peer, carrier, stats)| {
            (vec![peer.clone(), ("transport", carrier.name().to_owned())], value(stats))
        });
        append_family(text, &format!("{prefix}_{name}"), kind, help, rows);
    };
    #[expect(clippy::cast_precision_loss, reason = "no counter of a tunnel reaches 2^52")]
    {
        let help = "Smoothed round-trip time of the tunnel's path, in seconds.";
        family("rtt_seconds", Kind::Gauge, help, |stats| stats.rtt.as_secs_f64());
        let help = "Congestion window of the tunnel, in bytes.";
        family("cwnd_bytes", Kind::Gauge, help, |stats| stats.cwnd as f64);
        let help = "Largest UDP payload that the path is known to carry, in bytes.";
        family("mtu_bytes", Kind::Gauge, help, |stats| f64::from(stats.mtu));
        let help = "Packets sent on the tunnel.";
        family("sent_packets_total", Kind::Counter, help, |stats| stats.sent_packets as f64);
        let help = "Packets of the tunnel declared lost.";
        family("lost_packets_total", Kind::Counter, help, |stats| stats.lost_packets as f64);
        let help = "Times the tunnel's congestion window was cut.";
        family("congestion_events_total", Kind::Counter, help, |stats| {
            stats.congestion_events as f64
        });
        let help = "Times the tunnel's path was found to swallow large packets.";
        family("black_holes_total", Kind::Counter, help, |stats| stats.black_holes as f64);
        let help = "Thin writes of the tunnel that were sent a second time.";
        family("copies_sent_total", Kind::Counter, help, |stats| stats.copies_sent as f64);
        let help = "Second copies that came before the first, which was late or lost.";
        family("copies_used_total", Kind::Counter, help, |stats| stats.copies_used as f64);
        let help = "UDP payload bytes sent on the tunnel.";
        family("sent_bytes_total", Kind::Counter, help, |stats| stats.sent_bytes as f64);
        let help = "UDP payload bytes received on the tunnel.";
        family("received_bytes_total", Kind::Counter, help, |stats| stats.received_bytes as f64);
    }
}

/// Appends what a meter has counted; `directions` are the labels of the bytes to the tunnel and of
/// those from it.
pub fn append_meter(text: &mut String, name: &str, meter: &Meter, directions: [&str; 2]) {
    let bytes = [meter.to_tunnel(), meter.from_tunnel()];
    let rows = directions
        .into_iter()
        .zip(bytes)
        .map(|(direction, bytes)| (vec![("direction", direction.to_owned())], bytes));
    append_family(text, name, Kind::Counter, "Bytes spliced, by direction.", rows);
}

/// One metric without labels, in text format.
fn append_one(
    text: &mut String,
    name: &str,
    kind: Kind,
    help: &str,
    value: impl std::fmt::Display,
) {
    append_family(text, name, kind, help, [(vec![], value)]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_escapes_its_labels_and_is_left_out_without_rows() {
        let mut text = String::new();
        let rows = [(vec![("agent_id", "a\"b\\c\nd".to_owned())], 1)];
        append_family(&mut text, "x", Kind::Gauge, "Help.", rows);
        assert_eq!(text, "# HELP x Help.\n# TYPE x gauge\nx{agent_id=\"a\\\"b\\\\c\\nd\"} 1\n\n");
        text.clear();
        append_tunnels(&mut text, "culvert_server_tunnel", &[]);
        assert_eq!(text, "");
    }

    #[test]
    fn instances_do_not_share_what_they_count() {
        let (one, other) = (Metrics::new("1", &[]).unwrap(), Metrics::new("2", &[]).unwrap());
        one.describe_counter("dials_total", "Dials, by outcome.");
        one.counter("dials_total", &[("outcome", "ok")]).increment(3);
        let text = one.render();
        assert!(text.contains("# HELP dials_total Dials, by outcome.\n"), "{text}");
        assert!(text.contains("# TYPE dials_total counter\n"), "{text}");
        assert!(text.contains("dials_total{outcome=\"ok\"} 3\n"), "{text}");
        assert!(text.contains("culvert_build_info{version=\"1\"} 1\n"), "{text}");
        let text = other.render();
        assert!(!text.contains("dials_total"), "{text}");
        assert!(text.contains("culvert_build_info{version=\"2\"} 1\n"), "{text}");
    }

    #[test]
    fn a_described_name_without_handles_stays_out_of_the_scrape() {
        let metrics = Metrics::new("1", &[]).unwrap();
        metrics.describe_counter("failures_total", "Failures.");
        assert!(!metrics.render().contains("failures_total"));
        let gauge = metrics.gauge("open_connections", &[]);
        assert!(metrics.render().contains("\nopen_connections 0\n"));
        gauge.increment(2.0);
        gauge.decrement(1.0);
        assert!(metrics.render().contains("\nopen_connections 1\n"));
    }

    #[test]
    fn histograms_have_the_bounds_of_the_caller() {
        let metrics = Metrics::new("1", &[("dial_duration_seconds", &[0.000_01, 0.5])]).unwrap();
        metrics.histogram("dial_duration_seconds", &[]).record(0.1);
        let text = metrics.render();
        for line in [
            "# TYPE dial_duration_seconds histogram",
            "dial_duration_seconds_bucket{le=\"0.00001\"} 0",
            "dial_duration_seconds_bucket{le=\"0.5\"} 1",
            "dial_duration_seconds_bucket{le=\"+Inf\"} 1",
            "dial_duration_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
        assert!(Metrics::new("1", &[("empty", &[])]).is_err());
    }
}
