//! QUIC tunnels over networks that are not the system's.

use crate::{ConnectError, Settings, Tunnel, Unreachable, quic};

/// The configuration that these settings mean to quinn, on a path whose first link carries UDP
/// payloads of at most `link` bytes, if that is known.
pub fn quic_transport(settings: &Settings, link: Option<u16>) -> quinn::TransportConfig {
    settings.transport(link)
}

/// A tunnel over a connection that was set up with [`quic_transport`].
///
/// # Errors
/// When its peer did not agree on the protocol; it is closed then.
pub fn adopt(
    connection: quinn::Connection,
    endpoint: quinn::Endpoint,
) -> Result<Tunnel, ConnectError> {
    quic::adopt(connection, endpoint).map(Tunnel::from)
}

/// Reports to a tunnel over QUIC that the network does not deliver to its peer.
pub fn report_unreachable(tunnel: &Tunnel, why: Unreachable) {
    tunnel.report_unreachable(why);
}
