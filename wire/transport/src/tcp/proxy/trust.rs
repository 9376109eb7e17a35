//! TLS to a proxy itself. Proxies are checked with the system's CA certificates, not with the CA of
//! servers. They are looked for where Go looks, so a proxy that other agents of a node can use
//! works for this one too.

use std::{path::PathBuf, sync::Arc};

use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{net::TcpStream, task::spawn_blocking};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    ProxyFault,
    tls::{Authorities, Current, KeyExchange, system_authorities},
};

/// CA certificates for proxies.
#[derive(Clone, Debug, Default)]
pub(super) struct ProxyAuthorities {
    /// Their PEM file; without one, the system's is used.
    pub(super) file: Option<PathBuf>,
    /// The certificates, where they are kept up to date; otherwise each handshake reads the file.
    pub(super) kept: Option<Current<RootCertStore>>,
}

/// What is kept up to date has come from the file.
impl PartialEq for ProxyAuthorities {
    fn eq(&self, other: &Self) -> bool {
        self.file == other.file
    }
}

impl Eq for ProxyAuthorities {}

impl ProxyAuthorities {
    /// The file, or the first of the system's files that exists.
    pub(super) fn path(&self) -> Option<PathBuf> {
        self.file.clone().or_else(system_authorities)
    }

    async fn roots(&self) -> Result<Arc<RootCertStore>, ProxyFault> {
        if let Some(kept) = &self.kept {
            return Ok(kept.get());
        }
        let path = self.path();
        let path = path.ok_or_else(|| fault("the system has no CA certificates"))?;
        let read = spawn_blocking(move || Authorities::from_pem_file(&path)).await;
        Ok(Arc::new(read.map_err(fault)?.map_err(fault)?.roots))
    }
}

/// Does the handshake and checks the proxy's certificate.
pub(super) async fn handshake(
    socket: TcpStream,
    host: &str,
    authorities: &ProxyAuthorities,
) -> Result<TlsStream<TcpStream>, ProxyFault> {
    let name = ServerName::try_from(host.to_owned()).map_err(fault)?;
    let tls = ClientConfig::builder_with_provider(KeyExchange::default().provider())
        // Some proxies speak TLS 1.2 only.
        .with_safe_default_protocol_versions()
        .map_err(fault)?
        .with_root_certificates(authorities.roots().await?)
        .with_no_client_auth();
    TlsConnector::from(Arc::new(tls)).connect(name, socket).await.map_err(fault)
}

fn fault(error: impl ToString) -> ProxyFault {
    ProxyFault::Tls(error.to_string())
}
