//! A control stream's bytes: every frame in them, decoded and encoded again.
#![no_main]

use bytes::BytesMut;
use culvert_wire::{
    codec::MAX_BODY_LEN,
    control::ControlMessage,
    frame::Frame,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|stream: &[u8]| {
    let mut stream = BytesMut::from(stream);
    while let Ok(Some(frame)) = Frame::split(&mut stream, MAX_BODY_LEN) {
        let Ok(message) = ControlMessage::decode(&frame) else { continue };
        let mut again =
            BytesMut::from(&message.encode().expect("what was decoded fits its frame")[..]);
        let again = Frame::split(&mut again, MAX_BODY_LEN).expect("what was decoded is short");
        if let Some(frame) = again {
            assert_eq!(ControlMessage::decode(&frame), Ok(message));
        }
    }
});
