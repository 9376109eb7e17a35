//! What tunnels are set up with, over any carrier.

use std::time::Duration;

use crate::congestion::Congestion;

/// What a tunnel is set up with, whichever carrier it gets; what only one of them knows says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
