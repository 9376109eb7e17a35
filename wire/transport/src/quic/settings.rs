//! The configuration of quinn for a tunnel of many small and a few huge streams.

use std::{sync::Arc, time::Duration};

use quinn::{EndpointConfig, TransportConfig, VarInt};

use super::reset_key::{ConnectionIds, ListenerKey, ResetHmac};
use crate::settings::Settings;

/// Maximum number of unacknowledged and queued bytes per tunnel: no limit. When quinn reaches such
/// a limit and room is made, it wakes the latest writer first, so that a few downloads at the limit
/// would starve every keystroke. The peer's stream window bounds each stream.
const SEND_WINDOW: u64 = 1 << 40;
/// Largest UDP payload that is tried where the first link's is not known, in bytes: Ethernet's with
/// IPv6.
const MTU_GUESS: u16 = 1452;
/// Maximum number of bytes of datagrams that wait to be sent, and that wait to be read.
const DATAGRAM_BUFFER: usize = 64 * 1024;
/// Least time between two stateless resets: a thousand agents learn of a restart within half a
/// second. A reset is shorter than what it answers, so it does not serve as an amplifier.
const RESET_INTERVAL: Duration = Duration::from_micros(500);
/// First guess of the round-trip time. It sets when a lost first packet is sent again (three times
/// this); the RFC's 333 ms would make that a second.
const INITIAL_RTT: Duration = Duration::from_millis(100);

impl Settings {
    /// The configuration for a path whose first link carries UDP payloads of at most `link` bytes,
    /// if that is known.
    pub(crate) fn transport(&self, link: Option<u16>) -> TransportConfig {
        let mut mtu_discovery = quinn::MtuDiscoveryConfig::default();
        mtu_discovery.upper_bound(link.unwrap_or(MTU_GUESS).clamp(1200, self.mtu_cap.max(1200)));

        let mut transport = TransportConfig::default();
        transport
            // Beyond what a VarInt of milliseconds holds is "never".
            .max_idle_timeout(quinn::IdleTimeout::try_from(self.idle_timeout).ok())
            .keep_alive_interval(self.keep_alive_interval)
            .max_concurrent_bidi_streams(VarInt::from_u32(self.max_streams))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .stream_receive_window(VarInt::from_u32(self.stream_receive_window))
            .receive_window(self.receive_window())
            .send_window(SEND_WINDOW)
            .initial_rtt(INITIAL_RTT)
            .congestion_controller_factory(self.congestion.factory())
            .mtu_discovery_config(Some(mtu_discovery))
            // Datagrams carry copies and repair shards, of use for a moment only.
            .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
            .datagram_send_buffer_size(DATAGRAM_BUFFER);
        transport
    }

    /// The window of a new connection. quinn cannot change the windows of streams, so the peer is
    /// held back by this one until it is admitted.
    fn receive_window(&self) -> VarInt {
        match (self.unadmitted_window, self.tunnel_receive_window) {
            (Some(window), _) => VarInt::from_u32(window),
            (None, Some(window)) => VarInt::from_u64(window).unwrap_or(VarInt::MAX),
            (None, None) => VarInt::MAX,
        }
    }

    pub(super) fn endpoint(&self, reset_key: Option<ListenerKey>) -> EndpointConfig {
        let mut endpoint = EndpointConfig::default();
        if let Some(key) = reset_key {
            endpoint = EndpointConfig::new(Arc::new(ResetHmac(key.clone())));
            // A packet whose connection id this process cannot have given is dropped without an
            // answer, so a restart must go on to know its own.
            endpoint.cid_generator(move || Box::new(ConnectionIds(key.clone())));
            endpoint.min_reset_interval(RESET_INTERVAL);
        }
        // The cap is checked where it is configured; out of range leaves quinn's default.
        let _ = endpoint.max_udp_payload_size(self.mtu_cap.max(1200));
        endpoint
    }
}
