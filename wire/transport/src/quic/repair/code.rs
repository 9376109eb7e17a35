//! The Reed–Solomon code of bursts.
//!
//! The bytes of a burst are divided into source shards of one size, the last of which is filled up
//! with zeros. From any so many source and repair shards as there are source shards, all source
//! shards can be rebuilt.

use std::{ops::Range, sync::OnceLock};

use reed_solomon_simd::{ReedSolomonDecoder, ReedSolomonEncoder};

/// Maximum length of a burst, in bytes.
pub(super) const MAX_BURST: usize = 64 * 1024;
/// Sizes of shards are multiples of it, in bytes.
pub(super) const MIN_SIZE: usize = 64;
/// Maximum number of source shards of a burst, and of repair shards.
pub(super) const MAX_SHARDS: usize = 1024;

/// Why a datagram is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("a datagram is too short")]
    Short,
    #[error("a burst is too long for the size of its shards")]
    Length,
    #[error("repair shards have no size")]
    Size,
    #[error("the number of a burst's repair shards is out of range")]
    Count,
    #[error("a repair shard has a number beyond the last one")]
    Index,
    #[error("a datagram does not hold whole repair shards")]
    Ragged,
    #[error("repair shards of one burst differ in its length, their size or their number")]
    Differing,
}

/// How a burst is divided into shards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Division {
    /// Number of bytes of the burst.
    pub(super) length: usize,
    /// Number of bytes of a shard.
    pub(super) size: usize,
    /// Number of repair shards.
    pub(super) count: usize,
}

impl Division {
    pub(super) fn new(length: usize, size: usize, count: usize) -> Result<Self, Malformed> {
        if size < MIN_SIZE || !size.is_multiple_of(MIN_SIZE) {
            return Err(Malformed::Size);
        }
        if !(1..=MAX_SHARDS).contains(&count) {
            return Err(Malformed::Count);
        }
        if !(1..=MAX_BURST).contains(&length) || length.div_ceil(size) > MAX_SHARDS {
            return Err(Malformed::Length);
        }
        Ok(Self { length, size, count })
    }

    /// Number of source shards.
    pub(super) fn sources(&self) -> usize {
        self.length.div_ceil(self.size)
    }

    /// The bytes of the burst that a source shard has.
    pub(super) fn range(&self, source: usize) -> Range<usize> {
        let start = source * self.size;
        start..(start + self.size).min(self.length)
    }
}

/// Computes the tables that all encoders and decoders share: 8 MiB, which take some milliseconds.
pub(super) fn prepare() {
    PREPARED.get_or_init(|| {
        let division = Division { length: 2 * MIN_SIZE, size: MIN_SIZE, count: 1 };
        let burst = [1; 2 * MIN_SIZE];
        let shards = encode(division, &burst);
        let _ = decode(division, &burst, &[true, false], [(0, &shards[..])]);
    });
}

/// Whether [`prepare`] has run.
pub(super) fn is_prepared() -> bool {
    PREPARED.get().is_some()
}

static PREPARED: OnceLock<()> = OnceLock::new();

/// The repair shards of a burst, one after another. `burst` has the division's length.
pub(super) fn encode(division: Division, burst: &[u8]) -> Vec<u8> {
    let Division { size, count, .. } = division;
    try_encode(division, burst).unwrap_or_else(|error| {
        debug_assert!(false, "{division:?}: {error}");
        vec![0; size * count]
    })
}

fn try_encode(division: Division, burst: &[u8]) -> Result<Vec<u8>, reed_solomon_simd::Error> {
    let Division { size, count, .. } = division;
    let mut encoder = ReedSolomonEncoder::new(division.sources(), count, size)?;
    let (whole, rest) = burst.split_at(burst.len() / size * size);
    for shard in whole.chunks_exact(size) {
        encoder.add_original_shard(shard)?;
    }
    if !rest.is_empty() {
        let mut last = vec![0; size];
        last[..rest.len()].copy_from_slice(rest);
        encoder.add_original_shard(&last)?;
    }
    let encoded = encoder.encode()?;
    let mut shards = Vec::with_capacity(size * count);
    encoded.recovery_iter().for_each(|shard| shards.extend_from_slice(shard));
    Ok(shards)
}

/// Rebuilds the source shards of a burst that are missing; `None` if too few are known. `burst` has
/// the division's length, and the bytes of source shards that are known. Repair shards come with
/// their numbers.
pub(super) fn decode<'a>(
    division: Division,
    burst: &[u8],
    is_known: &[bool],
    repair: impl IntoIterator<Item = (usize, &'a [u8])>,
) -> Option<Vec<(usize, Vec<u8>)>> {
    let Division { size, count, .. } = division;
    let mut decoder = ReedSolomonDecoder::new(division.sources(), count, size).ok()?;
    let mut filled = vec![0; size];
    for source in (0..division.sources()).filter(|source| is_known[*source]) {
        let bytes = &burst[division.range(source)];
        if bytes.len() == size {
            decoder.add_original_shard(source, bytes).ok()?;
        } else {
            filled[..bytes.len()].copy_from_slice(bytes);
            decoder.add_original_shard(source, &filled).ok()?;
        }
    }
    let missing = is_known.iter().filter(|is_known| !**is_known).count();
    for (number, shard) in repair.into_iter().take(missing) {
        decoder.add_recovery_shard(number, shard).ok()?;
    }
    let decoded = decoder.decode().ok()?;
    let rebuilt = decoded.restored_original_iter().map(|(source, shard)| {
        let length = division.range(source).len();
        (source, shard[..length].to_vec())
    });
    Some(rebuilt.collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_burst_is_rebuilt_from_any_shards_that_are_enough(
            length in 1_usize..20_000,
            size in 1_usize..8,
            count in 1_usize..60,
            seed: u64,
        ) {
            let Ok(division) = Division::new(length, size * MIN_SIZE, count) else { return Ok(()) };
            let mut random = fastrand::Rng::with_seed(seed);
            let burst: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
            let shards = encode(division, &burst);
            prop_assert_eq!(shards.len(), count * division.size);
            // As many source shards are lost as there are repair shards that arrive.
            let mut repair: Vec<_> = shards.chunks(division.size).enumerate().collect();
            random.shuffle(&mut repair);
            repair.truncate(random.usize(1..=count));
            let lost = repair.len().min(division.sources());
            let mut is_known = vec![true; division.sources()];
            random.choose_multiple(0..division.sources(), lost).iter().for_each(|i| is_known[*i] = false);
            let mut damaged = burst.clone();
            for source in (0..division.sources()).filter(|source| !is_known[*source]) {
                damaged[division.range(source)].fill(0);
            }
            let rebuilt = decode(division, &damaged, &is_known, repair.iter().copied()).unwrap();
            prop_assert_eq!(rebuilt.len(), lost);
            for (source, bytes) in rebuilt {
                damaged[division.range(source)].copy_from_slice(&bytes);
            }
            prop_assert_eq!(damaged, burst);
            let too_few = decode(division, &[0; 20_000][..length], &vec![false; division.sources()],
                repair.iter().copied().take(division.sources() - 1));
            prop_assert!(too_few.is_none());
        }
    }

    #[test]
    fn every_division_that_is_allowed_can_be_coded() {
        for (length, size) in [(1, 64), (64, 64), (65, 64), (MAX_BURST, 64), (MAX_BURST, 255 * 64)]
        {
            for count in [1, 2, 3, 100, MAX_SHARDS] {
                let division = Division::new(length, size, count).unwrap();
                let burst = vec![7; length];
                let shards = try_encode(division, &burst).unwrap();
                let mut is_known = vec![true; division.sources()];
                is_known[0] = false;
                let last = (count - 1, &shards[(count - 1) * size..]);
                let rebuilt = decode(division, &burst, &is_known, [last]).unwrap();
                assert_eq!(rebuilt, [(0, burst[division.range(0)].to_vec())]);
            }
        }
    }

    /// Peers of other versions depend on it.
    #[test]
    fn the_code_does_not_change() {
        // Many source shards, many repair shards, and the same number of both.
        for (length, count, expected) in [
            (640, 3, 0xcce7_ca2d_7c2c_608d),
            (100, 9, 0x0e18_f644_25bd_83ae),
            (256, 4, 0xa5a7_d006_df95_b7df),
            (256, 3, 0x9159_440d_86e5_e561),
            (65_536, 200, 0x40b4_1eb2_bd84_97e6),
        ] {
            let burst: Vec<u8> = (0..length).map(|at| (at * at % 251) as u8).collect();
            let shards = encode(Division::new(length, MIN_SIZE, count).unwrap(), &burst);
            // FNV-1a
            let hash = shards.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            });
            assert_eq!(hash, expected, "{length} bytes, {count} shards: {hash:#x}");
        }
    }
}
