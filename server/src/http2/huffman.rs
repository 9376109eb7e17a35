//! HPACK's Huffman code (RFC 7541 §5.2 and appendix B).
//!
//! The code is canonical: codes of one length follow one another in the order of their symbols, and
//! longer ones follow shorter ones. So the lengths say everything.

use std::sync::LazyLock;

/// Number of bits of the longest code.
const MAX_BITS: usize = 30;
/// The symbol that ends no string: its first bits are the padding.
const END: usize = 256;
/// Number of bits of each symbol's code, and of [`END`].
#[rustfmt::skip]
const BITS: [u8; END + 1] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
    30,
];

/// The code, sorted by the length of its codes.
struct Code {
    /// Symbols in the order of their codes.
    symbols: Vec<u16>,
    /// For each length: its first code, the number of its codes, and the place of the first among
    /// `symbols`.
    lengths: [(u32, u32, u32); MAX_BITS + 1],
}

static CODE: LazyLock<Code> = LazyLock::new(|| {
    let mut symbols = Vec::with_capacity(BITS.len());
    let mut lengths = [(0, 0, 0); MAX_BITS + 1];
    let mut code = 0;
    for (bits, length) in lengths.iter_mut().enumerate().skip(1) {
        code <<= 1;
        let before = symbols.len();
        symbols.extend((0_u16..).zip(BITS).filter(|it| usize::from(it.1) == bits).map(|it| it.0));
        let count = u32::try_from(symbols.len() - before).unwrap_or(0);
        *length = (code, count, u32::try_from(before).unwrap_or(0));
        code += count;
    }
    Code { symbols, lengths }
});

/// Appends the decoded string; `None` when it is not encoded as it must be.
pub(super) fn decode(encoded: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let Code { symbols, lengths } = &*CODE;
    let (mut code, mut bits) = (0_u32, 0);
    for byte in encoded {
        for shift in (0..8).rev() {
            code = code << 1 | u32::from(byte >> shift & 1);
            bits += 1;
            // No code has more bits: 30 ones end in `END`.
            let (first, count, place) = lengths.get(bits)?;
            let above = code.wrapping_sub(*first);
            if above < *count {
                // Fails for `END`, which is no part of a string.
                out.push(u8::try_from(*symbols.get((place + above) as usize)?).ok()?);
                (code, bits) = (0, 0);
            }
        }
    }
    // The padding is less than a byte, of ones.
    (bits < 8 && code == (1 << bits) - 1).then_some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The code and the number of its bits of each symbol, by the rule that makes it canonical.
    fn codes() -> Vec<(u32, u8)> {
        let mut sorted: Vec<usize> = (0..BITS.len()).collect();
        sorted.sort_by_key(|symbol| (BITS[*symbol], *symbol));
        let mut codes = vec![(0, 0); BITS.len()];
        let (mut next, mut bits) = (0_u32, 0);
        for symbol in sorted {
            next <<= BITS[symbol] - bits;
            bits = BITS[symbol];
            codes[symbol] = (next, bits);
            next += 1;
        }
        codes
    }

    fn encode(text: &[u8]) -> Vec<u8> {
        let (codes, mut bits) = (codes(), Vec::new());
        for byte in text {
            let (code, length) = codes[usize::from(*byte)];
            bits.extend((0..length).rev().map(|shift| code >> shift & 1 == 1));
        }
        bits.resize(bits.len().next_multiple_of(8), true);
        let byte = |bits: &[bool]| bits.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit));
        bits.chunks(8).map(byte).collect()
    }

    fn decoded(encoded: &[u8]) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        decode(encoded, &mut out).map(|()| out)
    }

    #[test]
    fn the_examples_of_the_standard_are_decoded() {
        // RFC 7541 appendix C.4.1 and C.6.1.
        let host = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(decoded(&host).unwrap(), b"www.example.com");
        assert_eq!(decoded(&[0x64, 0x02]).unwrap(), b"302");
        assert_eq!(codes()[END], (0x3fff_ffff, 30));
    }

    #[test]
    fn what_is_no_string_is_refused() {
        assert_eq!(decoded(&[0xff; 4]), None, "the end within a string");
        assert_eq!(decoded(&[0b0001_1000]), None, "padding of zeros");
        assert_eq!(decoded(&[0b0001_1111, 0xff]), None, "a whole byte of padding");
    }

    proptest! {
        #[test]
        fn every_string_is_decoded(text in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert_eq!(decoded(&encode(&text)), Some(text));
        }

        /// Another implementation agrees on every input.
        #[test]
        fn any_bytes_are_decoded_as_by_another(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            let other = loona_hpack::huffman::HuffmanDecoder::new().decode(&bytes).ok();
            prop_assert_eq!(decoded(&bytes), other);
        }
    }
}
