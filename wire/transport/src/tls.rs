//! TLS for tunnels: 1.3 only, one provider, no tickets, no early data.
//!
//! Tickets are off because a resumed handshake would take the client's certificate from the ticket
//! without checking it again. Early data is off because it can be replayed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use culvert_wire::version::ALPN;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion,
    crypto::{CryptoProvider, aws_lc_rs},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

/// A certificate, key or CA file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The file is not PEM, or does not hold what it should.
    #[error("{path}: {reason}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// The fault.
        reason: String,
    },
    /// Certificate and key do not belong together, or the key's algorithm is not supported.
    #[error("unusable certificate or key: {0}")]
    Identity(#[from] rustls::Error),
    /// No certificate of the CA file can be trusted.
    #[error("unusable CA: {0}")]
    Authority(String),
}

/// A certificate chain, leaf first, and its private key.
#[derive(Debug)]
pub struct Identity {
    /// The chain.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key, in PKCS#1, SEC1 or PKCS#8.
    pub key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads a chain and a key from two PEM files.
    ///
    /// # Errors
    /// When either cannot be read or holds no such thing.
    pub fn from_pem_files(chain: &Path, key: &Path) -> Result<Self, TlsError> {
        let key_pem = read(key)?;
        let parsed = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|error| TlsError::Pem { path: key.into(), reason: error.to_string() })?;
        Ok(Self { chain: certificates(chain)?, key: parsed })
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

/// Reads every certificate of a PEM file.
///
/// # Errors
/// When the file cannot be read, has a malformed block, or holds no certificate.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let malformed = |reason: String| TlsError::Pem { path: path.into(), reason };
    let pem = read(path)?;
    let chain = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| malformed(error.to_string()))?;
    if chain.is_empty() {
        return Err(malformed("holds no certificate".into()));
    }
    Ok(chain)
}

/// The trust store of these CA certificates.
///
/// # Errors
/// When one of them cannot be a trust anchor.
pub fn authorities(
    certificates: &[CertificateDer<'static>],
) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates {
        roots.add(certificate.clone()).map_err(|error| TlsError::Authority(error.to_string()))?;
    }
    Ok(Arc::new(roots))
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read { path: path.into(), source })
}

/// The key exchanges that are offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyExchange {
    /// Post-quantum first (X25519 with ML-KEM-768), elliptic curves for peers without it
    #[default]
    Hybrid,
    /// Elliptic curves only: a first flight small enough for paths that drop large ones
    Classic,
}

impl KeyExchange {
    /// The provider of all cryptography, with these key exchanges.
    pub fn provider(self) -> Arc<CryptoProvider> {
        let mut provider = aws_lc_rs::default_provider();
        if self == Self::Classic {
            provider.kx_groups = vec![
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ];
        }
        Arc::new(provider)
    }
}

/// The server's side of a tunnel's TLS. With `client_ca`, agents must present a certificate of it.
///
/// # Errors
/// When certificate and key do not fit, or the CA cannot be used.
pub fn tunnel_server(
    identity: Identity,
    client_ca: Option<Arc<RootCertStore>>,
    key_exchange: KeyExchange,
) -> Result<ServerConfig, TlsError> {
    let mut config = server(identity, client_ca, key_exchange, &[&TLS13])?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// A server's TLS of these versions, without tickets and early data, and without ALPN. With
/// `client_ca`, clients must present a certificate of it.
///
/// # Errors
/// When certificate and key do not fit, or the CA cannot be used.
pub fn server(
    identity: Identity,
    client_ca: Option<Arc<RootCertStore>>,
    key_exchange: KeyExchange,
    versions: &[&'static SupportedProtocolVersion],
) -> Result<ServerConfig, TlsError> {
    let provider = key_exchange.provider();
    let builder =
        ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(versions)?;
    let builder = match client_ca {
        Some(roots) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|error| TlsError::Authority(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(identity.chain, identity.key)?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// The agent's side of a tunnel's TLS: trusts `server_ca` alone, presents `identity` if asked.
///
/// # Errors
/// When certificate and key do not fit.
pub fn tunnel_client(
    server_ca: Arc<RootCertStore>,
    identity: Option<Identity>,
    key_exchange: KeyExchange,
) -> Result<ClientConfig, TlsError> {
    let builder = ClientConfig::builder_with_provider(key_exchange.provider())
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(server_ca);
    let mut config = match identity {
        Some(identity) => builder.with_client_auth_cert(identity.chain, identity.key)?,
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}
