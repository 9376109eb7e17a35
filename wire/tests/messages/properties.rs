//! Random messages are written as `docs/protocol.md` specifies, and read back.

use culvert_wire::{
    AgentId, DialId, InstanceId, ServerId, Target,
    bounded::{List, Text, misleads},
    codec::{self},
    control::{
        ControlMessage, Drain, Goodbye, Hello, Ping, Pong, Renewal, Secret, ServerEntry,
        ServerList, ServerSet, Welcome,
    },
    dial::{
        DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming, Network, StreamKind,
        TraceContext,
    },
    extension::{Extension, Extensions, MAX_EXTENSION_LEN, MAX_EXTENSIONS},
    frame::HEAD_LEN,
    identifiers::{Identifier, Identifiers, MAX_IDENTIFIERS},
    resume::{
        Received, ReceivedOffset, ResumeErrorKind, ResumeReply, ResumeRequest, Resumed,
        SessionInfo, TunnelLost,
    },
    version::Features,
};
use proptest::{collection::vec, option, prelude::*};

use crate::{
    common::{Message, first_frame},
    frame,
    reference::Reference,
};

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

fn arb_servers() -> impl Strategy<Value = ServerList> {
    let server = (name(), arb_text())
        .prop_map(|(id, address)| ServerEntry { id: ServerId::try_from(id).unwrap(), address });
    length(64)
        .prop_flat_map(move |count| vec(server.clone(), count))
        .prop_map(|servers| List::try_from(servers).unwrap())
}

fn arb_welcome() -> impl Strategy<Value = Message> {
    let servers = arb_servers();
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
        (any::<u32>(), arb_servers()).prop_map(|(server_count, servers)| {
            ControlMessage::ServerSet(Box::new(ServerSet { server_count, servers }))
        }),
        string(8192, |_| true).prop_map(|token| {
            ControlMessage::Renewal(Renewal { token: Secret::new(&token).unwrap() })
        }),
    ]
    .prop_map(Message::Control)
}

fn arb_request() -> impl Strategy<Value = Message> {
    let network = prop_oneof![Just(Network::Tcp), Just(Network::Tcp4), Just(Network::Tcp6)];
    let host = string(255, |c| !misleads(c) && !c.is_whitespace());
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

/// Integers of every length on the wire.
fn integer() -> impl Strategy<Value = u64> + Clone {
    (any::<u64>(), 0_u32..64).prop_map(|(bits, shift)| bits >> shift)
}

fn list<T: std::fmt::Debug, const MAX: usize>(
    item: impl Strategy<Value = T> + Clone,
) -> impl Strategy<Value = List<T, MAX>> {
    length(MAX)
        .prop_flat_map(move |count| vec(item.clone(), count))
        .prop_map(|items| List::try_from(items).unwrap())
}

fn arb_resume() -> impl Strategy<Value = Message> {
    let received = (integer(), integer(), any::<bool>())
        .prop_map(|(id, offset, ended)| ReceivedOffset { id: DialId(id), offset, ended });
    let error = any::<u8>().prop_map(|kind| codec::decode::<ResumeErrorKind>(&[kind]).unwrap());
    prop_oneof![
        list(received)
            .prop_map(|streams| Message::Control(ControlMessage::Received(Received { streams }))),
        integer()
            .prop_map(|tunnel| Message::Control(ControlMessage::TunnelLost(TunnelLost { tunnel }))),
        (integer(), list(integer().prop_map(DialId)), any::<bool>()).prop_map(
            |(tunnel, streams, more)| {
                Message::Control(ControlMessage::Resumed(Resumed { tunnel, streams, more }))
            }
        ),
        (integer(), integer(), arb_extensions()).prop_map(|(id, received, extensions)| {
            Message::ResumeRequest(ResumeRequest { id: DialId(id), received, extensions })
        }),
        (proptest::result::maybe_ok(integer(), error), option::of(any::<u32>()), arb_extensions(),)
            .prop_map(|(outcome, reset, extensions)| {
                Message::ResumeReply(ResumeReply { outcome, reset, extensions })
            }),
    ]
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
    fn messages_that_resume_are_written_as_specified_and_read_back(message in arb_resume()) {
        check(&message)?;
    }

    #[test]
    fn sessions_are_written_as_specified_and_read_back(
        instance in any::<[u8; 16]>(),
        tunnel in integer(),
        software in arb_text(),
    ) {
        let session = SessionInfo { instance: InstanceId(instance), tunnel };
        let extensions = Extensions::of_welcome(&software, Some(&session));
        let value = Reference::default().bytes(&instance).integer(tunnel).0;
        prop_assert_eq!((extensions[1].kind, &extensions[1].value[..]), (4, &value[..]));
        prop_assert_eq!(extensions.session(), Ok(Some(session)));
        prop_assert_eq!(extensions.software(), Some(software));
    }

    #[test]
    fn any_bytes_are_refused_or_read_and_never_more(
        kind in prop_oneof![0x01_u8..=0x0b, 0x10_u8..=0x13],
        body in vec(any::<u8>(), 0..200),
    ) {
        if let Ok(message) = Message::decode(&frame(kind, body)) {
            check(&message)?;
        }
    }
}
