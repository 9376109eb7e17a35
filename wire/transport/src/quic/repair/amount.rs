//! How many copies and repair shards are sent, for the loss of the path.
//!
//! A burst cannot be rebuilt when more packets are lost than its repair shards make up for. Packets
//! are lost independently of one another here; where they are lost in bursts, more fail.

use super::code::{MAX_SHARDS, MIN_SIZE};

/// Share of bursts that need not be rebuilt.
const MAX_FAILURES: f64 = 0.001;
/// Maximum number of datagrams with repair shards beyond the number of a burst's packets.
const MAX_EXCESS: usize = 3;
/// Number of shards of a datagram at which they grow beyond [`MIN_SIZE`].
const SHARDS_OF_DATAGRAM: usize = 24;

/// Repair shards of a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Amount {
    /// Number of datagrams.
    pub(super) datagrams: usize,
    /// Number of shards in each.
    pub(super) shards: usize,
}

/// Size of the shards of a burst, in bytes, where a datagram has room for so many bytes of shards.
pub(super) fn shard_size(burst: usize, room: usize) -> usize {
    let size = burst.div_ceil(MAX_SHARDS).max(room / SHARDS_OF_DATAGRAM);
    size.next_multiple_of(MIN_SIZE).clamp(MIN_SIZE, 255 * MIN_SIZE)
}

/// Number of copies of a packet with which it is seldom lost altogether: one or two.
pub(super) fn copies(loss: f64) -> usize {
    if loss * loss > MAX_FAILURES { 2 } else { 1 }
}

/// A burst, and the packets and datagrams that carry it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Repaired {
    /// Number of source shards.
    pub(super) sources: usize,
    /// Number of packets that the burst takes.
    pub(super) packets: usize,
    /// Mean number of source shards that a lost packet costs, wherever it begins.
    pub(super) shards_of_packet: f64,
    /// Maximum number of shards in a datagram.
    pub(super) shards_of_datagram: usize,
}

impl Repaired {
    /// The fewest repair shards with which a burst is seldom not rebuilt, in at most so many
    /// datagrams; `None` if those would not make up for the loss of one packet.
    pub(super) fn amount(&self, loss: f64, most: usize) -> Option<Amount> {
        let most = most.min(self.packets + MAX_EXCESS).min(MAX_SHARDS / self.shards_of_datagram);
        let suffices = |amount| self.failures(amount, loss) <= MAX_FAILURES;
        let full = |datagrams| Amount { datagrams, shards: self.shards_of_datagram };
        let datagrams = (1..most).find(|datagrams| suffices(full(*datagrams))).unwrap_or(most);
        let smaller = |shards| Amount { datagrams, shards };
        let fewest = (1..self.shards_of_datagram).find(|shards| suffices(smaller(*shards)));
        let amount = smaller(fewest.unwrap_or(self.shards_of_datagram));
        (amount.datagrams * amount.shards >= self.missing(1)).then_some(amount)
    }

    /// Number of source shards that so many lost packets cost.
    #[expect(clippy::cast_precision_loss, reason = "a burst has few packets and shards")]
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is rounded up")]
    fn missing(&self, packets: usize) -> usize {
        ((packets as f64 * self.shards_of_packet).ceil() as usize).min(self.sources)
    }

    /// Share of bursts that cannot be rebuilt.
    fn failures(&self, amount: Amount, loss: f64) -> f64 {
        let lost = binomial(self.packets, loss);
        let arrived = binomial(amount.datagrams, 1.0 - loss);
        let fails = |missing: usize| {
            let enough = missing.div_ceil(amount.shards).min(arrived.len());
            arrived[..enough].iter().sum::<f64>()
        };
        (1..=self.packets).map(|packets| lost[packets] * fails(self.missing(packets))).sum()
    }
}

/// Probabilities that of `number` events none, one, … up to all happen.
#[expect(clippy::cast_precision_loss, reason = "there are a few dozen packets")]
fn binomial(number: usize, share: f64) -> Vec<f64> {
    let mut probability = (1.0 - share).powi(i32::try_from(number).unwrap_or(i32::MAX));
    let odds = share / (1.0 - share);
    (0..=number)
        .map(|events| {
            let this = probability;
            probability *= odds * (number - events) as f64 / (events + 1) as f64;
            this
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 1390;

    fn burst(bytes: usize) -> Repaired {
        let size = shard_size(bytes, ROOM);
        Repaired {
            sources: bytes.div_ceil(size),
            packets: bytes.div_ceil(1400),
            shards_of_packet: 1399.0 / size as f64 + 1.0,
            shards_of_datagram: ROOM / size,
        }
    }

    #[test]
    fn probabilities_are_those_of_the_binomial_distribution() {
        let of_three = binomial(3, 0.25);
        let expected = [27.0 / 64.0, 27.0 / 64.0, 9.0 / 64.0, 1.0 / 64.0];
        assert!(of_three.iter().zip(expected).all(|(it, expected)| (it - expected).abs() < 1e-12));
        assert!((binomial(64, 0.05).iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }

    #[test]
    fn more_datagrams_are_sent_for_longer_bursts_and_for_more_loss() {
        // Bursts of 3, 12 and 47 packets.
        let datagrams = |bytes, loss| burst(bytes).amount(loss, 99).unwrap().datagrams;
        let table = [3000, 16_384, 65_536]
            .map(|bytes| [0.01, 0.02, 0.05].map(|loss| datagrams(bytes, loss)));
        assert_eq!(table, [[2, 3, 4], [3, 4, 6], [5, 6, 10]]);
    }

    #[test]
    fn failures_are_rare_unless_the_datagrams_are_too_few() {
        for bytes in (1..=64).map(|kib| kib * 1024) {
            for loss in [0.005, 0.01, 0.03, 0.05, 0.1] {
                let burst = burst(bytes);
                let amount = burst.amount(loss, 99).unwrap();
                let is_most = amount.datagrams == burst.packets + MAX_EXCESS;
                assert!(burst.failures(amount, loss) <= MAX_FAILURES || is_most);
                let fewer = burst.amount(loss, amount.datagrams - 1);
                assert!(fewer.is_none_or(|fewer| fewer.datagrams == amount.datagrams - 1));
            }
        }
        assert_eq!(burst(16_384).amount(0.01, 1), None, "a packet has more shards than a datagram");
        assert_eq!(burst(16_384).amount(0.01, 0), None);
    }

    #[test]
    fn shards_are_small_and_grow_with_the_packets() {
        let sizes = [1500, 16_384, 65_536].map(|burst| shard_size(burst, ROOM));
        assert_eq!(sizes, [64; 3]);
        assert_eq!(shard_size(1500, 60_000), 2560, "of large packets");
        assert_eq!(shard_size(65_536, 1 << 20), 255 * 64);
    }

    #[test]
    fn a_single_packet_has_two_copies_where_one_is_not_enough() {
        assert_eq!([0.005, 0.01, 0.03, 0.05, 0.25].map(copies), [1, 1, 1, 2, 2]);
    }
}
