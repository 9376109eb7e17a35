//! What tunnels are set up with over any carrier, and why one could not be made.

use std::time::Duration;

use culvert_wire::version::ALPN;

use crate::congestion::Congestion;
use crate::{TunnelLost, quic::udp::BindError};

/// What a tunnel is set up with, whichever carrier it gets; what only one of them knows says so.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The tunnel is lost after this long without a packet; the smaller one of both peers' counts.
    pub idle_timeout: Duration,
    /// A packet is sent after this long without one, so that NAT mappings live and a dead path
    /// shows; `None` leaves it to the peer. At most a third of the idle time-out.
    pub keep_alive_interval: Option<Duration>,
    /// Bytes per stream that the peer may send ahead of the reader: a stalled stream costs at most
    /// this much memory, and one stream's rate is at most this per round trip.
    pub stream_receive_window: u32,
    /// Streams the peer may have open at once. Slots are allocated ahead, about 1 KiB each; raise
    /// the number on a live tunnel with [`crate::Tunnel::set_max_streams`].
    pub max_streams: u32,
    /// Largest UDP payload that path MTU discovery tries, from 1200 to 65527 bytes. Above 6550 the
    /// kernel takes fewer than ten packets in one batch.
    pub mtu_cap: u16,
    /// Kernel buffer asked for in each direction of the UDP socket, in bytes.
    pub udp_buffer_size: usize,
    /// How much of the path the tunnel fills.
    pub congestion: Congestion,
}

impl Default for Settings {
    /// Fit for a WAN path of up to 100 Mbit/s and 150 ms.
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(25),
            keep_alive_interval: Some(Duration::from_secs(5)),
            stream_receive_window: 2 * 1024 * 1024,
            max_streams: 256,
            mtu_cap: 6500,
            udp_buffer_size: 8 * 1024 * 1024,
            congestion: Congestion::Auto,
        }
    }
}

/// Why a tunnel could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The local socket could not be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The TLS configuration has no TLS 1.3 cipher suite; the fault is ours.
    #[error("unusable TLS configuration: {0}")]
    Tls(String),
    /// The server's name or address cannot be used.
    #[error("{0}")]
    Address(String),
    /// The handshake did not come to its end.
    #[error("{0}")]
    Handshake(TunnelLost),
    /// The network says that nobody listens at the server's address.
    #[error("connection refused")]
    Refused,
    /// The proxy on the way did not let the connection through.
    #[error("proxy {proxy}: {fault}")]
    Proxy {
        /// The proxy, without credentials.
        proxy: String,
        /// Why not.
        fault: ProxyFault,
    },
    /// The peer speaks another protocol.
    #[error("the peer did not agree on the protocol {}", String::from_utf8_lossy(ALPN))]
    Protocol,
}

/// Why a proxy did not let a connection through.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyFault {
    /// It cannot be connected to.
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    /// TLS to the proxy itself did not come about.
    #[error("TLS with it failed: {0}")]
    Tls(String),
    /// It cannot be asked for such a server.
    #[error("it cannot be asked for the server: {0}")]
    Server(String),
    /// The connection broke while it was asked.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// It ended the connection in place of an answer.
    #[error("it closed the connection without an answer")]
    Closed,
    /// It did not answer within the idle time-out.
    #[error("it did not answer in time")]
    TimedOut,
    /// What it answers is not HTTP.
    #[error("it does not speak HTTP/1.1")]
    Malformed,
    /// The head of its answer does not end.
    #[error("its answer's head is too long")]
    LongHead,
    /// It will not.
    #[error("it refuses: {status} {reason}")]
    Refused {
        /// The status of its answer: 407 asks for other credentials.
        status: u16,
        /// Its words, in printable ASCII.
        reason: String,
    },
}
