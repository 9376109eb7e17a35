//! Options of sockets that carriers, splices and listeners share.

use std::io;

use nix::errno::Errno;
use socket2::SockRef;
use tokio::net::TcpStream;

/// Makes a TCP socket send small writes at once, and take at most `max_unsent` bytes beyond what
/// can be sent: bytes that wait in the kernel cannot be overtaken.
pub(crate) fn send_at_once(socket: &TcpStream, max_unsent: u32) {
    // A socket that is gone already reports it at the first read.
    let _ = socket.set_nodelay(true);
    let _ = SockRef::from(socket).set_tcp_notsent_lowat(max_unsent);
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
