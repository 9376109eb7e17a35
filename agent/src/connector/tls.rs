//! The agent's TLS, from its files as they are now.

use std::sync::Arc;

use culvert_konnectivity::ALPN_H2;
use culvert_transport::tls::{self, Identity, KeyExchange, TlsError};
use rustls::RootCertStore;

/// TLS for each carrier. Over TCP, Konnectivity's ALPN is offered as well.
#[derive(Debug)]
pub(crate) struct ClientTls {
    /// For QUIC.
    pub(crate) quic: Arc<rustls::ClientConfig>,
    /// For TCP.
    pub(crate) tcp: Arc<rustls::ClientConfig>,
}

impl ClientTls {
    /// Trusts this CA, and presents this certificate. `extra_alpn` is offered over TCP before
    /// Konnectivity's.
    ///
    /// # Errors
    /// When the certificate cannot be used.
    pub(crate) fn new(
        ca: Arc<RootCertStore>,
        identity: Option<Identity>,
        key_exchange: KeyExchange,
        extra_alpn: &[String],
    ) -> Result<Self, TlsError> {
        let quic = tls::tunnel_client(ca, identity, key_exchange)?;
        let mut tcp = quic.clone();
        let extra = extra_alpn.iter().map(|name| name.clone().into_bytes());
        tcp.alpn_protocols.extend(extra.chain([ALPN_H2.to_vec()]));
        Ok(Self { quic: Arc::new(quic), tcp: Arc::new(tcp) })
    }
}
