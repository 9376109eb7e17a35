//! A server that the test drives message by message.

use std::sync::Arc;

use culvert_loadtest::{
    carrier::Carrier,
    rig::{Rig, Running},
};
use culvert_transport::{
    Settings, Tunnel,
    control::ControlStream,
    qmux::{Role, establish},
    quic, tcp,
    tls::{Identity, KeyExchange, authorities, certificates, tunnel_server},
};
use culvert_wire::{
    DialId,
    bounded::List,
    control::{ControlMessage, Hello, Welcome},
    dial::{DialRequest, Network, StreamKind},
    extension::Extensions,
    version::{Features, REVISION},
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

/// A listener, and one agent that connects to it.
pub(crate) struct FakeServer {
    listener: Listener,
    _agent: AbortOnDropHandle<()>,
    _rig: Running,
}

impl FakeServer {
    /// Starts both, for tunnels with this carrier. `configure` may change the agent's
    /// configuration.
    pub(crate) async fn start(
        carrier: Carrier,
        configure: impl FnOnce(&mut culvert_agent::Config),
    ) -> Self {
        // The rig provides certificates; its own server is not used.
        let rig = Rig::new().carrier(carrier).agents(0).start().await.unwrap();
        let pair = rig.certificates().server();
        let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
        let roots = authorities(&certificates(&rig.certificates().ca()).unwrap()).unwrap();
        let tls = tunnel_server(identity, Some(roots), KeyExchange::Hybrid).unwrap();
        let listener = Listener::bind(carrier, tls.into()).await;
        let mut config = rig.agent_config("agent").unwrap();
        config.servers.port = listener.port();
        configure(&mut config);
        let agent = culvert_agent::Agent::bind(&config).unwrap();
        let agent = culvert_transport::task::owned(agent.run(std::future::pending()));
        Self { listener, _agent: agent, _rig: rig }
    }

    /// Accepts the agent's tunnel and answers its hello.
    pub(crate) async fn agent_joins(&self) -> (Tunnel, ControlStream, Box<Hello>) {
        let tunnel = self.listener.accept().await;
        let mut control = ControlStream::new(tunnel.clone(), tunnel.accept().await.unwrap());
        let ControlMessage::Hello(hello) = control.next().await.unwrap() else {
            panic!("the first message of the agent is not a hello")
        };
        let welcome = Welcome {
            revision: REVISION,
            features: Features::supported(),
            server_id: "fake".parse().unwrap(),
            server_count: 1,
            servers: List::default(),
            max_streams: 100,
            extensions: Extensions::default(),
        };
        control.send(&ControlMessage::Welcome(Box::new(welcome))).await.unwrap();
        (tunnel, control, hello)
    }
}

/// Accepts tunnels of one carrier.
enum Listener {
    Quic(Box<quic::Listener>),
    Tcp(TcpListener, TlsAcceptor),
}

impl Listener {
    async fn bind(carrier: Carrier, tls: Arc<rustls::ServerConfig>) -> Self {
        let address = "127.0.0.1:0".parse().unwrap();
        match carrier {
            Carrier::Quic => {
                let settings = Settings::default();
                let listener = quic::Listener::bind(address, tls, &settings, None).unwrap();
                Self::Quic(Box::new(listener))
            }
            Carrier::Tcp | Carrier::Grpc => {
                Self::Tcp(TcpListener::bind(address).await.unwrap(), tls.into())
            }
        }
    }

    fn port(&self) -> u16 {
        let address = match self {
            Self::Quic(listener) => listener.local_addr().unwrap(),
            Self::Tcp(listener, _) => listener.local_addr().unwrap(),
        };
        address.port()
    }

    async fn accept(&self) -> Tunnel {
        match self {
            Self::Quic(listener) => {
                listener.accept().await.unwrap().complete().await.unwrap().into()
            }
            Self::Tcp(listener, acceptor) => {
                let (socket, _) = listener.accept().await.unwrap();
                let stream = acceptor.accept(socket).await.unwrap();
                let settings = Settings::default();
                let peer = tcp::accepted(&stream, Carrier::Tcp, &settings).unwrap();
                establish(stream, Role::Server, peer, &settings).await.unwrap().into()
            }
        }
    }
}

/// A request to dial a target.
pub(crate) fn request(target: &str) -> DialRequest {
    DialRequest {
        id: DialId(1),
        network: Network::Tcp,
        target: target.parse().unwrap(),
        kind: StreamKind::UNKNOWN,
        timeout_millis: 0,
        trace: None,
        extensions: Extensions::default(),
    }
}
