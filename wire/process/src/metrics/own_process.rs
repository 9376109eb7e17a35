//! The `process_*` metrics that every Prometheus client exports, read from /proc at scrape time.

use std::fs;

use super::{Kind, append_one};

/// Clock ticks per second in /proc/self/stat: Linux's USER_HZ, 100 wherever we run.
const TICKS_PER_SECOND: f64 = 100.0;

/// Appends what can be read; what cannot (another system than Linux) is left out.
pub(super) fn append(text: &mut String) {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let (stat, status) = (read("/proc/self/stat"), read("/proc/self/status"));
    // The name in field 2 may hold spaces and parentheses; fields are counted behind its end.
    let behind_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = |field: usize| -> Option<f64> {
        behind_name.split_ascii_whitespace().nth(field - 3)?.parse().ok()
    };
    let mut gauge = |name: &str, help: &str, value: Option<f64>| {
        if let Some(value) = value {
            append_one(text, name, Kind::Gauge, help, value);
        }
    };
    gauge(
        "process_resident_memory_bytes",
        "Resident memory size in bytes.",
        kibibytes(&status, "VmRSS:"),
    );
    gauge(
        "process_virtual_memory_bytes",
        "Virtual memory size in bytes.",
        kibibytes(&status, "VmSize:"),
    );
    gauge("process_open_fds", "Number of open file descriptors.", open_files());
    gauge(
        "process_max_fds",
        "Maximum number of open file descriptors.",
        max_files(&read("/proc/self/limits")),
    );
    gauge(
        "process_start_time_seconds",
        "Start time of the process since unix epoch in seconds.",
        boot_time(&read("/proc/stat"))
            .zip(ticks(22))
            .map(|(boot, start)| boot + start / TICKS_PER_SECOND),
    );
    if let Some((user, system)) = ticks(14).zip(ticks(15)) {
        append_one(
            text,
            "process_cpu_seconds_total",
            Kind::Counter,
            "Total user and system CPU time spent in seconds.",
            (user + system) / TICKS_PER_SECOND,
        );
    }
}

fn kibibytes(status: &str, name: &str) -> Option<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kibibytes: f64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024.0)
}

fn open_files() -> Option<f64> {
    // One of the entries is the listing's own.
    fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1) as f64)
}

fn max_files(limits: &str) -> Option<f64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

fn boot_time(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[cfg(target_os = "linux")]
    #[test]
    fn all_six_are_there_and_plausible() {
        let mut text = String::new();
        super::append(&mut text);
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} in {text}")).parse().unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e5);
        assert!(value("process_virtual_memory_bytes") >= value("process_resident_memory_bytes"));
        assert!(value("process_open_fds") >= 1.0);
        assert!(value("process_max_fds") >= value("process_open_fds"));
        assert!(value("process_cpu_seconds_total") >= 0.0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - value("process_start_time_seconds");
        assert!((-5.0..86_400.0).contains(&age), "started {age} s ago");
    }
}
