//! The carrier QUIC, by quinn.
//!
//! This module makes connections, from either end; `settings` configures quinn for them,
//! `connection` is an established one, and `udp` has the sockets that their packets pass.

mod close_reason;
mod connection;
pub(crate) mod icmp;
mod inspection;
mod receive_window;
mod repair;
mod reset_key;
mod rounds;
mod settings;
pub(crate) mod udp;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use culvert_wire::code::CloseCode;
use nix::errno::Errno;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};

pub use self::connection::Connection;
pub use self::reset_key::ResetKey;
use self::{
    close_reason::lost,
    icmp::{IcmpRouter, Unreachable},
    inspection::Inspected,
    reset_key::ListenerKey,
    udp::{BindError, Bound, BufferSizes, UdpHealth, Watching, WhenBroken},
};
pub(crate) use self::{
    connection::{RecvStream, SendStream},
    receive_window::Widened,
};
use super::{ConnectError, Settings, TransportFault, canonical};
use crate::tls::Current;

/// Maximum number of handshakes that wait to be accepted; quinn refuses further ones.
const MAX_QUEUED: usize = 1024;
/// Bytes that may wait for one handshake that has not been accepted yet.
const INCOMING_BUFFER: u64 = 64 * 1024;
/// Bytes that may wait for all handshakes that have not been accepted yet.
const INCOMING_BUFFER_TOTAL: u64 = 16 * 1024 * 1024;

/// The packets of a peer that a script stands for, for the fuzzer.
#[cfg(fuzzing)]
pub fn fuzz_packets(script: &[u8]) {
    repair::exercise(script);
}

/// Accepts connections on a UDP port.
///
/// Dropping it closes every connection that it accepted with [`CloseCode::ABANDONED`].
#[derive(Debug)]
pub struct Listener {
    endpoint: quinn::Endpoint,
    config: quinn::ServerConfig,
    settings: Settings,
    icmp_router: Arc<IcmpRouter>,
    buffer_sizes: BufferSizes,
    health: Arc<UdpHealth>,
}

impl Listener {
    /// Binds the UDP port and starts to answer on it.
    ///
    /// An unspecified IPv6 address takes IPv4 as well. The reset key is used as the one of the bound
    /// address; without one a random one is used. One that is replaced holds for the connection ids
    /// that are given later.
    ///
    /// # Errors
    /// When the port cannot be bound or the TLS configuration has no cipher suite for QUIC.
    pub fn bind(
        address: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        settings: &Settings,
        reset_key: Option<Current<ResetKey>>,
    ) -> Result<Self, ConnectError> {
        let health = Arc::new(UdpHealth::default());
        let bound = udp::bind(address, settings, &health, WhenBroken::Stay)?;
        let config = server_config(tls, settings)?;
        let bind_error = |error| BindError::new(address, error);
        let local_address = bound.socket.local_addr().map_err(bind_error)?;
        let reset_key = reset_key.map(|key| ListenerKey::new(key, local_address));
        let endpoint = rounds::endpoint(
            settings.endpoint(reset_key),
            Some(config.clone()),
            bound.socket,
            bound.rounds,
        )
        .map_err(bind_error)?;
        let icmp_router = Arc::new(IcmpRouter::default());
        icmp_router.listen(bound.errors);
        Ok(Self {
            endpoint,
            config,
            settings: *settings,
            icmp_router,
            buffer_sizes: bound.buffer_sizes,
            health,
        })
    }

    /// The address that was bound.
    ///
    /// # Errors
    /// When the kernel does not report it.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The buffers that the kernel granted to the socket.
    pub fn buffer_sizes(&self) -> BufferSizes {
        self.buffer_sizes
    }

    /// What the socket has found out about the kernel and about paths.
    pub fn udp_health(&self) -> &Arc<UdpHealth> {
        &self.health
    }

    /// The next handshake of an agent; `None` once the listener is closed.
    ///
    /// It returns before any cryptography is done: spawn, then [`Incoming::complete`]. The caller
    /// bounds the number of handshakes that are under way.
    ///
    /// # Cancel safety
    /// Cancel safe: no handshake is lost.
    pub async fn accept(&self) -> Option<Incoming> {
        Some(Incoming {
            incoming: self.endpoint.accept().await?,
            config: self.config.clone(),
            settings: self.settings,
            health: self.health.clone(),
            icmp_router: self.icmp_router.clone(),
            endpoint: self.endpoint.clone(),
        })
    }

    /// Refuses further handshakes; live connections go on.
    pub fn refuse_new(&self) {
        self.endpoint.set_server_config(None);
    }

    /// Closes every connection and waits until the peers were sent the close, at most `limit`.
    ///
    /// # Cancel safety
    /// Cancel safe: the connections are closed when the future is first polled.
    pub async fn close(&self, code: CloseCode, reason: &str, limit: Duration) {
        self.endpoint.close(code.as_u32().into(), reason.as_bytes());
        let _ = tokio::time::timeout(limit, self.endpoint.wait_idle()).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.endpoint.close(CloseCode::ABANDONED.as_u32().into(), b"");
    }
}

/// The begin of an agent's handshake. Dropping it refuses the agent.
#[derive(Debug)]
pub struct Incoming {
    incoming: quinn::Incoming,
    config: quinn::ServerConfig,
    settings: Settings,
    health: Arc<UdpHealth>,
    icmp_router: Arc<IcmpRouter>,
    endpoint: quinn::Endpoint,
}

impl Incoming {
    /// The address that it comes from; not proven before the handshake is complete, or
    /// [validated](Self::is_address_validated) before.
    pub fn remote_address(&self) -> SocketAddr {
        canonical(self.incoming.remote_address())
    }

    /// Whether the client has proved that it receives at its address.
    pub fn is_address_validated(&self) -> bool {
        self.incoming.remote_address_validated()
    }

    /// Whether the client can be asked to prove its address: only once.
    pub fn may_retry(&self) -> bool {
        self.incoming.may_retry()
    }

    /// Has the client prove that it receives at its address, by a handshake of its own (RFC 9000
    /// §8.1.2). Nothing is kept until then.
    pub fn retry(self) {
        // It only fails for a client that may not be asked, which is refused then.
        let _ = self.incoming.retry();
    }

    /// Does not answer. The client sends its first packet again, until it gives up.
    pub fn ignore(self) {
        self.incoming.ignore();
    }

    /// Does the handshake: certificates are checked, the protocol is agreed on.
    ///
    /// # Errors
    /// When the peer goes away, is refused, or speaks another protocol.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future ends the handshake.
    pub async fn complete(self) -> Result<Connection, ConnectError> {
        let mut config = self.config;
        // For one path, whose first link is known by now.
        let remote = canonical(self.incoming.remote_address());
        config.transport_config(Arc::new(path_config(&self.settings, remote, &self.health)));
        let handshake = async { self.incoming.accept_with(Arc::new(config))?.await };
        let connection = handshake.await.map_err(|error| ConnectError::Handshake(lost(error)))?;
        let window = self.settings.tunnel_receive_window;
        Connection::established(connection, self.endpoint, self.icmp_router, window)
            .ok_or(ConnectError::Protocol)
    }
}

/// Connects to a server, on a UDP socket of its own.
///
/// A shared socket would reach the same replica behind a load balancer every time. What the socket
/// finds out goes to `udp_health`, which is meant for all sockets of a process.
///
/// # Errors
/// When the socket cannot be opened, no process listens at the address, no packet gets there, or the
/// handshake fails; it gives up after the idle time-out.
///
/// # Cancel safety
/// Cancel safe: dropping the future ends the handshake.
pub async fn connect(
    remote: SocketAddr,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
    udp_health: &Arc<UdpHealth>,
) -> Result<(Connection, BufferSizes), ConnectError> {
    let any = match remote.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let local = SocketAddr::new(any, 0);
    let bound = udp::bind(local, settings, udp_health, WhenBroken::End)?;
    let (socket, rounds) = (bound.socket.clone(), bound.rounds.clone());
    let endpoint = rounds::endpoint(settings.endpoint(None), None, socket, rounds)
        .map_err(|error| BindError::new(local, error))?;
    let icmp_router = Arc::new(IcmpRouter::default());

    let mut client = quinn::ClientConfig::new(client_crypto(tls, settings)?);
    client.transport_config(Arc::new(path_config(settings, remote, udp_health)));
    let connecting = endpoint.connect_with(client, remote, server_name).map_err(not_begun)?;
    let connection = tokio::select! {
        connected = connecting => connected.map_err(|error| ConnectError::Handshake(lost(error)))?,
        error = undeliverable(&bound) => return Err(error),
    };
    icmp_router.listen(bound.errors);
    let window = settings.tunnel_receive_window;
    let connection = Connection::established(connection, endpoint, icmp_router, window)
        .ok_or(ConnectError::Protocol)?;
    Ok((connection, bound.buffer_sizes))
}

/// The connection that was established on an endpoint of any network, with the settings of
/// [`Settings::transport`].
///
/// # Errors
/// When its peer did not agree on the protocol; it is closed then.
#[cfg(feature = "test-util")]
pub(crate) fn adopt(
    connection: quinn::Connection,
    endpoint: quinn::Endpoint,
) -> Result<Connection, ConnectError> {
    Connection::established(connection, endpoint, Arc::default(), None)
        .ok_or(ConnectError::Protocol)
}

/// TLS of a server whose connections are inspected, for an endpoint of any network.
///
/// # Errors
/// When the TLS configuration has no cipher suite for QUIC.
pub(crate) fn server_crypto(
    tls: Arc<rustls::ServerConfig>,
    settings: &Settings,
) -> Result<Arc<dyn quinn::crypto::ServerConfig>, ConnectError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|_| ConnectError::CipherSuites)?;
    Ok(Arc::new(Inspected::new(crypto, settings)))
}

/// TLS of a client whose connections are inspected, for an endpoint of any network.
///
/// # Errors
/// When the TLS configuration has no cipher suite for QUIC.
pub(crate) fn client_crypto(
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<Arc<dyn quinn::crypto::ClientConfig>, ConnectError> {
    let crypto = QuicClientConfig::try_from(tls).map_err(|_| ConnectError::CipherSuites)?;
    Ok(Arc::new(Inspected::new(crypto, settings)))
}

/// The configuration for the path to `remote`, whose batches are watched.
fn path_config(
    settings: &Settings,
    remote: SocketAddr,
    health: &Arc<UdpHealth>,
) -> quinn::TransportConfig {
    let mut config = settings.transport(udp::link_payload(remote));
    if settings.gso {
        let (inner, peer) = (settings.congestion.factory(), remote.ip());
        let watching = Watching { inner, peer, health: health.clone() };
        config.congestion_controller_factory(Arc::new(watching));
    }
    config
}

/// Completes when a packet of the handshake cannot be delivered. The socket has one peer, so every
/// error is the server's.
async fn undeliverable(bound: &Bound) -> ConnectError {
    let reported = async {
        match &bound.errors {
            Some(errors) => errors.next().await,
            None => None,
        }
    };
    let report = async {
        match reported.await {
            Some((_, Unreachable::Port)) => ConnectError::Refused,
            Some((_, Unreachable::Host)) => {
                ConnectError::Unreachable(io::Error::from(Errno::EHOSTUNREACH).into())
            }
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        error = report => error,
        error = bound.unsendable.error() => ConnectError::Unreachable(error.into()),
    }
}

/// Why quinn did not begin a handshake.
fn not_begun(error: quinn::ConnectError) -> ConnectError {
    match error {
        quinn::ConnectError::InvalidServerName(name) => ConnectError::ServerName(name),
        quinn::ConnectError::InvalidRemoteAddress(address) => ConnectError::Address(address),
        // The endpoint is new, has a configuration, and speaks the version of its configuration.
        quinn::ConnectError::EndpointStopping
        | quinn::ConnectError::NoDefaultClientConfig
        | quinn::ConnectError::UnsupportedVersion
        | quinn::ConnectError::CidsExhausted => TransportFault::Exhausted.into(),
    }
}

fn server_config(
    tls: Arc<rustls::ServerConfig>,
    settings: &Settings,
) -> Result<quinn::ServerConfig, ConnectError> {
    let mut server = quinn::ServerConfig::with_crypto(server_crypto(tls, settings)?);
    server
        .max_incoming(MAX_QUEUED)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL);
    Ok(server)
}
