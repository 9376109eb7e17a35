//! The configuration of quinn for a tunnel of many small and a few huge streams.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::{EndpointConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;

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
            // A finite one would let a few stalled streams freeze the tunnel; memory is bounded by
            // streams times stream window instead.
            .receive_window(VarInt::MAX)
            .send_window(SEND_WINDOW)
            .initial_rtt(INITIAL_RTT)
            .congestion_controller_factory(self.congestion.factory())
            .mtu_discovery_config(Some(mtu_discovery))
            // Datagrams carry second copies, of use for a moment only.
            .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
            .datagram_send_buffer_size(DATAGRAM_BUFFER);
        transport
    }

    pub(super) fn endpoint(&self, reset_key: Option<&ResetKey>) -> EndpointConfig {
        let mut endpoint = EndpointConfig::default();
        if let Some(key) = reset_key {
            endpoint = EndpointConfig::new(Arc::new(key.hmac()));
            // A packet whose connection id this process cannot have given is dropped without an
            // answer, so a restart must go on to know its own.
            let ids = key.connection_ids();
            endpoint.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
            endpoint.min_reset_interval(RESET_INTERVAL);
        }
        // The cap is checked where it is configured; out of range leaves quinn's default.
        let _ = endpoint.max_udp_payload_size(self.mtu_cap.max(1200));
        endpoint
    }
}

/// The secret that stateless resets are made from (RFC 9000 §10.3).
///
/// A server that keeps it over a restart makes its peers notice the restart with their next
/// packet instead of after the idle time-out. No two servers may share one: the first that is
/// reached by a packet for a tunnel of the other would end it (RFC 9000 §21.11).
#[derive(Clone)]
pub struct ResetKey([u8; 32]);

impl ResetKey {
    /// The key derived from a secret of any length, such as a private key that outlives restarts,
    /// for the server that `owner` distinguishes from all others that may hold the secret.
    pub fn derive(secret: &[u8], owner: &str) -> Self {
        Self(Self::tag(secret, "culvert reset key")).mixed_with(owner)
    }

    /// The key of the listener that is bound to `address`, of several in one server.
    pub(super) fn at(&self, address: SocketAddr) -> Self {
        self.mixed_with(&address.to_string())
    }

    fn mixed_with(&self, owner: &str) -> Self {
        Self(Self::tag(&self.0, owner))
    }

    /// The key by which the server's own connection ids are known; it protects nothing.
    fn connection_ids(&self) -> u64 {
        let tag = Self::tag(&self.0, "culvert connection ids");
        u64::from_le_bytes(*tag.first_chunk().expect("a tag has 32 bytes"))
    }

    fn tag(secret: &[u8], purpose: &str) -> [u8; 32] {
        let salt = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, purpose.as_bytes());
        let tag = aws_lc_rs::hmac::sign(&salt, secret);
        tag.as_ref().try_into().expect("a tag of HMAC-SHA-256 has 32 bytes")
    }

    fn hmac(&self) -> aws_lc_rs::hmac::Key {
        aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &self.0)
    }
}

impl std::fmt::Debug for ResetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResetKey(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(secret: &str, owner: &str, address: &str) -> [u8; 32] {
        ResetKey::derive(secret.as_bytes(), owner).at(address.parse().unwrap()).0
    }

    #[test]
    fn a_server_keeps_its_reset_key_and_shares_it_with_no_other() {
        let key_of_a = key("secret", "a", "[::]:8132");
        assert_eq!(key_of_a, key("secret", "a", "[::]:8132"), "after a restart");
        for (secret, owner, address) in [
            ("another", "a", "[::]:8132"),
            ("secret", "b", "[::]:8132"),
            ("secret", "a", "[::]:8232"),
            ("secret", "a", "10.0.0.1:8132"),
        ] {
            assert_ne!(key_of_a, key(secret, owner, address), "{secret} {owner} {address}");
        }
    }

    #[test]
    fn a_server_does_not_know_the_connection_ids_of_another() {
        use quinn_proto::ConnectionIdGenerator;
        let generator = |owner| {
            let ids = ResetKey::derive(b"secret", owner).connection_ids();
            HashedConnectionIdGenerator::from_key(ids)
        };
        let id = generator("a").generate_cid();
        assert!(generator("a").validate(&id).is_ok());
        assert!(generator("b").validate(&id).is_err());
    }
}
