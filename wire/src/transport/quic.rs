//! The carrier that QUIC is: the one file that names quinn.
//!
//! Settings are those that a tunnel of many small and a few huge streams needs; each says why.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use quinn::{
    EndpointConfig, TokioRuntime, TransportConfig, VarInt,
    congestion::CubicConfig,
    crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
};
use rustls_pki_types::CertificateDer;
use tokio::sync::Notify;

use super::{
    ReadError, RecvHalf, SendHalf, Tunnel, TunnelLost, TunnelStats, WriteError,
    udp::{self, BindError, BufferSizes},
};
use crate::{
    code::{CloseCode, StreamCode},
    version::ALPN,
};

/// Handshakes in progress above which a client must first prove its address (RFC 9000 §8.1.2).
const RETRY_ABOVE: usize = 128;
/// Handshakes in progress above which further ones are dropped unanswered.
const IGNORE_ABOVE: usize = 1024;
/// Bytes that may wait for one handshake that has not been accepted yet.
const INCOMING_BUFFER: u64 = 64 * 1024;
/// Bytes that may wait for all handshakes that have not been accepted yet.
const INCOMING_BUFFER_TOTAL: u64 = 16 * 1024 * 1024;
/// Unacknowledged and queued bytes per tunnel: four times the bandwidth-delay product of a
/// 100 Mbit/s, 80 ms path.
const SEND_WINDOW: u64 = 4 * 1024 * 1024;
/// First guess of the round-trip time. It sets when a lost first packet is sent again (three times
/// this); the RFC's 333 ms would make that a second.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Congestion window at start: 32 packets, so that a dial and its first answer fit without waiting.
const INITIAL_WINDOW: u64 = 32 * 1200;

/// What both ends of a QUIC tunnel are configured with.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The tunnel is lost after this long without a packet; the smaller one of both peers' counts.
    pub idle_timeout: Duration,
    /// A packet is sent after this long without one, so that NAT mappings live and a dead path
    /// shows; `None` leaves it to the peer. At most a third of the idle time-out.
    pub keep_alive_interval: Option<Duration>,
    /// Bytes per stream that the peer may send ahead of the reader: a stalled stream costs at most
    /// this much memory, and one stream's rate is at most this per round trip.
    pub stream_receive_window: u32,
    /// Streams the peer may have open at once. Slots are allocated ahead, about 1 KiB each; raise
    /// the number on a live tunnel with [`Tunnel::set_max_streams`].
    pub max_streams: u32,
    /// Largest UDP payload that path MTU discovery tries, from 1200 to 65527 bytes.
    pub mtu_cap: u16,
    /// Kernel buffer asked for in each direction of the UDP socket, in bytes.
    pub udp_buffer_size: usize,
}

impl Default for Settings {
    /// Fit for a WAN path of up to 100 Mbit/s and 150 ms.
    fn default() -> Self {
        Self {
            idle_timeout: Duration::from_secs(25),
            keep_alive_interval: Some(Duration::from_secs(5)),
            stream_receive_window: 2 * 1024 * 1024,
            max_streams: 256,
            mtu_cap: 1452,
            udp_buffer_size: 8 * 1024 * 1024,
        }
    }
}

impl Settings {
    fn transport(&self) -> TransportConfig {
        let mut congestion = CubicConfig::default();
        congestion.initial_window(INITIAL_WINDOW);
        let mut mtu_discovery = quinn::MtuDiscoveryConfig::default();
        mtu_discovery.upper_bound(self.mtu_cap);

        let mut transport = TransportConfig::default();
        transport
            // Beyond what a VarInt of milliseconds holds is "never".
            .max_idle_timeout(quinn::IdleTimeout::try_from(self.idle_timeout).ok())
            .keep_alive_interval(self.keep_alive_interval)
            .max_concurrent_bidi_streams(VarInt::from_u32(self.max_streams))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .stream_receive_window(VarInt::from_u32(self.stream_receive_window))
            // A finite one would let a few stalled streams freeze the tunnel; memory is bounded by
            // streams times stream window instead.
            .receive_window(VarInt::MAX)
            .send_window(SEND_WINDOW)
            .initial_rtt(INITIAL_RTT)
            .congestion_controller_factory(Arc::new(congestion))
            .mtu_discovery_config(Some(mtu_discovery))
            // Datagrams are not part of the protocol.
            .datagram_receive_buffer_size(None);
        transport
    }

    fn endpoint(&self, reset_key: Option<&ResetKey>) -> EndpointConfig {
        let mut endpoint =
            reset_key.map(|key| EndpointConfig::new(Arc::new(key.hmac()))).unwrap_or_default();
        // The cap is checked where it is configured; out of range leaves quinn's default.
        let _ = endpoint.max_udp_payload_size(self.mtu_cap.max(1200));
        endpoint
    }
}

/// The secret that stateless resets are made from (RFC 9000 §10.3).
///
/// A server that keeps it over a restart makes its peers notice the restart with their next
/// packet instead of after the idle time-out.
#[derive(Clone)]
pub struct ResetKey([u8; 32]);

impl ResetKey {
    /// The key derived from a secret of any length, such as a private key that outlives restarts.
    pub fn derive(secret: &[u8]) -> Self {
        let salt = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, b"culvert reset key");
        let tag = aws_lc_rs::hmac::sign(&salt, secret);
        let mut key = [0; 32];
        key.copy_from_slice(&tag.as_ref()[..32]);
        Self(key)
    }

    fn hmac(&self) -> aws_lc_rs::hmac::Key {
        aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &self.0)
    }
}

impl std::fmt::Debug for ResetKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ResetKey(…)")
    }
}

/// Why a tunnel could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The local socket could not be had.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The TLS configuration has no TLS 1.3 cipher suite; the fault is ours.
    #[error("unusable TLS configuration: {0}")]
    Tls(String),
    /// The server's name or address cannot be used.
    #[error("{0}")]
    Address(String),
    /// The handshake did not come to its end.
    #[error("{0}")]
    Handshake(TunnelLost),
    /// The network says that nobody listens at the server's address.
    #[error("connection refused")]
    Refused,
    /// The peer speaks QUIC but not this protocol.
    #[error("the peer did not agree on the protocol {}", String::from_utf8_lossy(ALPN))]
    Protocol,
}

/// Accepts tunnels on a UDP port.
///
/// Dropping it closes every tunnel that it accepted with [`CloseCode::ABANDONED`].
#[derive(Debug)]
pub struct Listener {
    endpoint: quinn::Endpoint,
    neighbours: Arc<Neighbours>,
    handshakes: Arc<AtomicUsize>,
    buffer_sizes: BufferSizes,
}

impl Listener {
    /// Binds the UDP port and starts to answer on it.
    ///
    /// An unspecified IPv6 address takes IPv4 as well. Without a reset key a random one is used.
    ///
    /// # Errors
    /// When the port cannot be had or the TLS configuration cannot carry QUIC.
    pub fn bind(
        address: SocketAddr,
        tls: Arc<rustls::ServerConfig>,
        settings: &Settings,
        reset_key: Option<&ResetKey>,
    ) -> Result<Self, ConnectError> {
        let bound = udp::bind(address, settings)?;
        let endpoint = quinn::Endpoint::new_with_abstract_socket(
            settings.endpoint(reset_key),
            Some(server_config(tls, settings)?),
            bound.socket,
            Arc::new(TokioRuntime),
        )
        .map_err(|error| BindError::new(address, error))?;
        let neighbours = Arc::new(Neighbours::default());
        neighbours.listen(bound.errors);
        Ok(Self {
            endpoint,
            neighbours,
            handshakes: Arc::default(),
            buffer_sizes: bound.buffer_sizes,
        })
    }

    /// The port that was bound.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// The buffers that the kernel granted to the socket.
    pub fn buffer_sizes(&self) -> BufferSizes {
        self.buffer_sizes
    }

    /// The next agent that wants a tunnel; `None` once the listener is closed.
    ///
    /// It returns before any cryptography is done: spawn, then [`Incoming::complete`]. Under a
    /// flood of handshakes it makes clients prove their address first, and then drops them.
    pub async fn accept(&self) -> Option<Incoming> {
        loop {
            let incoming = self.endpoint.accept().await?;
            let pending = self.handshakes.load(Ordering::Relaxed);
            if pending >= IGNORE_ABOVE {
                incoming.ignore();
            } else if pending >= RETRY_ABOVE && incoming.may_retry() {
                // Only fails when the address is validated already, which may_retry excludes.
                let _ = incoming.retry();
            } else {
                return Some(Incoming {
                    incoming,
                    pending: Pending::enter(&self.handshakes),
                    neighbours: self.neighbours.clone(),
                    endpoint: self.endpoint.clone(),
                });
            }
        }
    }

    /// Refuses further handshakes; live tunnels go on.
    pub fn refuse_new(&self) {
        self.endpoint.set_server_config(None);
    }

    /// Closes every tunnel and waits until the peers have been told, at most `limit`.
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

/// An agent's wish for a tunnel, before its handshake.
#[derive(Debug)]
pub struct Incoming {
    incoming: quinn::Incoming,
    pending: Pending,
    neighbours: Arc<Neighbours>,
    endpoint: quinn::Endpoint,
}

impl Incoming {
    /// Where the wish comes from; not proven before the handshake is complete.
    pub fn remote_address(&self) -> SocketAddr {
        canonical(self.incoming.remote_address())
    }

    /// Does the handshake: certificates are checked, the protocol is agreed on.
    ///
    /// # Errors
    /// When the peer goes away, is refused, or speaks another protocol.
    pub async fn complete(self) -> Result<Tunnel, ConnectError> {
        let connection =
            self.incoming.await.map_err(|error| ConnectError::Handshake(lost(error)))?;
        drop(self.pending);
        Connection::established(connection, self.endpoint, self.neighbours)
    }
}

/// Counts one handshake in progress for as long as it lives.
#[derive(Debug)]
struct Pending(Arc<AtomicUsize>);

impl Pending {
    fn enter(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Makes a tunnel to a server, on a UDP socket of its own.
///
/// A shared socket would hash to the same replica behind a load balancer every time.
///
/// # Errors
/// When the socket cannot be had, nobody listens at the address, or the handshake does not come to
/// its end; it gives up after the idle time-out.
pub async fn connect(
    remote: SocketAddr,
    server_name: &str,
    tls: Arc<rustls::ClientConfig>,
    settings: &Settings,
) -> Result<(Tunnel, BufferSizes), ConnectError> {
    let any = match remote.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let local = SocketAddr::new(any, 0);
    let bound = udp::bind(local, settings)?;
    let endpoint = quinn::Endpoint::new_with_abstract_socket(
        settings.endpoint(None),
        None,
        bound.socket,
        Arc::new(TokioRuntime),
    )
    .map_err(|error| BindError::new(local, error))?;
    let neighbours = Arc::new(Neighbours::default());

    let crypto = QuicClientConfig::try_from(tls).map_err(|e| ConnectError::Tls(e.to_string()))?;
    let mut client = quinn::ClientConfig::new(Arc::new(crypto));
    client.transport_config(Arc::new(settings.transport()));
    let connecting = endpoint
        .connect_with(client, remote, server_name)
        .map_err(|error| ConnectError::Address(error.to_string()))?;
    let connection = tokio::select! {
        connected = connecting => connected.map_err(|error| ConnectError::Handshake(lost(error)))?,
        () = refused(bound.errors.as_ref()) => return Err(ConnectError::Refused),
    };
    neighbours.listen(bound.errors);
    let tunnel = Connection::established(connection, endpoint, neighbours)?;
    Ok((tunnel, bound.buffer_sizes))
}

/// Completes when a packet of the handshake could not be delivered. The socket has one peer, so
/// every error is the server's.
async fn refused(errors: Option<&udp::ErrorQueue>) {
    match errors {
        Some(errors) if errors.next().await.is_some() => {}
        _ => std::future::pending().await,
    }
}

fn server_config(
    tls: Arc<rustls::ServerConfig>,
    settings: &Settings,
) -> Result<quinn::ServerConfig, ConnectError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(|e| ConnectError::Tls(e.to_string()))?;
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    server
        .transport_config(Arc::new(settings.transport()))
        .max_incoming(IGNORE_ABOVE)
        .incoming_buffer_size(INCOMING_BUFFER)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL);
    Ok(server)
}

/// The live tunnels of one socket by the peer's address, so that an ICMP error finds its tunnel.
#[derive(Debug, Default)]
struct Neighbours(Mutex<HashMap<SocketAddr, Weak<Notify>>>);

impl Neighbours {
    fn enter(&self, address: SocketAddr) -> Arc<Notify> {
        let doubt = Arc::new(Notify::new());
        let mut tunnels = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.retain(|_, doubt| doubt.strong_count() > 0);
        tunnels.insert(address, Arc::downgrade(&doubt));
        doubt
    }

    /// Wakes the tunnel behind each address that the network reports as unreachable, for as long
    /// as the socket lives.
    fn listen(self: &Arc<Self>, errors: Option<udp::ErrorQueue>) {
        let Some(errors) = errors else { return };
        let neighbours = Arc::downgrade(self);
        tokio::spawn(async move {
            while let Some(address) = errors.next().await {
                let Some(neighbours) = neighbours.upgrade() else { return };
                let tunnels = neighbours.0.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(doubt) = tunnels.get(&canonical(address)).and_then(Weak::upgrade) {
                    doubt.notify_one();
                }
            }
        });
    }
}

/// What this side said when it closed the tunnel; its streams tell it as the reason they ended.
#[derive(Clone, Debug, Default)]
struct Farewell(Arc<OnceLock<(CloseCode, String)>>);

impl Farewell {
    /// Why the tunnel ended.
    fn lost(&self, error: quinn::ConnectionError) -> TunnelLost {
        match (lost(error), self.0.get()) {
            (TunnelLost::ClosedHere { .. }, Some((code, reason))) => {
                TunnelLost::ClosedHere { code: *code, reason: reason.clone() }
            }
            (lost, _) => lost,
        }
    }

    fn read_error(&self, error: quinn::ReadError) -> ReadError {
        match error {
            quinn::ReadError::Reset(code) => ReadError::Reset(stream_code(code)),
            quinn::ReadError::ConnectionLost(error) => ReadError::Lost(self.lost(error)),
            // Reads are always ordered, and 0-RTT is never used.
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => ReadError::Ended,
        }
    }
}

/// One QUIC connection.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    connection: quinn::Connection,
    endpoint: quinn::Endpoint,
    farewell: Farewell,
    doubt: Arc<Notify>,
    /// Keeps the socket's error queue watched for as long as a tunnel uses it.
    _neighbours: Arc<Neighbours>,
}

impl Connection {
    fn established(
        connection: quinn::Connection,
        endpoint: quinn::Endpoint,
        neighbours: Arc<Neighbours>,
    ) -> Result<Tunnel, ConnectError> {
        let data =
            connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
        if data.and_then(|data| data.protocol).as_deref() != Some(ALPN) {
            connection.close(CloseCode::INCOMPATIBLE.as_u32().into(), b"no protocol agreed on");
            return Err(ConnectError::Protocol);
        }
        let doubt = neighbours.enter(canonical(connection.remote_address()));
        let farewell = Farewell::default();
        let carrier = Self { connection, endpoint, farewell, doubt, _neighbours: neighbours };
        Ok(Tunnel { carrier })
    }

    pub(super) async fn open(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        let opened = self.connection.open_bi().await;
        opened.map(|stream| self.halves(stream)).map_err(|error| self.farewell.lost(error))
    }

    pub(super) async fn accept(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        let accepted = self.connection.accept_bi().await;
        accepted.map(|stream| self.halves(stream)).map_err(|error| self.farewell.lost(error))
    }

    fn halves(&self, (send, recv): (quinn::SendStream, quinn::RecvStream)) -> (SendHalf, RecvHalf) {
        let send = SendStream { stream: send, farewell: self.farewell.clone() };
        let recv = RecvStream { stream: recv, farewell: self.farewell.clone() };
        (SendHalf::new(send), RecvHalf::new(recv))
    }

    pub(super) fn close(&self, code: CloseCode, reason: &str) {
        // Only the first close counts, for the peer too.
        let _ = self.farewell.0.set((code, reason.to_owned()));
        self.connection.close(code.as_u32().into(), reason.as_bytes());
    }

    pub(super) async fn closed(&self) -> TunnelLost {
        self.farewell.lost(self.connection.closed().await)
    }

    pub(super) async fn flushed(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.endpoint.wait_idle()).await;
    }

    pub(super) async fn unreachable(&self) {
        self.doubt.notified().await;
    }

    pub(super) fn set_max_streams(&self, count: u32) {
        self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(count));
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        canonical(self.connection.remote_address())
    }

    pub(super) fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        let chain = self.connection.peer_identity()?.downcast().ok()?;
        Some(*chain)
    }

    pub(super) fn stats(&self) -> TunnelStats {
        let stats = self.connection.stats();
        TunnelStats {
            rtt: stats.path.rtt,
            cwnd: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            congestion_events: stats.path.congestion_events,
            black_holes: stats.path.black_holes_detected,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
        }
    }
}

/// The half of a QUIC stream that this side writes.
pub(super) struct SendStream {
    stream: quinn::SendStream,
    farewell: Farewell,
}

impl SendStream {
    pub(super) async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), WriteError> {
        self.stream.write_chunk(chunk).await.map_err(|error| match error {
            quinn::WriteError::Stopped(code) => WriteError::Stopped(stream_code(code)),
            quinn::WriteError::ConnectionLost(error) => WriteError::Lost(self.farewell.lost(error)),
            // 0-RTT is never used.
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => {
                WriteError::Ended
            }
        })
    }

    pub(super) fn finish(&mut self) {
        // Fails only on a stream that has ended, which SendHalf excludes.
        let _ = self.stream.finish();
    }

    pub(super) fn reset(&mut self, code: StreamCode) {
        let _ = self.stream.reset(code.as_u32().into());
    }

    pub(super) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<StreamCode>, TunnelLost>> + Send + Sync + 'static {
        let stopped = self.stream.stopped();
        let farewell = self.farewell.clone();
        async move {
            match stopped.await {
                Ok(code) => Ok(code.map(stream_code)),
                Err(quinn::StoppedError::ConnectionLost(error)) => Err(farewell.lost(error)),
                Err(quinn::StoppedError::ZeroRttRejected) => Ok(None),
            }
        }
    }

    pub(super) fn set_priority(&self, priority: i32) {
        let _ = self.stream.set_priority(priority);
    }
}

/// The half of a QUIC stream that this side reads.
pub(super) struct RecvStream {
    stream: quinn::RecvStream,
    farewell: Farewell,
}

impl RecvStream {
    pub(super) async fn read_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> Result<Option<usize>, ReadError> {
        self.stream.read_chunks(chunks).await.map_err(|error| self.farewell.read_error(error))
    }

    pub(super) async fn read(&mut self, buf: &mut [u8]) -> Result<Option<usize>, ReadError> {
        self.stream.read(buf).await.map_err(|error| self.farewell.read_error(error))
    }

    pub(super) fn stop(&mut self, code: StreamCode) {
        // Fails only on a stream that has ended, which has nothing left to stop.
        let _ = self.stream.stop(code.as_u32().into());
    }

    pub(super) async fn failed(&mut self) -> ReadError {
        match self.stream.received_reset().await {
            Ok(Some(code)) => ReadError::Reset(stream_code(code)),
            Ok(None) | Err(quinn::ResetError::ZeroRttRejected) => std::future::pending().await,
            Err(quinn::ResetError::ConnectionLost(error)) => {
                ReadError::Lost(self.farewell.lost(error))
            }
        }
    }
}

fn stream_code(code: VarInt) -> StreamCode {
    StreamCode::from_wire(code.into_inner())
}

fn lost(error: quinn::ConnectionError) -> TunnelLost {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => TunnelLost::ClosedByPeer {
            code: CloseCode::from_wire(close.error_code.into_inner()),
            reason: String::from_utf8_lossy(&close.reason).into_owned(),
        },
        quinn::ConnectionError::LocallyClosed => {
            TunnelLost::ClosedHere { code: CloseCode::ABANDONED, reason: String::new() }
        }
        quinn::ConnectionError::TimedOut => TunnelLost::TimedOut,
        quinn::ConnectionError::Reset => TunnelLost::PeerRestarted,
        error => TunnelLost::Transport(error.to_string()),
    }
}

/// An IPv4 peer of a dual-stack socket, without the IPv6 mapping.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
