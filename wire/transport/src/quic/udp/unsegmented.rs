//! The peers that are sent packets one by one, because batches do not reach them.

use std::{collections::HashMap, net::IpAddr, time::Duration};

use tokio::time::Instant;

/// First and longest time for which a peer is sent packets one by one.
const PERIODS: [Duration; 2] = [Duration::from_secs(600), Duration::from_secs(4 * 3600)];
/// Maximum number of peers. One more is sent batches, each of which costs a system call that fails.
const MAX_PEERS: usize = 4096;

/// The peers that are sent packets one by one, each for a time that grows.
///
/// A peer is known by its address without the port: what drops or refuses batches is the network,
/// and a peer's next tunnel has another port.
#[derive(Debug, Default)]
pub(super) struct Unsegmented {
    peers: HashMap<IpAddr, Period>,
}

#[derive(Clone, Copy, Debug)]
struct Period {
    until: Instant,
    length: Duration,
}

impl Period {
    /// Whether the period is forgotten, so that the next one is short again.
    fn is_forgotten(&self, now: Instant) -> bool {
        self.until + self.length <= now
    }
}

impl Unsegmented {
    /// Adds a peer; the time for which it is sent packets one by one. `None` if it was already, or
    /// there are too many.
    pub(super) fn add(&mut self, peer: IpAddr, now: Instant) -> Option<Duration> {
        if self.contains(peer, now) {
            return None;
        }
        if self.peers.len() >= MAX_PEERS {
            self.peers.retain(|_, period| !period.is_forgotten(now));
            if self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&peer) {
                return None;
            }
        }
        let before = self.peers.get(&peer).filter(|period| !period.is_forgotten(now));
        let length = before.map_or(PERIODS[0], |period| (period.length * 2).min(PERIODS[1]));
        self.peers.insert(peer, Period { until: now + length, length });
        Some(length)
    }

    pub(super) fn contains(&self, peer: IpAddr, now: Instant) -> bool {
        self.peers.get(&peer).is_some_and(|period| now < period.until)
    }

    pub(super) fn count(&self, now: Instant) -> usize {
        self.peers.values().filter(|period| now < period.until).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn a_peer_is_sent_batches_again_and_each_period_is_twice_as_long() {
        let (mut unsegmented, mut now) = (Unsegmented::default(), Instant::now());
        for minutes in [10, 20, 40, 80, 160, 240, 240] {
            let length = Duration::from_secs(minutes * 60);
            assert_eq!(unsegmented.add(PEER, now), Some(length));
            assert_eq!(unsegmented.add(PEER, now), None, "it is known already");
            now += length - Duration::from_millis(1);
            assert!(unsegmented.contains(PEER, now));
            assert_eq!(unsegmented.count(now), 1);
            now += Duration::from_millis(1);
            assert!(!unsegmented.contains(PEER, now));
            assert_eq!(unsegmented.count(now), 0);
        }
        // After as long a time without a fault the peer is a new one.
        now += PERIODS[1];
        assert_eq!(unsegmented.add(PEER, now), Some(PERIODS[0]));
    }

    #[test]
    fn other_peers_are_sent_batches() {
        let (mut unsegmented, now) = (Unsegmented::default(), Instant::now());
        unsegmented.add(PEER, now);
        assert!(!unsegmented.contains("192.0.2.2".parse().unwrap(), now));
    }

    #[test]
    fn the_number_of_peers_is_bounded() {
        let (mut unsegmented, now) = (Unsegmented::default(), Instant::now());
        let peer = |number: u32| IpAddr::from(number.to_be_bytes());
        for number in 0..=MAX_PEERS {
            unsegmented.add(peer(number.try_into().unwrap()), now);
        }
        assert_eq!(unsegmented.peers.len(), MAX_PEERS);
        // Those that are forgotten make room.
        let now = now + PERIODS[0] * 2;
        assert!(unsegmented.add(PEER, now).is_some());
        assert_eq!(unsegmented.peers.len(), 1);
    }
}
