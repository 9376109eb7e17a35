//! The head of a CONNECT request.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|head: &[u8]| culvert_server::frontend::fuzz_parse(head));
