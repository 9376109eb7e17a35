//! The exact bytes of messages, and the numbers of kinds and codes.

use culvert_wire::{
    CloseCode, StreamCode,
    codec::{self},
    control::{Drain, Goodbye, Hello, Ping, Pong, Renewal, ServerSet, Welcome},
    dial::{DialErrorKind, DialReply, DialRequest, StreamKind},
    frame::Message as _,
    resume::{Received, ResumeErrorKind, ResumeReply, ResumeRequest, Resumed, TunnelLost},
    version::Features,
};

use crate::common::{Message, examples, first_frame, hex};

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
        Renewal::KIND,
        ServerSet::KIND,
        Received::KIND,
        TunnelLost::KIND,
        Resumed::KIND,
        DialRequest::KIND,
        DialReply::KIND,
        ResumeRequest::KIND,
        ResumeReply::KIND,
    ];
    assert!(kinds[..11].iter().copied().eq(0x01..=0x0b), "{kinds:02x?}");
    assert!(kinds[11..].iter().copied().eq(0x10..=0x13), "{kinds:02x?}");
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
        (0x0a, "evicted"),
    ];
    assert_eq!(table, expected);
}

#[test]
fn stream_kinds_and_errors_of_dials_and_resumptions_have_their_numbers() {
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
    let errors = (0..4).map(|number| codec::decode::<ResumeErrorKind>(&[number]).unwrap());
    let names: Vec<_> = errors.map(|kind| kind.to_string()).collect();
    assert_eq!(names, ["unknown_stream", "ended", "lost_bytes", "unknown_stream"]);
    assert_eq!(codec::decode(&[0]), Ok(ResumeErrorKind::UNKNOWN_STREAM));
    assert_eq!(codec::decode(&[1]), Ok(ResumeErrorKind::ENDED));
    assert_eq!(codec::decode(&[2]), Ok(ResumeErrorKind::LOST_BYTES));
}

#[test]
fn features_have_their_bits() {
    assert_eq!(Features::PING.bits(), 1);
    assert_eq!(Features::DRAIN.bits(), 2);
    assert_eq!(Features::HEDGE.bits(), 4);
    assert_eq!(Features::RENEWAL.bits(), 8);
    assert_eq!(Features::SERVER_SET.bits(), 16);
    assert_eq!(Features::REPAIR.bits(), 32);
    assert_eq!(Features::RESUME.bits(), 64);
    assert_eq!(culvert_wire::version::ALPN, b"culvert/1");
    assert_eq!(culvert_wire::version::REVISION, 1);
}
