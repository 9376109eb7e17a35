//! TLS to a proxy itself. Proxies are checked with the system's CA certificates, not with the CA of
//! servers. They are looked for where Go looks, so a proxy that other agents of a node can use
//! works for this one too.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    ProxyFault,
    tls::{KeyExchange, certificates},
};

/// Files in which distributions keep the CA certificates (Go's `crypto/x509`).
const SYSTEM: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Does the handshake and checks the proxy's certificate. The CA certificates are read again each
/// time, as other files are.
pub(super) async fn handshake(
    socket: TcpStream,
    host: &str,
    authorities: Option<&Path>,
) -> Result<TlsStream<TcpStream>, ProxyFault> {
    let fault = |error: String| ProxyFault::Tls(error);
    let name = ServerName::try_from(host.to_owned()).map_err(|error| fault(error.to_string()))?;
    let file = authorities.map_or_else(system, |file| Ok(file.to_owned()))?;
    let trusted = certificates(&file).map_err(|error| fault(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(trusted);
    let tls = ClientConfig::builder_with_provider(KeyExchange::default().provider())
        // Some proxies speak TLS 1.2 only.
        .with_safe_default_protocol_versions()
        .map_err(|error| fault(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let handshake = TlsConnector::from(Arc::new(tls)).connect(name, socket).await;
    handshake.map_err(|error| fault(error.to_string()))
}

/// The first of the system's files that exists.
fn system() -> Result<PathBuf, ProxyFault> {
    let found = SYSTEM.iter().map(PathBuf::from).find(|file| file.exists());
    found.ok_or_else(|| ProxyFault::Tls("the system has no CA certificates".into()))
}
