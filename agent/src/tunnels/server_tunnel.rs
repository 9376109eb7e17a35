//! One tunnel to one server: its rank among others, and whether its peer still answers.

use std::sync::atomic::{AtomicBool, Ordering};

use culvert_transport::{BufferSizes, Carrier, Tunnel};
use culvert_wire::{ServerId, bounded::Text};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use super::KnownServers;

/// Quality of a tunnel. A tunnel is replaced by one of the same server with a higher rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// A Konnectivity server's gRPC: connections wait for each other.
    Grpc,
    /// QMux over TCP: connections wait for each other's lost packets.
    Tcp,
    /// QUIC in packets so small that every path carries them: more packets for the same bytes.
    SmallQuic,
    /// QUIC.
    Quic,
}

impl Rank {
    /// The rank of a tunnel over this carrier.
    pub(crate) fn of(carrier: Carrier, large_packets: bool) -> Self {
        match carrier {
            Carrier::Quic if large_packets => Self::Quic,
            Carrier::Quic => Self::SmallQuic,
            Carrier::Tcp => Self::Tcp,
            Carrier::Grpc => Self::Grpc,
        }
    }

    /// Whether the tunnel's packets are UDP.
    pub(crate) fn is_quic(self) -> bool {
        matches!(self, Self::SmallQuic | Self::Quic)
    }
}

/// Why the peer of a tunnel is suspected to be gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Suspicion {
    /// The peer does not answer.
    Silent,
    /// The network reports that the peer cannot be reached, and nothing came from it since.
    Refused,
}

/// Whether the peer of a tunnel answers, as last recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PeerState {
    Answering,
    /// The peer did not answer. The state is over as soon as more bytes than these have arrived,
    /// which the carrier counts.
    Silent {
        received_bytes: u64,
    },
    Refused,
}

/// The properties of a tunnel that is to be added.
#[derive(Debug)]
pub(crate) struct NewTunnel {
    /// The server's name.
    pub(crate) server_id: ServerId,
    /// The tunnel.
    pub(crate) tunnel: Tunnel,
    /// Sizes of the UDP socket's kernel buffers; `None` over TCP.
    pub(crate) buffers: Option<BufferSizes>,
    /// The tunnel's rank.
    pub(crate) rank: Rank,
    /// Why the tunnel has its carrier, as a metric label.
    pub(crate) reason: &'static str,
    /// What the server says about its software.
    pub(crate) version: PeerVersion,
    /// The set of servers that the server sent; empty when it sent none.
    pub(crate) servers: KnownServers,
}

/// What a server says about its software.
#[derive(Clone, Debug, Default)]
pub(crate) struct PeerVersion {
    /// Name and version; `None` if it does not say.
    pub(crate) software: Option<Text<64>>,
    /// Its revision of the protocol.
    pub(crate) revision: u16,
}

/// A tunnel whose server has welcomed the agent.
#[derive(Debug)]
pub(crate) struct ServerTunnel {
    /// The server's name.
    pub(crate) server_id: ServerId,
    /// The tunnel.
    pub(crate) tunnel: Tunnel,
    /// Sizes of the UDP socket's kernel buffers; `None` over TCP.
    pub(crate) buffers: Option<BufferSizes>,
    /// The tunnel's rank.
    pub(crate) rank: Rank,
    /// Why the tunnel has its carrier, as a metric label.
    pub(crate) reason: &'static str,
    /// What the server says about its software.
    pub(crate) version: PeerVersion,
    /// When the server welcomed the agent.
    pub(crate) since: Instant,
    retired: CancellationToken,
    /// Whether it was made with a certificate that was replaced since.
    outdated: AtomicBool,
    peer: Mutex<PeerState>,
    /// The set of servers that the server sent last, and when.
    servers: Mutex<(Instant, KnownServers)>,
}

impl ServerTunnel {
    /// A tunnel in use, whose peer answers.
    pub(crate) fn new(new: NewTunnel, now: Instant) -> Self {
        let NewTunnel { server_id, tunnel, buffers, rank, reason, version, servers } = new;
        Self {
            server_id,
            tunnel,
            buffers,
            rank,
            reason,
            version,
            since: now,
            retired: CancellationToken::new(),
            outdated: AtomicBool::new(false),
            peer: Mutex::new(PeerState::Answering),
            servers: Mutex::new((now, servers)),
        }
    }

    /// The set of servers that the server sent last, and when.
    pub(super) fn servers(&self) -> (Instant, KnownServers) {
        self.servers.lock().clone()
    }

    /// Records that the server sent another set of servers.
    pub(super) fn set_servers(&self, servers: KnownServers) {
        *self.servers.lock() = (Instant::now(), servers);
    }

    /// Why the peer is suspected to be gone; `None` while it answers.
    pub(crate) fn suspicion(&self) -> Option<Suspicion> {
        match *self.peer.lock() {
            PeerState::Answering => None,
            PeerState::Refused => Some(Suspicion::Refused),
            PeerState::Silent { received_bytes } => {
                (self.tunnel.stats().received_bytes == received_bytes).then_some(Suspicion::Silent)
            }
        }
    }

    /// Records whether the peer is suspected to be gone. Returns whether a suspicion began or
    /// ended.
    pub(super) fn set_suspicion(&self, suspicion: Option<Suspicion>) -> bool {
        let now = match suspicion {
            None => PeerState::Answering,
            Some(Suspicion::Refused) => PeerState::Refused,
            Some(Suspicion::Silent) => {
                PeerState::Silent { received_bytes: self.tunnel.stats().received_bytes }
            }
        };
        let before = std::mem::replace(&mut *self.peer.lock(), now);
        (before == PeerState::Answering) != (now == PeerState::Answering)
    }

    /// Whether the peer is suspected to be gone, for any reason.
    pub(crate) fn is_suspect(&self) -> bool {
        self.suspicion().is_some()
    }

    /// Whether the peer answers, the certificate is in use and a tunnel of `rank` would be no better.
    pub(crate) fn is_as_good_as(&self, rank: Rank) -> bool {
        rank <= self.rank && !self.is_suspect() && !self.is_outdated()
    }

    /// Records that the agent's certificate was replaced.
    pub(super) fn outdate(&self) {
        self.outdated.store(true, Ordering::Relaxed);
    }

    /// Whether it was made with a certificate that was replaced since. The server lets it go on
    /// until that one expires, or longer once it has another tunnel of this process.
    pub(crate) fn is_outdated(&self) -> bool {
        self.outdated.load(Ordering::Relaxed)
    }

    /// Takes the tunnel out of use: it gets no new dials, and is closed once its streams have
    /// ended.
    pub(super) fn retire(&self) {
        self.retired.cancel();
    }

    /// Whether another tunnel is used instead.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.is_cancelled()
    }

    /// Completes once another tunnel is used instead.
    pub(crate) fn retired(&self) -> WaitForCancellationFuture<'_> {
        self.retired.cancelled()
    }

    /// The tunnel's state as a metric label: `used`, `silent`, or `retired` while its last streams
    /// go on.
    pub(crate) fn state(&self) -> &'static str {
        match (self.is_retired(), self.is_suspect()) {
            (true, _) => "retired",
            (false, true) => "silent",
            (false, false) => "used",
        }
    }

    /// The tunnel in one line, in the form of Kubernetes' readiness checks.
    pub(super) fn describe(&self, now: Instant) -> String {
        let Self { server_id, reason, since, .. } = self;
        let (carrier, state) = (self.tunnel.carrier(), self.state());
        let mark = if state == "used" { '+' } else { '-' };
        let seconds = now.saturating_duration_since(*since).as_secs_f64();
        format!("[{mark}]tunnel {server_id}: {carrier} for {seconds:.1}s ({reason}), {state}")
    }
}
