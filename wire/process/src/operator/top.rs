//! Which streams are busy, and what each waits for: two lists of streams, compared.

use std::{
    collections::HashMap,
    io::{IsTerminal as _, Write as _, stdout},
    thread::sleep,
    time::{Duration, Instant},
};

use serde::Serialize;
use terminal_size::{Height, Width, terminal_size};

use super::{
    client::{Client, failed},
    streams::{MAX_LIMIT, Side, StreamEntry, StreamList, TunnelEntry},
    table::{Table, bytes},
};
use crate::go_flags::Exit;

/// Interval of the lists.
const INTERVAL: Duration = Duration::from_secs(1);
/// Clears a terminal.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Flags of the command, to be flattened into those of a process.
#[derive(Debug, clap::Args)]
pub struct TopFlags {
    /// Print one list and end
    #[arg(long)]
    once: bool,

    /// Print JSON, one line for each list
    #[arg(long)]
    json: bool,

    /// Number of streams in a list, the busiest first
    #[arg(long, value_name = "COUNT", default_value_t = 20)]
    count: usize,
}

/// One stream.
#[derive(Clone, Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    stream: StreamEntry,
    /// Bytes per second from the client to the target.
    rate_to_target: u64,
    /// Bytes per second from the target to the client.
    rate_from_target: u64,
    /// Round-trip time of its tunnel, in milliseconds.
    rtt_millis: Option<f64>,
    /// Packets that its tunnel lost in the interval, and whose contents were sent again.
    lost_packets: u64,
    /// What it waits for.
    waits_for: &'static str,
}

#[expect(clippy::disallowed_methods, reason = "a command, which has no runtime")]
fn pause() {
    sleep(INTERVAL);
}

/// Prints lists until the process cannot be asked, or once.
///
/// # Errors
/// When the process cannot be asked.
pub fn run(client: &Client<'_>, flags: &TopFlags, side: Side) -> Result<String, Exit> {
    let limit = MAX_LIMIT.to_string();
    let list = || client.get::<StreamList>("/streams", &[("limit", &limit)]);
    let (mut before, mut at) = (list()?, Instant::now());
    loop {
        pause();
        let after = list()?;
        let now = Instant::now();
        let mut rows = rows(&before, &after, now - at, side);
        rows.truncate(flags.count);
        let text = match flags.json {
            true => {
                serde_json::to_string(&rows).map_err(|error| failed(client.program, &error))? + "\n"
            }
            false => table(&rows, after.total, side),
        };
        if flags.once {
            return Ok(text);
        }
        let text = match stdout().is_terminal() && !flags.json {
            true => format!("{CLEAR}{}", clipped(&text, terminal_size())),
            false => text,
        };
        if write!(stdout(), "{text}").and_then(|()| stdout().flush()).is_err() {
            // The reader has left.
            return Ok(String::new());
        }
        (before, at) = (after, now);
    }
}

/// The part of a list that a terminal of this size shows without scrolling: the busiest streams.
fn clipped(text: &str, size: Option<(Width, Height)>) -> String {
    let Some((Width(width), Height(height))) = size else { return text.to_owned() };
    // The cursor stays on the last line.
    let lines = text.lines().take(usize::from(height).saturating_sub(1));
    let clip = |line: &str| line.chars().take(usize::from(width)).chain(['\n']).collect::<String>();
    lines.map(clip).collect()
}

/// The streams of `after`, the busiest first.
fn rows(before: &StreamList, after: &StreamList, elapsed: Duration, side: Side) -> Vec<Row> {
    let earlier: HashMap<_, _> =
        before.streams.iter().map(|stream| (stream.dial.as_str(), stream)).collect();
    let mut rows: Vec<_> = after
        .streams
        .iter()
        .filter_map(|stream| {
            let tunnel = after.tunnels.get(stream.tunnel)?;
            let old = earlier.get(stream.dial.as_str());
            let old_tunnel = old.and_then(|old| before.tunnels.get(old.tunnel));
            let rate = |now: u64, then: Option<u64>| per_second(now, then.unwrap_or(0), elapsed);
            let lost = old_tunnel.map_or(tunnel.lost_packets, |old| old.lost_packets);
            Some(Row {
                rate_to_target: rate(stream.bytes_to_target, old.map(|old| old.bytes_to_target)),
                rate_from_target: rate(
                    stream.bytes_from_target,
                    old.map(|old| old.bytes_from_target),
                ),
                rtt_millis: tunnel.rtt_millis,
                lost_packets: tunnel.lost_packets.saturating_sub(lost),
                waits_for: waits_for(stream, is_congested(old_tunnel, tunnel, elapsed), side),
                stream: stream.clone(),
            })
        })
        .collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.rate_to_target + row.rate_from_target));
    rows
}

fn per_second(now: u64, then: u64, elapsed: Duration) -> u64 {
    let millis = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX).max(1);
    now.saturating_sub(then).saturating_mul(1000) / millis
}

/// Whether a tunnel sends at least half of what its congestion window permits; `None` where the
/// window is the kernel's.
fn is_congested(
    before: Option<&TunnelEntry>,
    after: &TunnelEntry,
    elapsed: Duration,
) -> Option<bool> {
    let rtt = after.rtt_millis.filter(|rtt| *rtt > 0.0 && after.cwnd > 0)?;
    let sent = per_second(after.sent_bytes, before?.sent_bytes, elapsed);
    #[expect(clippy::cast_precision_loss, reason = "it is compared with a half")]
    let is_half = sent as f64 >= after.cwnd as f64 * 1000.0 / rtt / 2.0;
    Some(is_half)
}

/// What a stream waits for, the reason that an operator can change first.
fn waits_for(stream: &StreamEntry, congested: Option<bool>, side: Side) -> &'static str {
    match (stream.sending.as_str(), stream.receiving.as_str(), side) {
        ("tunnel", ..) | (_, "tunnel", _) => "another tunnel",
        ("memory", ..) => "memory budget",
        (_, "output", Side::Server) => "client to read",
        (_, "output", Side::Agent) => "target to read",
        ("output", ..) => match congested {
            Some(true) => "congestion",
            Some(false) => "window",
            None => "tunnel",
        },
        ("ended", "ended", _) => "its end",
        _ => "data",
    }
}

fn table(rows: &[Row], total: usize, side: Side) -> String {
    let peer = match side {
        Side::Server => "AGENT",
        Side::Agent => "SERVER",
    };
    let mut table = Table::new([
        "DIAL",
        peer,
        "TARGET",
        "CARRIER",
        "CLASS",
        "TO TARGET/s",
        "FROM TARGET/s",
        "RTT",
        "LOST",
        "WAITS FOR",
    ]);
    for row in rows {
        let stream = &row.stream;
        table.push([
            stream.dial.clone(),
            stream.peer.clone(),
            stream.target.clone(),
            stream.carrier.clone(),
            stream.class.clone(),
            bytes(row.rate_to_target),
            bytes(row.rate_from_target),
            row.rtt_millis.map_or_else(|| "-".into(), |rtt| format!("{rtt:.1}ms")),
            row.lost_packets.to_string(),
            row.waits_for.to_owned(),
        ]);
    }
    let streams = if total == 1 { "stream" } else { "streams" };
    format!("{total} {streams}\n{}", table.render())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(dial: &str, bytes: u64, sending: &str, receiving: &str) -> StreamEntry {
        StreamEntry {
            dial: dial.into(),
            peer: "agent".into(),
            target: "t:1".into(),
            kind: "unknown".into(),
            carrier: "quic".into(),
            age_seconds: 1.0,
            bytes_to_target: bytes,
            bytes_from_target: 0,
            class: "bulk".into(),
            sending: sending.into(),
            receiving: receiving.into(),
            tunnel: 0,
        }
    }

    fn list(sent_bytes: u64, lost_packets: u64, streams: Vec<StreamEntry>) -> StreamList {
        let tunnel = TunnelEntry {
            rtt_millis: Some(10.0),
            sent_packets: 100,
            lost_packets,
            sent_bytes,
            cwnd: 10_000,
        };
        StreamList { total: streams.len(), streams, tunnels: vec![tunnel] }
    }

    #[test]
    fn the_busiest_stream_is_first_and_has_its_rate() {
        let before =
            list(0, 1, vec![stream("a", 500, "input", "input"), stream("b", 0, "input", "input")]);
        let after = list(
            0,
            4,
            vec![stream("a", 600, "input", "input"), stream("b", 9000, "input", "input")],
        );
        let rows = rows(&before, &after, Duration::from_secs(2), Side::Server);
        let rates: Vec<_> =
            rows.iter().map(|row| (row.stream.dial.as_str(), row.rate_to_target)).collect();
        assert_eq!(rates, [("b", 4500), ("a", 50)]);
        assert_eq!(rows[0].lost_packets, 3);
        assert!(table(&rows, 2, Side::Server).starts_with("2 streams\nDIAL"));
    }

    #[test]
    fn a_list_fits_the_terminal() {
        let text = "5 streams\nDIAL  AGENT\na1  node\nb2  node\n";
        let size = |width, height| Some((Width(width), Height(height)));
        assert_eq!(clipped(text, size(7, 4)), "5 strea\nDIAL  A\na1  nod\n");
        assert_eq!(clipped(text, size(200, 50)), text);
        assert_eq!(clipped(text, size(0, 0)), "");
        assert_eq!(clipped(text, None), text);
    }

    #[test]
    fn what_a_stream_waits_for_is_the_nearest_reason() {
        let waits = |sent, sending, receiving, side| {
            let streams = |sending, receiving| vec![stream("a", 0, sending, receiving)];
            let (before, after) =
                (list(0, 0, streams("input", "input")), list(sent, 0, streams(sending, receiving)));
            rows(&before, &after, Duration::from_secs(1), side)[0].waits_for
        };
        // The window permits a million bytes per second.
        for (sent, sending, receiving, side, expected) in [
            (900_000, "output", "input", Side::Server, "congestion"),
            (100_000, "output", "input", Side::Server, "window"),
            (0, "memory", "output", Side::Server, "memory budget"),
            (0, "input", "output", Side::Server, "client to read"),
            (0, "input", "output", Side::Agent, "target to read"),
            (0, "input", "input", Side::Agent, "data"),
            (0, "tunnel", "tunnel", Side::Server, "another tunnel"),
            (0, "ended", "ended", Side::Agent, "its end"),
        ] {
            assert_eq!(waits(sent, sending, receiving, side), expected);
        }
    }
}
