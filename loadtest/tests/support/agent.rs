//! An agent that the test drives message by message.

use std::sync::Arc;

use culvert_loadtest::{carrier::Carrier, rig::Running};
use culvert_transport::{
    Settings, Tunnel,
    control::ControlStream,
    quic,
    tcp::{self, Route},
    tls::{Identity, KeyExchange, authorities, certificates, tunnel_client},
};
use culvert_wire::{
    InstanceId,
    bounded::Text,
    control::{ControlMessage, Hello},
    extension::Extensions,
    identifiers::Identifiers,
    version::{Features, REVISION},
};

/// A tunnel to the rig's server, over the rig's carrier, without a hello.
pub(crate) async fn tunnel(rig: &Running) -> Tunnel {
    let pair = rig.certificates().agent();
    let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
    let roots = authorities(&certificates(&rig.certificates().ca()).unwrap()).unwrap();
    let tls = Arc::new(tunnel_client(roots, Some(identity), KeyExchange::Hybrid).unwrap());
    let address = rig.server.tunnel;
    let (name, settings) = (address.ip().to_string(), Settings::default());
    match rig.carrier() {
        None | Some(Carrier::Quic) => {
            quic::connect(address, &name, tls, &settings, &Arc::default()).await.unwrap().0.into()
        }
        Some(Carrier::Tcp | Carrier::Grpc) => {
            tcp::connect(&Route::Direct(address), &name, tls, &settings).await.unwrap().into()
        }
    }
}

/// A hello of the agent with this name.
pub(crate) fn hello(name: &str) -> ControlMessage {
    ControlMessage::Hello(Box::new(Hello {
        revision: REVISION,
        features: Features::supported(),
        agent_id: name.parse().unwrap(),
        instance: InstanceId([7; 16]),
        identifiers: Identifiers::default(),
        token: None,
        software: Text::default(),
        extensions: Extensions::default(),
    }))
}

/// A tunnel of an agent that has joined the server.
pub(crate) async fn joined(rig: &Running, name: &str) -> (Tunnel, ControlStream) {
    let tunnel = tunnel(rig).await;
    let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await.unwrap());
    control.send(&hello(name)).await.unwrap();
    assert!(matches!(control.next().await.unwrap(), ControlMessage::Welcome(_)));
    (tunnel, control)
}
