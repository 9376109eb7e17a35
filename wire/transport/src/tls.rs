//! TLS for tunnels: 1.3 only, one provider, no tickets, no early data. Other peers over TCP may use
//! 1.2.
//!
//! Tickets are off because a resumed handshake would take the client's certificate from the ticket
//! without checking it again. Early data is off because it can be replayed.

mod current;
mod go_chain;
mod pem;
mod serving;
mod tls12;
mod verifier;

use std::{io, path::PathBuf, sync::Arc};

use culvert_wire::version::ALPN;
use rustls::{
    CipherSuite, ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs},
    server::NoServerSessionStorage,
    sign::SingleCertAndKey,
};

pub use self::{
    current::{Current, Replace},
    pem::{
        Authorities, Identity, authorities, certificates, parse_chain, pem_fault, pem_fault_of,
        read_file, system_authorities,
    },
    serving::{ClientVerifier, ServerCredentials},
    tls12::Tls12,
    verifier::CertificateRules,
};

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

/// The key exchanges that are offered and accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KeyExchange {
    /// Post-quantum first (X25519 with ML-KEM-768), elliptic curves for peers without it.
    #[default]
    Hybrid,
    /// Post-quantum only: a peer without it is refused, and so is TLS 1.2, which does not have it.
    PostQuantum,
    /// Elliptic curves only: a first flight small enough for paths that drop large ones.
    Classic,
}

impl KeyExchange {
    /// The provider of all cryptography, with these key exchanges.
    pub fn provider(self) -> Arc<CryptoProvider> {
        let mut provider = aws_lc_rs::default_provider();
        // First the suite with AES-128-GCM: SHA-384 of the other one takes a server of many agents
        // longer than SHA-256, for which processors have instructions.
        provider
            .cipher_suites
            .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
        match self {
            Self::Hybrid => {}
            Self::PostQuantum => provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768],
            Self::Classic => {
                provider.kx_groups = vec![
                    aws_lc_rs::kx_group::X25519,
                    aws_lc_rs::kx_group::SECP256R1,
                    aws_lc_rs::kx_group::SECP384R1,
                ];
            }
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
    let credentials = ServerCredentials::fixed(&identity, client_ca, key_exchange)?;
    tunnel_server_with(credentials, key_exchange)
}

/// The server's side of a tunnel's TLS, with credentials that may be replaced.
///
/// # Errors
/// When TLS 1.3 is not supported; the fault is ours.
pub fn tunnel_server_with(
    credentials: ServerCredentials,
    key_exchange: KeyExchange,
) -> Result<ServerConfig, TlsError> {
    let mut config = server(credentials, key_exchange, &Tls12::Off)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// A server's TLS of version 1.3 and, where allowed, 1.2, without tickets and early data, and without
/// ALPN. Each handshake uses the credentials that are current when it begins.
///
/// # Errors
/// When the versions are not supported; the fault is ours.
pub fn server(
    credentials: ServerCredentials,
    key_exchange: KeyExchange,
    tls12: &Tls12,
) -> Result<ServerConfig, TlsError> {
    let tls12 = tls12.with(key_exchange);
    let provider = tls12.provider(key_exchange);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(tls12.versions())?;
    let ServerCredentials { identity, client_ca } = credentials;
    let builder = match client_ca {
        Some(client_ca) => {
            let verifier = serving::CurrentVerifier::new(client_ca, provider);
            builder.with_client_cert_verifier(Arc::new(verifier))
        }
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(serving::CurrentIdentity(identity)));
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    Ok(config)
}

/// What the agent's side of TLS offers and accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientOptions {
    /// Key exchanges that are offered.
    pub key_exchange: KeyExchange,
    /// Whether TLS 1.2 is offered, and its cipher suites.
    pub tls12: Tls12,
    /// Rules for the server's certificate.
    pub rules: CertificateRules,
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
    let rules = CertificateRules::default();
    let options = ClientOptions { key_exchange, tls12: Tls12::Off, rules };
    let mut config = client(server_ca, identity, &options)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

/// The agent's side of TLS without ALPN: trusts `server_ca` alone, presents `identity` if asked.
///
/// # Errors
/// When certificate and key do not fit.
pub fn client(
    server_ca: Arc<RootCertStore>,
    identity: Option<Identity>,
    options: &ClientOptions,
) -> Result<ClientConfig, TlsError> {
    let tls12 = options.tls12.with(options.key_exchange);
    let provider = tls12.provider(options.key_exchange);
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(tls12.versions())?
        .dangerous()
        .with_custom_certificate_verifier(verifier::of_servers(server_ca, options.rules)?);
    let mut config = match identity {
        Some(identity) => {
            let certified = identity.certified(&provider)?;
            builder.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified)))
        }
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_early_data = false;
    Ok(config)
}
