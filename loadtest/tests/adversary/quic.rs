//! A peer over QUIC that sends what it is given, with limits of its own.

use std::{any::Any, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{
    ClientConfig, Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt,
    congestion::{Controller, ControllerFactory},
    crypto::rustls::QuicClientConfig,
};

use crate::{
    forge::{Forger, ForgingClient},
    victim::{MIB, Victim},
};

/// What the peer grants the server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grants {
    /// Bytes that the server may send on each stream.
    pub(crate) stream_window: u64,
    /// Streams that the server may open.
    pub(crate) streams: u32,
}

/// Everything, as a peer does that wants to harm the server's memory.
pub(crate) const EVERYTHING: Grants = Grants { stream_window: 1 << 50, streams: 10_000 };

/// A peer whose handshake is complete, and its control stream.
pub(crate) struct Peer {
    pub(crate) connection: Connection,
    pub(crate) send: SendStream,
    _recv: RecvStream,
    _endpoint: Endpoint,
}

impl Peer {
    /// Connects and opens the control stream.
    pub(crate) async fn connect(victim: &Victim, grants: Grants) -> Self {
        Self::connect_forging(victim, grants, None).await
    }

    /// The same, by a client whose packets are forged.
    pub(crate) async fn connect_forging(
        victim: &Victim,
        grants: Grants,
        forger: Option<Arc<Forger>>,
    ) -> Self {
        let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
        let server = victim.deployment.tunnel();
        let connecting =
            endpoint.connect_with(forging(victim, grants, forger), server, &name(server));
        let connection = connecting.unwrap().await.unwrap();
        let (send, recv) = connection.open_bi().await.unwrap();
        Self { connection, send, _recv: recv, _endpoint: endpoint }
    }
}

/// The name in the server's certificate.
pub(crate) fn name(server: SocketAddr) -> String {
    server.ip().to_string()
}

pub(crate) fn config(victim: &Victim, grants: Grants) -> ClientConfig {
    forging(victim, grants, None)
}

/// The same, by a client whose packets are forged.
pub(crate) fn forging(
    victim: &Victim,
    grants: Grants,
    forger: Option<Arc<Forger>>,
) -> ClientConfig {
    let tls = QuicClientConfig::try_from(victim.tls(&[b"culvert/1"])).unwrap();
    let mut client: Arc<dyn quinn::crypto::ClientConfig> = Arc::new(tls);
    let mut transport = TransportConfig::default();
    let mut send_window = 1 << 30;
    if let Some(forger) = forger {
        // What is on the way waits in quinn as packets, however little is in them.
        send_window =
            if forger.sends_less() && !forger.heeds_nothing() { MIB } else { send_window };
        if forger.heeds_nothing() {
            transport.congestion_controller_factory(Arc::new(NoWindow));
        }
        client = Arc::new(ForgingClient { client, forger });
    }
    let mut config = ClientConfig::new(client);
    transport
        .stream_receive_window(VarInt::from_u64(grants.stream_window).unwrap())
        .receive_window(VarInt::MAX)
        .max_concurrent_bidi_streams(grants.streams.into())
        .send_window(send_window)
        .max_idle_timeout(Some(Duration::from_secs(60).try_into().unwrap()));
    config.transport_config(Arc::new(transport));
    config
}

/// A congestion controller that holds nothing back.
#[derive(Clone, Debug)]
struct NoWindow;

impl ControllerFactory for NoWindow {
    fn build(self: Arc<Self>, _now: std::time::Instant, _mtu: u16) -> Box<dyn Controller> {
        Box::new(Self)
    }
}

impl Controller for NoWindow {
    fn on_congestion_event(
        &mut self,
        _now: std::time::Instant,
        _sent: std::time::Instant,
        _is_persistent: bool,
        _lost_bytes: u64,
    ) {
    }

    fn on_mtu_update(&mut self, _mtu: u16) {}

    fn window(&self) -> u64 {
        1 << 40
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self)
    }

    fn initial_window(&self) -> u64 {
        1 << 40
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
