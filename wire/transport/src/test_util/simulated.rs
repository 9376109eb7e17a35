//! QUIC tunnels over networks that are not the system's.

use std::sync::Arc;

use crate::{ConnectError, Settings, Tunnel, Unreachable, quic};

/// The configuration that these settings mean to quinn, on a path whose first link carries UDP
/// payloads of at most `link` bytes, if that is known.
pub fn quic_transport(settings: &Settings, link: Option<u16>) -> quinn::TransportConfig {
    settings.transport(link)
}

/// TLS of a QUIC server whose tunnels look at packets before quinn does.
///
/// # Errors
/// When the TLS configuration has no cipher suite for QUIC.
pub fn quic_server(
    tls: Arc<rustls::ServerConfig>,
    settings: &Settings,
) -> Result<Arc<dyn quinn::crypto::ServerConfig>, ConnectError> {
    quic::server_crypto(tls, settings)
}

/// TLS of a QUIC client whose tunnels look at packets before quinn does.
///
/// # Errors
/// When the TLS configuration has no cipher suite for QUIC.
pub fn quic_client(
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<Arc<dyn quinn::crypto::ClientConfig>, ConnectError> {
    quic::client_crypto(tls, settings)
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
