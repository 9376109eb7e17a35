//! What several test files share: every message with its exact bytes.
#![allow(dead_code, reason = "each test file uses a part of it")]
#![allow(clippy::unwrap_used, reason = "a helper that fails has to fail its test")]

use bytes::Bytes;
use culvert_wire::{
    CloseCode, DialId, InstanceId, Target,
    bounded::{List, Text},
    codec::{EncodeError, MAX_BODY_LEN},
    control::{
        ControlMessage, Drain, Goodbye, Hello, Ping, Pong, Renewal, Secret, ServerEntry,
        ServerList, ServerSet, Welcome,
    },
    dial::{
        DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming, Network, StreamKind,
        TraceContext,
    },
    extension::{Extension, Extensions},
    frame::{self, Frame, FrameError, FrameHead, HEAD_LEN, Message as _},
    identifiers::{Identifier, Identifiers},
    resume::{
        Received, ReceivedOffset, ResumeErrorKind, ResumeReply, ResumeRequest, Resumed,
        SessionInfo, TunnelLost,
    },
    version::Features,
};

/// Any message that a peer can send, wherever it belongs.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Message {
    Control(ControlMessage),
    Request(Box<DialRequest>),
    Reply(Box<DialReply>),
    ResumeRequest(ResumeRequest),
    ResumeReply(ResumeReply),
}

impl Message {
    /// The whole frame that carries the message.
    pub(crate) fn encode(&self) -> Result<Bytes, EncodeError> {
        match self {
            Self::Control(message) => message.encode(),
            Self::Request(message) => frame::encode(&**message),
            Self::Reply(message) => frame::encode(&**message),
            Self::ResumeRequest(message) => frame::encode(message),
            Self::ResumeReply(message) => frame::encode(message),
        }
    }

    /// The message that this frame carries, read by the decoder that its kind belongs to.
    pub(crate) fn decode(frame: &Frame) -> Result<Self, FrameError> {
        match frame.kind {
            DialRequest::KIND => frame.message().map(Box::new).map(Self::Request),
            DialReply::KIND => frame.message().map(Box::new).map(Self::Reply),
            ResumeRequest::KIND => frame.message().map(Self::ResumeRequest),
            ResumeReply::KIND => frame.message().map(Self::ResumeReply),
            _ => ControlMessage::decode(frame).map(Self::Control),
        }
    }

    /// The most bytes that the message's body may have.
    pub(crate) fn max_len(&self) -> usize {
        match self {
            Self::Control(_) => MAX_BODY_LEN,
            Self::Request(_) => DialRequest::MAX_LEN,
            Self::Reply(_) => DialReply::MAX_LEN,
            Self::ResumeRequest(_) => ResumeRequest::MAX_LEN,
            Self::ResumeReply(_) => ResumeReply::MAX_LEN,
        }
    }
}

/// The first frame of these bytes, if the whole of it is there.
pub(crate) fn first_frame(bytes: &[u8]) -> Option<Frame> {
    let (head, rest) = bytes.split_first_chunk::<HEAD_LEN>()?;
    let FrameHead { kind, length } = FrameHead::decode(*head);
    let body = rest.get(..length)?;
    Some(Frame { kind, body: Bytes::copy_from_slice(body) })
}

/// The bytes in hexadecimal, without spaces.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that this hexadecimal text stands for; white space counts for nothing.
pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text
        .chars()
        .filter(|c| !c.is_whitespace())
        .map(|c| c.to_digit(16))
        .map(|digit| digit.and_then(|digit| u8::try_from(digit).ok()))
        .collect::<Option<_>>()?;
    let (pairs, odd) = digits.as_chunks::<2>();
    odd.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// A message and its frame on the wire, which never changes.
pub(crate) struct Example {
    pub(crate) name: &'static str,
    pub(crate) message: Message,
    pub(crate) hex: &'static str,
}

/// Every message of the protocol at least once.
pub(crate) fn examples() -> Vec<Example> {
    let control = |name, message, hex| Example { name, message: Message::Control(message), hex };
    let request =
        |name, message, hex| Example { name, message: Message::Request(Box::new(message)), hex };
    let reply =
        |name, message, hex| Example { name, message: Message::Reply(Box::new(message)), hex };
    let lost_bytes = resume_reply(Err(ResumeErrorKind::LOST_BYTES));
    let resume = |name, message, hex| Example { name, message, hex };
    vec![
        control("hello", ControlMessage::Hello(Box::new(hello())), HELLO),
        control("hello-bare", ControlMessage::Hello(Box::new(bare_hello())), HELLO_BARE),
        control("welcome", ControlMessage::Welcome(Box::new(welcome())), WELCOME),
        control("ping", ControlMessage::Ping(Ping { echo: 7 }), "03000107"),
        control("pong", ControlMessage::Pong(Pong { echo: 7 }), "04000107"),
        control("pong-wide", ControlMessage::Pong(Pong { echo: 0x0123_4567_89ab_cdef }), PONG_WIDE),
        control("drain", ControlMessage::Drain(Drain { deadline_millis: 30_000 }), "050003fb3075"),
        control("goodbye", ControlMessage::Goodbye(goodbye()), GOODBYE),
        control("renewal", ControlMessage::Renewal(renewal()), "07000605746f6b656e"),
        control("server-set", ControlMessage::ServerSet(Box::new(server_set())), SERVER_SET),
        control("welcome-session", ControlMessage::Welcome(Box::new(session_welcome())), SESSION),
        control("received", ControlMessage::Received(received()), RECEIVED),
        control("received-none", ControlMessage::Received(nothing_received()), "09000100"),
        control(
            "tunnel-lost",
            ControlMessage::TunnelLost(TunnelLost { tunnel: 300 }),
            "0a0003fb2c01",
        ),
        control("resumed", ControlMessage::Resumed(resumed()), RESUMED),
        control("resumed-none", ControlMessage::Resumed(nothing_resumed()), "0b0003050000"),
        request("dial-request", dial_request(), DIAL_REQUEST),
        request("dial-request-bare", bare_dial_request(), DIAL_REQUEST_BARE),
        reply("dial-reply", dial_reply(), DIAL_REPLY),
        reply("dial-reply-failure", failed_dial_reply(), DIAL_REPLY_FAILURE),
        resume("resume-request", Message::ResumeRequest(resume_request()), RESUME_REQUEST),
        resume("resume-reply", Message::ResumeReply(resume_reply(Ok(65_536))), RESUME_REPLY),
        resume("resume-reply-reset", Message::ResumeReply(reset_reply()), "1300050005010200"),
        resume("resume-reply-failure", Message::ResumeReply(lost_bytes), "13000401020000"),
    ]
}

const HELLO: &str = "0100440103066e6f64652d31000102030405060708090a0b0c0d0e0f0104697076340831302e302e302e\
    310105746f6b656e0d63756c766572742f302e312e3001fb0001020203";
const HELLO_BARE: &str = "010018010001610000000000000000000000000000000000000000";
const WELCOME: &str = "0200320103087365727665722d610202087365727665722d6100087365727665722d620d31302e302e30\
    2e323a38313332fb001000";
const SERVER_SET: &str =
    "0800230202087365727665722d6100087365727665722d620d31302e302e302e323a38313332";
const PONG_WIDE: &str = "040009fdefcdab8967452301";
const GOODBYE: &str = "06000901075349475445524d";
const DIAL_REQUEST: &str = "10005efdefcdab8967452301000831302e302e302e39fb0a2801fb1027013730302d3061663736353139\
    3136636434336464383434386562323131633830333139632d623761643662373136393230333333312d\
    3031036b3d760120046576656e";
const DIAL_REQUEST_BARE: &str = "100011010207666430303a3a31fbbb0100000000";
const DIAL_REPLY: &str = "11000b000cfb5401fc60e3160000";
const DIAL_REPLY_FAILURE: &str = "11003b0101346469616c207463702031302e302e302e393a31303235303a20636f6e6e6563743a20636f\
    6e6e656374696f6e20726566757365640c00fa00";

const SESSION: &str = "0200560141087365727665722d610202087365727665722d6100087365727665722d620d31302e302e30\
    2e323a38313332fb001002020d63756c766572742f302e312e300413000102030405060708090a0b0c0d\
    0e0ffb2c01";
const RECEIVED: &str = "09001b02fdefcdab8967452301fc000004000007fd00f2052a0100000001";
const RESUMED: &str = "0b000d0502fdefcdab89674523010701";
const RESUME_REQUEST: &str = "120013fdefcdab8967452301fbe8030120046576656e";
const RESUME_REPLY: &str = "13000800fc000001000000";

/// A hello with everything in it.
pub(crate) fn hello() -> Hello {
    Hello {
        revision: 1,
        features: Features::PING.union(Features::DRAIN),
        agent_id: "node-1".parse().unwrap(),
        instance: InstanceId(std::array::from_fn(|index| index as u8)),
        identifiers: identifiers(&[("ipv4", "10.0.0.1")]),
        token: Some(Secret::new("token").unwrap()),
        software: text("culvert/0.1.0"),
        extensions: extensions(&[(0x0100, &[2, 3])]),
    }
}

/// A hello with nothing in it that may be left out.
pub(crate) fn bare_hello() -> Hello {
    Hello {
        revision: 1,
        features: Features::NONE,
        agent_id: "a".parse().unwrap(),
        instance: InstanceId([0; 16]),
        identifiers: Identifiers::default(),
        token: None,
        software: text(""),
        extensions: Extensions::default(),
    }
}

fn servers() -> ServerList {
    let servers = vec![
        ServerEntry { id: "server-a".parse().unwrap(), address: text("") },
        ServerEntry { id: "server-b".parse().unwrap(), address: text("10.0.0.2:8132") },
    ];
    List::try_from(servers).unwrap()
}

pub(crate) fn server_set() -> ServerSet {
    ServerSet { server_count: 2, servers: servers() }
}

pub(crate) fn welcome() -> Welcome {
    Welcome {
        revision: 1,
        features: Features::PING.union(Features::DRAIN),
        server_id: "server-a".parse().unwrap(),
        server_count: 2,
        servers: servers(),
        max_streams: 4096,
        extensions: Extensions::default(),
    }
}

/// A welcome of a tunnel whose streams can be resumed.
pub(crate) fn session_welcome() -> Welcome {
    let session =
        SessionInfo { instance: InstanceId(std::array::from_fn(|index| index as u8)), tunnel: 300 };
    Welcome {
        features: Features::PING.union(Features::RESUME),
        extensions: Extensions::of_welcome(&text("culvert/0.1.0"), Some(&session)),
        ..welcome()
    }
}

/// A report of two streams, one of which has ended.
pub(crate) fn received() -> Received {
    let streams = vec![
        ReceivedOffset { id: DialId(0x0123_4567_89ab_cdef), offset: 262_144, ended: false },
        ReceivedOffset { id: DialId(7), offset: 5_000_000_000, ended: true },
    ];
    Received { streams: List::try_from(streams).unwrap() }
}

pub(crate) fn nothing_received() -> Received {
    Received { streams: List::default() }
}

pub(crate) fn resumed() -> Resumed {
    let streams = vec![DialId(0x0123_4567_89ab_cdef), DialId(7)];
    Resumed { tunnel: 5, streams: List::try_from(streams).unwrap(), more: true }
}

/// The last message about a tunnel of which no stream is resumed.
pub(crate) fn nothing_resumed() -> Resumed {
    Resumed { tunnel: 5, streams: List::default(), more: false }
}

pub(crate) fn resume_request() -> ResumeRequest {
    ResumeRequest {
        id: DialId(0x0123_4567_89ab_cdef),
        received: 1_000,
        extensions: extensions(&[(0x20, b"even")]),
    }
}

pub(crate) fn reset_reply() -> ResumeReply {
    ResumeReply { reset: Some(2), ..resume_reply(Ok(5)) }
}

pub(crate) fn resume_reply(outcome: Result<u64, ResumeErrorKind>) -> ResumeReply {
    ResumeReply { outcome, reset: None, extensions: Extensions::default() }
}

pub(crate) fn goodbye() -> Goodbye {
    Goodbye { code: CloseCode::SHUTDOWN.as_u32(), reason: text("SIGTERM") }
}

pub(crate) fn renewal() -> Renewal {
    Renewal { token: Secret::new("token").unwrap() }
}

/// A dial request with everything in it.
pub(crate) fn dial_request() -> DialRequest {
    DialRequest {
        id: DialId(0x0123_4567_89ab_cdef),
        network: Network::Tcp,
        target: Target::new("10.0.0.9", 10250).unwrap(),
        kind: StreamKind::EXEC,
        timeout_millis: 10_000,
        trace: Some(TraceContext {
            traceparent: text("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            tracestate: text("k=v"),
        }),
        extensions: extensions(&[(0x20, b"even")]),
    }
}

/// A dial request with nothing in it that may be left out.
pub(crate) fn bare_dial_request() -> DialRequest {
    DialRequest {
        id: DialId(1),
        network: Network::Tcp6,
        target: Target::new("fd00::1", 443).unwrap(),
        kind: StreamKind::UNKNOWN,
        timeout_millis: 0,
        trace: None,
        extensions: Extensions::default(),
    }
}

pub(crate) fn dial_reply() -> DialReply {
    DialReply {
        outcome: Ok(()),
        timing: DialTiming { header_micros: 12, resolve_micros: 340, connect_micros: 1_500_000 },
        extensions: Extensions::default(),
    }
}

pub(crate) fn failed_dial_reply() -> DialReply {
    let text = "dial tcp 10.0.0.9:10250: connect: connection refused";
    DialReply {
        outcome: Err(DialFailure::new(DialErrorKind::REFUSED, text)),
        timing: DialTiming { header_micros: 12, resolve_micros: 0, connect_micros: 250 },
        extensions: Extensions::default(),
    }
}

pub(crate) fn text<const MAX: usize>(text: &str) -> Text<MAX> {
    text.try_into().unwrap()
}

pub(crate) fn identifiers(pairs: &[(&str, &str)]) -> Identifiers {
    let identifiers: Vec<_> =
        pairs.iter().map(|(key, value)| Identifier::new(key, value).unwrap()).collect();
    identifiers.try_into().unwrap()
}

pub(crate) fn extensions(pairs: &[(u16, &[u8])]) -> Extensions {
    let extensions: Vec<_> = pairs
        .iter()
        .map(|&(kind, value)| Extension { kind, value: value.to_vec().try_into().unwrap() })
        .collect();
    extensions.try_into().unwrap()
}
