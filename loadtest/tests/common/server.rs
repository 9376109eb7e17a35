//! A server that does what the test says, and nothing else.

use culvert_loadtest::{frontend::Door, rig::Running};
use culvert_wire::{
    DialId,
    control::{ControlMessage, ControlStream, Hello, Welcome},
    dial::{DialRequest, Network, StreamKind},
    extension::Extensions,
    text::List,
    tls::{Identity, KeyExchange, authorities, certificates, tunnel_server},
    transport::{
        Tunnel,
        quic::{Listener, Settings},
    },
    version::{Features, REVISION},
};
use tokio_util::task::AbortOnDropHandle;

/// A listener, and one agent that looks for it.
pub(crate) struct FakeServer {
    listener: Listener,
    _agent: AbortOnDropHandle<()>,
    _rig: Running,
}

impl FakeServer {
    /// Starts both; `configure` may change what the agent is told.
    pub(crate) async fn start(configure: impl FnOnce(&mut culvert_agent::Config)) -> Self {
        // The rig lends its certificates; its own server is not asked.
        let rig = Door::ConnectUnix.rig().agents(0).start().await.unwrap();
        let pair = rig.certificates().server();
        let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
        let roots = authorities(&certificates(&rig.certificates().ca()).unwrap()).unwrap();
        let tls = tunnel_server(identity, Some(roots), KeyExchange::Hybrid).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind(address, tls.into(), &Settings::default(), None).unwrap();
        let mut config = rig.agent_config("agent");
        config.servers.port = listener.local_addr().unwrap().port();
        configure(&mut config);
        let agent = culvert_agent::Agent::bind(&config).unwrap();
        let agent = AbortOnDropHandle::new(tokio::spawn(agent.run(std::future::pending())));
        Self { listener, _agent: agent, _rig: rig }
    }

    /// Takes the agent in.
    pub(crate) async fn agent_joins(&self) -> (Tunnel, ControlStream, Box<Hello>) {
        let incoming = self.listener.accept().await.unwrap();
        let tunnel = incoming.complete().await.unwrap();
        let mut control = ControlStream::new(tunnel.clone(), tunnel.accept().await.unwrap());
        let ControlMessage::Hello(hello) = control.next().await.unwrap() else {
            panic!("the agent did not say hello first")
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

/// Asks for a target.
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
