//! The bodies of a resume request and a resume reply, and the session of a welcome, decoded and
//! encoded again.
#![no_main]

use culvert_wire::{
    bounded::Text,
    extension::{Extension, Extensions, SESSION},
    frame::{self, Frame, HEAD_LEN, Message},
    resume::{ResumeReply, ResumeRequest},
};
use libfuzzer_sys::fuzz_target;

fn check<M: Message + PartialEq + std::fmt::Debug>(body: &[u8]) {
    let frame = Frame { kind: M::KIND, body: body.to_vec().into() };
    if let Ok(message) = frame.message::<M>() {
        let again = frame::encode(&message).expect("what was decoded fits its frame");
        let frame = Frame { kind: M::KIND, body: again.slice(HEAD_LEN..) };
        assert_eq!(frame.message::<M>(), Ok(message));
    }
}

fn check_session(value: &[u8]) {
    let Ok(value) = value.to_vec().try_into() else { return };
    let extensions = Extensions::try_from(vec![Extension { kind: SESSION, value }])
        .expect("one extension is allowed");
    if let Ok(session) = extensions.session() {
        let again = Extensions::of_welcome(&Text::default(), session.as_ref());
        assert_eq!(again.session(), Ok(session));
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((selector, body)) = bytes.split_first() else { return };
    match selector % 3 {
        0 => check::<ResumeRequest>(body),
        1 => check::<ResumeReply>(body),
        _ => check_session(body),
    }
});
