//! The HTTP/2 bytes of a client: the connection ends, and holds nothing then.
#![no_main]

use culvert_server::fuzz_http2;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u16, &[u8])| {
    let (cut, bytes) = input;
    fuzz_http2(cut.into(), bytes);
});
