//! Looks at the frames of received packets before quinn does.
//!
//! quinn processes a frame before this side can refuse it, and reports neither frames that it queues
//! without a limit nor how much of a stream has arrived. So quinn gets a TLS session whose keys show
//! each packet that they decrypt to the [`Inbound`] of its connection, which may refuse the packet, and
//! which restores what datagrams have of packets that were lost.

mod frames;
mod inbound;
mod unread;

use std::{any::Any, sync::Arc};

use bytes::BytesMut;
use quinn::{
    ConnectError, ConnectionId, Side,
    crypto::{
        ClientConfig, CryptoError, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey,
        ServerConfig, Session, UnsupportedVersion,
        rustls::{HandshakeData, QuicClientConfig, QuicServerConfig},
    },
};
use quinn_proto::{TransportError, transport_parameters::TransportParameters};

use self::inbound::has_few_pieces;
pub(super) use self::{
    frames::{Frame, Frames},
    inbound::Inbound,
};
use crate::Settings;

/// TLS of a server or client whose connections are inspected.
pub(super) struct Inspected<C> {
    tls: Arc<C>,
    /// Maximum number of bytes that a peer may send ahead of a stream's reader.
    stream_window: u32,
    /// Whether peers are strangers until they are admitted.
    has_strangers: bool,
}

impl<C> Inspected<C> {
    pub(super) fn new(tls: C, settings: &Settings) -> Self {
        Self {
            tls: Arc::new(tls),
            stream_window: settings.stream_receive_window,
            has_strangers: settings.unadmitted_window.is_some(),
        }
    }

    fn session(&self, session: Box<dyn Session>, side: Side) -> Box<dyn Session> {
        let inbound = Arc::new(Inbound::new(side, self.stream_window, self.has_strangers));
        Box::new(InspectedSession { session, inbound })
    }
}

impl ServerConfig for Inspected<QuicServerConfig> {
    fn initial_keys(
        &self,
        version: u32,
        dst_cid: &ConnectionId,
    ) -> Result<Keys, UnsupportedVersion> {
        let Keys { header, packet } = self.tls.initial_keys(version, dst_cid)?;
        Ok(Keys { header, packet: inspect(packet, None) })
    }

    fn retry_tag(&self, version: u32, orig_dst_cid: &ConnectionId, packet: &[u8]) -> [u8; 16] {
        self.tls.retry_tag(version, orig_dst_cid, packet)
    }

    fn start_session(
        self: Arc<Self>,
        version: u32,
        params: &TransportParameters,
    ) -> Box<dyn Session> {
        self.session(self.tls.clone().start_session(version, params), Side::Server)
    }
}

impl ClientConfig for Inspected<QuicClientConfig> {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn Session>, ConnectError> {
        let session = self.tls.clone().start_session(version, server_name, params)?;
        Ok(self.session(session, Side::Client))
    }
}

/// What the handshake of an inspected connection negotiated.
pub(super) struct Negotiated {
    protocol: Option<Vec<u8>>,
    inbound: Arc<Inbound>,
}

impl Negotiated {
    /// The negotiated protocol of a connection whose handshake is complete, and what is known of its
    /// received frames. Where the connection is not inspected, nothing is.
    pub(super) fn of(connection: &quinn::Connection) -> Option<(Option<Vec<u8>>, Arc<Inbound>)> {
        let data = connection.handshake_data()?;
        match data.downcast::<Self>() {
            Ok(negotiated) => Some((negotiated.protocol, negotiated.inbound)),
            Err(data) => {
                let data = data.downcast::<HandshakeData>().ok()?;
                Some((data.protocol, Arc::new(Inbound::new(Side::Client, 0, false))))
            }
        }
    }
}

struct InspectedSession {
    session: Box<dyn Session>,
    inbound: Arc<Inbound>,
}

impl InspectedSession {
    fn inspect(&self, keys: KeyPair<Box<dyn PacketKey>>) -> KeyPair<Box<dyn PacketKey>> {
        inspect(keys, Some(self.inbound.clone()))
    }
}

fn inspect(
    keys: KeyPair<Box<dyn PacketKey>>,
    inbound: Option<Arc<Inbound>>,
) -> KeyPair<Box<dyn PacketKey>> {
    let KeyPair { local, remote: key } = keys;
    KeyPair { local, remote: Box::new(InspectingKey { key, inbound }) }
}

impl Session for InspectedSession {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        let Keys { header, packet } = self.session.initial_keys(dst_cid, side);
        Keys { header, packet: self.inspect(packet) }
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        let data = self.session.handshake_data()?.downcast::<HandshakeData>().ok()?;
        Some(Box::new(Negotiated { protocol: data.protocol, inbound: self.inbound.clone() }))
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.session.peer_identity()
    }

    /// None: early data is never used, and its packets would not be inspected.
    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        None
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.session.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.session.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        self.session.read_handshake(buf)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        self.session.transport_parameters()
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let Keys { header, packet } = self.session.write_handshake(buf)?;
        Some(Keys { header, packet: self.inspect(packet) })
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let keys = self.session.next_1rtt_keys()?;
        Some(self.inspect(keys))
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.session.is_valid_retry(orig_dst_cid, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.session.export_keying_material(output, label, context)
    }
}

/// The key of received packets.
struct InspectingKey {
    key: Box<dyn PacketKey>,
    /// `None` for the first packets that a server receives, which belong to no session yet.
    inbound: Option<Arc<Inbound>>,
}

impl PacketKey for InspectingKey {
    fn encrypt(&self, packet: u64, buf: &mut [u8], header_len: usize) {
        self.key.encrypt(packet, buf, header_len);
    }

    fn decrypt(
        &self,
        packet: u64,
        header: &[u8],
        payload: &mut BytesMut,
    ) -> Result<(), CryptoError> {
        self.key.decrypt(packet, header, payload)?;
        let is_accepted = match &self.inbound {
            Some(inbound) => inbound.inspect(packet, payload),
            None => has_few_pieces(payload),
        };
        if is_accepted { Ok(()) } else { Err(CryptoError) }
    }

    fn tag_len(&self) -> usize {
        self.key.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.key.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.key.integrity_limit()
    }
}
