//! The results as tables.

use std::{sync::Arc, time::Duration};

use culvert_server::backends::{Backend, registry::Candidate};

use super::session::Report;
use crate::tables::table;

/// Sessions above, tunnels below.
pub(super) fn draw(reports: &[Report], tunnels: &[Arc<Backend>]) -> String {
    let mut sessions = table(&["session", "up", "down", "Mbit/s", "answers", "p50", "p99", "max"]);
    for report in reports {
        let latency = |value: Duration| match report.max {
            Duration::ZERO => "–".to_owned(),
            _ => millis(value),
        };
        sessions.add_row([
            report.name.to_owned(),
            bytes(report.up),
            bytes(report.down),
            format!("{:.2}", report.megabits_per_second()),
            report.count.to_string(),
            latency(report.p50),
            latency(report.p99),
            latency(report.max),
        ]);
    }
    let mut agents =
        table(&["tunnel of", "transport", "streams", "RTT", "cwnd", "MTU", "sent", "lost"]);
    for backend in tunnels {
        let stats = backend.tunnel.stats();
        agents.add_row([
            backend.agent_id().to_string(),
            backend.tunnel.carrier().to_string(),
            backend.open_streams().to_string(),
            millis(stats.rtt),
            bytes(stats.cwnd),
            stats.mtu.to_string(),
            stats.sent_packets.to_string(),
            stats.lost_packets.to_string(),
        ]);
    }
    format!("{sessions}\n{agents}")
}

fn millis(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

fn bytes(count: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown to two digits")]
    let count = count as f64;
    match count {
        0.0..1e3 => format!("{count:.0} B"),
        1e3..1e6 => format!("{:.1} kB", count / 1e3),
        1e6..1e9 => format!("{:.1} MB", count / 1e6),
        _ => format!("{:.2} GB", count / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(1_500), "1.5 kB");
        assert_eq!(bytes(2_000_000), "2.0 MB");
        assert_eq!(bytes(3_210_000_000), "3.21 GB");
    }
}
