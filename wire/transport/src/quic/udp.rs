//! UDP sockets for tunnels: bound, with large buffers, and batches that the kernel accepts.

mod calls;
#[cfg(test)]
mod download_tests;
mod health;
mod intake;
mod joined;
mod receiving;
mod socket;
mod unsegmented;
mod unsendable;
mod vanishing;

use std::{
    io,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    sync::Arc,
};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::AsyncUdpSocket;
use socket2::{Domain, Protocol, Socket, Type};

pub use self::health::{UdpHealth, UdpStats};
use self::{
    calls::KernelCalls,
    intake::Intake,
    socket::{Abilities, Socket as QuicSocket},
};
pub(super) use self::{
    calls::socket_address, socket::WhenBroken, unsendable::Unsendable, vanishing::Watching,
};
use super::{icmp::ErrorQueue, rounds::Rounds};
use crate::{Settings, socket::lacks_ipv6};

/// Maximum payload of a UDP datagram over IPv4, in bytes, and so of a batch that the kernel
/// segments.
const MAX_BATCH: usize = 65_507;

/// A UDP port could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot use UDP {address}: {source}")]
pub struct BindError {
    address: SocketAddr,
    source: io::Error,
}

impl BindError {
    pub(super) fn new(address: SocketAddr, source: io::Error) -> Self {
        Self { address, source }
    }
}

/// Sizes of the buffers that the kernel granted to a UDP socket, in usable bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferSizes {
    /// Buffer of packets that have arrived and were not read.
    pub receive: usize,
    /// Buffer of packets that were written and not sent.
    pub send: usize,
}

impl BufferSizes {
    /// Size below which a burst of a fast peer loses packets: 1 MiB is 800 full packets.
    pub const RECOMMENDED: usize = 1024 * 1024;

    /// Whether a buffer is smaller than [`Self::RECOMMENDED`].
    pub fn is_small(&self) -> bool {
        self.receive.min(self.send) < Self::RECOMMENDED
    }
}

/// A socket that is ready for QUIC.
pub(super) struct Bound {
    pub(super) socket: Arc<dyn AsyncUdpSocket>,
    pub(super) errors: Option<ErrorQueue>,
    /// Why nothing can be sent; for a socket with one peer.
    pub(super) unsendable: Arc<Unsendable>,
    pub(super) buffer_sizes: BufferSizes,
    /// What the socket's connections have to process; for the endpoint on it.
    pub(super) rounds: Arc<Rounds>,
}

/// Binds a UDP port. An unspecified IPv6 address takes IPv4 as well, and falls back to IPv4 alone
/// on a host without IPv6.
pub(super) fn bind(
    address: SocketAddr,
    settings: &Settings,
    health: &Arc<UdpHealth>,
    when_broken: WhenBroken,
) -> Result<Bound, BindError> {
    let result = match open(address) {
        Err(error) if lacks_ipv6(&error) && address.is_ipv6() && address.ip().is_unspecified() => {
            open(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        result => result,
    };
    let prepare = |socket: Socket| {
        let buffer_sizes = set_buffers(&socket, settings.udp_buffer_size);
        // Without the error queue a dead peer shows only by the idle time-out: slower, not wrong.
        let errors = ErrorQueue::of(&socket).ok();
        let io = tokio::net::UdpSocket::from_std(socket.into())?;
        let calls = KernelCalls::new(&io)?;
        let (segments, joined) = calls.segments();
        // The kernel refuses a larger batch.
        let batch = segments.min(MAX_BATCH / usize::from(settings.mtu_cap.max(1200)));
        let batch = if settings.gso { batch } else { 1 };
        health.set_segments(batch > 1);
        let may_fragment = calls.may_fragment();
        let abilities = Abilities { batch, joins: joined > 1, may_fragment, when_broken };
        let rounds = Arc::new(Rounds::default());
        let intake = Intake::new(rounds.clone(), settings.packet_backlog);
        let socket = QuicSocket::new(io, calls, abilities, health.clone(), intake);
        let (unsendable, socket) = (socket.unsendable(), Arc::new(socket));
        Ok(Bound { socket, errors, unsendable, buffer_sizes, rounds })
    };
    result.and_then(prepare).map_err(|source| BindError::new(address, source))
}

/// Maximum UDP payload on the first link of the path to `remote`, in bytes, if the kernel knows it;
/// it does for IPv4. The rest of the path may carry less. Nothing is sent.
pub(super) fn link_payload(remote: SocketAddr) -> Option<u16> {
    const HEADERS: i32 = 20 + 8;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(remote).ok()?;
    let mtu = getsockopt(&socket, sockopt::IpMtu).ok()?;
    u16::try_from(mtu.min(65_535) - HEADERS).ok()
}

fn open(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Sets the sizes of the buffers, beyond the system's limit where the process may; the sizes that
/// the kernel granted, which are the system's where it refuses. Linux reports twice the usable size,
/// because it counts its own bookkeeping.
fn set_buffers(socket: &Socket, size: usize) -> BufferSizes {
    if setsockopt(socket, sockopt::RcvBufForce, &size).is_err() {
        let _ = socket.set_recv_buffer_size(size);
    }
    if setsockopt(socket, sockopt::SndBufForce, &size).is_err() {
        let _ = socket.set_send_buffer_size(size);
    }
    BufferSizes {
        receive: socket.recv_buffer_size().unwrap_or_default() / 2,
        send: socket.send_buffer_size().unwrap_or_default() / 2,
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;

    use quinn::udp::RecvMeta;

    use super::*;

    fn bind_with(address: &str, settings: &Settings) -> (Bound, Arc<UdpHealth>) {
        let health = Arc::default();
        let bound = bind(address.parse().unwrap(), settings, &health, WhenBroken::Stay);
        (bound.unwrap(), health)
    }

    #[tokio::test]
    async fn a_batch_of_large_packets_fits_the_largest_datagram() {
        let settings = Settings { mtu_cap: 8952, ..Settings::default() };
        let (bound, health) = bind_with("127.0.0.1:0", &settings);
        assert!(bound.socket.max_transmit_segments() * 8952 <= MAX_BATCH);
        assert!(health.stats().gso);
    }

    #[tokio::test]
    async fn without_gso_quinn_makes_no_batches() {
        let settings = Settings { gso: false, ..Settings::default() };
        let (bound, health) = bind_with("127.0.0.1:0", &settings);
        assert_eq!(bound.socket.max_transmit_segments(), 1);
        assert!(!health.stats().gso);
    }

    #[tokio::test]
    async fn every_interface_means_both_address_families() {
        let (bound, _) = bind_with("[::]:0", &Settings::default());
        let port = bound.socket.local_addr().unwrap().port();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"over IPv4", ("127.0.0.1", port)).unwrap();
        let (mut buf, mut meta) = ([0; 100], [RecvMeta::default()]);
        let received = std::future::poll_fn(|cx| {
            bound.socket.poll_recv(cx, &mut [IoSliceMut::new(&mut buf)], &mut meta)
        });
        assert_eq!(received.await.unwrap(), 1);
        assert_eq!(&buf[..meta[0].len], b"over IPv4");
    }

    #[tokio::test]
    async fn granted_buffers_are_read_back() {
        let settings = Settings { udp_buffer_size: 65_536, ..Settings::default() };
        let (bound, _) = bind_with("127.0.0.1:0", &settings);
        assert!(bound.buffer_sizes.receive >= 32_768, "{:?}", bound.buffer_sizes);
        assert!(bound.buffer_sizes.is_small());
    }
}
