//! QMux over TLS over TCP: the carrier for networks that block UDP.

mod proxies;
mod proxy;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use culvert_wire::version::ALPN;
use rustls::{CommonState, ProtocolVersion, pki_types::ServerName};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsConnector, client, server::TlsStream};
use tokio_util::either::Either;

pub use self::{
    proxies::{InvalidVariable, Proxies, proxy_url},
    proxy::{InvalidProxy, ProxiedStream, Proxy},
};
use super::{
    Carrier, ConnectError, Settings, TransportFault, TunnelLost, canonical,
    qmux::{Connection, Peer, Role, establish},
    socket::send_at_once,
};

/// Maximum number of bytes that wait in the socket and have not been sent.
const MAX_UNSENT: u32 = 64 * 1024;

/// How to reach a server.
#[derive(Clone, Debug)]
pub enum Route {
    /// Connect to its address.
    Direct(SocketAddr),
    /// Connect through a proxy, which resolves the server's name.
    Proxied {
        /// The proxy.
        proxy: Arc<Proxy>,
        /// The server's name or address, without brackets.
        host: String,
        /// The server's port.
        port: u16,
    },
}

/// Makes a tunnel to a server. Through a proxy, the peer's address is the proxy's.
///
/// # Errors
/// When the server or the proxy cannot be reached, is not who it should be, or does not agree on
/// the protocol; it gives up after the idle time-out.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub async fn connect(
    route: &Route,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<Connection, ConnectError> {
    handshake(route, server_name, tls, settings).await?.begin(settings).await
}

/// Connects to a server and does the TLS handshake. The protocol is then the one that both agreed
/// on.
///
/// # Errors
/// When the server or the proxy cannot be reached or is not who it should be; it gives up after the
/// idle time-out.
///
/// # Cancel safety
/// Dropping the future closes the connection.
pub async fn handshake(
    route: &Route,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<Connected, ConnectError> {
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|_| ConnectError::ServerName(server_name.to_owned()))?;
    let deadline = Instant::now() + settings.idle_timeout;
    let (socket, address) = match route {
        Route::Direct(remote) => {
            let socket = in_time(deadline, TcpStream::connect(remote)).await?;
            prepare(&socket, settings);
            (Either::Left(socket), *remote)
        }
        Route::Proxied { proxy, host, port } => {
            let proxied_stream = proxy.connect((host, *port), settings, deadline).await;
            let (proxied_stream, address) = proxied_stream
                .map_err(|fault| ConnectError::Proxy { proxy: proxy.to_string(), fault })?;
            (Either::Right(proxied_stream), canonical(address))
        }
    };
    let stream = in_time(deadline, TlsConnector::from(tls).connect(name, socket)).await?;
    Ok(Connected { stream, address })
}

/// The result of a step of the handshake, which must end before the deadline.
async fn in_time<T>(
    deadline: Instant,
    step: impl Future<Output = io::Result<T>>,
) -> Result<T, ConnectError> {
    let lost = match timeout_at(deadline, step).await {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return Err(ConnectError::Refused);
        }
        Ok(Err(error)) if is_unreachable(&error) => {
            return Err(ConnectError::Unreachable(error.into()));
        }
        Ok(Err(error)) => error.into(),
        Err(_) => TunnelLost::TimedOut,
    };
    Err(ConnectError::Handshake(lost))
}

/// Whether there is no route, or a packet filter forbids the connection.
fn is_unreachable(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkDown
            | io::ErrorKind::PermissionDenied
    )
}

/// The byte stream of a connection to a server, direct or through a proxy.
pub type Stream = client::TlsStream<Either<TcpStream, ProxiedStream>>;

/// A connection to a server whose TLS handshake is done.
#[derive(Debug)]
pub struct Connected {
    stream: Stream,
    address: SocketAddr,
}

impl Connected {
    /// The protocol that was agreed on (RFC 7301).
    pub fn protocol(&self) -> Option<&[u8]> {
        self.stream.get_ref().1.alpn_protocol()
    }

    /// Begins QMux on the connection.
    ///
    /// # Errors
    /// When the server does not begin within the idle time-out, or agreed on something else.
    pub async fn begin(self, settings: &Settings) -> Result<Connection, ConnectError> {
        if !is_tunnel(self.stream.get_ref().1) {
            return Err(ConnectError::Protocol);
        }
        let (stream, peer) = self.into_parts(Carrier::Tcp);
        establish(stream, Role::Client, peer, settings).await
    }

    /// The byte stream and its peer, for a caller that speaks another protocol on it. `carrier` is
    /// what the tunnel then reports as its carrier.
    pub fn into_parts(self, carrier: Carrier) -> (Stream, Peer) {
        let certificates = self.stream.get_ref().1.peer_certificates().map(<[_]>::to_vec);
        (self.stream, Peer { address: self.address, carrier, certificates })
    }
}

/// The agent at the other end of a connection whose TLS handshake is done; the connection is ready
/// then for the protocol that was agreed on. `carrier` is what the tunnel will report as its
/// carrier.
///
/// # Errors
/// When the agent has closed the connection, or has agreed on no tunnel where TCP is the carrier.
pub fn accepted(
    stream: &TlsStream<TcpStream>,
    carrier: Carrier,
    settings: &Settings,
) -> Result<Peer, ConnectError> {
    let (socket, session) = stream.get_ref();
    if carrier == Carrier::Tcp && !is_tunnel(session) {
        return Err(ConnectError::Protocol);
    }
    prepare(socket, settings);
    let address = socket.peer_addr().map_err(TransportFault::from)?;
    let certificates = session.peer_certificates().map(<[_]>::to_vec);
    Ok(Peer { address: canonical(address), carrier, certificates })
}

/// Whether a session is one for a tunnel: TLS 1.2 is for other protocols.
fn is_tunnel(session: &CommonState) -> bool {
    session.alpn_protocol() == Some(ALPN)
        && session.protocol_version() == Some(ProtocolVersion::TLSv1_3)
}

/// Sets up a tunnel's socket: small writes are sent at once, little waits in the kernel, and a peer
/// that is gone is noticed within the idle time-out.
fn prepare(socket: &TcpStream, settings: &Settings) {
    send_at_once(socket, MAX_UNSENT);
    let socket = SockRef::from(socket);
    let _ = socket.set_tcp_user_timeout(Some(settings.idle_timeout));
    let interval = settings.keep_alive_interval.unwrap_or(settings.idle_timeout / 3);
    let interval = interval.max(Duration::from_secs(1));
    let keep_alive = TcpKeepalive::new().with_time(interval).with_interval(interval);
    let _ = socket.set_tcp_keepalive(&keep_alive);
}
