//! ICMP errors: what the network reports of peers that it cannot deliver packets to.
//!
//! ```text
//!  kernel ─▶ ErrorQueue of a socket ─▶ IcmpRouter, by peer address ─▶ Reachability of a tunnel
//! ```
//!
//! ICMP is not authenticated, so an error is a reason to look at a tunnel, never to close it.

use std::{
    collections::HashMap,
    fmt, io,
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, OnceLock, Weak},
};

use nix::{
    cmsg_space,
    errno::Errno,
    libc,
    sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt},
};
use parking_lot::Mutex;
use socket2::{Domain, Socket};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};
use tokio_util::task::AbortOnDropHandle;

use super::udp::socket_address;
use crate::canonical;

/// What the network reports of a peer to which it does not deliver packets (RFC 792, RFC 4443). The
/// graver report is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unreachable {
    /// There is no route to the peer's host now. Where routes change there may soon be one.
    Host,
    /// The host is there, and no process listens on the port, or a firewall reports so.
    Port,
}

/// A socket's queue of ICMP errors (`IP_RECVERR`, ip(7)).
///
/// It watches a second descriptor of the socket for priority and error events alone, so packets do
/// not wake it.
pub(super) struct ErrorQueue {
    socket: AsyncFd<OwnedFd>,
}

impl ErrorQueue {
    pub(super) fn of(socket: &Socket) -> io::Result<Self> {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true)?;
        if socket.domain()? == Domain::IPV6 {
            setsockopt(socket, sockopt::Ipv6RecvErr, &true)?;
        }
        let fd = OwnedFd::from(socket.try_clone()?);
        #[expect(deprecated, reason = "sound for an OwnedFd, which stays open while it lives")]
        let socket = AsyncFd::with_interest(fd, Interest::PRIORITY)?;
        Ok(Self { socket })
    }

    /// The next peer to which a packet could not be delivered, and what the network reports; `None`
    /// when the socket is unusable.
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

/// Takes one entry off the error queue: where the packet was sent that caused it, and why it was
/// not delivered. `None` for a packet that was too large, which is left to path MTU discovery.
fn take_error(fd: i32) -> nix::Result<Option<(SocketAddr, Unreachable)>> {
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    // quinn asks for addresses and ECN marks of packets, which come with errors too.
    let mut space = cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6, [u8; 256]);
    let message = recvmsg::<SockaddrStorage>(fd, &mut [], Some(&mut space), flags)?;
    let error = |message| match message {
        ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
            i32::try_from(error.ee_errno).ok().map(Errno::from_raw)
        }
        _ => None,
    };
    let error = message.cmsgs().ok().and_then(|mut messages| messages.find_map(error));
    let why = match error {
        Some(Errno::EMSGSIZE) => return Ok(None),
        Some(Errno::ECONNREFUSED) => Unreachable::Port,
        _ => Unreachable::Host,
    };
    let peer = message.address.as_ref().and_then(socket_address);
    Ok(peer.map(|peer| (peer, why)))
}

/// What the network has reported of one tunnel's peer.
#[derive(Debug, Default)]
pub(super) struct Reachability {
    /// The gravest report that the tunnel has not taken.
    report: Mutex<Option<Unreachable>>,
    reported: Notify,
}

impl Reachability {
    pub(super) fn report(&self, why: Unreachable) {
        let mut report = self.report.lock();
        *report = (*report).max(Some(why));
        self.reported.notify_one();
    }

    /// Waits for a report; the gravest since the last time. For one waiter.
    ///
    /// # Cancel safety
    /// Cancel safe: no report is lost.
    pub(super) async fn unreachable(&self) -> Unreachable {
        loop {
            if let Some(why) = self.report.lock().take() {
                return why;
            }
            self.reported.notified().await;
        }
    }
}

/// The live tunnels of one socket by the peer's address, so that an ICMP error finds its tunnel.
#[derive(Debug, Default)]
pub(super) struct IcmpRouter {
    tunnels: Mutex<HashMap<SocketAddr, Weak<Reachability>>>,
    /// Reads the socket's errors. It holds the socket open, so it ends with the router.
    reader: OnceLock<AbortOnDropHandle<()>>,
}

impl IcmpRouter {
    /// Adds a tunnel with this peer. It is removed some time after the result is dropped.
    pub(super) fn add(&self, address: SocketAddr) -> Arc<Reachability> {
        let reachability = Arc::new(Reachability::default());
        let mut tunnels = self.tunnels.lock();
        tunnels.retain(|_, reachability| reachability.strong_count() > 0);
        tunnels.insert(address, Arc::downgrade(&reachability));
        reachability
    }

    fn report(&self, address: SocketAddr, why: Unreachable) {
        let reachability = self.tunnels.lock().get(&canonical(address)).and_then(Weak::upgrade);
        if let Some(reachability) = reachability {
            reachability.report(why);
        }
    }

    /// Passes the socket's errors on to its tunnels, for as long as the router lives.
    pub(super) fn listen(self: &Arc<Self>, errors: Option<ErrorQueue>) {
        let Some(errors) = errors else { return };
        let icmp_router = Arc::downgrade(self);
        self.reader.get_or_init(|| {
            crate::task::owned(async move {
                while let Some((address, why)) = errors.next().await {
                    let Some(icmp_router) = icmp_router.upgrade() else { return };
                    icmp_router.report(address, why);
                }
            })
        });
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::UdpSocket,
        pin::{Pin, pin},
        task::Poll,
        time::Duration,
    };

    use quinn::{
        AsyncUdpSocket,
        udp::{EcnCodepoint, Transmit},
    };

    use super::*;
    use crate::{
        Settings,
        quic::udp::{Bound, WhenBroken, bind},
    };

    fn bind_to(address: &str) -> Bound {
        let (settings, health) = (Settings::default(), Arc::default());
        bind(address.parse().unwrap(), &settings, &health, WhenBroken::Stay).unwrap()
    }

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

    /// Polls a future once.
    async fn poll<T>(mut future: Pin<&mut impl Future<Output = T>>) -> Poll<T> {
        std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await
    }

    #[tokio::test]
    async fn reports_that_come_together_are_one_report() {
        let reachability = Reachability::default();
        let mut waiting = pin!(reachability.unreachable());
        assert!(poll(waiting.as_mut()).await.is_pending());
        // The first wakes the waiter; the second comes before it has run.
        for why in [Unreachable::Port, Unreachable::Host] {
            reachability.report(why);
        }
        assert_eq!(waiting.await, Unreachable::Port);
        let nothing = pin!(reachability.unreachable());
        assert!(poll(nothing).await.is_pending(), "there was nothing more to report");
    }

    #[tokio::test]
    async fn the_socket_is_closed_with_the_router() {
        let bound = bind_to("127.0.0.1:0");
        let address = bound.socket.local_addr().unwrap();
        let router = Arc::new(IcmpRouter::default());
        router.listen(bound.errors);
        drop(bound.socket);
        UdpSocket::bind(address).unwrap_err();
        drop(router);
        let closed = async {
            while UdpSocket::bind(address).is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), closed).await.unwrap();
    }

    #[tokio::test]
    async fn a_closed_port_is_reported_with_its_address() {
        let bound = bind_to("127.0.0.1:0");
        let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        send(&bound.socket, gone).await;
        assert_eq!(bound.errors.unwrap().next().await, Some((gone, Unreachable::Port)));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn errors_about_one_peer_cost_no_packet_to_another() {
        let health = Arc::default();
        let address = "127.0.0.1:0".parse().unwrap();
        let bound = bind(address, &Settings::default(), &health, WhenBroken::Stay).unwrap();
        let errors = bound.errors.unwrap();
        let socket = UdpSocket::from(errors.socket.get_ref().try_clone().unwrap());
        // The queue of errors is read meanwhile.
        let router = Arc::new(IcmpRouter::default());
        router.listen(Some(errors));
        let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..5_000 {
            // A call that fails has taken the error of the one before. One that does not leaves its
            // own to the next call on the socket.
            while socket.send_to(b"anyone?", gone).is_err() {}
            send(&bound.socket, peer.local_addr().unwrap()).await;
        }
        assert_eq!(health.stats().send_errors, 0);
    }

    #[tokio::test]
    async fn a_dual_stack_socket_reports_an_ipv4_peer() {
        // On a host without IPv6 this is an IPv4 socket, which has to report the peer as well.
        let bound = bind_to("[::]:0");
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
    async fn a_report_reaches_the_tunnel_with_that_peer_and_the_gravest_counts() {
        let router = IcmpRouter::default();
        let [one, other] = ["192.0.2.1:8132", "192.0.2.2:8132"]
            .map(|address| router.add(address.parse().unwrap()));
        router.report("[::ffff:192.0.2.1]:8132".parse().unwrap(), Unreachable::Port);
        router.report("192.0.2.1:8132".parse().unwrap(), Unreachable::Host);
        router.report("192.0.2.2:8132".parse().unwrap(), Unreachable::Host);
        router.report("192.0.2.3:8132".parse().unwrap(), Unreachable::Port);
        assert_eq!(one.unreachable().await, Unreachable::Port);
        assert_eq!(other.unreachable().await, Unreachable::Host);
        router.report("192.0.2.1:8132".parse().unwrap(), Unreachable::Host);
        assert_eq!(one.unreachable().await, Unreachable::Host);
    }

    #[test]
    fn tunnels_that_are_gone_are_forgotten() {
        let router = IcmpRouter::default();
        for host in 0..10 {
            drop(router.add(SocketAddr::from(([192, 0, 2, host], 8132))));
        }
        assert_eq!(router.tunnels.lock().len(), 1);
    }
}
