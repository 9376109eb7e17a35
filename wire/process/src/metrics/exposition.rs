//! Families whose values are read at scrape time, in Prometheus' text format 0.0.4.

use std::fmt::{Display, Write as _};

use culvert_transport::{
    Carrier, TunnelStats, UdpStats,
    budget::{Held, MemoryBudget},
    congestion::{KnownPaths, Resumption},
    splice::Meter,
};
use metrics_process::collector;
use tokio::runtime::Handle;

use super::{durations::Durations, go_number::go_number};
use crate::logging;

/// Kind of a family's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Values that only grow.
    Counter,
    /// Values that go up and down.
    Gauge,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// Labels of one value: names and values.
pub type Labels = Vec<(&'static str, String)>;

/// One tunnel in a scrape: the label that names its peer, its carrier, and its path.
pub type TunnelRow = ((&'static str, String), Carrier, TunnelStats);

/// The text of one scrape, to which a process adds what it reads at scrape time.
#[derive(Debug)]
pub struct Exposition {
    text: String,
}

impl Exposition {
    pub(super) fn new(text: String) -> Self {
        Self { text }
    }

    pub(super) fn into_text(self) -> String {
        self.text
    }

    /// Adds a family with a value for each set of labels; without rows it adds nothing.
    pub fn family<V: Display>(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        rows: impl IntoIterator<Item = (Labels, V)>,
    ) {
        let mut rows = rows.into_iter().peekable();
        if rows.peek().is_none() {
            return;
        }
        // Writing to a String cannot fail.
        let text = &mut self.text;
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {}\n", kind.name());
        for (labels, value) in rows {
            let labels: Vec<_> = labels
                .iter()
                .map(|(label, value)| format!("{label}=\"{}\"", escape(value)))
                .collect();
            let _ = match labels.is_empty() {
                true => writeln!(text, "{name} {value}"),
                false => writeln!(text, "{name}{{{}}} {value}", labels.join(",")),
            };
        }
        text.push('\n');
    }

    /// Adds a gauge without labels.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, Kind::Gauge, help, [(vec![], value)]);
    }

    /// Adds a counter without labels.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, Kind::Counter, help, [(vec![], value)]);
    }

    /// Adds a histogram without labels.
    pub fn histogram(&mut self, name: &str, help: &str, durations: &Durations) {
        // Writing to a String cannot fail.
        let text = &mut self.text;
        let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} histogram\n");
        let mut count = 0;
        for (bound, sum) in durations.cumulative() {
            let _ = writeln!(text, "{name}_bucket{{le=\"{}\"}} {sum}", go_number(bound));
            count = sum;
        }
        let _ = write!(text, "{name}_sum {}\n{name}_count {count}\n\n", durations.sum());
    }

    /// Adds the number of live tasks of the calling thread's runtime; nothing outside a runtime.
    pub fn tasks(&mut self, name: &str) {
        if let Ok(runtime) = Handle::try_current() {
            let help = "Tasks of the asynchronous runtime that have not ended.";
            self.gauge(name, help, runtime.metrics().num_alive_tasks());
        }
    }

    /// Adds the bytes of a meter; `directions` label the bytes to the tunnel and those from it.
    pub fn meter(&mut self, name: &str, meter: &Meter, directions: [&str; 2]) {
        let bytes = [meter.to_tunnel(), meter.from_tunnel()];
        let rows = directions
            .into_iter()
            .zip(bytes)
            .map(|(direction, bytes)| (vec![("direction", direction.to_owned())], bytes));
        self.family(name, Kind::Counter, "Bytes spliced, by direction.", rows);
    }

    /// Adds the state of the process's UDP sockets, in families whose names begin with `prefix`.
    pub fn udp(&mut self, prefix: &str, stats: &UdpStats) {
        let name = |name| format!("{prefix}_{name}");
        let help = "Whether UDP packets are sent in batches that the kernel segments.";
        self.gauge(&name("gso"), help, u8::from(stats.gso));
        let help = "Peers that are sent packets one by one, because batches do not reach them.";
        self.gauge(&name("gso_disabled_peers"), help, stats.unsegmented_peers);
        let help = "UDP sockets on which no packet can be received.";
        self.gauge(&name("broken"), help, stats.broken);
        let fallbacks = [
            ("recvmmsg_refused", stats.recvmmsg_refused),
            ("receive_refused", stats.receive_refused),
            ("gso_refused", stats.gso_refused),
            ("gso_lost", stats.gso_lost),
        ];
        let rows = fallbacks.map(|(reason, count)| (vec![("reason", reason.to_owned())], count));
        let help =
            "Times that a system call was given up for a slower one, or UDP for TCP, by reason.";
        self.family(&name("fallbacks_total"), Kind::Counter, help, rows);
        let help = "UDP packets that the kernel refused to send.";
        self.counter(&name("send_errors_total"), help, stats.send_errors);
        let help = "Times that a UDP socket stopped to receive until packets were processed.";
        self.counter(&name("receive_pauses_total"), help, stats.receive_pauses);
        let help = "UDP packets that were dropped, because their tunnel had many to process.";
        self.counter(&name("receive_drops_total"), help, stats.packets_dropped);
    }

    /// Adds what the process holds for its peers, in families whose names begin with `prefix`.
    pub fn memory(&mut self, prefix: &str, budget: &MemoryBudget) {
        let name = |name| format!("{prefix}_memory_{name}");
        let help =
            "Maximum number of bytes that the process holds for its peers; 0 without a limit.";
        self.gauge(&name("limit_bytes"), help, budget.limit().unwrap_or(0));
        let help = "Bytes that the process holds for its peers, by kind.";
        let rows = Held::ALL.map(|it| (vec![("kind", it.label().to_owned())], budget.held(it)));
        self.family(&name("held_bytes"), Kind::Gauge, help, rows);
        let help = "Times that a stream waited for memory before it read on.";
        self.counter(&name("waits_total"), help, budget.waits());
        let help = "Streams that were cut because the memory for peers was used up.";
        self.counter(&name("cuts_total"), help, budget.cuts());
    }

    /// Adds what tunnels made of the paths that earlier tunnels have found, in a family whose name
    /// begins with `prefix`.
    pub fn resumptions(&mut self, prefix: &str, known: &KnownPaths) {
        let rows = Resumption::ALL
            .map(|result| (vec![("result", result.label().to_owned())], known.count(result)));
        let help = "Tunnels that could begin at the rate of an earlier one, by result.";
        self.family(&format!("{prefix}_rate_resumptions_total"), Kind::Counter, help, rows);
    }

    /// Adds the paths of tunnels, in families whose names begin with `prefix`.
    #[expect(clippy::cast_precision_loss, reason = "no counter of a tunnel reaches 2^52")]
    pub fn tunnels(&mut self, prefix: &str, tunnels: &[TunnelRow]) {
        use Kind::{Counter, Gauge};
        type Value = fn(&TunnelStats) -> f64;
        #[rustfmt::skip]
        let families: [(&str, Kind, &str, Value); 13] = [
            ("rtt_seconds", Gauge, "Smoothed round-trip time of the tunnel's path, in seconds.",
                |stats| stats.rtt.as_secs_f64()),
            ("cwnd_bytes", Gauge, "Congestion window of the tunnel, in bytes.",
                |stats| stats.cwnd as f64),
            ("mtu_bytes", Gauge, "Largest UDP payload that the path is known to carry, in bytes.",
                |stats| f64::from(stats.mtu)),
            ("sent_packets_total", Counter, "Packets sent on the tunnel.",
                |stats| stats.sent_packets as f64),
            ("lost_packets_total", Counter, "Packets of the tunnel declared lost.",
                |stats| stats.lost_packets as f64),
            ("congestion_events_total", Counter,
                "Times the tunnel's congestion window was cut.",
                |stats| stats.congestion_events as f64),
            ("black_holes_total", Counter,
                "Times the tunnel's path was found to swallow large packets.",
                |stats| stats.black_holes as f64),
            ("copies_sent_total", Counter,
                "Copies of short writes and of streams' ends that were sent on the tunnel.",
                |stats| stats.copies_sent as f64),
            ("copies_used_total", Counter,
                "Copies that came before the first, which was late or lost.",
                |stats| stats.copies_used as f64),
            ("repair_packets_sent_total", Counter,
                "Packets with repair shards of bursts that were sent on the tunnel.",
                |stats| stats.repairs_sent as f64),
            ("bursts_rebuilt_total", Counter,
                "Bursts whose missing packets were rebuilt from repair shards.",
                |stats| stats.bursts_rebuilt as f64),
            ("sent_bytes_total", Counter, "UDP payload bytes sent on the tunnel.",
                |stats| stats.sent_bytes as f64),
            ("received_bytes_total", Counter, "UDP payload bytes received on the tunnel.",
                |stats| stats.received_bytes as f64),
        ];
        for (name, kind, help, value) in families {
            let rows = tunnels.iter().map(|(peer, carrier, stats)| {
                (vec![peer.clone(), ("transport", carrier.name().to_owned())], value(stats))
            });
            self.family(&format!("{prefix}_{name}"), kind, help, rows);
        }
    }

    /// Adds the `process_*` metrics that client_golang exports, with its HELP texts, and the number
    /// of lost log lines. A value that the system does not give is left out.
    ///
    /// metrics-process only reads the values: registered as its own metrics, the seconds of
    /// processor time would lose their fractions.
    pub(super) fn process(&mut self) {
        let process = collector::collect();
        let mut gauge = |name, help, value: Option<u64>| {
            if let Some(value) = value {
                self.gauge(name, help, value);
            }
        };
        gauge(
            "process_resident_memory_bytes",
            "Resident memory size in bytes.",
            process.resident_memory_bytes,
        );
        gauge(
            "process_virtual_memory_bytes",
            "Virtual memory size in bytes.",
            process.virtual_memory_bytes,
        );
        gauge(
            "process_virtual_memory_max_bytes",
            "Maximum amount of virtual memory available in bytes.",
            // The library says 0 where there is no limit, and Go's the largest number.
            process.virtual_memory_max_bytes.map(|bytes| if bytes == 0 { u64::MAX } else { bytes }),
        );
        gauge("process_open_fds", "Number of open file descriptors.", process.open_fds);
        gauge("process_max_fds", "Maximum number of open file descriptors.", process.max_fds);
        gauge(
            "process_start_time_seconds",
            "Start time of the process since unix epoch in seconds.",
            process.start_time_seconds,
        );
        if let Some(seconds) = process.cpu_seconds_total {
            let help = "Total user and system CPU time spent in seconds.";
            self.counter("process_cpu_seconds_total", help, seconds);
        }
        if let Some([received, sent]) = network_bytes() {
            let help = "Number of bytes received by the process over the network.";
            self.counter("process_network_receive_bytes_total", help, received);
            let help = "Number of bytes sent by the process over the network.";
            self.counter("process_network_transmit_bytes_total", help, sent);
        }
        let help = "Log lines that were lost: the queue was full, or they could not be written.";
        self.counter("culvert_log_lines_dropped_total", help, logging::dropped_lines());
    }
}

/// Number of bytes received and sent by the process's network namespace, as in Go's client library.
fn network_bytes() -> Option<[u64; 2]> {
    let netstat = std::fs::read_to_string("/proc/self/net/netstat").ok()?;
    let mut rows = netstat.lines().filter_map(|line| line.strip_prefix("IpExt: "));
    let (names, values) = (rows.next()?, rows.next()?);
    let columns: Vec<_> = names.split(' ').zip(values.split(' ')).collect();
    let value = |wanted| {
        let (_, value) = columns.iter().find(|(name, _)| *name == wanted)?;
        value.parse().ok()
    };
    Some([value("InOctets")?, value("OutOctets")?])
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_escapes_its_labels_and_is_left_out_without_rows() {
        let mut exposition = Exposition::new(String::new());
        exposition.tunnels("culvert_server_tunnel", &[]);
        exposition.family("x", Kind::Gauge, "Help.", Vec::<(Labels, u64)>::new());
        assert_eq!(exposition.text, "");
        let rows = [(vec![("agent_id", "a\"b\\c\nd".to_owned()), ("b", "c".to_owned())], 1)];
        exposition.family("x", Kind::Gauge, "Help.", rows);
        let text = "# HELP x Help.\n# TYPE x gauge\nx{agent_id=\"a\\\"b\\\\c\\nd\",b=\"c\"} 1\n\n";
        assert_eq!(exposition.into_text(), text);
    }

    #[test]
    fn a_histogram_counts_up_to_each_bound() {
        let durations = Durations::new(&[1e-6, 0.5]);
        let micros = [1, 2, 500_000, 500_001];
        micros.into_iter().for_each(|it| durations.record(std::time::Duration::from_micros(it)));
        let mut exposition = Exposition::new(String::new());
        exposition.histogram("d", "Help.", &durations);
        let text = "# HELP d Help.\n# TYPE d histogram\nd_bucket{le=\"1e-06\"} 1\n\
                    d_bucket{le=\"0.5\"} 3\nd_bucket{le=\"+Inf\"} 4\nd_sum 1.000004\nd_count 4\n\n";
        assert_eq!(exposition.into_text(), text);
    }

    #[test]
    fn each_family_of_a_tunnel_has_its_own_value() {
        let mut stats = TunnelStats::default();
        stats.rtt = std::time::Duration::from_millis(1500);
        (stats.cwnd, stats.mtu) = (2, 3);
        (stats.sent_packets, stats.lost_packets) = (4, 5);
        (stats.congestion_events, stats.black_holes) = (6, 7);
        (stats.copies_sent, stats.copies_used) = (8, 9);
        (stats.sent_bytes, stats.received_bytes) = (10, 11);
        (stats.repairs_sent, stats.bursts_rebuilt) = (12, 13);
        let mut exposition = Exposition::new(String::new());
        exposition.tunnels("t", &[(("agent_id", "a".to_owned()), Carrier::Quic, stats)]);
        let labels = "{agent_id=\"a\",transport=\"quic\"} ";
        let lines = exposition.text.lines();
        let values: Vec<_> =
            lines.filter_map(|line| line.strip_prefix("t_")?.split_once(labels)).collect();
        let names = [
            ("rtt_seconds", "1.5"),
            ("cwnd_bytes", "2"),
            ("mtu_bytes", "3"),
            ("sent_packets_total", "4"),
            ("lost_packets_total", "5"),
            ("congestion_events_total", "6"),
            ("black_holes_total", "7"),
            ("copies_sent_total", "8"),
            ("copies_used_total", "9"),
            ("repair_packets_sent_total", "12"),
            ("bursts_rebuilt_total", "13"),
            ("sent_bytes_total", "10"),
            ("received_bytes_total", "11"),
        ];
        assert_eq!(values, names);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_metrics_of_the_process_are_plausible() {
        let mut exposition = Exposition::new(String::new());
        exposition.process();
        let text = exposition.into_text();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e5);
        assert!(value("process_virtual_memory_bytes") >= value("process_resident_memory_bytes"));
        let max = value("process_virtual_memory_max_bytes");
        assert!(max >= value("process_virtual_memory_bytes"));
        assert!(value("process_network_receive_bytes_total") >= 0.0);
        assert!(value("process_network_transmit_bytes_total") >= 0.0);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_max_fds") >= value("process_open_fds"));
        assert!(value("process_cpu_seconds_total") >= 0.0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - value("process_start_time_seconds");
        assert!((-5.0..86_400.0).contains(&age), "started {age} s ago");
        assert!(text.contains("# TYPE process_cpu_seconds_total counter\n"), "{text}");
    }
}
