//! UDP sockets for tunnels: bound, with large buffers, and batches that the kernel accepts.

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::{
    AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use socket2::{Domain, Protocol, Socket, Type};

use super::icmp::ErrorQueue;
use crate::socket::lacks_ipv6;

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
    pub(super) buffer_sizes: BufferSizes,
}

/// Binds a UDP port. An unspecified IPv6 address takes IPv4 as well, and falls back to IPv4 alone
/// on a host without IPv6.
pub(super) fn bind(
    address: SocketAddr,
    buffer_size: usize,
    largest_payload: u16,
) -> Result<Bound, BindError> {
    let result = match open(address) {
        Err(error) if lacks_ipv6(&error) && address.is_ipv6() && address.ip().is_unspecified() => {
            open(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()))
        }
        result => result,
    };
    let prepare = |socket: Socket| {
        let buffer_sizes = set_buffers(&socket, buffer_size)?;
        // Without the error queue a dead peer shows only by the idle time-out: slower, not wrong.
        let errors = ErrorQueue::of(&socket).ok();
        let inner = TokioRuntime.wrap_udp_socket(socket.into())?;
        let batch = MAX_BATCH / usize::from(largest_payload.max(1200));
        let socket = Arc::new(Batched { inner, batch });
        Ok(Bound { socket, errors, buffer_sizes })
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
/// the kernel granted. Linux reports twice the usable size, because it counts its own bookkeeping.
fn set_buffers(socket: &Socket, size: usize) -> io::Result<BufferSizes> {
    if setsockopt(socket, sockopt::RcvBufForce, &size).is_err() {
        socket.set_recv_buffer_size(size)?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &size).is_err() {
        socket.set_send_buffer_size(size)?;
    }
    Ok(BufferSizes {
        receive: socket.recv_buffer_size()? / 2,
        send: socket.send_buffer_size()? / 2,
    })
}

/// Limits the number of packets in one batch for the kernel.
///
/// A batch beyond [`MAX_BATCH`] fails as a whole, which QUIC would take for loss and lower the MTU.
#[derive(Debug)]
struct Batched {
    inner: Arc<dyn AsyncUdpSocket>,
    batch: usize,
}

impl AsyncUdpSocket for Batched {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments().min(self.batch)
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 1024 * 1024;

    #[tokio::test]
    async fn a_batch_of_large_packets_fits_the_largest_datagram() {
        let bound = bind("127.0.0.1:0".parse().unwrap(), SIZE, 8952).unwrap();
        assert!(bound.socket.max_transmit_segments() * 8952 <= MAX_BATCH);
    }

    #[tokio::test]
    async fn every_interface_means_both_address_families() {
        let bound = bind("[::]:0".parse().unwrap(), SIZE, 1452).unwrap();
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
        let bound = bind("127.0.0.1:0".parse().unwrap(), 65_536, 1452).unwrap();
        assert!(bound.buffer_sizes.receive >= 32_768, "{:?}", bound.buffer_sizes);
        assert!(bound.buffer_sizes.is_small());
    }
}
