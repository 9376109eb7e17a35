//! Peers between their accept and their admission.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use culvert_konnectivity::ALPN_H2;
use culvert_transport::{ConnectError, Settings, TransportFault, Tunnel, quic, tcp};
use rustls::ServerConfig;
use tokio::{
    net::TcpStream,
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout_at},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{
    AgentContext,
    first_bytes::FirstBytes,
    join::{self, JoinError},
    konnectivity, session,
};

/// Time from the accept to the admission: for the handshake, for the hello, and for the review of
/// the token, which has shorter limits of its own.
pub(super) const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// A peer that was accepted and has proved nothing yet.
#[derive(Debug)]
pub(super) struct Unadmitted {
    connection: Connection,
    /// Address of the peer; over QUIC not proven before the handshake is complete.
    remote: SocketAddr,
    /// When the peer is dropped unless it is admitted.
    deadline: Instant,
}

/// A connection before its handshake.
#[derive(Debug)]
enum Connection {
    Quic(Box<quic::Incoming>),
    Tcp {
        socket: TcpStream,
        tls: Arc<ServerConfig>,
        settings: Settings,
        /// Permit for one handshake in progress.
        permit: OwnedSemaphorePermit,
    },
}

/// A connection after its handshake, by the protocol that was agreed on.
#[derive(Debug)]
enum Negotiated {
    Culvert(Tunnel),
    /// gRPC over HTTP/2.
    Konnectivity(Box<TlsStream<TcpStream>>),
}

impl Unadmitted {
    /// A peer that has just been accepted over QUIC.
    pub(super) fn over_quic(incoming: quic::Incoming) -> Self {
        let remote = incoming.remote_address();
        Self::new(Connection::Quic(Box::new(incoming)), remote)
    }

    /// A peer that has just been accepted over TCP. `permit` is given back after the handshake.
    pub(super) fn over_tcp(
        (socket, remote): (TcpStream, SocketAddr),
        tls: Arc<ServerConfig>,
        settings: Settings,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self::new(Connection::Tcp { socket, tls, settings, permit }, remote)
    }

    fn new(connection: Connection, remote: SocketAddr) -> Self {
        Self { connection, remote, deadline: Instant::now() + JOIN_TIMEOUT }
    }

    /// Serves the peer until its connection is closed.
    pub(super) async fn serve(self, context: Arc<AgentContext>) {
        let Self { connection, remote, deadline } = self;
        let handshake = timeout_at(deadline, connection.handshake());
        match handshake.await {
            Ok(Ok(Negotiated::Culvert(tunnel))) => {
                session::serve(tunnel, None, deadline, context).await;
            }
            Ok(Ok(Negotiated::Konnectivity(stream))) => {
                konnectivity::serve(*stream, remote, deadline, context).await;
            }
            Ok(Err(error)) => join::record_failure(remote, &error, &context),
            Err(_) => join::record_failure(remote, &JoinError::TimedOut, &context),
        }
    }
}

impl Connection {
    /// Completes the handshake: certificates are checked, the protocol is agreed on.
    async fn handshake(self) -> Result<Negotiated, JoinError> {
        match self {
            Self::Quic(incoming) => Ok(Negotiated::Culvert(incoming.complete().await?.into())),
            Self::Tcp { socket, tls, settings, permit } => {
                match FirstBytes::of(&socket).await {
                    FirstBytes::Unknown => {}
                    FirstBytes::Other(protocol) => return Err(JoinError::NotTls(protocol)),
                    FirstBytes::Closed => return Err(JoinError::Closed),
                }
                let accepted = TlsAcceptor::from(tls).accept(socket).await;
                let failed = |error| ConnectError::from(TransportFault::from(error));
                let stream = accepted.map_err(failed)?;
                drop(permit);
                if stream.get_ref().1.alpn_protocol() == Some(ALPN_H2) {
                    tcp::prepare(stream.get_ref().0, &settings);
                    return Ok(Negotiated::Konnectivity(Box::new(stream)));
                }
                Ok(Negotiated::Culvert(tcp::accept(stream, &settings).await?.into()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use culvert_transport::tls::KeyExchange;
    use rustls::server::ResolvesServerCertUsingSni;
    use tokio::{io::AsyncWriteExt, net::TcpListener, sync::Semaphore};

    use super::*;
    use crate::testing::{context, metric};

    const FAILURES: &str = "culvert_server_join_failures_total";

    /// A server's configuration of TLS that has no certificate, for handshakes that end before.
    fn tls() -> Arc<ServerConfig> {
        let config = ServerConfig::builder_with_provider(KeyExchange::Classic.provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(ResolvesServerCertUsingSni::new()));
        Arc::new(config)
    }

    /// Serves a connection over TCP whose client sends these bytes. Returns how long that took, the
    /// server's failures under this reason, and the permits that are left of one.
    async fn serve(bytes: &[u8], reason: &str) -> (Duration, f64, usize) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        client.write_all(bytes).await.unwrap();
        let accepted = listener.accept().await.unwrap();
        let (context, handshakes) = (context(), Arc::new(Semaphore::new(1)));
        let permit = handshakes.clone().try_acquire_owned().unwrap();
        let peer = Unadmitted::over_tcp(accepted, tls(), Settings::default(), permit);
        let arrived = Instant::now();
        peer.serve(context.clone()).await;
        let name = format!("{FAILURES}{{reason=\"{reason}\"}}");
        let failures = metric(&context.metrics, &context.backends, &name);
        (arrived.elapsed(), failures, handshakes.available_permits())
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_begin_its_handshake_is_dropped_at_the_deadline() {
        assert_eq!(serve(b"", "timed_out").await, (JOIN_TIMEOUT, 1.0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_speaks_no_tls_is_dropped_at_once_and_counted_by_what_it_speaks() {
        assert_eq!(serve(b"GET / HTTP/1.1\r\n\r\n", "not_tls").await, (Duration::ZERO, 1.0, 1));
        assert_eq!(serve(b"SSH-2.0-OpenSSH\r\n", "handshake").await, (Duration::ZERO, 1.0, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_check_of_a_load_balancer_is_no_failed_handshake() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let accepted = listener.accept().await.unwrap();
        drop(client);
        let (context, handshakes) = (context(), Arc::new(Semaphore::new(1)));
        let permit = handshakes.clone().try_acquire_owned().unwrap();
        let peer = Unadmitted::over_tcp(accepted, tls(), Settings::default(), permit);
        peer.serve(context.clone()).await;
        let count = |reason: &str| {
            let name = format!("{FAILURES}{{reason=\"{reason}\"}}");
            metric(&context.metrics, &context.backends, &name)
        };
        assert_eq!((count("closed"), count("handshake")), (1.0, 0.0));
        assert_eq!(handshakes.available_permits(), 1);
    }
}
