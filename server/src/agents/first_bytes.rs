//! The first bytes of a TCP connection, before TLS looks at them.
//!
//! Load balancers open connections to check the port, and close them without a byte: no agent has
//! failed. A peer that speaks another protocol is reported with the name of that protocol, which an
//! operator understands better than the error of TLS.

use std::io;

use tokio::net::TcpStream;

/// Number of bytes that distinguish the protocols.
const LOOK: usize = 12;
/// First bytes of protocols that are sent to the port by mistake.
const OTHERS: [(&[u8], &str); 9] = [
    (b"GET ", HTTP),
    (b"HEAD ", HTTP),
    (b"POST ", HTTP),
    (b"PUT ", HTTP),
    (b"OPTIONS ", HTTP),
    (b"CONNECT ", HTTP),
    (b"PRI * HTTP/2", HTTP),
    (b"PROXY ", PROXY),
    (b"\r\n\r\n\0\r\nQUIT\n", PROXY),
];
const HTTP: &str = "HTTP without TLS";
const PROXY: &str = "a PROXY protocol header, which the load balancer must not add";

/// What a connection begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstBytes {
    /// Something that may be TLS.
    Unknown,
    /// Another protocol, described for a log line.
    Other(&'static str),
    /// Nothing: the peer closed the connection.
    Closed,
}

impl FirstBytes {
    /// Waits for the first bytes, which stay in the socket.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(super) async fn of(socket: &TcpStream) -> Self {
        let mut bytes = [0; LOOK];
        match socket.peek(&mut bytes).await {
            Ok(0) => Self::Closed,
            Ok(count) => Self::from_bytes(&bytes[..count]),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Self::Closed,
            // The handshake reports it.
            Err(_) => Self::Unknown,
        }
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let other = OTHERS.iter().find(|(begin, _)| bytes.starts_with(begin));
        other.map_or(Self::Unknown, |(_, name)| Self::Other(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_that_are_not_tls_are_known_by_their_first_bytes() {
        let cases: [(&[u8], FirstBytes); 6] = [
            (b"GET / HTTP/1.1\r\n", FirstBytes::Other(HTTP)),
            (b"PRI * HTTP/2.0\r\n", FirstBytes::Other(HTTP)),
            (b"PROXY TCP4 10.0.0.1", FirstBytes::Other(PROXY)),
            (b"\r\n\r\n\0\r\nQUIT\n!", FirstBytes::Other(PROXY)),
            (b"\x16\x03\x01\x02\x00\x01", FirstBytes::Unknown),
            (b"G", FirstBytes::Unknown),
        ];
        for (bytes, expected) in cases {
            assert_eq!(FirstBytes::from_bytes(&bytes[..bytes.len().min(LOOK)]), expected);
        }
    }
}
