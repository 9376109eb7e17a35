//! Every message's exact bytes, and what is refused. Renumbering a kind or a code, or a codec that
//! changes its mind, fails here.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fmt::Debug;

use culvert_wire::{
    AgentId, CloseCode, DialId, InstanceId, StreamCode, Target,
    codec::{self, DecodeError, MAX_BODY_LEN},
    control::{ControlMessage, Drain, Goodbye, Hello, Ping, Pong, Secret, ServerEntry, Welcome},
    dial::{
        DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming, Network, StreamKind,
        TraceContext,
    },
    extension::{Extension, Extensions, MAX_EXTENSIONS},
    frame::{self, Frame, FrameError, HEAD_LEN, Head, Message},
    route::{Identifier, Identifiers, MAX_IDENTIFIERS},
    text::Text,
    version::Features,
};
use proptest::{collection::vec, option, prelude::*};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn frame_of(bytes: &[u8]) -> Frame {
    let head = Head::decode(*bytes.first_chunk::<HEAD_LEN>().unwrap());
    assert_eq!(bytes.len(), HEAD_LEN + head.length);
    Frame { kind: head.kind, body: bytes[HEAD_LEN..].to_vec().into() }
}

/// Asserts a message's frame, byte for byte, and that it reads back as the same.
#[track_caller]
fn assert_golden<M: Message + PartialEq + Debug>(message: &M, golden: &str) {
    let bytes = frame::encode(message).unwrap();
    assert_eq!(hex(&bytes), golden.replace([' ', '\n'], ""));
    assert_eq!(&frame_of(&bytes).message::<M>().unwrap(), message);
}

fn extensions() -> Extensions {
    let value = vec![0xaa, 0xbb].try_into().unwrap();
    vec![Extension { kind: 0x102, value }].try_into().unwrap()
}

fn hello() -> Hello {
    let identifier = Identifier::new("ipv4", "10.0.0.1").unwrap();
    Hello {
        revision: 1,
        features: Features::PING.union(Features::DRAIN),
        agent_id: "node-1".parse().unwrap(),
        instance: InstanceId(*b"0123456789abcdef"),
        identifiers: vec![identifier].try_into().unwrap(),
        token: Some(Secret::new("t0k").unwrap()),
        software: "x 1".try_into().unwrap(),
        extensions: extensions(),
    }
}

fn welcome() -> Welcome {
    let server = ServerEntry { id: "s-0".parse().unwrap(), address: "h:8132".try_into().unwrap() };
    Welcome {
        revision: 1,
        features: Features::PING,
        server_id: "s-0".parse().unwrap(),
        server_count: 3,
        servers: vec![server].try_into().unwrap(),
        max_streams: 10_000,
        extensions: Extensions::default(),
    }
}

fn dial_request() -> DialRequest {
    DialRequest {
        id: DialId(0x0102_0304_0506_0708),
        network: Network::Tcp,
        target: Target::new("10.0.0.9", 10250).unwrap(),
        kind: StreamKind::LOGS,
        timeout_millis: 10_000,
        trace: Some(TraceContext {
            traceparent: "00-01".try_into().unwrap(),
            tracestate: Text::default(),
        }),
        extensions: Extensions::default(),
    }
}

fn dial_reply(outcome: Result<(), DialFailure>) -> DialReply {
    let timing = DialTiming { policy_micros: 1, resolve_micros: 250, connect_micros: 251 };
    DialReply { outcome, timing, extensions: Extensions::default() }
}

#[test]
fn hello_is_these_bytes() {
    assert_golden(
        &hello(),
        "01 0038
         01 03 066e6f64652d31 30313233343536373839616263646566
         01 0469707634 0831302e302e302e31
         01 0374306b 03782031 01 fb0201 02 aabb",
    );
}

#[test]
fn welcome_is_these_bytes() {
    assert_golden(&welcome(), "02 0017 01 01 03732d30 03 01 03732d30 06683a38313332 fb1027 00");
}

#[test]
fn ping_pong_drain_and_goodbye_are_these_bytes() {
    assert_golden(&Ping { echo: 250 }, "03 0001 fa");
    assert_golden(&Pong { echo: 251 }, "04 0003 fbfb00");
    assert_golden(&Ping { echo: u64::MAX }, "03 0009 fdffffffffffffffff");
    assert_golden(&Drain { deadline_millis: 70_000 }, "05 0005 fc70110100");
    let goodbye = Goodbye { code: 1, reason: "bye".try_into().unwrap() };
    assert_golden(&goodbye, "06 0005 01 03627965");
}

#[test]
fn dial_request_is_these_bytes() {
    assert_golden(
        &dial_request(),
        "10 0023 fd0807060504030201 00 0831302e302e302e39 fb0a28 03 fb1027
         01 0530302d3031 00 00",
    );
}

#[test]
fn dial_reply_is_these_bytes() {
    assert_golden(&dial_reply(Ok(())), "11 0007 00 01 fa fbfb00 00");
    let failure = DialFailure::new(DialErrorKind::REFUSED, "no");
    assert_golden(&dial_reply(Err(failure)), "11 000b 01 01 026e6f 01 fa fbfb00 00");
}

#[test]
fn codes_keep_their_numbers() {
    let names = |codes: Vec<(u32, &'static str)>| {
        codes.into_iter().map(|(code, name)| format!("{code:#04x} {name}")).collect::<Vec<_>>()
    };
    let stream = names(StreamCode::ALL.iter().map(|code| (code.as_u32(), code.name())).collect());
    assert_eq!(
        stream,
        [
            "0x00 abandoned",
            "0x01 closed",
            "0x02 peer_reset",
            "0x03 broken_pipe",
            "0x04 io_error",
            "0x05 cancelled",
            "0x06 dial_timeout",
            "0x07 dial_failed",
            "0x08 malformed",
            "0x09 overloaded",
            "0x0a draining",
            "0x0b tunnel_lost",
            "0x0c shutdown",
            "0x0d frontend_misbehaved",
        ]
    );
    let close = names(CloseCode::ALL.iter().map(|code| (code.as_u32(), code.name())).collect());
    assert_eq!(
        close,
        [
            "0x00 done",
            "0x01 shutdown",
            "0x02 protocol_violation",
            "0x03 incompatible",
            "0x04 unauthenticated",
            "0x05 unresponsive",
            "0x06 overloaded",
            "0x07 superseded",
            "0x08 abandoned",
        ]
    );
}

#[test]
fn kinds_of_streams_and_failures_keep_their_numbers() {
    let encoded = |kind: &str| {
        let mut bytes = Vec::new();
        codec::encode(&StreamKind::from_name(kind), &mut bytes).unwrap();
        bytes[0]
    };
    let kinds =
        ["unknown", "exec", "attach", "logs", "port-forward", "metrics", "health", "webhook"];
    assert_eq!(kinds.map(encoded), [0, 1, 2, 3, 4, 5, 6, 7]);
    let later: StreamKind = codec::decode(&[200]).unwrap();
    assert_eq!(later.name(), "unknown");
    let later: DialErrorKind = codec::decode(&[200]).unwrap();
    assert_eq!(later.name(), "other");
}

/// The frame with its body changed and its length made to fit.
fn with_body(frame: &Frame, change: impl FnOnce(&mut Vec<u8>)) -> Frame {
    let mut body = frame.body.to_vec();
    change(&mut body);
    Frame { kind: frame.kind, body: body.into() }
}

#[test]
fn a_message_that_breaks_a_limit_is_refused() {
    let hello = frame_of(&frame::encode(&hello()).unwrap());
    let malformed = |frame: Frame| match ControlMessage::decode(&frame) {
        Err(FrameError::Body { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    let trailing = malformed(with_body(&hello, |body| body.push(0)));
    assert_eq!(trailing, DecodeError::TrailingBytes(1));
    for cut in 0..hello.body.len() {
        malformed(with_body(&hello, |body| body.truncate(cut)));
    }
    // The agent's name is the third field: empty, and with a control character.
    malformed(with_body(&hello, |body| {
        body.splice(2..9, [0]);
    }));
    malformed(with_body(&hello, |body| body[3] = b'\n'));
}

#[test]
fn more_items_than_allowed_are_refused_where_they_are_made_and_where_they_are_read() {
    let identifier = Identifier::new("host", "x").unwrap();
    let too_many = vec![identifier; MAX_IDENTIFIERS + 1];
    assert!(Identifiers::try_from(too_many.clone()).is_err());
    let mut bytes = Vec::new();
    codec::encode(&too_many, &mut bytes).unwrap();
    assert!(codec::decode::<Identifiers>(&bytes).is_err());

    let extension = Extension { kind: 0, value: vec![].try_into().unwrap() };
    assert!(Extensions::try_from(vec![extension; MAX_EXTENSIONS + 1]).is_err());
    assert!(Identifier::new(&"k".repeat(33), "v").is_err());
    assert!(Identifier::new("k", &"v".repeat(256)).is_err());
    assert!(Secret::new(&"t".repeat(8193)).is_err());
    assert!("n".repeat(256).parse::<AgentId>().is_err());
}

#[test]
fn a_frame_in_the_wrong_place_is_refused_and_one_of_later_times_is_not() {
    let dial = frame_of(&frame::encode(&dial_request()).unwrap());
    assert!(matches!(
        ControlMessage::decode(&dial),
        Err(FrameError::UnexpectedKind { found: 0x10, .. })
    ));
    let ping = frame_of(&frame::encode(&Ping { echo: 1 }).unwrap());
    assert!(ping.message::<DialRequest>().is_err());
    let later = Frame { kind: 0x40, body: vec![1, 2, 3].into() };
    assert_eq!(ControlMessage::decode(&later), Ok(ControlMessage::Unknown { kind: 0x40 }));
}

#[test]
fn a_token_does_not_show_in_a_log() {
    assert!(!format!("{:?}", hello()).contains("t0k"));
}

fn text<const MAX: usize>() -> impl Strategy<Value = Text<MAX>> {
    ".{0,40}".prop_map(Text::truncated)
}

fn any_extensions() -> impl Strategy<Value = Extensions> {
    let extension = (any::<u16>(), vec(any::<u8>(), 0..50))
        .prop_map(|(kind, value)| Extension { kind, value: value.try_into().unwrap() });
    vec(extension, 0..4).prop_map(|extensions| extensions.try_into().unwrap())
}

prop_compose! {
    fn any_hello()(
        revision: u16, instance: [u8; 16], name in "[ -~]{1,60}",
        pairs in vec(("[a-z0-9-]{1,20}", "[ -~]{0,80}"), 0..6),
        token in option::of("[!-~]{0,2000}"), software in text(), extensions in any_extensions(),
    ) -> Hello {
        let pairs = pairs.iter().map(|(key, value)| Identifier::new(key, value).unwrap());
        Hello {
            revision,
            features: Features::supported(),
            agent_id: name.parse().unwrap(),
            instance: InstanceId(instance),
            identifiers: pairs.collect::<Vec<_>>().try_into().unwrap(),
            token: token.map(|token| Secret::new(&token).unwrap()),
            software,
            extensions,
        }
    }
}

prop_compose! {
    fn any_dial_request()(
        id: u64, host in "[a-z0-9.:%-]{0,200}", port: u16, timeout_millis: u32,
        trace in option::of((text(), text())), extensions in any_extensions(),
    ) -> DialRequest {
        DialRequest {
            id: DialId(id),
            network: Network::Tcp6,
            target: Target::new(host, port).unwrap(),
            kind: StreamKind::EXEC,
            timeout_millis,
            trace: trace.map(|(traceparent, tracestate)| TraceContext { traceparent, tracestate }),
            extensions,
        }
    }
}

fn assert_round_trip<M: Message + PartialEq + Debug>(message: &M) -> Result<(), TestCaseError> {
    let bytes = frame::encode(message).unwrap();
    prop_assert!(bytes.len() <= HEAD_LEN + M::MAX_LEN);
    prop_assert!(M::MAX_LEN <= MAX_BODY_LEN);
    prop_assert_eq!(&frame_of(&bytes).message::<M>().unwrap(), message);
    Ok(())
}

proptest! {
    #[test]
    fn every_hello_survives_the_wire(hello in any_hello()) {
        assert_round_trip(&hello)?;
    }

    #[test]
    fn every_dial_request_survives_the_wire(request in any_dial_request()) {
        assert_round_trip(&request)?;
    }

    #[test]
    fn every_reply_survives_the_wire(
        text in ".{0,300}", policy_micros: u32, connect_micros: u32, extensions in any_extensions(),
    ) {
        let outcome = Err(DialFailure::new(DialErrorKind::TIMEOUT, text));
        let timing = DialTiming { policy_micros, resolve_micros: 0, connect_micros };
        assert_round_trip(&DialReply { outcome, timing, extensions })?;
    }

    #[test]
    fn every_number_survives_the_wire(echo: u64, deadline_millis: u32) {
        assert_round_trip(&Ping { echo })?;
        assert_round_trip(&Pong { echo })?;
        assert_round_trip(&Drain { deadline_millis })?;
    }

    #[test]
    fn a_target_reads_back_as_it_is_shown(host in "[a-z0-9.-]{1,60}", port: u16) {
        let target = Target::new(host, port).unwrap();
        prop_assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
    }
}

/// A million mutated frames through every decoder that a peer can reach.
#[test]
fn a_million_mutated_frames_neither_panic_nor_decode_to_something_else() {
    const SEED: u64 = 0xc01d_c0de;
    println!("seed {SEED:#x}");
    let mut random = Random(SEED);
    let failure = DialFailure::new(DialErrorKind::REFUSED, "dial tcp: connection refused");
    let frames = [
        frame::encode(&hello()).unwrap(),
        frame::encode(&welcome()).unwrap(),
        frame::encode(&Ping { echo: 77 }).unwrap(),
        frame::encode(&Drain { deadline_millis: 70_000 }).unwrap(),
        frame::encode(&Goodbye { code: 1, reason: "bye".try_into().unwrap() }).unwrap(),
        frame::encode(&dial_request()).unwrap(),
        frame::encode(&dial_reply(Ok(()))).unwrap(),
        frame::encode(&dial_reply(Err(failure))).unwrap(),
    ];
    let mut decoded = 0;
    for round in 0..1_000_000 {
        let mut bytes = frames[round % frames.len()].to_vec();
        for _ in 0..=random.below(3) {
            mutate(&mut bytes, &mut random);
        }
        let Some(head) = bytes.first_chunk::<HEAD_LEN>() else { continue };
        // What arrived of the body, as long as the head says at most.
        let length = Head::decode(*head).length.min(bytes.len() - HEAD_LEN);
        let body = bytes[HEAD_LEN..HEAD_LEN + length].to_vec().into();
        let frame = Frame { kind: bytes[0], body };
        if let Ok(message) = ControlMessage::decode(&frame) {
            decoded += 1;
            let again = message.encode().unwrap();
            if !again.is_empty() {
                assert_eq!(ControlMessage::decode(&frame_of(&again)), Ok(message));
            }
        }
        if let Ok(request) = frame.message::<DialRequest>() {
            decoded += 1;
            let again = frame::encode(&request).unwrap();
            assert_eq!(frame_of(&again).message(), Ok(request));
        }
        if let Ok(reply) = frame.message::<DialReply>() {
            decoded += 1;
            let again = frame::encode(&reply).unwrap();
            assert_eq!(frame_of(&again).message(), Ok(reply));
        }
    }
    assert!(decoded > 10_000, "only {decoded} decoded: the mutations are too wild to mean much");
}

fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = random.below(bytes.len());
    match random.below(5) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = random.byte(),
        2 => bytes.truncate(at),
        3 => bytes.insert(at, random.byte()),
        _ => {
            // A lie about a length: the codec's markers for larger integers.
            bytes[at] = 0xfb + u8::try_from(random.below(3)).unwrap();
        }
    }
}

/// A small generator (xorshift64*), so that a seed means the same for ever.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % limit
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[7]
    }
}
