//! A control stream's bytes: every frame in them, decoded and encoded again.
#![no_main]

use culvert_wire::{control::ControlMessage, frame::{Frame, HEAD_LEN, Head}};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stream: &[u8]| {
    let mut rest = stream;
    while let Some(head) = rest.first_chunk::<HEAD_LEN>() {
        let Head { kind, length } = Head::decode(*head);
        let Some(body) = rest.get(HEAD_LEN..HEAD_LEN + length) else { return };
        let frame = Frame { kind, body: body.to_vec().into() };
        if let Ok(message) = ControlMessage::decode(&frame) {
            let again = message.encode().expect("what was decoded fits its frame");
            if let Some(body) = again.get(HEAD_LEN..) {
                let frame = Frame { kind, body: body.to_vec().into() };
                assert_eq!(ControlMessage::decode(&frame), Ok(message));
            }
        }
        rest = &rest[HEAD_LEN + length..];
    }
});
