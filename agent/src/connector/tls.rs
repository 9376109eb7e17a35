//! The agent's TLS, from the files as they are now.

use std::{path::Path, sync::Arc};

use culvert_konnectivity::ALPN_H2;
use culvert_transport::tls::{self, Identity, KeyExchange, TlsError};

use crate::config::ServersConfig;

/// TLS for each carrier. Over TCP, Konnectivity's ALPN is offered as well.
#[derive(Debug)]
pub(crate) struct ClientTls {
    /// For QUIC.
    pub(crate) quic: Arc<rustls::ClientConfig>,
    /// For TCP.
    pub(crate) tcp: Arc<rustls::ClientConfig>,
}

impl ClientTls {
    /// Reads certificate, key and CA.
    ///
    /// # Errors
    /// When one of them cannot be used.
    pub(crate) fn from_files(
        servers: &ServersConfig,
        key_exchange: KeyExchange,
    ) -> Result<Self, TlsError> {
        let identity = match &servers.certificate {
            Some(pair) => Some(Identity::from_pem_files(&pair.certificate, &pair.key)?),
            None => None,
        };
        let roots = tls::authorities(&tls::certificates(Path::new(&servers.ca))?)?;
        let quic = tls::tunnel_client(roots, identity, key_exchange)?;
        let mut tcp = quic.clone();
        let extra = servers.extra_alpn.iter().map(|name| name.clone().into_bytes());
        tcp.alpn_protocols.extend(extra.chain([ALPN_H2.to_vec()]));
        Ok(Self { quic: Arc::new(quic), tcp: Arc::new(tcp) })
    }
}
