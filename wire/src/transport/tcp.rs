//! QMux over TLS over TCP: how a tunnel goes where UDP does not.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rustls::pki_types::ServerName;
use socket2::{SockRef, TcpKeepalive};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsConnector, client, server::TlsStream};

use super::{
    Tunnel, TunnelLost, canonical,
    qmux::{Peer, Role, establish},
    quic::{ConnectError, Settings},
};
use crate::version::ALPN;

/// What such tunnels are called.
const TRANSPORT: &str = "tcp";
/// Bytes that TCP takes beyond what the path lets out: what waits in the kernel cannot be overtaken.
const MAX_UNSENT: u32 = 64 * 1024;

/// Makes a tunnel to a server.
///
/// # Errors
/// When the server cannot be reached, is not who it should be, or does not agree on the protocol;
/// it gives up after the idle time-out.
pub async fn connect(
    remote: SocketAddr,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<Tunnel, ConnectError> {
    begin(handshake(remote, server_name, tls, settings).await?, remote, settings).await
}

/// Connects to a server and does the TLS handshake; what is spoken then is what both agreed on.
///
/// # Errors
/// When the server cannot be reached or is not who it should be; it gives up after the idle time-out.
///
/// # Cancel safety
/// Dropping the future gives up what was begun.
pub async fn handshake(
    remote: SocketAddr,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<client::TlsStream<TcpStream>, ConnectError> {
    let name = ServerName::try_from(server_name.to_owned())
        .map_err(|error| ConnectError::Address(error.to_string()))?;
    let io_error = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => ConnectError::Refused,
        _ => ConnectError::Handshake(TunnelLost::Transport(error.to_string())),
    };
    let handshake = async {
        let socket = TcpStream::connect(remote).await.map_err(io_error)?;
        prepare(&socket, settings);
        TlsConnector::from(tls).connect(name, socket).await.map_err(io_error)
    };
    timeout(settings.idle_timeout, handshake)
        .await
        .unwrap_or(Err(ConnectError::Handshake(TunnelLost::TimedOut)))
}

/// Makes a tunnel of a connection to a server whose TLS handshake is done, and agreed on the protocol.
///
/// # Errors
/// When the server does not begin within the idle time-out, or agreed on something else.
pub async fn begin(
    stream: client::TlsStream<TcpStream>,
    remote: SocketAddr,
    settings: &Settings,
) -> Result<Tunnel, ConnectError> {
    let session = stream.get_ref().1;
    if session.alpn_protocol() != Some(ALPN) {
        return Err(ConnectError::Protocol);
    }
    let certificates = session.peer_certificates().map(<[_]>::to_vec);
    let peer = Peer { address: remote, transport: TRANSPORT, certificates };
    establish(stream, Role::Client, peer, settings).await
}

/// Makes a tunnel of an agent's connection whose TLS handshake is done, and agreed on the protocol.
///
/// # Errors
/// When the agent does not begin within the idle time-out, or agreed on something else.
pub async fn accept(
    stream: TlsStream<TcpStream>,
    settings: &Settings,
) -> Result<Tunnel, ConnectError> {
    let (socket, session) = stream.get_ref();
    if session.alpn_protocol() != Some(ALPN) {
        return Err(ConnectError::Protocol);
    }
    prepare(socket, settings);
    let address = socket.peer_addr().map_err(|error| ConnectError::Address(error.to_string()))?;
    let certificates = session.peer_certificates().map(<[_]>::to_vec);
    let peer = Peer { address: canonical(address), transport: TRANSPORT, certificates };
    establish(stream, Role::Server, peer, settings).await
}

/// Sets up the socket: small writes go at once, little waits in the kernel, and a peer that is gone
/// shows within the idle time-out.
pub fn prepare(socket: &TcpStream, settings: &Settings) {
    // A socket that is gone already shows it at the first read.
    let _ = socket.set_nodelay(true);
    let socket = SockRef::from(socket);
    let _ = socket.set_tcp_notsent_lowat(MAX_UNSENT);
    let _ = socket.set_tcp_user_timeout(Some(settings.idle_timeout));
    let interval = settings.keep_alive_interval.unwrap_or(settings.idle_timeout / 3);
    let interval = interval.max(Duration::from_secs(1));
    let keep_alive = TcpKeepalive::new().with_time(interval).with_interval(interval);
    let _ = socket.set_tcp_keepalive(&keep_alive);
}
