//! The settings of a tunnel, over any carrier.

use std::time::Duration;

use crate::congestion::Congestion;

/// The settings of a tunnel. Those that only one carrier has say so.
///
/// [`Settings::default`] is the one source of defaults; flags that change a field take theirs from
/// it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Time without a packet after which the tunnel is lost; the smaller one of both peers' counts.
    pub idle_timeout: Duration,
    /// Time without a packet after which one is sent, so that NAT mappings live and a dead path
    /// shows; `None` leaves it to the peer. At most a third of the idle time-out.
    pub keep_alive_interval: Option<Duration>,
    /// Maximum number of bytes that the peer may send ahead of a stream's reader: a stalled stream
    /// costs at most this much memory, and a stream's rate is at most this per round trip.
    pub stream_receive_window: u32,
    /// Maximum number of bytes that the peer may send ahead of the readers of all streams together,
    /// beside those that wait for readers that stall; `None` sets no limit. It bounds what waits
    /// behind a gap, which is counted nowhere. With less than 64 windows of streams, large transfers
    /// delay small ones. QUIC only: nothing overtakes over TCP.
    pub tunnel_receive_window: Option<u64>,
    /// Maximum number of bytes that the peer may send ahead of the readers of its streams until
    /// [`crate::Tunnel::admit`]; `None` does not bound them beyond the windows of streams. QUIC
    /// only: a byte stream can be bounded as a whole, by the one that accepts it.
    pub unadmitted_window: Option<u32>,
    /// Maximum number of streams that the peer may have open at once. Slots are allocated ahead,
    /// about 1 KiB each; raise the number on a live tunnel with [`crate::Tunnel::set_max_streams`].
    pub max_streams: u32,
    /// Largest UDP payload that path MTU discovery tries, from 1200 to 65527 bytes. Above 6550 the
    /// kernel takes fewer than ten packets in one batch.
    pub mtu_cap: u16,
    /// Whether packets are handed to the kernel in batches, which it segments (GSO); peers that
    /// batches do not reach are sent packets one by one in any case.
    pub gso: bool,
    /// Kernel buffer requested for each direction of the UDP socket, in bytes.
    pub udp_buffer_size: usize,
    /// Maximum number of bytes of packets that were received on a UDP socket and wait for their
    /// connections. What comes beyond is dropped.
    pub packet_backlog: u64,
    /// The congestion controller of the tunnel; QUIC only.
    pub congestion: Congestion,
}

impl Default for Settings {
    /// Fit for a WAN path of up to 100 Mbit/s and 150 ms.
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(25),
            keep_alive_interval: Some(Duration::from_secs(5)),
            stream_receive_window: 2 * 1024 * 1024,
            tunnel_receive_window: None,
            unadmitted_window: None,
            max_streams: 256,
            mtu_cap: 6500,
            gso: true,
            udp_buffer_size: 8 * 1024 * 1024,
            packet_backlog: Self::MAX_PACKET_BACKLOG,
            congestion: Congestion::Auto,
        }
    }
}

impl Settings {
    /// Bytes of packets that wait for their connections, at most, whatever memory there is: 20 000
    /// full packets.
    pub const MAX_PACKET_BACKLOG: u64 = 32 * 1024 * 1024;

    /// These settings for tunnels whose peers have to be admitted.
    #[must_use]
    pub fn with_unadmitted_window(self, window: u32) -> Self {
        Self { unadmitted_window: Some(window), ..self }
    }
}
