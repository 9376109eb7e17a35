//! The bytes of a QMux peer, and what this side does meanwhile: whatever comes, memory is bounded,
//! credit is kept to, and what is sent is in order.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| culvert_transport::qmux::fuzz_peer(script));
