//! UDP sockets for tunnels: buffers that were asked for and read back, a batch size that fits, and
//! the network's own word that a peer is gone.

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use nix::{
    cmsg_space,
    errno::Errno,
    libc,
    sys::socket::{
        ControlMessageOwned, MsgFlags, SockaddrStorage, getsockopt, recvmsg, setsockopt, sockopt,
    },
};
use quinn::{
    AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit},
};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};

/// Largest payload of one UDP datagram over IPv4, and so of one batch that the kernel segments.
const MAX_BATCH: usize = 65_507;

/// A UDP port could not be had.
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

/// The buffers that the kernel granted to a UDP socket, in usable bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferSizes {
    /// For packets that have arrived and were not read yet.
    pub receive: usize,
    /// For packets that were written and are not out yet.
    pub send: usize,
}

impl BufferSizes {
    /// Less than this loses packets when a fast peer sends a burst: 1 MiB is 800 full packets.
    pub const RECOMMENDED: usize = 1024 * 1024;

    /// Whether a direction got less than [`Self::RECOMMENDED`].
    pub fn is_small(&self) -> bool {
        self.receive.min(self.send) < Self::RECOMMENDED
    }
}

/// A socket that is ready to carry QUIC.
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

/// Largest UDP payload that the first link of the path to `remote` carries, if the kernel says; it
/// does for IPv4.
///
/// Nothing is sent. The rest of the path may carry less.
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

fn lacks_ipv6(error: &io::Error) -> bool {
    const EAFNOSUPPORT: i32 = 97;
    const EADDRNOTAVAIL: i32 = 99;
    matches!(error.raw_os_error(), Some(EAFNOSUPPORT | EADDRNOTAVAIL))
}

/// Asks for buffers, by force where the process may, and tells what the kernel granted.
///
/// Linux reports twice the usable size, because it counts its own bookkeeping.
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

/// Limits how many packets are handed to the kernel as one batch.
///
/// A batch beyond [`MAX_BATCH`] fails whole, and QUIC would take that for loss and shrink the MTU.
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

/// What the network says of a peer whose packets it does not deliver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// There is no way to the peer's host now. Where routes change there may be one in a moment.
    Host,
    /// The host is there and nobody listens: the process has gone, or a firewall says so.
    Port,
}

/// The socket's queue of ICMP errors: which peers the network calls unreachable.
///
/// It watches a second descriptor of the socket for priority and error events alone, so packets
/// do not wake it.
pub(super) struct ErrorQueue {
    socket: AsyncFd<OwnedFd>,
}

impl ErrorQueue {
    fn of(socket: &Socket) -> io::Result<Self> {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
        if socket.domain()? == Domain::IPV6 {
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
        }
        let fd = OwnedFd::from(socket.try_clone()?);
        #[expect(deprecated, reason = "sound for an OwnedFd, which stays open while it lives")]
        let socket = AsyncFd::with_interest(fd, Interest::PRIORITY)?;
        Ok(Self { socket })
    }

    /// The next peer that a packet could not be delivered to, and what the network says; `None` when
    /// the socket is unusable.
    pub(super) async fn next(&self) -> Option<(SocketAddr, Unreachable)> {
        loop {
            let mut ready = self.socket.ready(Interest::PRIORITY | Interest::ERROR).await.ok()?;
            match take_error(ready.get_inner().as_raw_fd()) {
                Ok(Some(undelivered)) => return Some(undelivered),
                Ok(None) => {}
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(_) => return None,
            }
        }
    }
}

impl fmt::Debug for ErrorQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ErrorQueue").finish_non_exhaustive()
    }
}

/// Takes one entry off the error queue: where the packet that caused it was sent, and why it did not
/// get there. A packet that was too large is left to path MTU discovery.
fn take_error(fd: i32) -> nix::Result<Option<(SocketAddr, Unreachable)>> {
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    // QUIC asks for addresses and ECN marks of packets, which come along with errors too.
    let mut space = cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6, [u8; 256]);
    let message = recvmsg::<SockaddrStorage>(fd, &mut [], Some(&mut space), flags)?;
    let error = |told| match told {
        ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
            i32::try_from(error.ee_errno).ok().map(Errno::from_raw)
        }
        _ => None,
    };
    let error = message.cmsgs().ok().and_then(|mut told| told.find_map(error));
    let why = match error {
        Some(Errno::EMSGSIZE) => return Ok(None),
        Some(Errno::ECONNREFUSED) => Unreachable::Port,
        _ => Unreachable::Host,
    };
    let peer = message.address.and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
    });
    Ok(peer.map(|peer| (peer, why)))
}

#[cfg(test)]
mod tests {
    use quinn::udp::EcnCodepoint;

    use super::*;

    const SIZE: usize = 1024 * 1024;

    async fn send(socket: &Arc<dyn AsyncUdpSocket>, destination: SocketAddr) {
        let transmit = Transmit {
            destination,
            ecn: Some(EcnCodepoint::Ect0),
            contents: b"anyone?",
            segment_size: None,
            src_ip: None,
        };
        let mut poller = socket.clone().create_io_poller();
        while socket.try_send(&transmit).is_err() {
            std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_closed_port_is_reported_with_its_address() {
        let bound = bind("127.0.0.1:0".parse().unwrap(), SIZE, 1452).unwrap();
        let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        send(&bound.socket, gone).await;
        assert_eq!(bound.errors.unwrap().next().await, Some((gone, Unreachable::Port)));
    }

    #[tokio::test]
    async fn a_dual_stack_socket_reports_an_ipv4_peer() {
        let Ok(bound) = bind("[::]:0".parse().unwrap(), SIZE, 1452) else { return };
        let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let destination = if bound.socket.local_addr().unwrap().is_ipv6() {
            format!("[::ffff:127.0.0.1]:{}", gone.port()).parse().unwrap()
        } else {
            gone
        };
        send(&bound.socket, destination).await;
        let (reported, why) = bound.errors.unwrap().next().await.unwrap();
        assert_eq!(why, Unreachable::Port);
        assert_eq!(reported.ip().to_canonical(), gone.ip());
        assert_eq!(reported.port(), gone.port());
    }

    #[tokio::test]
    async fn a_batch_of_large_packets_fits_one_datagram() {
        let bound = bind("127.0.0.1:0".parse().unwrap(), SIZE, 8952).unwrap();
        assert!(bound.socket.max_transmit_segments() * 8952 <= MAX_BATCH);
    }

    #[tokio::test]
    async fn granted_buffers_are_read_back() {
        let bound = bind("127.0.0.1:0".parse().unwrap(), 65_536, 1452).unwrap();
        assert!(bound.buffer_sizes.receive >= 32_768, "{:?}", bound.buffer_sizes);
        assert!(bound.buffer_sizes.is_small());
    }
}
