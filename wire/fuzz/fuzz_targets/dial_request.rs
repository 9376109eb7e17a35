//! The body of a dial request, decoded and encoded again.
#![no_main]

use culvert_wire::{dial::DialRequest, frame::{self, Frame, HEAD_LEN, Message}};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    let frame = Frame { kind: DialRequest::KIND, body: body.to_vec().into() };
    if let Ok(message) = frame.message::<DialRequest>() {
        let again = frame::encode(&message).expect("what was decoded fits its frame");
        let frame = Frame { kind: DialRequest::KIND, body: again.slice(HEAD_LEN..) };
        assert_eq!(frame.message::<DialRequest>(), Ok(message));
    }
});
