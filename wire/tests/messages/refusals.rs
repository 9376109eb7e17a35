//! Messages that are refused.

use culvert_wire::{
    DialId,
    codec::{DecodeError, MAX_BODY_LEN},
    control::{ControlMessage, Goodbye, Hello, Ping, Secret, Welcome},
    dial::{DialReply, DialRequest},
    frame::{Frame, FrameError, HEAD_LEN, Message as _},
    identifiers::MAX_IDENTIFIERS,
    resume::{Received, ReceivedOffset, ResumeReply, ResumeRequest, Resumed},
};

use crate::{
    common::{self, Message, examples, first_frame},
    frame,
    reference::Reference,
};

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
    let offsets = [&[251][..], &257_u16.to_le_bytes(), &[0; 3 * 257]].concat();
    assert!(malformed(Received::KIND, offsets).contains("257 is more than the 256"));
    let streams = [&[1, 251][..], &1025_u16.to_le_bytes(), &[0; 1025], &[0]].concat();
    assert!(malformed(Resumed::KIND, streams).contains("1025 is more than the 1024"));
    let resumption = [&[1, 1][..], &extensions].concat();
    assert!(malformed(ResumeRequest::KIND, resumption).contains("17 is more than the 16"));
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
    malformed(ResumeReply::KIND, vec![2, 0, 0]); // Neither success nor failure.
    malformed(Received::KIND, vec![1, 1, 1, 2]); // Neither ended nor open.
    malformed(Resumed::KIND, vec![1, 0, 2]); // Neither the last nor one with more behind it.
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
    for kind in (0x00..=0xff).filter(|kind| !(0x01..=0x0b).contains(kind) && kind >> 4 != 1) {
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

#[test]
fn a_resumption_longer_than_its_limit_is_refused_unread() {
    let body = vec![0; 513];
    let refused = Err(FrameError::Oversized { kind: 0x12, length: 513, limit: 512 });
    assert_eq!(frame(0x12, body.clone()).message::<ResumeRequest>(), refused);
    let refused = Err(FrameError::Oversized { kind: 0x13, length: 513, limit: 512 });
    assert_eq!(frame(0x13, body).message::<ResumeReply>(), refused);
    let value = [0; 512];
    let request = ResumeRequest {
        extensions: common::extensions(&[(0x20, &value)]),
        ..common::resume_request()
    };
    assert!(culvert_wire::frame::encode(&request).is_err());
}

/// The costliest lists fit their frames, and the limit of what one decoding may cost.
#[test]
fn full_lists_of_streams_can_be_read() {
    let offset = ReceivedOffset { id: DialId(u64::MAX), offset: u64::MAX, ended: true };
    let received = Received { streams: vec![offset; 256].try_into().unwrap() };
    let streams = vec![DialId(u64::MAX); 1024].try_into().unwrap();
    let resumed = Resumed { tunnel: u64::MAX, streams, more: true };
    for message in [ControlMessage::Received(received), ControlMessage::Resumed(resumed)] {
        let bytes = message.encode().unwrap();
        assert_eq!(ControlMessage::decode(&first_frame(&bytes).unwrap()), Ok(message));
    }
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
