//! The live streams of a process: their registry, and the list that crosses the operator's socket.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use culvert_transport::{Progress, Step, Tunnel, priority::Class};
use culvert_wire::{DialId, Target, dial::StreamKind};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::{
    socket::{Refusal, Request},
    table::{Table, bytes, seconds},
};

/// Number of streams in one answer unless the operator asks for another number.
pub const DEFAULT_LIMIT: usize = 1000;
/// Maximum number of streams in one answer.
pub const MAX_LIMIT: usize = 20_000;

/// The value of a command's `--limit`.
///
/// # Errors
/// When it is no number, or above [`MAX_LIMIT`].
pub fn parse_limit(text: &str) -> Result<usize, String> {
    let limit = text.parse().ok().filter(|limit| *limit <= MAX_LIMIT);
    limit.ok_or_else(|| format!("write a number up to {MAX_LIMIT}"))
}

/// Which side of the tunnel the process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The local connections are those of clients.
    Server,
    /// The local connections are those to targets.
    Agent,
}

/// The streams that are spliced now. Clones share them.
#[derive(Clone, Debug)]
pub struct LiveStreams {
    side: Side,
    streams: Arc<Mutex<Registry>>,
}

#[derive(Debug, Default)]
struct Registry {
    next: u64,
    by_age: BTreeMap<u64, Arc<LiveStream>>,
}

/// One spliced stream.
#[derive(Debug)]
pub struct LiveStream {
    /// Identifies its dial in the logs of both sides.
    pub dial: DialId,
    /// Name of the agent or the server at the other end of its tunnel.
    pub peer: String,
    /// Target of the dial.
    pub target: Target,
    /// Purpose of the connection, if the request hinted at one.
    pub kind: StreamKind,
    /// The tunnel that carried it first.
    pub tunnel: Tunnel,
    /// How far it has come.
    pub progress: Arc<Progress>,
    /// When it was spliced.
    pub since: Instant,
}

/// Keeps a stream among the live ones until it is dropped.
#[derive(Debug)]
pub struct Listed {
    streams: Arc<Mutex<Registry>>,
    number: u64,
}

impl LiveStreams {
    /// No streams yet.
    pub fn new(side: Side) -> Self {
        Self { side, streams: Arc::default() }
    }

    /// Adds a stream.
    pub fn enter(&self, stream: LiveStream) -> Listed {
        let stream = Arc::new(stream);
        let mut registry = self.streams.lock();
        let number = registry.next;
        registry.next += 1;
        registry.by_age.insert(number, stream);
        Listed { streams: self.streams.clone(), number }
    }

    /// Number of streams of each tunnel, by [`Tunnel::key`].
    pub fn by_tunnel(&self) -> HashMap<usize, usize> {
        let mut counts = HashMap::new();
        for stream in self.streams.lock().by_age.values() {
            *counts.entry(stream.current_tunnel().key()).or_default() += 1;
        }
        counts
    }

    /// The answer to a request with the parameters `peer` and `limit`, both optional.
    ///
    /// # Errors
    /// When the limit is no number, or above [`MAX_LIMIT`].
    pub fn answer(&self, request: &Request<'_>) -> Result<StreamList, Refusal> {
        let limit = request.parameter("limit").map(|limit| parse_limit(&limit)).transpose();
        let limit = limit.map_err(|_| Refusal::Invalid("limit must be a number up to 20000"))?;
        let peer = request.parameter("peer");
        Ok(self.list(peer.as_deref(), limit.unwrap_or(DEFAULT_LIMIT)))
    }

    /// The streams, the oldest first; of one peer, or of all.
    pub fn list(&self, peer: Option<&str>, limit: usize) -> StreamList {
        let mut total = 0;
        let mut listed = Vec::new();
        for stream in self.streams.lock().by_age.values() {
            if peer.is_none_or(|peer| peer == stream.peer) {
                total += 1;
                if listed.len() < limit {
                    listed.push(stream.clone());
                }
            }
        }
        let mut list = StreamList { total, streams: Vec::new(), tunnels: Vec::new() };
        let mut numbers = HashMap::new();
        for stream in listed {
            let tunnel = stream.current_tunnel();
            let number = *numbers.entry(tunnel.key()).or_insert_with(|| {
                list.tunnels.push(TunnelEntry::of(&tunnel));
                list.tunnels.len() - 1
            });
            list.streams.push(stream.entry(self.side, &tunnel, number));
        }
        list
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        // The stream itself is dropped without the lock.
        let _stream = self.streams.lock().by_age.remove(&self.number);
    }
}

/// The list of streams.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StreamList {
    /// Number of streams that there are, of which the list may have fewer.
    pub total: usize,
    /// The streams, the oldest first.
    pub streams: Vec<StreamEntry>,
    /// The tunnels that carry them.
    pub tunnels: Vec<TunnelEntry>,
}

/// One stream in the list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StreamEntry {
    /// Identifies its dial in the logs of both sides.
    pub dial: String,
    /// Name of the agent or the server at the other end.
    pub peer: String,
    /// Target of the dial.
    pub target: String,
    /// Purpose of the connection, `unknown` if the request did not say.
    pub kind: String,
    /// What carries it.
    pub carrier: String,
    /// Time since it was spliced, in seconds.
    pub age_seconds: f64,
    /// Bytes from the client to the target.
    pub bytes_to_target: u64,
    /// Bytes from the target to the client.
    pub bytes_from_target: u64,
    /// Class of what this process sends: `interactive`, `short` or `bulk`.
    pub class: String,
    /// What the direction into the tunnel waits for: `input`, `memory`, `output`, or `tunnel` where that
    /// was lost; or `ended`.
    pub sending: String,
    /// What the direction out of the tunnel waits for: `input`, `output`, `tunnel`; or `ended`.
    pub receiving: String,
    /// Position of its tunnel in the list of tunnels.
    pub tunnel: usize,
}

/// Measurements of a tunnel, from its start on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TunnelEntry {
    /// Round-trip time, in milliseconds; `None` where it is not measured.
    pub rtt_millis: Option<f64>,
    /// Packets sent; 0 where the kernel sends them.
    pub sent_packets: u64,
    /// Packets lost, whose contents were sent again.
    pub lost_packets: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Congestion window, in bytes; 0 where it is the kernel's.
    pub cwnd: u64,
}

impl TunnelEntry {
    fn of(tunnel: &Tunnel) -> Self {
        let stats = tunnel.stats();
        let rtt = (!stats.rtt.is_zero()).then_some(stats.rtt);
        Self {
            rtt_millis: rtt.map(|rtt| rtt.as_secs_f64() * 1000.0),
            sent_packets: stats.sent_packets,
            lost_packets: stats.lost_packets,
            sent_bytes: stats.sent_bytes,
            cwnd: stats.cwnd,
        }
    }
}

impl LiveStream {
    /// The tunnel that carries it now, or did last.
    fn current_tunnel(&self) -> Tunnel {
        self.progress.tunnel().unwrap_or_else(|| self.tunnel.clone())
    }

    fn entry(&self, side: Side, tunnel: &Tunnel, number: usize) -> StreamEntry {
        let progress = &self.progress;
        let (to_target, from_target) = match side {
            Side::Server => (progress.to_tunnel(), progress.from_tunnel()),
            Side::Agent => (progress.from_tunnel(), progress.to_tunnel()),
        };
        let class = match progress.class() {
            Class::Bulk => "bulk",
            Class::Short => "short",
            Class::Interactive => "interactive",
        };
        StreamEntry {
            dial: self.dial.to_string(),
            peer: self.peer.clone(),
            target: self.target.to_string(),
            kind: self.kind.name().to_owned(),
            carrier: tunnel.carrier().to_string(),
            age_seconds: self.since.elapsed().as_secs_f64(),
            bytes_to_target: to_target,
            bytes_from_target: from_target,
            class: class.to_owned(),
            sending: step(progress.sending()),
            receiving: step(progress.receiving()),
            tunnel: number,
        }
    }
}

fn step(step: Step) -> String {
    let name = match step {
        Step::Input => "input",
        Step::Memory => "memory",
        Step::Output => "output",
        Step::Tunnel => "tunnel",
        Step::Ended => "ended",
    };
    name.to_owned()
}

/// The streams as a table for a terminal, whose column of peers has this title.
pub fn stream_table(list: &StreamList, peer: &str) -> String {
    let mut table =
        Table::new(["DIAL", peer, "TARGET", "KIND", "CARRIER", "AGE", "TO TARGET", "FROM TARGET"]);
    for stream in &list.streams {
        table.push([
            stream.dial.clone(),
            stream.peer.clone(),
            stream.target.clone(),
            stream.kind.clone(),
            stream.carrier.clone(),
            seconds(stream.age_seconds as u64),
            bytes(stream.bytes_to_target),
            bytes(stream.bytes_from_target),
        ]);
    }
    let mut text = table.render();
    if list.total > list.streams.len() {
        let more = list.total - list.streams.len();
        text.push_str(&format!("{more} more, see --limit\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use culvert_transport::{Carrier, Settings, qmux::Peer, test_util::Pair};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_list_is_bounded_and_has_the_streams_of_one_peer() {
        let settings = Settings::default();
        let pair = Pair::new(Peer::local(Carrier::Tcp), &settings, &settings).await.unwrap();
        let streams = LiveStreams::new(Side::Agent);
        let enter = |dial, peer: &str| {
            streams.enter(LiveStream {
                dial: DialId(dial),
                peer: peer.into(),
                target: "10.0.0.1:80".parse().unwrap(),
                kind: StreamKind::LOGS,
                tunnel: pair.agent.clone(),
                progress: Arc::default(),
                since: Instant::now(),
            })
        };
        let held = [enter(1, "a"), enter(2, "b"), enter(3, "a")];
        let list = streams.list(None, 2);
        assert_eq!((list.total, list.streams.len(), list.tunnels.len()), (3, 2, 1));
        let list = streams.list(Some("a"), 10);
        assert_eq!((list.total, list.streams.len()), (2, 2));
        assert_eq!(list.streams[1].dial, DialId(3).to_string());
        assert_eq!(
            (list.streams[1].kind.as_str(), list.streams[1].carrier.as_str()),
            ("logs", "tcp")
        );
        let answer = |path: &str| streams.answer(&Request::new(path, false));
        assert_eq!(answer("/streams?peer=b").unwrap().total, 1);
        assert_eq!(answer("/streams?limit=1").unwrap().streams.len(), 1);
        for limit in ["20001", "-1", "x", ""] {
            let path = format!("/streams?limit={limit}");
            assert!(matches!(answer(&path), Err(Refusal::Invalid(_))), "{limit}");
        }
        drop(held);
        assert_eq!(streams.list(None, 10).total, 0);
    }
}
