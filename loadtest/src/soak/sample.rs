//! What a process holds at one moment, from `/proc` and a scrape of its metrics.

use std::{collections::HashSet, fs, io};

use super::trend::Slack;

/// A resource that must not grow.
#[derive(Debug)]
pub(super) struct Resource {
    /// Name, with its unit.
    pub(super) name: &'static str,
    /// Growth that is no leak.
    pub(super) slack: Slack,
}

const fn resource(name: &'static str, absolute: u64, percent: u64) -> Resource {
    Resource { name, slack: Slack { absolute, percent } }
}

/// Every resource, in the order of [`Sample`].
pub(super) const RESOURCES: [Resource; 7] = [
    resource("descriptors", 3, 5),
    // Threads for blocking work come and go.
    resource("threads", 4, 0),
    resource("tasks", 3, 5),
    // Receive buffers of the first tunnels that were replaced.
    resource("memory, KiB", 8_192, 15),
    resource("UDP sockets", 2, 0),
    resource("TCP sockets", 3, 0),
    // Labels that an event brings for the first time add series.
    resource("metric series", 30, 5),
];

/// Descriptors, threads, tasks, resident memory in KiB, UDP sockets, TCP sockets, metric series.
pub type Sample = [u64; RESOURCES.len()];

/// Reads what the process with this id holds; `scrape` is its metrics page.
///
/// # Errors
/// When the process has ended, or the page has no number of tasks.
pub fn read(pid: i32, scrape: &str) -> io::Result<Sample> {
    let folder = format!("/proc/{pid}");
    let links = fs::read_dir(format!("{folder}/fd"))?.filter_map(|entry| {
        // A descriptor may be closed meanwhile.
        let link = fs::read_link(entry.ok()?.path()).ok()?;
        Some(link.to_string_lossy().into_owned())
    });
    let links: Vec<_> = links.collect();
    let inodes: HashSet<_> =
        links.iter().filter_map(|link| link.strip_prefix("socket:[")?.strip_suffix(']')).collect();
    let sockets = |protocol: &str| -> io::Result<u64> {
        let table = |name: &str| fs::read_to_string(format!("{folder}/net/{name}"));
        let text = table(protocol)? + &table(&format!("{protocol}6")).unwrap_or_default();
        // The inode is the tenth column.
        let own = |line: &&str| {
            line.split_whitespace().nth(9).is_some_and(|inode| inodes.contains(inode))
        };
        Ok(text.lines().filter(own).count() as u64)
    };
    let status = fs::read_to_string(format!("{folder}/status"))?;
    Ok([
        links.len() as u64,
        field(&status, "Threads:")?,
        tasks(scrape).ok_or_else(|| io::Error::other("the scrape has no number of tasks"))?,
        field(&status, "VmRSS:")?,
        sockets("udp")?,
        sockets("tcp")?,
        scrape.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).count() as u64,
    ])
}

fn field(status: &str, name: &str) -> io::Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
    let value = line.split_whitespace().next().unwrap_or_default();
    value.parse().map_err(|_| io::Error::other(format!("/proc/…/status has no {name}")))
}

fn tasks(scrape: &str) -> Option<u64> {
    let names = ["culvert_server_tasks ", "culvert_agent_tasks "];
    let of_line = |line: &str| names.iter().find_map(|name| line.strip_prefix(name)?.parse().ok());
    scrape.lines().find_map(of_line)
}

/// The smaller amount of each resource: a scrape itself holds a connection.
pub(super) fn smaller(one: Sample, other: Sample) -> Sample {
    std::array::from_fn(|index| one[index].min(other[index]))
}

/// The larger amount of each resource.
pub(super) fn larger(one: Sample, other: Sample) -> Sample {
    std::array::from_fn(|index| one[index].max(other[index]))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn a_sample_counts_sockets_threads_and_series() {
        let scrape = "# HELP x y\nculvert_agent_tasks 7\n\na{b=\"c\"} 1\n";
        let pid = i32::try_from(std::process::id()).unwrap();
        // Other tests of this process open and close sockets too: many of them show.
        let before = read(pid, scrape).unwrap();
        let held: Vec<_> = (0..500)
            .map(|_| (TcpListener::bind("127.0.0.1:0"), UdpSocket::bind("[::1]:0")))
            .collect();
        let [descriptors, threads, tasks, memory, udp, tcp, series] = read(pid, scrape).unwrap();
        assert!(descriptors >= before[0] + 900, "{descriptors} after {}", before[0]);
        assert!(udp >= before[4] + 450 && tcp >= before[5] + 450, "{udp} UDP, {tcp} TCP");
        assert!(threads >= 1 && memory >= 1000);
        assert_eq!((tasks, series), (7, 2));
        drop(held);
    }
}
