//! What the UDP sockets of a process have found out about the kernel and about paths.

use std::{
    io,
    net::IpAddr,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::time::Instant;
use tracing::{error, info, warn};

use super::unsegmented::Unsegmented;

/// Minimum time between two log lines of one kind.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What the UDP sockets of a process have found out about the kernel and about paths.
///
/// The sockets share it, so that a peer's next tunnel begins with what the last one found out.
#[derive(Debug, Default)]
pub struct UdpHealth {
    unsegmented: Mutex<Unsegmented>,
    /// Whether a peer was ever added to `unsegmented`.
    any_unsegmented: AtomicBool,
    segments: AtomicBool,
    broken: AtomicUsize,
    recvmmsg_refused: AtomicU64,
    receive_refused: AtomicU64,
    gso_refused: AtomicU64,
    gso_lost: AtomicU64,
    send_errors: AtomicU64,
    receive_pauses: AtomicU64,
    packets_dropped: AtomicU64,
    logs: [LogLimit; 3],
}

/// The state and the counters of a process's UDP sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpStats {
    /// Whether packets are sent in batches that the kernel segments (GSO); not if it cannot, or
    /// [`Settings::gso`](crate::Settings::gso) is off.
    pub gso: bool,
    /// Number of peers that are sent packets one by one for now.
    pub unsegmented_peers: usize,
    /// Number of sockets whose calls that receive packets fail.
    pub broken: usize,
    /// Number of times that `recvmmsg` was refused and `recvmsg` took its place.
    pub recvmmsg_refused: u64,
    /// Number of times that every call that receives packets failed on a socket for seconds.
    pub receive_refused: u64,
    /// Number of times that the kernel or a sandbox refused batches to a peer.
    pub gso_refused: u64,
    /// Number of times that batches to a peer were found to vanish.
    pub gso_lost: u64,
    /// Number of packets that the kernel refused to send, without those larger than the path.
    pub send_errors: u64,
    /// Number of times that a socket stopped to receive, because its connections had too many
    /// packets to process.
    pub receive_pauses: u64,
    /// Number of packets that were received and dropped, because their connection had too many to
    /// process.
    pub packets_dropped: u64,
}

/// Limits the lines of one kind.
#[derive(Debug, Default)]
struct LogLimit(Mutex<Option<Instant>>);

impl LogLimit {
    fn admits(&self, now: Instant) -> bool {
        let mut last = self.0.lock();
        let admits = last.is_none_or(|last| now - last >= LOG_INTERVAL);
        if admits {
            *last = Some(now);
        }
        admits
    }
}

impl UdpHealth {
    /// The state and the counters now.
    pub fn stats(&self) -> UdpStats {
        UdpStats {
            gso: self.segments.load(Ordering::Relaxed),
            unsegmented_peers: self.unsegmented.lock().count(Instant::now()),
            broken: self.broken.load(Ordering::Relaxed),
            recvmmsg_refused: self.recvmmsg_refused.load(Ordering::Relaxed),
            receive_refused: self.receive_refused.load(Ordering::Relaxed),
            gso_refused: self.gso_refused.load(Ordering::Relaxed),
            gso_lost: self.gso_lost.load(Ordering::Relaxed),
            send_errors: self.send_errors.load(Ordering::Relaxed),
            receive_pauses: self.receive_pauses.load(Ordering::Relaxed),
            packets_dropped: self.packets_dropped.load(Ordering::Relaxed),
        }
    }

    /// Records whether a new socket sends batches.
    pub(super) fn set_segments(&self, segments: bool) {
        self.segments.store(segments, Ordering::Relaxed);
    }

    /// Whether the peer is to be sent packets one by one.
    pub(super) fn is_unsegmented(&self, peer: IpAddr) -> bool {
        self.any_unsegmented.load(Ordering::Relaxed)
            && self.unsegmented.lock().contains(peer.to_canonical(), Instant::now())
    }

    /// Records that a batch to the peer was refused, while its packets were taken one by one.
    pub(super) fn batches_refused(&self, peer: IpAddr, error: &io::Error) {
        let Some((peer, period)) = self.add_unsegmented(peer) else { return };
        self.gso_refused.fetch_add(1, Ordering::Relaxed);
        if self.logs[0].admits(Instant::now()) {
            let seconds = period.as_secs();
            warn!(%peer, %error, seconds, "batches of UDP packets are refused; GSO is off for the peer");
        }
    }

    /// Records that batches to the peer vanish, while single packets arrive.
    pub(super) fn batches_vanish(&self, peer: IpAddr) {
        let Some((peer, period)) = self.add_unsegmented(peer) else { return };
        self.gso_lost.fetch_add(1, Ordering::Relaxed);
        if self.logs[0].admits(Instant::now()) {
            let seconds = period.as_secs();
            warn!(%peer, seconds, "batches of UDP packets are lost on the path; GSO is off for the peer");
        }
    }

    fn add_unsegmented(&self, peer: IpAddr) -> Option<(IpAddr, Duration)> {
        let peer = peer.to_canonical();
        let period = self.unsegmented.lock().add(peer, Instant::now())?;
        self.any_unsegmented.store(true, Ordering::Relaxed);
        Some((peer, period))
    }

    /// Records that packets are received one by one, because `recvmmsg` fails.
    pub(super) fn recvmmsg_refused(&self, error: &io::Error) {
        self.recvmmsg_refused.fetch_add(1, Ordering::Relaxed);
        if self.logs[1].admits(Instant::now()) {
            warn!(%error, "recvmmsg fails; UDP packets are received one by one");
        }
    }

    /// Records that `recvmmsg` works again.
    pub(super) fn recvmmsg_works(&self) {
        info!("recvmmsg works again");
    }

    /// Records that no packet can be received on a socket.
    pub(super) fn receive_broken(&self, error: &io::Error) {
        self.broken.fetch_add(1, Ordering::Relaxed);
        self.receive_refused.fetch_add(1, Ordering::Relaxed);
        if self.logs[2].admits(Instant::now()) {
            error!(%error, "UDP is broken: packets cannot be received");
        }
    }

    /// Records that a broken socket is closed, or works again.
    pub(super) fn receive_ended(&self, works: bool) {
        self.broken.fetch_sub(1, Ordering::Relaxed);
        if works {
            info!("UDP packets are received again");
        }
    }

    /// Records that the kernel refused to send a packet.
    pub(super) fn send_failed(&self) {
        self.send_errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a socket stops to receive until its connections have processed packets.
    pub(super) fn receive_paused(&self) {
        self.receive_pauses.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that a packet of a connection that has many to process is dropped.
    pub(super) fn packet_dropped(&self) {
        self.packets_dropped.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_one_whether_its_address_is_mapped_or_not() {
        let health = UdpHealth::default();
        health.batches_vanish("::ffff:192.0.2.1".parse().unwrap());
        health.batches_refused("192.0.2.1".parse().unwrap(), &io::ErrorKind::Other.into());
        assert!(health.is_unsegmented("192.0.2.1".parse().unwrap()));
        assert!(health.is_unsegmented("::ffff:192.0.2.1".parse().unwrap()));
        assert!(!health.is_unsegmented("192.0.2.2".parse().unwrap()));
        let stats = health.stats();
        assert_eq!((stats.unsegmented_peers, stats.gso_lost, stats.gso_refused), (1, 1, 0));
        tokio::time::advance(Duration::from_secs(601)).await;
        assert_eq!(health.stats().unsegmented_peers, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_is_logged_once_a_minute() {
        let limit = LogLimit::default();
        assert!(limit.admits(Instant::now()));
        assert!(!limit.admits(Instant::now()));
        tokio::time::advance(LOG_INTERVAL).await;
        assert!(limit.admits(Instant::now()));
    }
}
