//! An agent that the test drives message by message.

use std::{net::SocketAddr, sync::Arc};

use culvert_loadtest::{carrier::Carrier, rig::Running};
use culvert_transport::{
    ConnectError, Settings, Tunnel,
    control::ControlStream,
    quic,
    tcp::{self, Route},
    tls::{Identity, KeyExchange, authorities, certificates, tunnel_client},
};
use culvert_wire::{
    InstanceId,
    bounded::Text,
    control::{ControlMessage, Hello, Pong},
    extension::Extensions,
    identifiers::Identifiers,
    version::{Features, REVISION},
};
use rustls::ClientConfig;

/// An agent's configuration of TLS, with the rig's certificates.
pub(crate) fn tls(rig: &Running) -> ClientConfig {
    let pair = rig.certificates().agent();
    let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
    let roots = authorities(&certificates(&rig.certificates().ca()).unwrap()).unwrap();
    tunnel_client(roots, Some(identity), KeyExchange::Hybrid).unwrap()
}

/// A handshake over QUIC with this address, as an agent of the rig.
pub(crate) async fn quic_handshake(
    rig: &Running,
    address: SocketAddr,
) -> Result<Tunnel, ConnectError> {
    quic_handshake_with(rig, address, &Settings::default()).await
}

/// The same with these settings.
pub(crate) async fn quic_handshake_with(
    rig: &Running,
    address: SocketAddr,
    settings: &Settings,
) -> Result<Tunnel, ConnectError> {
    let (name, tls) = (address.ip().to_string(), Arc::new(tls(rig)));
    Ok(quic::connect(address, &name, tls, settings, &Arc::default()).await?.0.into())
}

/// A tunnel to the rig's server, over the rig's carrier, without a hello.
pub(crate) async fn tunnel(rig: &Running) -> Tunnel {
    let address = rig.server.tunnel;
    match rig.carrier() {
        None | Some(Carrier::Quic) => quic_handshake(rig, address).await.unwrap(),
        Some(Carrier::Tcp | Carrier::Grpc) => {
            let (name, settings) = (address.ip().to_string(), Settings::default());
            let tls = Arc::new(tls(rig));
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
    join(tunnel(rig).await, name).await
}

/// The same over this tunnel.
pub(crate) async fn join(tunnel: Tunnel, name: &str) -> (Tunnel, ControlStream) {
    let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await.unwrap());
    control.send(&hello(name)).await.unwrap();
    assert!(matches!(control.next().await.unwrap(), ControlMessage::Welcome(_)));
    (tunnel, control)
}

/// Answers pings, as an agent that is alive. Dials get no answer.
pub(crate) async fn answer_pings(mut control: ControlStream) {
    while let Ok(message) = control.next().await {
        if let ControlMessage::Ping(ping) = message {
            let pong = ControlMessage::Pong(Pong { echo: ping.echo });
            if control.send(&pong).await.is_err() {
                return;
            }
        }
    }
}
