//! TCP listeners with the rules of Go, so that a changed image listens where the old one did.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use culvert_transport::socket::lacks_ipv6;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpListener;

/// Maximum number of connections that wait for accept. The kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 1024;

/// The flags of a listener, without their hyphens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenFlags {
    /// The one that chooses the port.
    pub port: &'static str,
    /// The one that chooses the address.
    pub address: &'static str,
}

impl ListenFlags {
    /// The flag to change where the kernel refuses to listen for this reason.
    pub fn at_fault(self, error: &io::Error) -> &'static str {
        match error.kind() {
            io::ErrorKind::AddrNotAvailable => self.address,
            _ if lacks_ipv6(error) => self.address,
            _ => self.port,
        }
    }
}

/// What an operator can do where a port cannot be listened on, behind a semicolon.
pub fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => {
            "; another process has the port: end it, or choose another port or address"
        }
        io::ErrorKind::AddrNotAvailable => "; this host does not have the address",
        _ => "",
    }
}

/// A listener on `address`. `[::]` is both address families, or IPv4 alone on a machine without
/// IPv6. Port 0 is any free port. Panics outside a tokio runtime.
///
/// # Errors
/// With the kernel's error.
pub fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    match bind(address) {
        Err(error) if lacks_ipv6(&error) && address.ip().is_unspecified() => {
            bind((Ipv4Addr::UNSPECIFIED, address.port()).into())
        }
        outcome => outcome,
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    socket.set_reuse_address(true)?; // a restart must not wait for old connections to time out
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_unspecified_address_accepts_both_address_families() {
        let listener = tcp("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        let (connected, accepted) = tokio::join!(
            tokio::net::TcpStream::connect((Ipv4Addr::LOCALHOST, port)),
            listener.accept()
        );
        connected.unwrap();
        accepted.unwrap();
    }

    #[tokio::test]
    async fn an_address_of_another_host_is_the_fault_of_the_flag_of_the_address() {
        let flags = ListenFlags { port: "port", address: "address" };
        let error = tcp("192.0.2.1:0".parse().unwrap()).unwrap_err(); // of RFC 5737
        assert_eq!(flags.at_fault(&error), "address", "{error}");
        let first = tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = tcp(first.local_addr().unwrap()).unwrap_err();
        assert_eq!(flags.at_fault(&error), "port", "{error}");
    }

    #[tokio::test]
    async fn a_taken_port_is_refused_and_the_remedy_is_another_port() {
        let first = tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = tcp(first.local_addr().unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(remedy(&error).contains("choose another port"));
    }
}
