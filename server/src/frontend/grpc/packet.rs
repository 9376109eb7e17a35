//! Konnectivity's packets, as protobuf messages (upstream `client.proto`, which has no package).
//!
//! Receivers go by `type`, not by which payload is set, and ignore types they do not know.

use bytes::Bytes;
use prost::{Enumeration, Message, Oneof};
use tokio::sync::mpsc;
use tonic::Status;

/// Where a `Proxy` stream's packets to the frontend go. An error ends the stream.
pub(super) type Outbound = mpsc::Sender<Result<Packet, Status>>;

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Enumeration)]
#[repr(i32)]
pub enum PacketType {
    /// Frontend: reach a target.
    DialReq = 0,
    /// Server: the target was reached, or why not.
    DialRsp = 1,
    /// Frontend: close the connection, both ways.
    CloseReq = 2,
    /// Server: the connection is closed, both ways.
    CloseRsp = 3,
    /// Either: bytes of the connection.
    Data = 4,
    /// Frontend: the dial is not wanted any more.
    DialCls = 5,
    /// Agent: no new dials.
    Drain = 6,
}

/// One message of a `Proxy` stream, either way.
#[derive(Clone, PartialEq, Message)]
pub struct Packet {
    /// A [`PacketType`].
    #[prost(enumeration = "PacketType", tag = "1")]
    pub r#type: i32,
    /// What belongs to the type.
    #[prost(oneof = "Payload", tags = "2, 3, 4, 5, 6, 7, 8")]
    pub payload: Option<Payload>,
}

/// What belongs to a packet's type.
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

/// Asks for a target.
#[derive(Clone, PartialEq, Message)]
pub struct DialRequest {
    /// `tcp`.
    #[prost(string, tag = "1")]
    pub protocol: String,
    /// `host:port`.
    #[prost(string, tag = "2")]
    pub address: String,
    /// Names the dial; chosen by the frontend.
    #[prost(int64, tag = "3")]
    pub random: i64,
}

/// Answers a dial.
#[derive(Clone, PartialEq, Message)]
pub struct DialResponse {
    /// Why it failed; empty when it did not.
    #[prost(string, tag = "1")]
    pub error: String,
    /// Names the connection from now on; 0 when there is none.
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
    /// Which dial is answered.
    #[prost(int64, tag = "3")]
    pub random: i64,
}

/// Asks to close a connection.
#[derive(Clone, PartialEq, Message)]
pub struct CloseRequest {
    /// Which.
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
}

/// Tells that a connection is closed.
#[derive(Clone, PartialEq, Message)]
pub struct CloseResponse {
    /// Why, when it was not in order.
    #[prost(string, tag = "1")]
    pub error: String,
    /// Which.
    #[prost(int64, tag = "2")]
    pub connect_id: i64,
}

/// Gives a dial up.
#[derive(Clone, PartialEq, Message)]
pub struct CloseDial {
    /// Which.
    #[prost(int64, tag = "1")]
    pub random: i64,
}

/// Announces that an agent goes away.
#[derive(Clone, PartialEq, Message)]
pub struct Drain {}

/// Bytes of a connection.
#[derive(Clone, PartialEq, Message)]
pub struct Data {
    /// Which.
    #[prost(int64, tag = "1")]
    pub connect_id: i64,
    /// Never set by anybody.
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

    /// A dial's answer: the connection's name, or why there is none.
    pub fn dial_response(random: i64, result: Result<i64, String>) -> Self {
        let (connect_id, error) = match result {
            Ok(connect_id) => (connect_id, String::new()),
            Err(error) => (0, error),
        };
        let response = DialResponse { error, connect_id, random };
        Self::new(PacketType::DialRsp, Payload::DialResponse(response))
    }

    /// The answer to a dial on a stream that carries a connection already.
    pub fn second_dial_refused(random: i64) -> Self {
        Self::dial_response(random, Err("this stream carries another connection".into()))
    }

    /// Bytes of a connection.
    pub fn data(connect_id: i64, data: Bytes) -> Self {
        let data = Data { connect_id, error: String::new(), data };
        Self::new(PacketType::Data, Payload::Data(data))
    }

    /// The end of a connection; the error is empty when it ended in order.
    pub fn close_response(connect_id: i64, error: impl Into<String>) -> Self {
        let response = CloseResponse { error: error.into(), connect_id };
        Self::new(PacketType::CloseRsp, Payload::CloseResponse(response))
    }
}

/// What a frontend's packet asks for, by its type; a payload that is missing is an empty one.
#[derive(Debug)]
pub(super) enum Ask {
    Dial(DialRequest),
    Close(i64),
    Data(Data),
    CancelDial(i64),
    /// A type that no frontend sends, or one of a later version.
    Other,
}

impl From<Packet> for Ask {
    fn from(packet: Packet) -> Self {
        match (PacketType::try_from(packet.r#type), packet.payload) {
            (Ok(PacketType::DialReq), Some(Payload::DialRequest(dial))) => Self::Dial(dial),
            (Ok(PacketType::DialReq), _) => Self::Dial(DialRequest::default()),
            (Ok(PacketType::CloseReq), Some(Payload::CloseRequest(close))) => {
                Self::Close(close.connect_id)
            }
            (Ok(PacketType::CloseReq), _) => Self::Close(0),
            (Ok(PacketType::Data), Some(Payload::Data(data))) => Self::Data(data),
            (Ok(PacketType::Data), _) => Self::Data(Data::default()),
            (Ok(PacketType::DialCls), Some(Payload::CloseDial(close))) => {
                Self::CancelDial(close.random)
            }
            (Ok(PacketType::DialCls), _) => Self::CancelDial(0),
            _ => Self::Other,
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
    fn packets_are_the_bytes_that_konnectivity_sends() {
        let dial = DialRequest { protocol: "tcp".into(), address: "a:1".into(), random: 300 };
        let dial = Packet::new(PacketType::DialReq, Payload::DialRequest(dial));
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
    fn the_type_decides_and_a_missing_payload_is_an_empty_one() {
        let bare = |r#type| Ask::from(Packet { r#type, payload: None });
        assert!(matches!(bare(0), Ask::Dial(dial) if dial.address.is_empty()));
        assert!(matches!(bare(2), Ask::Close(0)));
        assert!(matches!(bare(4), Ask::Data(data) if data.connect_id == 0));
        assert!(matches!(bare(5), Ask::CancelDial(0)));
        for r#type in [1, 3, 6, 7, -1, i32::MAX] {
            assert!(matches!(bare(r#type), Ask::Other), "{type}");
        }
    }
}
