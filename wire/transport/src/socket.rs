//! Options of sockets that carriers, splices and listeners share.

use std::{io, time::Duration};

use nix::errno::Errno;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Makes a TCP socket send small writes at once, and take at most `max_unsent` bytes beyond what
/// can be sent: bytes that wait in the kernel cannot be overtaken.
pub(crate) fn send_at_once(socket: &TcpStream, max_unsent: u32) {
    // A socket that is gone already reports it at the first read.
    let _ = socket.set_nodelay(true);
    let _ = SockRef::from(socket).set_tcp_notsent_lowat(max_unsent);
}

/// When a TCP peer that answers nothing counts as gone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepAlive {
    /// Time without a byte before the first probe.
    pub(crate) idle: Duration,
    /// Time between two probes.
    pub(crate) interval: Duration,
    /// Number of unanswered probes that end the connection.
    pub(crate) probes: u32,
}

/// The rule for targets and for TCP frontends, the one that Go's `net` package sets on every
/// connection that it dials or accepts.
pub(crate) const KEEP_ALIVE: KeepAlive =
    KeepAlive { idle: Duration::from_secs(15), interval: Duration::from_secs(15), probes: 9 };

impl KeepAlive {
    /// Time after which an idle connection to a host that is gone ends: 150 seconds for
    /// [`KEEP_ALIVE`].
    pub(crate) const fn limit(self) -> Duration {
        self.idle.saturating_add(self.interval.saturating_mul(self.probes))
    }

    /// Sets this rule for a TCP socket.
    pub(crate) fn set(self, socket: &TcpStream) {
        let options = TcpKeepalive::new()
            .with_time(self.idle)
            .with_interval(self.interval)
            .with_retries(self.probes);
        // A socket that is gone already reports it at the first read.
        let _ = SockRef::from(socket).set_tcp_keepalive(&options);
    }
}

/// Whether a socket could not be bound to an IPv6 address because the host has no IPv6.
pub fn lacks_ipv6(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_sends_at_once_and_keeps_little() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        send_at_once(&socket, 12_345);
        let socket = SockRef::from(&socket);
        assert!(socket.tcp_nodelay().unwrap());
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), 12_345);
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_is_found_in_two_and_a_half_minutes() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        crate::splice::prepare(&socket);
        let socket = SockRef::from(&socket);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 9);
        // It would also end connections to peers that are there and do not read.
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
        assert_eq!(KEEP_ALIVE.limit(), Duration::from_secs(150));
    }

    #[test]
    fn only_a_host_without_ipv6_lacks_it() {
        for (errno, lacks) in [
            (Errno::EAFNOSUPPORT, true),
            (Errno::EADDRNOTAVAIL, true),
            (Errno::EADDRINUSE, false),
            (Errno::EACCES, false),
        ] {
            assert_eq!(lacks_ipv6(&errno.into()), lacks, "{errno}");
        }
    }
}
