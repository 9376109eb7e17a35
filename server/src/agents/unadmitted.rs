//! Peers between their accept and their admission.

mod allowance;
mod attempt;
mod recent;
mod source;
mod table;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use culvert_konnectivity::ALPN_H2;
use culvert_transport::{
    Carrier, ConnectError, Settings, TransportFault, Tunnel,
    qmux::{self, Peer, Role},
    quic, tcp,
};
use rustls::ServerConfig;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use self::table::Progress;
pub(crate) use self::table::UnadmittedTable;
pub(super) use self::{allowance::Limited, attempt::Attempt, source::Source};
use super::{
    AgentContext,
    first_bytes::FirstBytes,
    join::{self, JoinError},
    konnectivity, session,
};

/// Time from the accept to the admission: for the handshake, for the hello, and for the review of
/// the token, which has shorter limits of its own.
pub(super) const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// Time from the accept of a TCP connection to its first bytes. An agent sends its ClientHello at
/// once; one that is lost is repeated after 1 s.
pub(super) const FIRST_BYTES_TIMEOUT: Duration = Duration::from_secs(3);

/// A peer that was accepted and has proved nothing yet.
#[derive(Debug)]
pub(super) struct Unadmitted {
    connection: Connection,
    /// Address of the peer; over QUIC not proven before the handshake is complete.
    remote: SocketAddr,
    attempt: Attempt,
}

/// A connection before its handshake.
#[derive(Debug)]
enum Connection {
    Quic(Box<quic::Incoming>),
    Tcp { socket: TcpStream, tls: Arc<ServerConfig>, settings: Settings },
}

/// A connection after its handshake, by the protocol that was agreed on.
#[derive(Debug)]
enum Negotiated {
    Culvert(Tunnel),
    /// gRPC over HTTP/2.
    Konnectivity(Box<Limited<TlsStream<TcpStream>>>, Peer),
}

impl Unadmitted {
    /// Enters a peer that has just been accepted over QUIC into the table. Without room there the
    /// peer is not answered, and sends its first packet again.
    ///
    /// # Cancel safety
    /// Dropping the future drops the peer.
    pub(super) async fn over_quic(
        incoming: quic::Incoming,
        context: &AgentContext,
    ) -> Option<Self> {
        let remote = incoming.remote_address();
        let progress = match incoming.is_address_validated() {
            true => Progress::Heard,
            false => Progress::Silent,
        };
        let entered = context.unadmitted.enter(remote.ip(), Carrier::Quic, progress).await;
        let Ok(place) = entered else {
            join::record_failure(remote, &JoinError::NoRoom, context);
            incoming.ignore();
            return None;
        };
        let connection = Connection::Quic(Box::new(incoming));
        Some(Self { connection, remote, attempt: Attempt::new(place) })
    }

    /// Enters a peer that has just been accepted over TCP into the table. Without room there its
    /// connection is closed.
    ///
    /// # Cancel safety
    /// Dropping the future drops the peer.
    pub(super) async fn over_tcp(
        (socket, remote): (TcpStream, SocketAddr),
        tls: Arc<ServerConfig>,
        settings: Settings,
        context: &AgentContext,
    ) -> Option<Self> {
        let entered = context.unadmitted.enter(remote.ip(), Carrier::Tcp, Progress::Silent).await;
        let Ok(place) = entered else {
            join::record_failure(remote, &JoinError::NoRoom, context);
            return None;
        };
        let connection = Connection::Tcp { socket, tls, settings };
        Some(Self { connection, remote, attempt: Attempt::new(place) })
    }

    /// Serves the peer until its connection is closed.
    pub(super) async fn serve(self, context: Arc<AgentContext>) {
        let Self { connection, remote, attempt } = self;
        match attempt.within(connection.handshake(&attempt)).await {
            Ok(Negotiated::Culvert(tunnel)) => {
                attempt.set_progress(Progress::Connected);
                session::serve(tunnel, None, attempt, context).await;
            }
            Ok(Negotiated::Konnectivity(stream, peer)) => {
                attempt.set_progress(Progress::Connected);
                attempt.set_carrier(Carrier::Grpc);
                konnectivity::serve(*stream, peer, attempt, context).await;
            }
            Err(error) => join::record_failure(remote, &error, &context),
        }
    }
}

impl Connection {
    /// Completes the handshake: certificates are checked, the protocol is agreed on.
    async fn handshake(self, attempt: &Attempt) -> Result<Negotiated, JoinError> {
        match self {
            Self::Quic(incoming) => Ok(Negotiated::Culvert(incoming.complete().await?.into())),
            Self::Tcp { socket, tls, settings } => {
                match timeout(FIRST_BYTES_TIMEOUT, FirstBytes::of(&socket)).await {
                    Ok(FirstBytes::Unknown) => attempt.set_progress(Progress::Heard),
                    Ok(FirstBytes::Other(protocol)) => return Err(JoinError::NotTls(protocol)),
                    Ok(FirstBytes::Closed) => return Err(JoinError::Closed),
                    Err(_) => return Err(JoinError::Silent),
                }
                let accepted = TlsAcceptor::from(tls).accept(socket).await;
                let failed = |error| ConnectError::from(TransportFault::from(error));
                let stream = accepted.map_err(failed)?;
                begin(stream, &settings, attempt).await
            }
        }
    }
}

/// Begins the protocol that was agreed on. What the peer sends is limited from here on.
async fn begin(
    stream: TlsStream<TcpStream>,
    settings: &Settings,
    attempt: &Attempt,
) -> Result<Negotiated, JoinError> {
    let carrier = match stream.get_ref().1.alpn_protocol() {
        Some(ALPN_H2) => Carrier::Grpc,
        _ => Carrier::Tcp,
    };
    let peer = tcp::accepted(&stream, carrier, settings)?;
    let stream = attempt.limit(stream);
    if carrier == Carrier::Grpc {
        return Ok(Negotiated::Konnectivity(Box::new(stream), peer));
    }
    let connection = qmux::establish(stream, Role::Server, peer, settings).await?;
    Ok(Negotiated::Culvert(connection.into()))
}

#[cfg(test)]
mod tests {
    use culvert_transport::tls::KeyExchange;
    use rustls::server::ResolvesServerCertUsingSni;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        task::JoinSet,
        time::Instant,
    };

    use super::*;
    use crate::testing::{context, context_with_room_for, metric};

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

    const STRANGERS: &str = "culvert_server_unadmitted_connections";

    /// An accepted connection, with its client.
    async fn accepted() -> ((TcpStream, SocketAddr), TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (listener.accept().await.unwrap(), client)
    }

    fn failures(context: &AgentContext, reason: &str) -> f64 {
        let name = format!("{FAILURES}{{reason=\"{reason}\"}}");
        metric(&context.metrics, &context.backends, &name)
    }

    fn strangers(context: &AgentContext) -> f64 {
        let name = format!("{STRANGERS}{{transport=\"tcp\"}}");
        metric(&context.metrics, &context.backends, &name)
    }

    /// Serves a connection over TCP whose client sends these bytes. Returns how long that took, the
    /// server's failures under this reason, and the strangers before and after.
    async fn serve(bytes: &[u8], reason: &str) -> (Duration, f64, [f64; 2]) {
        let (accepted, mut client) = accepted().await;
        client.write_all(bytes).await.unwrap();
        let context = context();
        let peer = Unadmitted::over_tcp(accepted, tls(), Settings::default(), &context).await;
        let (arrived, before) = (Instant::now(), strangers(&context));
        peer.unwrap().serve(context.clone()).await;
        (arrived.elapsed(), failures(&context, reason), [before, strangers(&context)])
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_sends_nothing_is_dropped_after_three_seconds() {
        assert_eq!(serve(b"", "no_first_bytes").await, (FIRST_BYTES_TIMEOUT, 1.0, [1.0, 0.0]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_complete_its_handshake_is_dropped_at_the_deadline() {
        let begin_of_a_record = b"\x16\x03\x01\x02\x00\x01";
        assert_eq!(serve(begin_of_a_record, "timed_out").await, (JOIN_TIMEOUT, 1.0, [1.0, 0.0]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_gives_way_is_dropped_at_once() {
        const ROOM: usize = 4;
        let context = context_with_room_for(ROOM);
        let (mut serving, mut clients) = (JoinSet::new(), Vec::new());
        for _ in 0..=ROOM {
            let (accepted, client) = accepted().await;
            let peer = Unadmitted::over_tcp(accepted, tls(), Settings::default(), &context).await;
            serving.spawn(peer.unwrap().serve(context.clone()));
            clients.push(client);
        }
        let arrived = Instant::now();
        serving.join_next().await.unwrap().unwrap();
        assert_eq!(arrived.elapsed(), Duration::ZERO);
        assert_eq!((failures(&context, "evicted"), strangers(&context)), (1.0, ROOM as f64));
        assert_eq!(clients[0].read(&mut [0]).await.unwrap(), 0, "the oldest one");
        serving.join_next().await.unwrap().unwrap();
        assert_eq!(arrived.elapsed(), FIRST_BYTES_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_without_room_is_counted_and_its_connection_closed() {
        let context = context_with_room_for(1);
        let (first, _client) = accepted().await;
        let first = Unadmitted::over_tcp(first, tls(), Settings::default(), &context).await;
        let (second, mut client) = accepted().await;
        let second = Unadmitted::over_tcp(second, tls(), Settings::default(), &context).await;
        assert!(first.is_some() && second.is_none());
        assert_eq!(failures(&context, "no_room"), 1.0);
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_speaks_no_tls_is_dropped_at_once_and_counted_by_what_it_speaks() {
        let dropped = (Duration::ZERO, 1.0, [1.0, 0.0]);
        assert_eq!(serve(b"GET / HTTP/1.1\r\n\r\n", "not_tls").await, dropped);
        assert_eq!(serve(b"SSH-2.0-OpenSSH\r\n", "handshake").await, dropped);
    }

    #[tokio::test(start_paused = true)]
    async fn the_check_of_a_load_balancer_is_no_failed_handshake() {
        let (accepted, client) = accepted().await;
        drop(client);
        let context = context();
        let peer = Unadmitted::over_tcp(accepted, tls(), Settings::default(), &context).await;
        peer.unwrap().serve(context.clone()).await;
        assert_eq!((failures(&context, "closed"), failures(&context, "handshake")), (1.0, 0.0));
        assert_eq!(strangers(&context), 0.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_leaves_within_its_handshake_is_no_failed_handshake() {
        for is_reset in [false, true] {
            let (accepted, mut client) = accepted().await;
            let begin_of_a_record = b"\x16\x03\x01\x02\x00\x01";
            client.write_all(begin_of_a_record).await.unwrap();
            let context = context();
            let peer = Unadmitted::over_tcp(accepted, tls(), Settings::default(), &context).await;
            if is_reset {
                client.set_zero_linger().unwrap();
            }
            let leaving = async {
                // Once its first bytes were looked at.
                tokio::task::yield_now().await;
                drop(client);
            };
            tokio::join!(peer.unwrap().serve(context.clone()), leaving);
            assert_eq!((failures(&context, "lost"), failures(&context, "handshake")), (1.0, 0.0));
        }
    }
}
