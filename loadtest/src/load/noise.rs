//! Pseudo-random bytes that both ends of a connection know from a seed, so that a byte that is lost,
//! doubled or in another place is found.

/// Words of the stream of a seed, `SplitMix64` (Steele, Lea, Flood: Fast Splittable Pseudorandom
/// Number Generators, 2014): word `index` needs no word before it.
fn word(seed: u64, index: u64) -> u64 {
    let step = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut mixed = seed.wrapping_add(step);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// The words of a seed as big-endian bytes, from a place on.
#[derive(Debug)]
pub(super) struct Noise {
    seed: u64,
    /// Number of bytes before the next one.
    offset: u64,
    /// The bytes that [`Self::matches`] expects.
    expected: Vec<u8>,
}

impl Noise {
    /// The stream of a seed, from its first byte on.
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, offset: 0, expected: Vec::new() }
    }

    /// The seed.
    pub(super) fn seed(&self) -> u64 {
        self.seed
    }

    /// Fills `bytes` with the next bytes.
    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        let begun = (self.offset % 8) as usize;
        let rest_of_word = (8 - begun) % 8;
        let (head, words) = bytes.split_at_mut(rest_of_word.min(bytes.len()));
        let word_now = word(self.seed, self.offset / 8).to_be_bytes();
        head.copy_from_slice(&word_now[begun..begun + head.len()]);
        let next = (self.offset + head.len() as u64) / 8;
        for (index, bytes) in (next..).zip(words.chunks_mut(8)) {
            bytes.copy_from_slice(&word(self.seed, index).to_be_bytes()[..bytes.len()]);
        }
        self.offset += bytes.len() as u64;
    }

    /// Whether `bytes` are the next bytes.
    pub(super) fn matches(&mut self, bytes: &[u8]) -> bool {
        let mut expected = std::mem::take(&mut self.expected);
        expected.resize(bytes.len(), 0);
        self.fill(&mut expected);
        let matches = expected == bytes;
        self.expected = expected;
        matches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_splitmix64() {
        let words = [0, 1, 2].map(|index| word(1_234_567, index));
        let known =
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(words, known);
    }

    #[test]
    fn the_stream_does_not_depend_on_the_pieces_in_which_it_is_read() {
        let mut whole = [0; 100];
        Noise::new(7).fill(&mut whole);
        let (mut in_pieces, mut noise) = ([0; 100], Noise::new(7));
        for piece in in_pieces.chunks_mut(3) {
            noise.fill(piece);
        }
        assert_eq!(in_pieces, whole);
        let mut noise = Noise::new(7);
        assert!(whole.chunks(7).all(|piece| noise.matches(piece)));
    }

    #[test]
    fn a_byte_that_is_lost_doubled_moved_or_changed_is_found() {
        let mut sent = vec![0; 64];
        Noise::new(7).fill(&mut sent);
        for at in 0..sent.len() - 1 {
            let (mut lost, mut doubled, mut swapped, mut changed) =
                (sent.clone(), sent.clone(), sent.clone(), sent.clone());
            lost.remove(at);
            doubled.insert(at, sent[at]);
            swapped.swap(at, at + 1);
            changed[at] ^= 1;
            for (what, bytes) in [("lost", lost), ("doubled", doubled), ("changed", changed)] {
                assert!(!Noise::new(7).matches(&bytes), "{what} at {at}");
            }
            // Equal neighbours have no order.
            assert_eq!(Noise::new(7).matches(&swapped), sent[at] == sent[at + 1], "{at}");
        }
        assert!(Noise::new(7).matches(&sent));
        assert!(!Noise::new(8).matches(&sent));
    }
}
