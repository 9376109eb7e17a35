//! The system calls that move UDP packets. Tests script them through [`Calls`].

use std::{
    fmt,
    io::{self, IoSliceMut},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
};

use nix::{
    cmsg_space,
    errno::Errno,
    libc,
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg},
};
use parking_lot::RwLock;
use quinn::udp::{EcnCodepoint, RecvMeta, Transmit, UdpSocketState};
use tokio::net::UdpSocket;

/// The system calls that move UDP packets. None of them waits.
pub(super) trait Calls: fmt::Debug + Send + Sync + 'static {
    /// Sends one packet, or a batch that the kernel segments (`sendmsg`).
    fn send(&self, socket: &UdpSocket, transmit: &Transmit<'_>) -> io::Result<()>;

    /// Receives several packets with one call (`recvmmsg`); their number.
    fn receive_many(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize>;

    /// Receives one packet into the first buffer (`recvmsg`), or several that the kernel has joined
    /// to one.
    fn receive_one(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut RecvMeta,
    ) -> io::Result<()>;
}

/// The calls of the kernel, by quinn-udp where it has them.
#[derive(Debug)]
pub(super) struct KernelCalls {
    state: RwLock<UdpSocketState>,
}

impl KernelCalls {
    /// Sets the socket's options.
    pub(super) fn new(socket: &UdpSocket) -> io::Result<Self> {
        Ok(Self { state: RwLock::new(UdpSocketState::new(socket.into())?) })
    }

    /// Maximum number of packets that the kernel segments in one call, and joins in one call; 1
    /// where it does not.
    pub(super) fn segments(&self) -> (usize, usize) {
        let state = self.state.read();
        (state.max_gso_segments(), state.gro_segments())
    }

    pub(super) fn may_fragment(&self) -> bool {
        self.state.read().may_fragment()
    }
}

impl Calls for KernelCalls {
    fn send(&self, socket: &UdpSocket, transmit: &Transmit<'_>) -> io::Result<()> {
        let sent = self.state.read().try_send(socket.into(), transmit);
        // quinn-udp sends no ECN marks over IPv4 any more after this error, to any peer, because
        // kernels before 3.13 refuse them. Here it was a batch that was refused.
        let refused = sent.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EINVAL));
        if refused
            && transmit.segment_size.is_some()
            && let Ok(state) = UdpSocketState::new(socket.into())
        {
            *self.state.write() = state;
        }
        sent
    }

    fn receive_many(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        self.state.read().recv(socket.into(), bufs, meta)
    }

    fn receive_one(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut RecvMeta,
    ) -> io::Result<()> {
        let mut space = cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo, [libc::c_int; 3]);
        let fd = socket.as_raw_fd();
        let flags = MsgFlags::empty();
        let message = recvmsg::<SockaddrStorage>(fd, &mut bufs[..1], Some(&mut space), flags)?;
        let addr = message.address.as_ref().and_then(socket_address).ok_or(Errno::EAFNOSUPPORT)?;
        *meta =
            RecvMeta { addr, len: message.bytes, stride: message.bytes, ecn: None, dst_ip: None };
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::Ipv4Tos(tos) => meta.ecn = EcnCodepoint::from_bits(tos),
                ControlMessageOwned::Ipv6TClass(class) => {
                    meta.ecn = EcnCodepoint::from_bits(class.to_le_bytes()[0]);
                }
                ControlMessageOwned::Ipv4PacketInfo(info) => {
                    meta.dst_ip = Some(IpAddr::from(info.ipi_addr.s_addr.to_ne_bytes()));
                }
                ControlMessageOwned::Ipv6PacketInfo(info) => {
                    meta.dst_ip = Some(IpAddr::from(info.ipi6_addr.s6_addr));
                }
                ControlMessageOwned::UdpGroSegments(size) => {
                    meta.stride = usize::try_from(size).unwrap_or(meta.len);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The address that the kernel reports of a packet or of an error.
pub(in crate::quic) fn socket_address(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}
