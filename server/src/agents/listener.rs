//! Where agents come in: one port number, over UDP and over TCP.

use std::{fs, io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use culvert_konnectivity::ALPN_H2;
use culvert_process::{listen, logging::RateLimited};
use culvert_transport::{
    ConnectError, Settings, TransportFault, Tunnel,
    quic::{self, ResetKey},
    tcp,
    tls::{self, Identity, TlsError},
};
use culvert_wire::CloseCode;
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    select,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::warn;

use crate::config::Config;

/// TCP handshakes in progress above which further connections are dropped, as with QUIC.
const MAX_HANDSHAKES: usize = 1024;
/// Wait after a failed accept: it fails for want of file descriptors, which takes a moment.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Attempts to find a number that is free for UDP and TCP, where any will do.
const MAX_ATTEMPTS: usize = 16;

/// Agents cannot be let in.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The tunnel port cannot be listened on.
    #[error("--agent-port: {0}")]
    Tunnel(#[from] ConnectError),
    /// The tunnel port cannot be listened on over TCP.
    #[error("--agent-port: cannot listen on {address} over TCP: {source}")]
    TunnelTcp {
        /// What was to be bound.
        address: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Certificate, key or CA of the tunnel port cannot be used.
    #[error("--cluster-cert, --cluster-key, --cluster-ca-cert: {0}")]
    Tls(#[from] TlsError),
    /// The secret of stateless resets cannot be read.
    #[error("--reset-key-file: cannot read {path}: {source}")]
    ResetKey {
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The kernel does not tell what was bound.
    #[error(transparent)]
    Address(#[from] io::Error),
}

/// Both listeners of the tunnel port.
#[derive(Debug)]
pub struct AgentListener {
    quic: quic::Listener,
    tcp: TcpListener,
    /// How handshakes over TCP are done, where Konnectivity agents come too.
    tls: Arc<ServerConfig>,
    settings: Settings,
    handshakes: Arc<Semaphore>,
}

/// Who came in, by the protocol that was agreed on.
#[derive(Debug)]
pub enum Arrival {
    /// An agent of ours.
    Tunnel(Tunnel),
    /// A Konnectivity agent, which speaks gRPC.
    Konnectivity(Box<TlsStream<TcpStream>>),
}

/// An agent's wish for a tunnel, before its handshake.
#[derive(Debug)]
pub enum Incoming {
    /// Over QUIC.
    Quic(Box<quic::Incoming>),
    /// Over TCP.
    Tcp {
        /// The connection.
        socket: TcpStream,
        /// Where it comes from.
        remote: SocketAddr,
        /// How its handshake is done.
        tls: Arc<ServerConfig>,
        /// What its tunnel is set up with.
        settings: Settings,
        /// One handshake in progress.
        place: OwnedSemaphorePermit,
    },
}

impl Incoming {
    /// Where the wish comes from; over QUIC not proven before the handshake is complete.
    pub fn remote_address(&self) -> SocketAddr {
        match self {
            Self::Quic(incoming) => incoming.remote_address(),
            Self::Tcp { remote, .. } => *remote,
        }
    }

    /// Does the handshake: certificates are checked, the protocol is agreed on.
    ///
    /// # Errors
    /// When the peer goes away, is refused, or speaks another protocol.
    pub async fn complete(self) -> Result<Arrival, ConnectError> {
        match self {
            Self::Quic(incoming) => Ok(Arrival::Tunnel(incoming.complete().await?.into())),
            Self::Tcp { socket, tls, settings, place, .. } => {
                let accepted = TlsAcceptor::from(tls).accept(socket).await;
                let stream = accepted.map_err(TransportFault::from)?;
                drop(place);
                if stream.get_ref().1.alpn_protocol() == Some(ALPN_H2) {
                    tcp::prepare(stream.get_ref().0, &settings);
                    return Ok(Arrival::Konnectivity(Box::new(stream)));
                }
                Ok(Arrival::Tunnel(tcp::accept(stream, &settings).await?.into()))
            }
        }
    }
}

impl AgentListener {
    /// Binds the port, with the certificates and the secret that the configuration names.
    ///
    /// # Errors
    /// When a file cannot be used or the port cannot be had, for UDP or for TCP.
    pub fn bind(config: &Config) -> Result<Self, ListenerError> {
        let agents = &config.agents;
        let identity =
            Identity::from_pem_files(&agents.certificate.certificate, &agents.certificate.key)?;
        // By default a restart keeps the secret for as long as it keeps the private key.
        let reset_key = match &agents.reset_key_file {
            Some(path) => {
                let secret = fs::read(path)
                    .map_err(|source| ListenerError::ResetKey { path: path.clone(), source })?;
                ResetKey::derive(&secret)
            }
            None => ResetKey::derive(identity.key.secret_der()),
        };
        let client_ca = match &agents.client_ca {
            Some(path) => Some(tls::authorities(&tls::certificates(path)?)?),
            None => None,
        };
        let tls = tls::tunnel_server(identity, client_ca, config.tunnel.key_exchange)?;
        let tls = Arc::new(tls);
        // Agents open the control stream and nothing else.
        let settings = config.tunnel.settings(1);
        let (quic, tcp) = bind_both(agents.address, &tls, &settings, &reset_key)?;
        let mut tls = (*tls).clone();
        tls.alpn_protocols.push(ALPN_H2.to_vec());
        let tls = Arc::new(tls);
        let sizes = quic.buffer_sizes();
        if sizes.is_small() {
            warn!(
                receive = sizes.receive,
                send = sizes.send,
                "UDP buffers are small; raise net.core.rmem_max and net.core.wmem_max to 8 MiB",
            );
        }
        let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
        Ok(Self { quic, tcp, tls, settings, handshakes })
    }

    /// What its tunnels are set up with.
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// The listener over UDP.
    pub fn quic(&self) -> &quic::Listener {
        &self.quic
    }

    /// The next agent that wants a tunnel, over whichever carrier; `None` once the port is closed.
    pub async fn accept(&self) -> Option<Incoming> {
        static ACCEPT_FAILED: RateLimited = RateLimited::new(Duration::from_secs(10));
        loop {
            let accepted = select! {
                incoming = self.quic.accept() => return incoming.map(Box::new).map(Incoming::Quic),
                accepted = self.tcp.accept() => accepted,
            };
            match accepted {
                Ok((socket, remote)) => {
                    // Without a place the connection is dropped, and the agent tries again.
                    let Ok(place) = self.handshakes.clone().try_acquire_owned() else { continue };
                    let (tls, settings) = (self.tls.clone(), self.settings);
                    return Some(Incoming::Tcp { socket, remote, tls, settings, place });
                }
                Err(error) => {
                    if let Some(suppressed) = ACCEPT_FAILED.admit(std::time::Instant::now()) {
                        warn!(%error, suppressed, "an agent's connection was not accepted");
                    }
                    sleep(ACCEPT_RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Closes every QUIC tunnel and waits until the peers have been told, at most `limit`.
    pub async fn close(&self, code: CloseCode, reason: &str, limit: Duration) {
        self.quic.close(code, reason, limit).await;
    }
}

/// One number for both; where any will do, one that is free for both.
fn bind_both(
    address: SocketAddr,
    tls: &Arc<ServerConfig>,
    settings: &Settings,
    reset_key: &ResetKey,
) -> Result<(quic::Listener, TcpListener), ListenerError> {
    let mut attempts = if address.port() == 0 { MAX_ATTEMPTS } else { 1 };
    loop {
        attempts -= 1;
        let quic = quic::Listener::bind(address, tls.clone(), settings, Some(reset_key))?;
        let bound = SocketAddr::new(address.ip(), quic.local_addr()?.port());
        match listen::tcp(bound) {
            Ok(tcp) => return Ok((quic, tcp)),
            Err(source) if attempts == 0 => {
                return Err(ListenerError::TunnelTcp { address: bound, source });
            }
            Err(_) => {}
        }
    }
}
