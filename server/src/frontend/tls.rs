//! TLS of the frontend over TCP.

use bytes::Bytes;
use culvert_konnectivity::ALPN_H2;
use culvert_transport::{
    splice::{BufferedRead, BufferedWrite, Local, SocketAbort, buffered},
    tls::{self, KeyExchange, ServerCredentials, Tls12, TlsError},
};
use rustls::ServerConfig;
use tokio::{
    io::{ReadHalf, WriteHalf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use super::socket::{FrontendSocket, SharedTcp};
use crate::config::Mode;

/// Configuration of TLS with kube-apiserver, which must present a certificate of the CA.
pub(super) fn server_tls(
    credentials: ServerCredentials,
    mode: Mode,
    tls12: &Tls12,
) -> Result<ServerConfig, TlsError> {
    let mut config = tls::server(credentials, KeyExchange::Hybrid, tls12)?;
    config.alpn_protocols = match mode {
        Mode::Grpc => vec![ALPN_H2.to_vec()],
        Mode::HttpConnect => vec![b"http/1.1".to_vec()],
    };
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

    /// TCP reports a close of one direction and of both alike.
    fn is_hung_up(&self) -> bool {
        false
    }
}
