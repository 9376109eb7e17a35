//! The tunnel: one connection of whichever carrier, and what its streams share.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_wire::code::CloseCode;
use rustls_pki_types::CertificateDer;

use crate::{
    RecvHalf, SendHalf, TunnelLost,
    budget::{MemoryBudget, StreamMemory},
    carrier::Carrier,
    congestion::KnownPath,
    priority::PriorityBudget,
    qmux, quic,
    quic::icmp::Unreachable,
    stream::either,
};

/// One authenticated connection between one agent and one server.
///
/// Clones are handles to the same tunnel. It lives until one side closes it or the path dies;
/// dropping every handle closes it with [`CloseCode::DONE`].
#[derive(Clone)]
pub struct Tunnel {
    connection: Connection,
    /// How many of the streams' bytes may go first.
    priorities: Arc<PriorityBudget>,
    /// What the streams hold, once that is known.
    memory: Arc<StreamMemory>,
}

/// A connection of one carrier.
#[derive(Clone)]
enum Connection {
    Quic(quic::Connection),
    Qmux(qmux::Connection),
}

impl From<quic::Connection> for Tunnel {
    fn from(connection: quic::Connection) -> Self {
        Self::new(Connection::Quic(connection))
    }
}

impl From<qmux::Connection> for Tunnel {
    fn from(connection: qmux::Connection) -> Self {
        Self::new(Connection::Qmux(connection))
    }
}

impl Tunnel {
    fn new(connection: Connection) -> Self {
        Self { connection, priorities: PriorityBudget::new(now()), memory: Arc::default() }
    }

    /// Opens a data stream. Nothing is sent until the first write.
    ///
    /// Waits while the peer's limit of open streams is reached.
    ///
    /// # Errors
    /// When the tunnel is lost.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future opens nothing.
    pub async fn open(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        Ok(match &self.connection {
            Connection::Quic(connection) => self.halves(connection.open().await?),
            Connection::Qmux(connection) => self.halves(connection.open().await?),
        })
    }

    /// The next stream that the peer opened, in the order in which it opened them.
    ///
    /// # Errors
    /// When the tunnel is lost.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future loses no stream.
    pub async fn accept(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        Ok(match &self.connection {
            Connection::Quic(connection) => self.halves(connection.accept().await?),
            Connection::Qmux(connection) => self.halves(connection.accept().await?),
        })
    }

    /// The memory of the tunnel's streams, for bytes that wait before or behind them.
    pub fn memory(&self) -> &Arc<StreamMemory> {
        &self.memory
    }

    /// The same tunnel with the memory of its other end, which is in this process.
    #[must_use]
    pub(crate) fn with_memory_of(self, other: &Self) -> Self {
        Self { memory: other.memory.clone(), ..self }
    }

    fn halves<S, R>(&self, (send, recv): (S, R)) -> (SendHalf, RecvHalf)
    where
        S: Into<crate::stream::SendStream>,
        R: Into<crate::stream::RecvStream>,
    {
        let (priorities, memory) = (self.priorities.clone(), self.memory.clone());
        let send = SendHalf::new(send.into(), priorities, memory);
        (send, RecvHalf::new(recv.into()))
    }

    /// Takes what the streams hold from the process's budget. Call it before the first splice; the
    /// first call counts. Without it there is no limit.
    pub fn set_memory(&self, budget: &Arc<MemoryBudget>) {
        self.memory.set(budget);
        if let Connection::Quic(connection) = &self.connection {
            connection.set_memory(budget);
        }
    }

    /// Begins near the rate that an earlier tunnel to the same peer has found, where the path is still
    /// the same, and leaves there what this one finds. Call it once the peer is known; the first call
    /// counts. It has no effect over TCP.
    pub fn resume(&self, path: KnownPath) {
        if let Connection::Quic(connection) = &self.connection {
            connection.resume(path);
        }
    }

    /// Closes the tunnel at once; what is in flight on any stream is lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        either!(Connection, &self.connection, connection => connection.close(code, reason));
    }

    /// Completes with the cause once the tunnel has ended.
    ///
    /// # Cancel safety
    /// Cancel safe, and any number of callers may wait.
    pub async fn closed(&self) -> TunnelLost {
        either!(Connection, &self.connection, connection => connection.closed().await)
    }

    /// Waits until a closed tunnel's last packets are out, at most `limit`.
    ///
    /// # Cancel safety
    /// Cancel safe, and any number of callers may wait.
    pub async fn flushed(&self, limit: Duration) {
        either!(Connection, &self.connection, connection => connection.flushed(limit).await);
    }

    /// Completes each time the network reports that the peer cannot be reached.
    ///
    /// The report is a hint that can be forged by all who see the packets: ping the peer before
    /// acting on it. Over TCP it never completes: the kernel ends the connection by itself.
    ///
    /// # Cancel safety
    /// Cancel safe: a report that came while no caller waited completes the next call. It is for
    /// one caller at a time; of several, one gets the report.
    pub async fn unreachable(&self) -> Unreachable {
        match &self.connection {
            Connection::Quic(connection) => connection.unreachable().await,
            Connection::Qmux(_) => std::future::pending().await,
        }
    }

    /// Reports that the network does not deliver to the peer, in place of the network.
    #[cfg(feature = "test-util")]
    pub(crate) fn report_unreachable(&self, why: Unreachable) {
        if let Connection::Quic(connection) = &self.connection {
            connection.report_unreachable(why);
        }
    }

    /// Sends short writes twice while the path loses packets, and with `repairs` repair shards of
    /// bursts, at most `rate` bytes per second in all, so that a loss does not delay them; and uses
    /// what the peer sends of both.
    ///
    /// Call it once both sides have offered [`culvert_wire::version::Features::HEDGE`], with `repairs`
    /// if they have offered [`culvert_wire::version::Features::REPAIR`] too; the first call counts. It
    /// does nothing over TCP, where a lost packet delays the second copy too.
    pub fn hedge(&self, rate: u32, repairs: bool) {
        if let Connection::Quic(connection) = &self.connection {
            connection.hedge(rate, repairs);
        }
    }

    /// Sets how many streams the peer may have open at once; takes effect within a round trip.
    pub fn set_max_streams(&self, count: u32) {
        either!(Connection, &self.connection, connection => connection.set_max_streams(count));
    }

    /// Completes when the peer has sent a datagram, which it may not before both sides have agreed on
    /// hedging. The datagram is lost: do not call it after [`Self::hedge`].
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn unexpected_datagram(&self) {
        match &self.connection {
            Connection::Quic(connection) => connection.unexpected_datagram().await,
            Connection::Qmux(_) => std::future::pending().await,
        }
    }

    /// Lifts [`crate::Settings::unadmitted_window`]: the peer is admitted. It takes effect within a
    /// round trip.
    pub fn admit(&self) {
        if let Connection::Quic(connection) = &self.connection {
            connection.admit();
        }
    }

    /// The address that the peer's packets come from; it changes when the peer moves.
    pub fn remote_address(&self) -> SocketAddr {
        either!(Connection, &self.connection, connection => connection.remote_address())
    }

    /// The peer's certificate chain, leaf first, if it presented one.
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        either!(Connection, &self.connection, connection => connection.peer_certificates())
    }

    /// The carrier's measurements so far. Takes the tunnel's lock: sample, do not poll.
    pub fn stats(&self) -> TunnelStats {
        either!(Connection, &self.connection, connection => connection.stats())
    }

    /// Distinguishes the tunnel from the others of this process that live now.
    pub fn key(&self) -> usize {
        Arc::as_ptr(&self.priorities) as usize
    }

    /// What carries the tunnel.
    pub fn carrier(&self) -> Carrier {
        match &self.connection {
            Connection::Quic(_) => Carrier::Quic,
            Connection::Qmux(connection) => connection.carrier(),
        }
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("carrier", &self.carrier())
            .field("remote", &self.remote_address())
            .finish_non_exhaustive()
    }
}

/// Measurements of a tunnel's path. Counters run from the tunnel's start.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct TunnelStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Congestion window, in bytes.
    pub cwnd: u64,
    /// Largest UDP payload that the path is known to carry, in bytes.
    pub mtu: u16,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Bytes in the packets declared lost.
    pub lost_bytes: u64,
    /// Number of times the congestion window was cut.
    pub congestion_events: u64,
    /// Number of times the path was found to drop large packets.
    pub black_holes: u64,
    /// UDP payload bytes sent; over a byte stream, its bytes above TLS.
    pub sent_bytes: u64,
    /// UDP payload bytes received; over a byte stream, its bytes above TLS.
    pub received_bytes: u64,
    /// Frames sent that the peer must acknowledge; 0 where the carrier does not count them.
    pub eliciting_frames: u64,
    /// Copies of short writes that were sent.
    pub copies_sent: u64,
    /// Copies that arrived before what they are copies of.
    pub copies_used: u64,
    /// Datagrams sent that had repair shards of bursts.
    pub repairs_sent: u64,
    /// Bursts whose missing bytes were rebuilt.
    pub bursts_rebuilt: u64,
}

/// An IPv4 peer of a dual-stack socket, without the IPv6 mapping.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The time by tokio's clock, which tests can pause.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
