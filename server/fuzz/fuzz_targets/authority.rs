//! The HTTP/2 bytes of a client: the output does not depend on how they are cut, and is bounded.
#![no_main]

use bytes::BytesMut;
use culvert_server::frontend::Frames;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, &[u8])| {
    let (cut, bytes) = input;
    let bytes = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", bytes].concat();
    let mut whole = BytesMut::new();
    Frames::default().push(&bytes, &mut whole);
    let (mut frames, mut parts) = (Frames::default(), BytesMut::new());
    let (before, after) = bytes.split_at(usize::from(cut).min(bytes.len()));
    frames.push(before, &mut parts);
    frames.push(after, &mut parts);
    assert_eq!(whole, parts);
    assert!(whole.len() <= bytes.len() * 2 + 16_384);
});
