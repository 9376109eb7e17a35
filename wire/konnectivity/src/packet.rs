//! Packets of Konnectivity as protobuf messages (its `client.proto`, which has no package).
//!
//! Receivers go by `type`, not by which payload is set, and ignore unknown types.

use bytes::Bytes;
use prost::{Enumeration, Message, Oneof};

/// Type of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum PacketType {
    /// Towards the target: connect to it.
    DialReq = 0,
    /// From the target: the result of a dial.
    DialRsp = 1,
    /// Towards the target: close both directions of the connection.
    CloseReq = 2,
    /// From the target: both directions of the connection are closed.
    CloseRsp = 3,
    /// In either direction: bytes of the connection.
    Data = 4,
    /// Towards the target: the dial is cancelled.
    DialCls = 5,
    /// From an agent: it takes no new dials.
    Drain = 6,
}

/// One message of a `Proxy` or `Connect` stream, in either direction.
#[derive(Clone, PartialEq, Message)]
pub struct Packet {
    /// A [`PacketType`].
    #[prost(enumeration = "PacketType", tag = "1")]
    pub r#type: i32,
    /// Payload of the type.
    #[prost(oneof = "Payload", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub payload: Option<Payload>,
}

/// Payload of a packet.
#[derive(Clone, PartialEq, Oneof)]
pub enum Payload {
    /// See [`DialRequest`].
    #[prost(message, tag = "2")]
    DialRequest(DialRequest),
    /// See [`DialResponse`].
    #[prost(message, tag = "3")]
    DialResponse(DialResponse),
    /// See [`Data`].
    #[prost(message, tag = "4")]
    Data(Data),
    /// See [`CloseRequest`].
    #[prost(message, tag = "5")]
    CloseRequest(CloseRequest),
    /// See [`CloseResponse`].
    #[prost(message, tag = "6")]
    CloseResponse(CloseResponse),
    /// See [`CloseDial`].
    #[prost(message, tag = "7")]
    CloseDial(CloseDial),
    /// See [`Drain`].
    #[prost(message, tag = "8")]
    Drain(Drain),
}

/// Payload of [`PacketType::DialReq`].
#[derive(Clone, PartialEq, Message)]
pub struct DialRequest {
    /// `tcp`.
    #[prost(string, tag = "1")]
    pub protocol: String,
    /// `host:port`.
    #[prost(string, tag = "2")]
    pub address: String,
    /// Id of the dial, chosen at random by the side that dials.
    #[prost(int64, tag = "3")]
    pub random: i64,
}

/// Payload of [`PacketType::DialRsp`].
#[derive(Clone, PartialEq, Message)]
pub struct DialResponse {
    /// Reason of the failure; empty for a success.
    #[prost(string, tag = "1")]
    pub error: String,
    /// Id of the connection; 0 after a failure.
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
    /// Id of the dial.
    #[prost(int64, tag = "3")]
    pub random: i64,
}

/// Payload of [`PacketType::CloseReq`].
#[derive(Clone, PartialEq, Message)]
pub struct CloseRequest {
    /// Id of the connection.
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
}

/// Payload of [`PacketType::CloseRsp`].
#[derive(Clone, PartialEq, Message)]
pub struct CloseResponse {
    /// Reason; empty for an end in order.
    #[prost(string, tag = "1")]
    pub error: String,
    /// Id of the connection.
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
}

/// Payload of [`PacketType::DialCls`].
#[derive(Clone, PartialEq, Message)]
pub struct CloseDial {
    /// Id of the dial.
    #[prost(int64, tag = "1")]
    pub random: i64,
}

/// Payload of [`PacketType::Drain`].
#[derive(Clone, PartialEq, Message)]
pub struct Drain {}

/// Payload of [`PacketType::Data`].
#[derive(Clone, PartialEq, Message)]
pub struct Data {
    /// Id of the connection.
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
    /// Unused in Konnectivity.
    #[prost(string, tag = "2")]
    pub error: String,
    /// The bytes.
    #[prost(bytes = "bytes", tag = "3")]
    pub data: Bytes,
}

impl Packet {
    fn new(r#type: PacketType, payload: Payload) -> Self {
        Self { r#type: r#type.into(), payload: Some(payload) }
    }

    /// A request to connect to a target.
    pub fn dial_request(random: i64, protocol: &str, address: String) -> Self {
        let request = DialRequest { protocol: protocol.into(), address, random };
        Self::new(PacketType::DialReq, Payload::DialRequest(request))
    }

    /// The result of a dial: the connection's id, or the reason of the failure.
    pub fn dial_response(random: i64, result: Result<i64, String>) -> Self {
        let (connect_id, error) = match result {
            Ok(connect_id) => (connect_id, String::new()),
            Err(error) => (0, error),
        };
        let response = DialResponse { error, connect_id, random };
        Self::new(PacketType::DialRsp, Payload::DialResponse(response))
    }

    /// The cancellation of a dial.
    pub fn close_dial(random: i64) -> Self {
        Self::new(PacketType::DialCls, Payload::CloseDial(CloseDial { random }))
    }

    /// Bytes of a connection.
    pub fn data(connect_id: i64, data: Bytes) -> Self {
        let data = Data { connect_id, error: String::new(), data };
        Self::new(PacketType::Data, Payload::Data(data))
    }

    /// A request to close a connection.
    pub fn close_request(connect_id: i64) -> Self {
        Self::new(PacketType::CloseReq, Payload::CloseRequest(CloseRequest { connect_id }))
    }

    /// The end of a connection; `error` is empty for an end in order.
    pub fn close_response(connect_id: i64, error: impl Into<String>) -> Self {
        let response = CloseResponse { error: error.into(), connect_id };
        Self::new(PacketType::CloseRsp, Payload::CloseResponse(response))
    }

    /// The announcement that the agent takes no new dials.
    pub fn drain() -> Self {
        Self::new(PacketType::Drain, Payload::Drain(Drain {}))
    }
}

/// A packet by its type. A missing payload counts as an empty one.
#[derive(Debug)]
pub enum PacketMessage {
    /// Connect to a target.
    Dial(DialRequest),
    /// The result of a dial.
    Dialed(DialResponse),
    /// Close the connection with this id.
    Close(i64),
    /// A connection is closed.
    Closed(CloseResponse),
    /// Bytes of a connection.
    Data(Data),
    /// The dial with this id is cancelled.
    CancelDial(i64),
    /// The agent takes no new dials.
    Drain,
    /// An unknown type.
    Unknown,
}

impl From<Packet> for PacketMessage {
    fn from(packet: Packet) -> Self {
        let Ok(r#type) = PacketType::try_from(packet.r#type) else { return Self::Unknown };
        match (r#type, packet.payload) {
            (PacketType::DialReq, Some(Payload::DialRequest(dial))) => Self::Dial(dial),
            (PacketType::DialReq, _) => Self::Dial(DialRequest::default()),
            (PacketType::DialRsp, Some(Payload::DialResponse(answer))) => Self::Dialed(answer),
            (PacketType::DialRsp, _) => Self::Dialed(DialResponse::default()),
            (PacketType::CloseReq, Some(Payload::CloseRequest(close))) => {
                Self::Close(close.connect_id)
            }
            (PacketType::CloseReq, _) => Self::Close(0),
            (PacketType::CloseRsp, Some(Payload::CloseResponse(closed))) => Self::Closed(closed),
            (PacketType::CloseRsp, _) => Self::Closed(CloseResponse::default()),
            (PacketType::Data, Some(Payload::Data(data))) => Self::Data(data),
            (PacketType::Data, _) => Self::Data(Data::default()),
            (PacketType::DialCls, Some(Payload::CloseDial(close))) => {
                Self::CancelDial(close.random)
            }
            (PacketType::DialCls, _) => Self::CancelDial(0),
            (PacketType::Drain, _) => Self::Drain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(packet: &Packet) -> String {
        packet.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn packets_encode_to_the_bytes_of_konnectivity() {
        let dial = Packet::dial_request(300, "tcp", "a:1".into());
        // Type 0 is left out, so a dial begins with field 2.
        assert_eq!(hex(&dial), "120d0a03746370120361 3a3118ac02".replace(' ', ""));
        assert_eq!(hex(&Packet::dial_response(300, Ok(1))), "08011a05100118ac02");
        let refused = Packet::dial_response(1, Err("no".into()));
        assert_eq!(hex(&refused), "08011a060a026e6f1801");
        assert_eq!(
            hex(&Packet::data(7, Bytes::from_static(b"hi"))),
            "080422060807 1a026869".replace(' ', "")
        );
        assert_eq!(hex(&Packet::close_response(7, "")), "080332021007");
        assert_eq!(hex(&Packet::close_response(7, "x")), "080332050a01781007");
    }

    #[test]
    fn the_type_decides_and_a_missing_payload_counts_as_an_empty_one() {
        let bare = |r#type| PacketMessage::from(Packet { r#type, payload: None });
        assert!(matches!(bare(0), PacketMessage::Dial(dial) if dial.address.is_empty()));
        assert!(matches!(bare(1), PacketMessage::Dialed(answer) if answer.connect_id == 0));
        assert!(matches!(bare(2), PacketMessage::Close(0)));
        assert!(matches!(bare(3), PacketMessage::Closed(closed) if closed.error.is_empty()));
        assert!(matches!(bare(4), PacketMessage::Data(data) if data.connect_id == 0));
        assert!(matches!(bare(5), PacketMessage::CancelDial(0)));
        assert!(matches!(bare(6), PacketMessage::Drain));
        for r#type in [7, -1, i32::MAX] {
            assert!(matches!(bare(r#type), PacketMessage::Unknown), "{type}");
        }
    }
}
