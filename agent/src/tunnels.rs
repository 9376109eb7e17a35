//! The tunnels that the agent has, by server: which one is used, which one a better has replaced, and
//! how many servers are missing.

pub mod liveness;
pub mod session;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Instant,
};

use culvert_transport::{BufferSizes, Carrier, Tunnel};
use culvert_wire::ServerId;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::config::CountSource;

/// How good a way is; a tunnel gives way to one of the same server that has a better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rank {
    /// A Konnectivity server's gRPC, where connections wait for one another.
    Grpc,
    /// QMux over TCP, where they wait for lost packets.
    Tcp,
    /// QUIC in packets that every path carries: more of them, for the same bytes.
    SmallQuic,
    /// QUIC.
    Quic,
}

impl Rank {
    /// The way of this tunnel.
    pub fn of(tunnel: &Tunnel, large_packets: bool) -> Self {
        match tunnel.carrier() {
            Carrier::Quic if large_packets => Self::Quic,
            Carrier::Quic => Self::SmallQuic,
            Carrier::Tcp => Self::Tcp,
            Carrier::Grpc => Self::Grpc,
        }
    }

    /// Whether packets go over UDP.
    pub fn is_quic(self) -> bool {
        self >= Self::SmallQuic
    }
}

/// One tunnel that a server has taken the agent in on.
#[derive(Debug)]
pub struct ServerTunnel {
    /// Whose tunnel it is.
    pub server_id: ServerId,
    /// The tunnel.
    pub tunnel: Tunnel,
    /// What the kernel granted its socket, if it is UDP.
    pub buffers: Option<BufferSizes>,
    /// How it goes.
    pub rank: Rank,
    /// Why it goes that way, in a word.
    pub reason: &'static str,
    /// Since when.
    pub since: Instant,
    /// Told when a better tunnel has taken its place: no new dials, and the end once the streams have
    /// ended.
    pub retired: CancellationToken,
    /// How much had been received when the peer was found silent, or [`HEARD`] or [`REFUSED`].
    suspected_at: AtomicU64,
}

/// The peer of a tunnel answers.
const HEARD: u64 = u64::MAX;
/// The network says that it cannot be reached.
const REFUSED: u64 = HEARD - 1;

/// Why the peer of a tunnel may not be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspicion {
    /// It does not answer.
    Silent,
    /// The network says that it cannot be reached, and it has not been heard since.
    Refused,
}

impl ServerTunnel {
    /// Why the peer may not be there now, if there is a reason to think so.
    pub fn suspicion(&self) -> Option<Suspicion> {
        match self.suspected_at.load(Ordering::Relaxed) {
            HEARD => None,
            REFUSED => Some(Suspicion::Refused),
            suspected_at => {
                (self.tunnel.stats().received_bytes == suspected_at).then_some(Suspicion::Silent)
            }
        }
    }

    /// Whether the peer may not be there, for one reason or another.
    pub fn is_suspect(&self) -> bool {
        self.suspicion().is_some()
    }

    /// Whether another tunnel is used instead.
    pub fn is_retired(&self) -> bool {
        self.retired.is_cancelled()
    }

    /// How it stands, in a word: `used`, `silent`, or `retired` while its last streams go on.
    pub fn state(&self) -> &'static str {
        match (self.is_retired(), self.is_suspect()) {
            (true, _) => "retired",
            (false, true) => "silent",
            (false, false) => "used",
        }
    }
}

/// What became of a new tunnel.
#[derive(Debug)]
pub enum AddOutcome {
    /// Its server had none.
    New(Arc<ServerTunnel>),
    /// It takes the place of this one, which is told.
    Instead(Arc<ServerTunnel>, Arc<ServerTunnel>),
    /// Its server has one that is as good.
    Duplicate,
}

/// The agent's tunnels. Shared by whoever looks for servers and whoever tells about them.
#[derive(Debug, Default)]
pub struct ServerTunnels {
    tunnels: Mutex<Vec<Arc<ServerTunnel>>>,
    /// How many servers there are, by their own words; 0 before the first has said so.
    told: AtomicU32,
    /// How many have a Lease; 0 where Leases are not counted.
    leases: AtomicU32,
    /// Whether the larger of both holds, and not always that of the Leases.
    larger: bool,
    changed: Notify,
}

impl ServerTunnels {
    /// No tunnels yet; where Leases are counted, `source` says which count holds.
    pub fn new(source: CountSource) -> Self {
        Self { larger: source == CountSource::Larger, ..Self::default() }
    }

    /// Enters a tunnel whose server has welcomed the agent, unless it has one that is as good.
    pub fn enter(
        &self,
        server_id: ServerId,
        (tunnel, rank): (Tunnel, Rank),
        buffers: Option<BufferSizes>,
        reason: &'static str,
        now: Instant,
    ) -> AddOutcome {
        let mut tunnels = self.lock();
        let in_use =
            |other: &&Arc<ServerTunnel>| other.server_id == server_id && !other.is_retired();
        let other = tunnels.iter().find(in_use).cloned();
        if other.as_ref().is_some_and(|other| rank <= other.rank && !other.is_suspect()) {
            return AddOutcome::Duplicate;
        }
        let served = Arc::new(ServerTunnel {
            server_id,
            tunnel,
            buffers,
            rank,
            reason,
            since: now,
            retired: CancellationToken::new(),
            suspected_at: AtomicU64::new(HEARD),
        });
        tunnels.push(served.clone());
        drop(tunnels);
        match other {
            None => AddOutcome::New(served),
            Some(other) => {
                other.retired.cancel();
                AddOutcome::Instead(served, other)
            }
        }
    }

    /// Takes a tunnel out that is gone.
    pub fn leave(&self, served: &Arc<ServerTunnel>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, served));
    }

    /// Notes that the peer of a tunnel may not be there, or that it was heard again.
    pub fn set_suspicion(&self, served: &ServerTunnel, suspicion: Option<Suspicion>) {
        let now = match suspicion {
            None => HEARD,
            Some(Suspicion::Refused) => REFUSED,
            Some(Suspicion::Silent) => served.tunnel.stats().received_bytes,
        };
        let before = served.suspected_at.swap(now, Ordering::Relaxed);
        if (before == HEARD) != (now == HEARD) {
            self.changed.notify_one();
        }
    }

    /// Completes when a tunnel has fallen silent or was heard again, or another number of servers has
    /// Leases. For one waiter.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Notes how many servers there are by a server's words.
    pub fn set_told_count(&self, count: u32) {
        self.told.store(count, Ordering::Relaxed);
    }

    /// Notes how many servers have Leases; from now on that counts.
    pub fn set_lease_count(&self, count: u32) {
        if self.leases.swap(count, Ordering::Relaxed) != count {
            self.changed.notify_one();
        }
    }

    /// How many servers there are, as far as is known; 0 before anybody has said so.
    pub fn count(&self) -> u32 {
        let (told, leases) =
            (self.told.load(Ordering::Relaxed), self.leases.load(Ordering::Relaxed));
        match leases {
            0 => told,
            leases if self.larger => leases.max(told),
            leases => leases,
        }
    }

    /// How many servers are connected.
    pub fn connected(&self) -> u32 {
        let count = self.in_use().len();
        u32::try_from(count).unwrap_or(u32::MAX)
    }

    /// Whether a server has taken the agent in: what Konnectivity calls ready.
    pub fn is_connected(&self) -> bool {
        self.lock().iter().any(|served| !served.is_retired())
    }

    /// How many tunnels were replaced and still have streams.
    pub fn retired(&self) -> usize {
        self.lock().iter().filter(|served| served.is_retired()).count()
    }

    /// A line for each tunnel, for whoever asks whether the agent is ready.
    pub fn describe(&self) -> Vec<String> {
        let line = |served: &Arc<ServerTunnel>| {
            let mark = if served.state() == "used" { '+' } else { '-' };
            let ServerTunnel { server_id, reason, since, .. } = &**served;
            let (transport, state) = (served.tunnel.carrier(), served.state());
            let seconds = since.elapsed().as_secs_f64();
            format!("[{mark}]tunnel {server_id}: {transport} for {seconds:.1}s ({reason}), {state}")
        };
        self.lock().iter().map(line).collect()
    }

    /// The tunnels that dials come on, one for each server.
    pub fn in_use(&self) -> Vec<Arc<ServerTunnel>> {
        self.lock().iter().filter(|served| !served.is_retired()).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<ServerTunnel>>> {
        // Every change is complete before it could panic.
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
