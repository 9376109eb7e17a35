//! Clients of a server's frontends, as kube-apiserver is one: every kind of frontend with one
//! interface.

pub mod connect;
pub mod proxy;

use std::{io, path::Path, sync::Arc, time::Duration};

use culvert_server::frontend::listen::FrontendAddress;
use culvert_transport::tls::{Identity, KeyExchange, authorities, certificates};
use rustls::{ClientConfig, pki_types::ServerName};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::{
    frontend::{connect::ConnectError, proxy::ProxyConnection},
    rig::Running,
};

/// Protocol of a frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// gRPC, which kube-apiserver speaks with its own client library.
    Grpc,
    /// HTTP CONNECT.
    Connect,
}

/// Protocol of a frontend, and what it listens on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrontendKind {
    /// HTTP CONNECT on a Unix socket.
    ConnectUnix,
    /// HTTP CONNECT over TCP with mutual TLS.
    ConnectTls,
    /// gRPC on a Unix socket.
    GrpcUnix,
    /// gRPC over TCP with mutual TLS.
    GrpcTls,
}

impl FrontendKind {
    /// Protocol.
    pub fn protocol(self) -> Protocol {
        match self {
            Self::ConnectUnix | Self::ConnectTls => Protocol::Connect,
            Self::GrpcUnix | Self::GrpcTls => Protocol::Grpc,
        }
    }

    /// Whether it is on TCP, with mutual TLS.
    pub fn is_tls(self) -> bool {
        matches!(self, Self::ConnectTls | Self::GrpcTls)
    }
}

impl Running {
    /// Dials `target` through the frontend.
    ///
    /// # Errors
    /// When the frontend cannot be reached, or refuses the dial.
    pub async fn dial(&self, target: impl ToString) -> Result<Connection, ConnectError> {
        let (kind, target) = (self.frontend(), target.to_string());
        if !kind.is_tls() {
            return Connection::dial_unix(kind.protocol(), &self.uds(), target).await;
        }
        Ok(match kind.protocol() {
            Protocol::Connect => {
                let mut socket = tls(self, b"http/1.1").await?;
                connect::request(&mut socket, &target).await?;
                Connection::Tls(Box::new(socket))
            }
            Protocol::Grpc => {
                let socket = tls(self, b"h2").await?;
                Connection::Proxy(Box::new(ProxyConnection::dial(socket, &target).await?))
            }
        })
    }
}

/// A TLS connection to the frontend's TCP port, with the frontend's client certificate.
///
/// # Errors
/// When the port cannot be reached or the handshake fails.
pub async fn tls(rig: &Running, alpn: &[u8]) -> io::Result<TlsStream<TcpStream>> {
    let pair = rig.certificates().frontend();
    let identity = Identity::from_pem_files(&pair.certificate, &pair.key);
    let identity = identity.map_err(io::Error::other)?;
    let mut config = tls_builder(rig)?
        .with_client_auth_cert(identity.chain, identity.key)
        .map_err(io::Error::other)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    handshake(rig, config).await
}

/// Connects to the frontend's TCP port without a client certificate, and reads a byte.
///
/// # Errors
/// When the frontend refuses the connection, as it should.
pub async fn tls_without_certificate(rig: &Running) -> io::Result<()> {
    let config = tls_builder(rig)?.with_no_client_auth();
    // In TLS 1.3 the refusal comes after the client's own part of the handshake.
    handshake(rig, config).await?.read_u8().await.map(drop)
}

fn tls_builder(
    rig: &Running,
) -> io::Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>> {
    let roots = certificates(&rig.certificates().ca()).and_then(|ca| authorities(&ca));
    Ok(ClientConfig::builder_with_provider(KeyExchange::Hybrid.provider())
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots.map_err(io::Error::other)?))
}

async fn handshake(rig: &Running, config: ClientConfig) -> io::Result<TlsStream<TcpStream>> {
    let FrontendAddress::Tcp(address) = rig.server.frontend else {
        return Err(io::Error::other("the frontend of this rig is on a Unix socket"));
    };
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::from(address.ip()), socket).await
}

/// A connection to a target through a frontend.
#[derive(Debug)]
pub enum Connection {
    /// Through CONNECT on a Unix socket.
    Unix(UnixStream),
    /// Through CONNECT over TLS.
    Tls(Box<TlsStream<TcpStream>>),
    /// Through gRPC.
    Proxy(Box<ProxyConnection>),
}

impl Connection {
    /// Dials `target` through a frontend on a Unix socket, of Culvert or Konnectivity.
    ///
    /// # Errors
    /// When the frontend cannot be reached, or refuses the dial.
    pub async fn dial_unix(
        protocol: Protocol,
        uds: &Path,
        target: impl ToString,
    ) -> Result<Self, ConnectError> {
        Ok(match protocol {
            Protocol::Connect => Self::Unix(connect::dial(uds, target).await?),
            Protocol::Grpc => {
                let socket = UnixStream::connect(uds).await?;
                let connection = ProxyConnection::dial(socket, &target.to_string()).await?;
                Self::Proxy(Box::new(connection))
            }
        })
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// When the connection is over.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.write_all(bytes).await,
            Self::Tls(socket) => {
                socket.write_all(bytes).await?;
                socket.flush().await
            }
            Self::Proxy(connection) => connection.write(bytes).await,
        }
    }

    /// Appends the next bytes to `bytes`; how many, 0 at the clean end.
    ///
    /// # Errors
    /// When the connection was cut off.
    pub async fn read(&mut self, bytes: &mut Vec<u8>) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.read_buf(bytes).await,
            Self::Tls(socket) => socket.read_buf(bytes).await,
            Self::Proxy(connection) => connection.read(bytes).await,
        }
    }

    /// Reads until there are `count` bytes or the connection ends.
    ///
    /// # Errors
    /// When the connection was cut off.
    pub async fn read_count(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < count && self.read(&mut bytes).await? > 0 {}
        Ok(bytes)
    }

    /// Reads to the clean end.
    ///
    /// # Errors
    /// When the connection was cut off.
    pub async fn read_to_end(&mut self) -> io::Result<Vec<u8>> {
        self.read_count(usize::MAX).await
    }

    /// Ends this direction and keeps the other.
    ///
    /// # Errors
    /// When the connection is over; always over gRPC, which cannot end one direction.
    pub async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.shutdown().await,
            Self::Tls(socket) => socket.shutdown().await,
            Self::Proxy(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Closes both directions in order.
    ///
    /// # Errors
    /// When gRPC answers the close with an error.
    pub async fn close(self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => {
                drop(socket);
                Ok(())
            }
            Self::Tls(mut socket) => socket.shutdown().await,
            Self::Proxy(connection) => connection.close().await,
        }
    }

    /// Cuts the connection off, as a crash of the client would: TLS by a reset of its TCP socket,
    /// gRPC by cancelling its stream. A Unix socket is closed: it has no reset.
    pub fn abort(self) {
        match self {
            Self::Unix(socket) => drop(socket),
            Self::Tls(socket) => {
                // Fails only on a socket that is not connected any more.
                let _ = SockRef::from(socket.get_ref().0).set_linger(Some(Duration::ZERO));
            }
            Self::Proxy(connection) => connection.cancel(),
        }
    }
}
