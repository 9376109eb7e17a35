//! TLS of the frontend over TCP.

use std::{path::Path, sync::Arc};

use bytes::Bytes;
use culvert_transport::{
    splice::{BufferedRead, BufferedWrite, Local, SocketAbort, buffered},
    tls::{Identity, KeyExchange, TlsError, authorities, certificates},
};
use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio::{
    io::{ReadHalf, WriteHalf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use super::socket::{FrontendSocket, SharedTcp};
use crate::config::{Mode, TlsVersion};

/// Configuration of TLS with kube-apiserver, which must present a certificate of `client_ca`.
pub(super) fn server_tls(
    identity: Identity,
    client_ca: &Path,
    mode: Mode,
    min_version: TlsVersion,
) -> Result<ServerConfig, TlsError> {
    let provider = KeyExchange::Hybrid.provider();
    let roots = authorities(&certificates(client_ca)?)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| TlsError::Authority(error.to_string()))?;
    let versions: &[_] = match min_version {
        TlsVersion::Tls13 => &[&rustls::version::TLS13],
        TlsVersion::Tls12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain, identity.key)?;
    config.alpn_protocols = match mode {
        Mode::Grpc => vec![b"h2".to_vec()],
        Mode::HttpConnect => vec![b"http/1.1".to_vec()],
    };
    // A resumed session would not check the client's certificate again.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

impl FrontendSocket for TlsStream<SharedTcp> {
    type Read = BufferedRead<ReadHalf<Self>>;
    type Write = BufferedWrite<WriteHalf<Self>>;
    type Abort = SocketAbort<TcpStream>;

    fn into_local(self, read_ahead: Bytes) -> Local<Self::Read, Self::Write, Self::Abort> {
        let abort = self.get_ref().0.abort();
        let (reader, writer) = tokio::io::split(self);
        let (reader, writer) = buffered(reader, writer);
        Local::new(reader.with_prefix(read_ahead), writer, abort)
    }

    /// A peer that left without a close_notify cannot be distinguished from one that is silent.
    fn is_hung_up(&self) -> bool {
        false
    }
}
