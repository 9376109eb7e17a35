//! What each message is on the wire, byte by byte, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use culvert_wire::{
    AgentId, CloseCode, DialId, InstanceId, ServerId, StreamCode, Target,
    bounded::{List, Text},
    codec::{self, DecodeError, MAX_BODY_LEN},
    control::{ControlMessage, Drain, Goodbye, Hello, Ping, Pong, Secret, ServerEntry, Welcome},
    dial::{
        DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming, Network, StreamKind,
        TraceContext,
    },
    extension::{Extension, Extensions, MAX_EXTENSION_LEN, MAX_EXTENSIONS},
    frame::{Frame, FrameError, HEAD_LEN, Message as _},
    identifiers::{Identifier, Identifiers, MAX_IDENTIFIERS},
    version::Features,
};
use proptest::{collection::vec, option, prelude::*};

use common::{Message, examples, first_frame, hex};

// ---- Exact bytes ----

#[test]
fn every_message_has_its_exact_bytes() {
    for example in examples() {
        let frame = example.message.encode().unwrap();
        assert_eq!(hex(&frame), example.hex, "{}", example.name);
        let read = Message::decode(&first_frame(&frame).unwrap());
        assert_eq!(read.as_ref(), Ok(&example.message), "{}", example.name);
    }
}

#[test]
fn every_kind_has_its_number() {
    let kinds = [
        Hello::KIND,
        Welcome::KIND,
        Ping::KIND,
        Pong::KIND,
        Drain::KIND,
        Goodbye::KIND,
        DialRequest::KIND,
        DialReply::KIND,
    ];
    assert_eq!(kinds, [0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x10, 0x11]);
}

#[test]
fn every_stream_code_has_its_number() {
    let table: Vec<_> = StreamCode::ALL.iter().map(|code| (code.as_u32(), code.name())).collect();
    let expected = [
        (0x00, "abandoned"),
        (0x01, "closed"),
        (0x02, "peer_reset"),
        (0x03, "broken_pipe"),
        (0x04, "io_error"),
        (0x05, "cancelled"),
        (0x06, "dial_timeout"),
        (0x07, "dial_failed"),
        (0x08, "malformed"),
        (0x09, "overloaded"),
        (0x0a, "draining"),
        (0x0b, "tunnel_lost"),
        (0x0c, "shutdown"),
        (0x0d, "frontend_misbehaved"),
    ];
    assert_eq!(table, expected);
}

#[test]
fn every_close_code_has_its_number() {
    let table: Vec<_> = CloseCode::ALL.iter().map(|code| (code.as_u32(), code.name())).collect();
    let expected = [
        (0x00, "done"),
        (0x01, "shutdown"),
        (0x02, "protocol_violation"),
        (0x03, "incompatible"),
        (0x04, "unauthenticated"),
        (0x05, "unresponsive"),
        (0x06, "overloaded"),
        (0x07, "superseded"),
        (0x08, "abandoned"),
        (0x09, "too_many_pings"),
    ];
    assert_eq!(table, expected);
}

#[test]
fn stream_kinds_and_dial_errors_have_their_numbers() {
    let kinds = (0..9).map(|number| codec::decode::<StreamKind>(&[number]).unwrap().name());
    let expected = [
        "unknown",
        "exec",
        "attach",
        "logs",
        "port-forward",
        "metrics",
        "health",
        "webhook",
        "unknown",
    ];
    assert_eq!(kinds.collect::<Vec<_>>(), expected);
    let errors = (0..11).map(|number| codec::decode::<DialErrorKind>(&[number]).unwrap().name());
    let expected = [
        "other",
        "refused",
        "timeout",
        "unresolvable",
        "unreachable",
        "reset",
        "forbidden",
        "overloaded",
        "draining",
        "unsupported",
        "other",
    ];
    assert_eq!(errors.collect::<Vec<_>>(), expected);
}

#[test]
fn features_have_their_bits() {
    assert_eq!(Features::PING.bits(), 1);
    assert_eq!(Features::DRAIN.bits(), 2);
    assert_eq!(Features::HEDGE.bits(), 4);
    assert_eq!(culvert_wire::version::ALPN, b"culvert/1");
    assert_eq!(culvert_wire::version::REVISION, 1);
}

// ---- Refusals ----

/// The frame with this kind and body.
fn frame(kind: u8, body: impl Into<Vec<u8>>) -> Frame {
    Frame { kind, body: body.into().into() }
}

/// What the decoder says of a body that it must call malformed.
fn malformed(kind: u8, body: Vec<u8>) -> String {
    match Message::decode(&frame(kind, body)) {
        Err(FrameError::Body { source: DecodeError::Malformed(text), .. }) => text,
        other => panic!("read as {other:?}"),
    }
}

/// A hello's body with one part replaced; the parts are those of a hello with nothing in it.
fn hello_with(part: usize, bytes: &[u8]) -> Vec<u8> {
    // Revision, features, agent id, instance, identifiers, token, software, extensions.
    let mut parts: [&[u8]; 8] = [&[1], &[0], b"\x01a", &[0; 16], &[0], &[0], &[0], &[0]];
    assert!(Message::decode(&frame(Hello::KIND, parts.concat())).is_ok());
    parts[part] = bytes;
    parts.concat()
}

/// A dial request's body with one part replaced.
fn dial_with(part: usize, bytes: &[u8]) -> Vec<u8> {
    // Id, network, host, port, kind, time-out, trace, extensions.
    let mut parts: [&[u8]; 8] = [&[1], &[0], b"\x01h", &[80], &[0], &[0], &[0], &[0]];
    assert!(Message::decode(&frame(DialRequest::KIND, parts.concat())).is_ok());
    parts[part] = bytes;
    parts.concat()
}

/// The encoding of this text.
fn encoded(text: &str) -> Vec<u8> {
    Reference::default().text(text).0
}

#[test]
fn a_text_longer_than_its_place_is_refused() {
    let long = encoded(&"x".repeat(65));
    assert!(
        malformed(Hello::KIND, hello_with(6, &long)).contains("65 is more than the 64 allowed")
    );
    let token = [&[1], &encoded(&"x".repeat(8193))[..]].concat();
    assert!(malformed(Hello::KIND, hello_with(5, &token)).contains("8193"));
    let id = encoded(&"x".repeat(256));
    assert!(malformed(Hello::KIND, hello_with(2, &id)).contains("256 bytes is longer than 255"));
    let identifier = [&[1], &encoded(&"k".repeat(33))[..], &[0]].concat();
    assert!(malformed(Hello::KIND, hello_with(4, &identifier)).contains("33"));
    let host = encoded(&"x".repeat(256));
    assert!(malformed(DialRequest::KIND, dial_with(2, &host)).contains("no such host"));
    let reason = [&[1], &encoded(&"x".repeat(256))[..]].concat();
    assert!(malformed(Goodbye::KIND, reason).contains("256"));
    let failure = [&[1, 0], &encoded(&"x".repeat(1025))[..], &[0, 0, 0, 0]].concat();
    assert!(malformed(DialReply::KIND, failure).contains("1025"));
}

#[test]
fn a_list_longer_than_its_field_is_refused() {
    let identifiers = [&[65][..], &[0; 130]].concat();
    assert!(malformed(Hello::KIND, hello_with(4, &identifiers)).contains("65 is more than the 64"));
    let extensions = [&[17][..], &[0; 34]].concat();
    assert!(malformed(Hello::KIND, hello_with(7, &extensions)).contains("17 is more than the 16"));
    assert!(malformed(DialRequest::KIND, dial_with(7, &extensions)).contains("17"));
    let extension = [&[1, 0][..], &[251], &1025_u16.to_le_bytes(), &[0; 1025]].concat();
    assert!(malformed(DialRequest::KIND, dial_with(7, &extension)).contains("1025"));
    let servers = [&[1, 0, 1, b's', 1, 65][..], &[1, b's', 0].repeat(65), &[0, 0]].concat();
    assert!(malformed(Welcome::KIND, servers).contains("65 is more than the 64"));
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    malformed(Hello::KIND, hello_with(6, &[2, 0xc3, 0x28]));
    malformed(DialRequest::KIND, dial_with(2, &[1, 0xff]));
}

#[test]
fn a_name_or_host_that_spoils_a_log_is_refused() {
    assert!(malformed(Hello::KIND, hello_with(2, &[0])).contains("must not be empty"));
    assert!(malformed(Hello::KIND, hello_with(2, b"\x02a\n")).contains("must be printable ASCII"));
    assert!(malformed(DialRequest::KIND, dial_with(2, b"\x03a b")).contains("no such host"));
}

#[test]
fn a_value_without_meaning_is_refused() {
    malformed(DialRequest::KIND, dial_with(1, &[3])); // A fourth network.
    malformed(DialRequest::KIND, dial_with(3, &[252, 0, 0, 1, 0])); // A port of 65536.
    malformed(DialRequest::KIND, dial_with(6, &[2])); // Neither absent nor present.
    malformed(DialReply::KIND, vec![2, 0, 0, 0, 0]); // Neither success nor failure.
    malformed(Ping::KIND, vec![254]); // An integer of sixteen bytes.
    malformed(Ping::KIND, vec![255]); // Reserved.
}

#[test]
fn bytes_behind_a_message_are_refused() {
    for example in examples() {
        let mut frame = first_frame(&example.message.encode().unwrap()).unwrap();
        frame.body = [&frame.body[..], &[0]].concat().into();
        let source = DecodeError::TrailingBytes(1);
        let expected = FrameError::Body { kind: frame.kind, source };
        assert_eq!(Message::decode(&frame), Err(expected), "{}", example.name);
    }
}

#[test]
fn a_message_cut_short_anywhere_is_refused() {
    for example in examples() {
        let frame = example.message.encode().unwrap();
        for length in HEAD_LEN..frame.len() {
            let cut = Frame { kind: frame[0], body: frame.slice(HEAD_LEN..length) };
            assert!(Message::decode(&cut).is_err(), "{} cut at {length}", example.name);
        }
    }
}

#[test]
fn a_message_of_another_place_is_refused() {
    let dial = frame(DialRequest::KIND, dial_with(0, &[1]));
    assert!(matches!(
        ControlMessage::decode(&dial),
        Err(FrameError::UnexpectedKind { found: 0x10, .. })
    ));
    assert_eq!(
        dial.message::<DialReply>(),
        Err(FrameError::UnexpectedKind { found: 0x10, expected: 0x11 })
    );
    for kind in 0x10..=0x1f {
        assert!(ControlMessage::decode(&frame(kind, [])).is_err(), "{kind:#04x}");
    }
}

#[test]
fn a_control_message_of_a_later_revision_is_distinguished_from_a_broken_one() {
    for kind in (0x00..=0xff).filter(|kind| !(0x01..=0x06).contains(kind) && kind >> 4 != 1) {
        let read = ControlMessage::decode(&frame(kind, [0xff; 9]));
        assert_eq!(read, Ok(ControlMessage::Unknown { kind }));
    }
}

#[test]
fn a_dial_longer_than_its_limit_is_refused_unread() {
    let body = vec![0; DialRequest::MAX_LEN + 1];
    let refused = Err(FrameError::Oversized { kind: 0x10, length: 4097, limit: 4096 });
    assert_eq!(frame(0x10, body.clone()).message::<DialRequest>(), refused);
    assert!(frame(0x11, body).message::<DialReply>().is_err());
}

/// Many integers in a message must not count against its length more than they take.
#[test]
fn a_hello_that_fills_its_frame_can_be_read() {
    let mut hello = common::bare_hello();
    let pairs = vec![("k".repeat(32), "v".repeat(216)); MAX_IDENTIFIERS];
    let pairs: Vec<_> = pairs.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    hello.identifiers = common::identifiers(&pairs);
    let spare = MAX_BODY_LEN + HEAD_LEN - culvert_wire::frame::encode(&hello).unwrap().len() - 3;
    hello.token = Some(Secret::new(&"t".repeat(spare)).unwrap());
    let bytes = culvert_wire::frame::encode(&hello).unwrap();
    assert_eq!(bytes.len(), HEAD_LEN + MAX_BODY_LEN);
    assert_eq!(first_frame(&bytes).unwrap().message(), Ok(hello));
}

// ---- Properties ----

/// The encoding as `docs/protocol.md` describes it, written a second time: the code cannot drift
/// from the text.
#[derive(Default)]
struct Reference(Vec<u8>);

impl Reference {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn integer(self, value: impl Into<u64>) -> Self {
        let value = value.into();
        let wide = value.to_le_bytes();
        match value {
            0..=250 => self.bytes(&wide[..1]),
            251..=0xffff => self.bytes(&[251]).bytes(&wide[..2]),
            0x1_0000..=0xffff_ffff => self.bytes(&[252]).bytes(&wide[..4]),
            _ => self.bytes(&[253]).bytes(&wide),
        }
    }

    fn text(self, text: &str) -> Self {
        self.integer(text.len() as u64).bytes(text.as_bytes())
    }

    fn list<T>(self, items: &[T], item: impl Fn(Self, &T) -> Self) -> Self {
        items.iter().fold(self.integer(items.len() as u64), item)
    }

    fn option<T>(self, value: Option<&T>, some: impl Fn(Self, &T) -> Self) -> Self {
        match value {
            None => self.bytes(&[0]),
            Some(value) => some(self.bytes(&[1]), value),
        }
    }

    fn extensions(self, extensions: &Extensions) -> Self {
        self.list(extensions, |out, extension| {
            out.integer(extension.kind)
                .integer(extension.value.len() as u64)
                .bytes(&extension.value)
        })
    }

    fn body(message: &Message) -> Vec<u8> {
        let out = Self::default();
        let out = match message {
            Message::Control(ControlMessage::Hello(hello)) => out
                .integer(hello.revision)
                .integer(hello.features.bits())
                .text(hello.agent_id.as_str())
                .bytes(&hello.instance.0)
                .list(&hello.identifiers, |out, identifier| {
                    out.text(&identifier.key).text(&identifier.value)
                })
                .option(hello.token.as_ref(), |out, token| out.text(token.expose()))
                .text(&hello.software)
                .extensions(&hello.extensions),
            Message::Control(ControlMessage::Welcome(welcome)) => out
                .integer(welcome.revision)
                .integer(welcome.features.bits())
                .text(welcome.server_id.as_str())
                .integer(welcome.server_count)
                .list(&welcome.servers, |out, server| {
                    out.text(server.id.as_str()).text(&server.address)
                })
                .integer(welcome.max_streams)
                .extensions(&welcome.extensions),
            Message::Control(ControlMessage::Ping(ping)) => out.integer(ping.echo),
            Message::Control(ControlMessage::Pong(pong)) => out.integer(pong.echo),
            Message::Control(ControlMessage::Drain(drain)) => out.integer(drain.deadline_millis),
            Message::Control(ControlMessage::Goodbye(goodbye)) => {
                out.integer(goodbye.code).text(&goodbye.reason)
            }
            Message::Control(ControlMessage::Unknown { .. }) => out,
            Message::Request(request) => out
                .integer(request.id.0)
                .integer(request.network as u64)
                .text(request.target.host())
                .integer(request.target.port())
                .bytes(&[number(request.kind)])
                .integer(request.timeout_millis)
                .option(request.trace.as_ref(), |out, trace| {
                    out.text(&trace.traceparent).text(&trace.tracestate)
                })
                .extensions(&request.extensions),
            Message::Reply(reply) => match &reply.outcome {
                Ok(()) => out.integer(0_u64),
                Err(failure) => {
                    out.integer(1_u64).bytes(&[number(failure.kind)]).text(&failure.text)
                }
            }
            .integer(reply.timing.header_micros)
            .integer(reply.timing.resolve_micros)
            .integer(reply.timing.connect_micros)
            .extensions(&reply.extensions),
        };
        out.0
    }
}

/// The number of a stream kind or dial error, which keeps it to itself.
fn number(kind: impl serde::Serialize) -> u8 {
    let mut bytes = Vec::new();
    codec::encode(&kind, &mut bytes).unwrap();
    bytes[0]
}

/// Lengths up to `max`: mostly short, sometimes any, sometimes the limit.
fn length(max: usize) -> impl Strategy<Value = usize> + Clone {
    prop_oneof![4 => 0..=max.min(12), 1 => 0..=max, 1 => Just(max)]
}

/// Text of every length, made of characters that `allowed` lets pass.
fn string(max: usize, allowed: fn(char) -> bool) -> impl Strategy<Value = String> + Clone {
    (vec(any::<char>(), 1..6), length(max)).prop_map(move |(pattern, length)| {
        let mut text = String::new();
        for c in pattern.into_iter().map(|c| if allowed(c) { c } else { 'x' }).cycle() {
            if text.len() + c.len_utf8() > length {
                return text;
            }
            text.push(c);
        }
        text
    })
}

fn arb_text<const MAX: usize>() -> impl Strategy<Value = Text<MAX>> + Clone {
    string(MAX, |_| true).prop_map(|text| text.try_into().unwrap())
}

fn name() -> impl Strategy<Value = String> + Clone {
    (vec(proptest::char::range(' ', '~'), 1..6), length(255))
        .prop_map(|(pattern, length)| pattern.into_iter().cycle().take(length.max(1)).collect())
}

fn arb_extensions() -> impl Strategy<Value = Extensions> {
    let value = (any::<u8>(), length(MAX_EXTENSION_LEN));
    let extension = (any::<u16>(), value).prop_map(|(kind, (byte, length))| Extension {
        kind,
        value: vec![byte; length].try_into().unwrap(),
    });
    length(MAX_EXTENSIONS)
        .prop_flat_map(move |count| vec(extension.clone(), count))
        .prop_map(|extensions| extensions.try_into().unwrap())
}

fn arb_features() -> impl Strategy<Value = Features> {
    any::<u64>().prop_map(|bits| codec::decode(&Reference::default().integer(bits).0).unwrap())
}

fn arb_identifiers() -> impl Strategy<Value = Identifiers> {
    let identifier = (arb_text(), arb_text()).prop_map(|(key, value)| Identifier { key, value });
    length(MAX_IDENTIFIERS)
        .prop_flat_map(move |count| {
            // As many as may be, but seldom more than fit: clones of a few.
            vec(identifier.clone(), 1..4)
                .prop_map(move |few| few.into_iter().cycle().take(count).collect::<Vec<_>>())
        })
        .prop_map(|identifiers| identifiers.try_into().unwrap())
}

fn arb_hello() -> impl Strategy<Value = Message> {
    let token = option::of(string(8192, |_| true).prop_map(|token| Secret::new(&token).unwrap()));
    let head = (any::<u16>(), arb_features(), name(), any::<[u8; 16]>());
    (head, arb_identifiers(), token, arb_text(), arb_extensions()).prop_map(
        |((revision, features, id, instance), identifiers, token, software, extensions)| {
            Message::Control(ControlMessage::Hello(Box::new(Hello {
                revision,
                features,
                agent_id: AgentId::try_from(id).unwrap(),
                instance: InstanceId(instance),
                identifiers,
                token,
                software,
                extensions,
            })))
        },
    )
}

fn arb_welcome() -> impl Strategy<Value = Message> {
    let server = (name(), arb_text())
        .prop_map(|(id, address)| ServerEntry { id: ServerId::try_from(id).unwrap(), address });
    let servers = length(64)
        .prop_flat_map(move |count| vec(server.clone(), count))
        .prop_map(|servers| List::try_from(servers).unwrap());
    let head = (any::<u16>(), arb_features(), name(), any::<u32>());
    (head, servers, any::<u32>(), arb_extensions()).prop_map(
        |((revision, features, id, server_count), servers, max_streams, extensions)| {
            Message::Control(ControlMessage::Welcome(Box::new(Welcome {
                revision,
                features,
                server_id: ServerId::try_from(id).unwrap(),
                server_count,
                servers,
                max_streams,
                extensions,
            })))
        },
    )
}

fn arb_small_control() -> impl Strategy<Value = Message> {
    prop_oneof![
        any::<u64>().prop_map(|echo| ControlMessage::Ping(Ping { echo })),
        any::<u64>().prop_map(|echo| ControlMessage::Pong(Pong { echo })),
        any::<u32>().prop_map(|deadline_millis| ControlMessage::Drain(Drain { deadline_millis })),
        (any::<u32>(), arb_text())
            .prop_map(|(code, reason)| ControlMessage::Goodbye(Goodbye { code, reason })),
    ]
    .prop_map(Message::Control)
}

fn arb_request() -> impl Strategy<Value = Message> {
    let network = prop_oneof![Just(Network::Tcp), Just(Network::Tcp4), Just(Network::Tcp6)];
    let host = string(255, |c| !c.is_control() && !c.is_whitespace());
    let target = (host, any::<u16>()).prop_map(|(host, port)| Target::new(host, port).unwrap());
    let kind = any::<u8>().prop_map(|kind| codec::decode::<StreamKind>(&[kind]).unwrap());
    let trace = option::of(
        (arb_text(), arb_text())
            .prop_map(|(traceparent, tracestate)| TraceContext { traceparent, tracestate }),
    );
    (any::<u64>(), network, target, kind, any::<u32>(), trace, arb_extensions()).prop_map(
        |(id, network, target, kind, timeout_millis, trace, extensions)| {
            Message::Request(Box::new(DialRequest {
                id: DialId(id),
                network,
                target,
                kind,
                timeout_millis,
                trace,
                extensions,
            }))
        },
    )
}

fn arb_reply() -> impl Strategy<Value = Message> {
    let failure = (any::<u8>(), arb_text()).prop_map(|(kind, text)| DialFailure {
        kind: codec::decode::<DialErrorKind>(&[kind]).unwrap(),
        text,
    });
    let timing = any::<[u32; 3]>().prop_map(|[header_micros, resolve_micros, connect_micros]| {
        DialTiming { header_micros, resolve_micros, connect_micros }
    });
    (option::of(failure), timing, arb_extensions()).prop_map(|(failure, timing, extensions)| {
        let outcome = failure.map_or(Ok(()), Err);
        Message::Reply(Box::new(DialReply { outcome, timing, extensions }))
    })
}

/// The message has the bytes that the specification gives it and is read back as it was, unless
/// it is longer than its kind allows; then it is not written.
fn check(message: &Message) -> Result<(), TestCaseError> {
    let body = Reference::body(message);
    let Ok(bytes) = message.encode() else {
        prop_assert!(body.len() > message.max_len(), "{} bytes were refused", body.len());
        return Ok(());
    };
    prop_assert!(bytes.len() <= HEAD_LEN + message.max_len());
    prop_assert_eq!(&bytes[HEAD_LEN..], &body[..]);
    let frame = first_frame(&bytes).unwrap();
    prop_assert_eq!(frame.body.len(), body.len());
    let read = Message::decode(&frame);
    prop_assert_eq!(read.as_ref(), Ok(message));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hellos_are_written_as_specified_and_read_back(message in arb_hello()) {
        check(&message)?;
    }

    #[test]
    fn welcomes_are_written_as_specified_and_read_back(message in arb_welcome()) {
        check(&message)?;
    }

    #[test]
    fn small_control_messages_are_written_as_specified_and_read_back(
        message in arb_small_control(),
    ) {
        check(&message)?;
    }

    #[test]
    fn dial_requests_are_written_as_specified_and_read_back(message in arb_request()) {
        check(&message)?;
    }

    #[test]
    fn dial_replies_are_written_as_specified_and_read_back(message in arb_reply()) {
        check(&message)?;
    }

    #[test]
    fn any_bytes_are_refused_or_read_and_never_more(
        kind in prop_oneof![0x01_u8..=0x06, 0x10_u8..=0x11],
        body in vec(any::<u8>(), 0..200),
    ) {
        if let Ok(message) = Message::decode(&frame(kind, body)) {
            check(&message)?;
        }
    }
}
