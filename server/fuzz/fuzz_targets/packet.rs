//! A packet from a frontend, decoded and encoded again.
#![no_main]

use culvert_konnectivity::packet::Packet;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(packet) = Packet::decode(bytes) {
        assert_eq!(Packet::decode(&packet.encode_to_vec()[..]), Ok(packet));
    }
});
