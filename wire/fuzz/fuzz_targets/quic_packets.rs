//! The decrypted packets of a QUIC peer, with copies and repair shards in datagrams: whatever comes,
//! memory is bounded, and what quinn could parse it can parse still.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|script: &[u8]| culvert_transport::quic::fuzz_packets(script));
