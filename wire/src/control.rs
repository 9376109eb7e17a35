//! The messages of the control stream, the first stream of every tunnel.
//!
//! The agent opens it and sends hello. The server answers with welcome, or closes the tunnel with a
//! code that says why. Then either side may send any of the other messages at any time.
//= docs/protocol.md#5-control-stream

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    bounded::{List, Text},
    codec::EncodeError,
    extension::Extensions,
    frame::{self, Frame, FrameError, Message},
    identifiers::Identifiers,
    ids::{AgentId, InstanceId, ServerId},
    resume::{Received, Resumed, TunnelLost},
    version::Features,
};

/// The agent's introduction: the first message on the control stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The agent's [`crate::version::REVISION`].
    pub revision: u16,
    /// The features that the agent offers.
    pub features: Features,
    /// The agent's name.
    pub agent_id: AgentId,
    /// The process that has this name.
    pub instance: InstanceId,
    /// What the agent announces about itself.
    pub identifiers: Identifiers,
    /// A service-account token, where it is the agent's proof of identity.
    pub token: Option<Secret>,
    /// Name and version of the software, for logs alone.
    pub software: Text<64>,
    /// Additions of later revisions.
    pub extensions: Extensions,
}

impl Message for Hello {
    const KIND: u8 = 0x01;
}

/// The server's answer to a hello that it accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The server's [`crate::version::REVISION`].
    pub revision: u16,
    /// The features that both offer.
    pub features: Features,
    /// The name of this server replica.
    pub server_id: ServerId,
    /// Number of replicas.
    pub server_count: u32,
    /// The set of servers, if the server knows it and both offer [`Features::SERVER_SET`];
    /// otherwise empty.
    pub servers: ServerList,
    /// Maximum number of data streams that the server keeps open on this tunnel.
    pub max_streams: u32,
    /// Additions of later revisions.
    pub extensions: Extensions,
}

impl Message for Welcome {
    const KIND: u8 = 0x02;
}

/// Servers, the sender included, at most 64. A server may be in it with several addresses.
pub type ServerList = List<ServerEntry, 64>;

/// One server replica and its address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerEntry {
    /// The replica's name.
    pub id: ServerId,
    /// An IPv4 address or an IPv6 address in brackets, and a port behind a colon; empty when the
    /// sender does not know it, and the server is found at the address that the agent already has.
    pub address: Text<255>,
}

/// The set of servers has changed. Only servers send it, to agents that offer
/// [`Features::SERVER_SET`]. It replaces what this server sent before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerSet {
    /// Number of replicas.
    pub server_count: u32,
    /// As [`Welcome::servers`].
    pub servers: ServerList,
}

impl Message for ServerSet {
    const KIND: u8 = 0x08;
}

/// Asks the peer to answer at once with a pong that carries the same bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// A number that the sender chooses.
    pub echo: u64,
}

impl Message for Ping {
    const KIND: u8 = 0x03;
}

/// The answer to a ping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The echo of the ping.
    pub echo: u64,
}

impl Message for Pong {
    const KIND: u8 = 0x04;
}

/// Announces that the sender goes away: no new dials on this tunnel; open streams may end by
/// themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Time until the sender closes the tunnel with whatever is open then, in milliseconds.
    pub deadline_millis: u32,
}

impl Message for Drain {
    const KIND: u8 = 0x05;
}

/// The last message: the sender closes the tunnel after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goodbye {
    /// The code with which the tunnel will be closed, a [`crate::CloseCode`].
    pub code: u32,
    /// Why, for people.
    pub reason: Text<255>,
}

impl Message for Goodbye {
    const KIND: u8 = 0x06;
}

/// A newer proof of the identity that the agent had in its hello. Only agents send it, to servers
/// that offer [`Features::RENEWAL`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// The token.
    pub token: Secret,
}

impl Message for Renewal {
    const KIND: u8 = 0x07;
}

/// A bearer token. It never shows in logs.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(Text<8192>);

impl Secret {
    /// The token with this text.
    ///
    /// # Errors
    /// When it has more than 8192 bytes.
    pub fn new(token: &str) -> Result<Self, crate::bounded::TooLong> {
        token.try_into().map(Self)
    }

    /// The token itself, for the check of it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Any message of the control stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControlMessage {
    /// See [`Hello`].
    Hello(Box<Hello>),
    /// See [`Welcome`].
    Welcome(Box<Welcome>),
    /// See [`Ping`].
    Ping(Ping),
    /// See [`Pong`].
    Pong(Pong),
    /// See [`Drain`].
    Drain(Drain),
    /// See [`Goodbye`].
    Goodbye(Goodbye),
    /// See [`Renewal`].
    Renewal(Renewal),
    /// See [`ServerSet`].
    ServerSet(Box<ServerSet>),
    /// See [`Received`].
    Received(Received),
    /// See [`TunnelLost`].
    TunnelLost(TunnelLost),
    /// See [`Resumed`].
    Resumed(Resumed),
    /// A message of a later revision, which may be ignored.
    Unknown {
        /// The frame's first byte.
        kind: u8,
    },
}

impl ControlMessage {
    /// Reads a frame of the control stream.
    ///
    /// # Errors
    /// When the frame belongs on a data stream, or its body is not the message its kind says.
    pub fn decode(frame: &Frame) -> Result<Self, FrameError> {
        Ok(match frame.kind {
            Hello::KIND => Self::Hello(Box::new(frame.message()?)),
            Welcome::KIND => Self::Welcome(Box::new(frame.message()?)),
            Ping::KIND => Self::Ping(frame.message()?),
            Pong::KIND => Self::Pong(frame.message()?),
            Drain::KIND => Self::Drain(frame.message()?),
            Goodbye::KIND => Self::Goodbye(frame.message()?),
            Renewal::KIND => Self::Renewal(frame.message()?),
            ServerSet::KIND => Self::ServerSet(Box::new(frame.message()?)),
            Received::KIND => Self::Received(frame.message()?),
            TunnelLost::KIND => Self::TunnelLost(frame.message()?),
            Resumed::KIND => Self::Resumed(frame.message()?),
            // Kinds from 0x10 to 0x1f head data streams and have no business here.
            found @ 0x10..=0x1f => {
                return Err(FrameError::UnexpectedKind { found, expected: Hello::KIND });
            }
            kind => Self::Unknown { kind },
        })
    }

    /// The frame that carries the message; an unknown one has none and becomes no bytes.
    ///
    /// # Errors
    /// When the message is longer than its kind allows; the fault is ours.
    pub fn encode(&self) -> Result<Bytes, EncodeError> {
        match self {
            Self::Hello(message) => frame::encode(&**message),
            Self::Welcome(message) => frame::encode(&**message),
            Self::Ping(message) => frame::encode(message),
            Self::Pong(message) => frame::encode(message),
            Self::Drain(message) => frame::encode(message),
            Self::Goodbye(message) => frame::encode(message),
            Self::Renewal(message) => frame::encode(message),
            Self::ServerSet(message) => frame::encode(&**message),
            Self::Received(message) => frame::encode(message),
            Self::TunnelLost(message) => frame::encode(message),
            Self::Resumed(message) => frame::encode(message),
            Self::Unknown { .. } => Ok(Bytes::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_never_shown() {
        let secret = Secret::new("hunter2").unwrap();
        assert_eq!(secret.expose(), "hunter2");
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        assert!(Secret::new(&"x".repeat(8192)).is_ok());
        assert!(Secret::new(&"x".repeat(8193)).is_err());
    }

    #[test]
    fn kinds_of_data_streams_are_refused_and_later_ones_are_kept() {
        let decode = |kind| ControlMessage::decode(&Frame { kind, body: Bytes::new() });
        for kind in [0x10, 0x11, 0x12, 0x13, 0x1f] {
            let expected = Hello::KIND;
            assert_eq!(decode(kind), Err(FrameError::UnexpectedKind { found: kind, expected }));
        }
        for kind in [0x00, 0x0c, 0x0f, 0x20, 0xff] {
            assert_eq!(decode(kind), Ok(ControlMessage::Unknown { kind }));
        }
    }
}
