//! Coming in as kube-apiserver does: by each of the server's front doors, with one interface.

pub mod connect;
pub mod proxy;

use std::{io, path::Path, sync::Arc, time::Duration};

use culvert_agent::config::Transport;
use culvert_server::{config::Mode, frontend::listen::FrontendAddress};
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
    peer::Frontend,
    rig::{Rig, Running},
};

/// One way into a server, and what carries its tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// HTTP CONNECT on a Unix socket.
    ConnectUnix,
    /// HTTP CONNECT over TCP with mutual TLS.
    ConnectTls,
    /// gRPC on a Unix socket.
    GrpcUnix,
    /// gRPC over TCP with mutual TLS.
    GrpcTls,
    /// As [`Self::ConnectUnix`], where tunnels go over TCP.
    ConnectUnixTunnelTcp,
    /// As [`Self::ConnectTls`], where tunnels go over TCP.
    ConnectTlsTunnelTcp,
    /// As [`Self::GrpcUnix`], where tunnels go over TCP.
    GrpcUnixTunnelTcp,
    /// As [`Self::GrpcTls`], where tunnels go over TCP.
    GrpcTlsTunnelTcp,
}

impl Door {
    /// Every way there is.
    pub const ALL: [Self; 8] = [
        Self::ConnectUnix,
        Self::ConnectTls,
        Self::GrpcUnix,
        Self::GrpcTls,
        Self::ConnectUnixTunnelTcp,
        Self::ConnectTlsTunnelTcp,
        Self::GrpcUnixTunnelTcp,
        Self::GrpcTlsTunnelTcp,
    ];
    /// HTTP CONNECT on a Unix socket, with each carrier.
    pub const CONNECT_UNIX: [Self; 2] = [Self::ConnectUnix, Self::ConnectUnixTunnelTcp];
    /// HTTP CONNECT over TLS, with each carrier.
    pub const CONNECT_TLS: [Self; 2] = [Self::ConnectTls, Self::ConnectTlsTunnelTcp];
    /// gRPC on a Unix socket, with each carrier.
    pub const GRPC_UNIX: [Self; 2] = [Self::GrpcUnix, Self::GrpcUnixTunnelTcp];
    /// Those that speak gRPC.
    pub const GRPC: [Self; 4] =
        [Self::GrpcUnix, Self::GrpcTls, Self::GrpcUnixTunnelTcp, Self::GrpcTlsTunnelTcp];
    /// Those that can end one direction and keep the other.
    pub const WITH_HALF_CLOSE: [Self; 4] = [
        Self::ConnectUnix,
        Self::ConnectTls,
        Self::ConnectUnixTunnelTcp,
        Self::ConnectTlsTunnelTcp,
    ];
    /// Those that can tell a cut from an end. On a Unix socket, which knows no reset, a cut shows as
    /// the end of a connection whose TLS, inside, was not ended.
    pub const WITH_RESET: [Self; 6] = [
        Self::ConnectTls,
        Self::GrpcUnix,
        Self::GrpcTls,
        Self::ConnectTlsTunnelTcp,
        Self::GrpcUnixTunnelTcp,
        Self::GrpcTlsTunnelTcp,
    ];

    /// Whether it speaks gRPC.
    pub fn is_grpc(self) -> bool {
        Self::GRPC.contains(&self)
    }

    /// Whether it is on TCP, with mutual TLS.
    fn is_tls(self) -> bool {
        matches!(
            self,
            Self::ConnectTls | Self::GrpcTls | Self::ConnectTlsTunnelTcp | Self::GrpcTlsTunnelTcp
        )
    }

    /// What carries tunnels behind it.
    pub fn transport(self) -> Transport {
        match self {
            Self::ConnectUnix | Self::ConnectTls | Self::GrpcUnix | Self::GrpcTls => {
                Transport::Quic
            }
            Self::ConnectUnixTunnelTcp
            | Self::ConnectTlsTunnelTcp
            | Self::GrpcUnixTunnelTcp
            | Self::GrpcTlsTunnelTcp => Transport::Tcp,
        }
    }

    /// A rig that has this door.
    pub fn rig(self) -> Rig {
        let mode = if self.is_grpc() { Mode::Grpc } else { Mode::HttpConnect };
        let rig = Rig::new().mode(mode).transport(self.transport());
        if self.is_tls() { rig.tcp_frontend() } else { rig }
    }

    /// Dials `target` through this door of `rig`.
    ///
    /// # Errors
    /// When the frontend cannot be reached, or refuses the dial.
    pub async fn dial(
        self,
        rig: &Running,
        target: impl ToString,
    ) -> Result<Connection, ConnectError> {
        let target = target.to_string();
        Ok(match (self.is_grpc(), self.is_tls()) {
            (false, false) => Connection::dial_unix(Frontend::Connect, &rig.uds(), target).await?,
            (true, false) => Connection::dial_unix(Frontend::Grpc, &rig.uds(), target).await?,
            (false, true) => {
                let mut socket = tls(rig, b"http/1.1").await?;
                connect::request(&mut socket, &target).await?;
                Connection::Tls(Box::new(socket))
            }
            (true, true) => {
                let socket = tls(rig, b"h2").await?;
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

/// The same without a certificate, up to the server's first byte or its refusal.
///
/// # Errors
/// When the frontend does as it should.
pub async fn tls_without_certificate(rig: &Running) -> io::Result<()> {
    let config = tls_builder(rig)?.with_no_client_auth();
    // In TLS 1.3 the refusal comes behind the client's own end of the handshake.
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
        return Err(io::Error::other("this rig takes frontends in on a Unix socket"));
    };
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::from(address.ip()), socket).await
}

/// A connection to a target through some door.
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
    /// Dials `target` through the frontend of a server of either make on a Unix socket.
    ///
    /// # Errors
    /// When the frontend cannot be reached, or refuses the dial.
    pub async fn dial_unix(
        frontend: Frontend,
        uds: &Path,
        target: impl ToString,
    ) -> Result<Self, ConnectError> {
        Ok(match frontend {
            Frontend::Connect => Self::Unix(connect::dial(uds, target).await?),
            Frontend::Grpc => {
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

    /// Appends what comes next to `bytes`; how much, 0 at the clean end.
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
    /// When the connection is over; gRPC has no such thing.
    pub async fn finish(&mut self) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.shutdown().await,
            Self::Tls(socket) => socket.shutdown().await,
            Self::Proxy(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Closes both directions in order, as the end of a process that is done would.
    ///
    /// # Errors
    /// When gRPC's closing is answered with an error.
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

    /// Cuts the connection off, as a crash would: TLS by a reset of its TCP socket, gRPC by
    /// cancelling its stream. A Unix socket has no reset.
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
