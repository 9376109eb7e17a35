//! A row of chunks as one run of bytes.

use bytes::{Buf, Bytes};

/// Takes `length` bytes off the front of `chunks`; how many chunks are used up by it.
pub(crate) fn advance(chunks: &mut [Bytes], mut length: usize) -> usize {
    let mut used = 0;
    for chunk in chunks {
        if chunk.len() > length {
            chunk.advance(length);
            break;
        }
        length -= chunk.len();
        *chunk = Bytes::new();
        used += 1;
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_begins_where_the_length_ends() {
        for (length, used, rest) in
            [(0, 0, "abcdef"), (1, 0, "bcdef"), (2, 1, "cdef"), (4, 2, "ef"), (6, 3, "")]
        {
            let mut chunks = [&b"ab"[..], b"cd", b"ef"].map(Bytes::from_static);
            assert_eq!(advance(&mut chunks, length), used);
            assert_eq!(chunks.concat(), rest.as_bytes());
        }
    }
}
