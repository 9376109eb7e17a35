//! The peers of the table, and which of them gives way first.
//!
//! Of the source with the most peers beyond its share, the one that has proved least gives way, and
//! among those the oldest. A crowd of many sources with a few peers each is different, such as all
//! agents after a restart of the server. There each peer stays for [`CROWD_TIME`] at least, and
//! newcomers are refused meanwhile: if each took the place of another, all would be sent away in
//! their handshakes.
//!
//! Strangers make the table work, at whatever rate they connect. So sources are kept in order of
//! who gives way first, and each operation takes time in the logarithm of the number of peers.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, HashMap},
    mem,
    time::Duration,
};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{super::recent::Recent, NoRoom, Progress, Source};

/// Maximum number of peers beyond its share of a source in a crowd. An agent tries several addresses
/// and both carriers at once.
pub(super) const CROWD_EXCESS: usize = 3;
/// Time that a peer has in a crowd: for a handshake over a long path.
pub(super) const CROWD_TIME: Duration = Duration::from_secs(1);

/// What a peer has proved, and its number, which grows: the least of a source gives way first.
type Key = (Progress, u64);

/// Peers that are not admitted yet, and the memory of sources of agents. Times that the methods are
/// given never go back.
#[derive(Debug, Default)]
pub(super) struct Peers {
    peers: HashMap<u64, Peer>,
    /// Number of the last peer that entered.
    last_number: u64,
    /// Sources with at least one peer.
    sources: HashMap<Source, OfSource>,
    /// Peers that had not had their time at the last look, the oldest first.
    in_their_time: BTreeSet<u64>,
    /// Sources by their first peer to give way; the last one is the first to give way of all.
    order: BTreeSet<(usize, Reverse<Key>, Source)>,
    /// The same, of the peers that have had their time, by whether the source has more than its
    /// share.
    crowd_order: BTreeSet<(bool, Reverse<Key>, Source)>,
    recent: Recent,
}

#[derive(Debug)]
struct Peer {
    source: Source,
    progress: Progress,
    entered: Instant,
    /// Cancelled when the peer is to give way.
    gives_way: CancellationToken,
}

/// Peers of one source.
#[derive(Debug, Default)]
struct OfSource {
    all: BTreeSet<Key>,
    /// Those of them that have had their time.
    had_time: BTreeSet<Key>,
    /// What the orders have of this source.
    rank: Rank,
}

/// A source's part of the orders.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Rank {
    first: Option<(usize, Key)>,
    first_in_crowd: Option<(bool, Key)>,
}

impl Peers {
    /// Number of peers.
    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    /// Enters a peer of this source. If there are as many as the limit, another one gives way.
    /// Returns the peer's number, and what is cancelled when it is to give way.
    ///
    /// # Errors
    /// When there are too many, and none of them is to give way to this one.
    pub(super) fn enter(
        &mut self,
        limit: usize,
        source: Source,
        progress: Progress,
        now: Instant,
    ) -> Result<(u64, CancellationToken), NoRoom> {
        self.advance(now);
        if self.len() >= limit
            && let Some((excess, first)) = self.first_to_give_way()
        {
            let is_crowd = self.is_crowd(excess, first, source, progress, now);
            let leaves = match is_crowd {
                true => self.first_in_crowd().ok_or(NoRoom)?,
                false => first,
            };
            if let Some(peer) = self.take(leaves) {
                peer.gives_way.cancel();
            }
        }
        self.last_number += 1;
        let (number, gives_way) = (self.last_number, CancellationToken::new());
        let peer = Peer { source, progress, entered: now, gives_way: gives_way.clone() };
        self.peers.insert(number, peer);
        self.in_their_time.insert(number);
        self.sources.entry(source).or_default().all.insert((progress, number));
        self.rank(source);
        Ok((number, gives_way))
    }

    /// Removes a peer. Returns whether it was there: it may have given way before.
    pub(super) fn remove(&mut self, number: u64) -> bool {
        self.take(number).is_some()
    }

    fn take(&mut self, number: u64) -> Option<Peer> {
        let peer = self.peers.remove(&number)?;
        self.in_their_time.remove(&number);
        if let Some(of_source) = self.sources.get_mut(&peer.source) {
            let key = (peer.progress, number);
            of_source.all.remove(&key);
            of_source.had_time.remove(&key);
        }
        self.rank(peer.source);
        Some(peer)
    }

    /// Records what a peer has proved, unless it gave way before.
    pub(super) fn set_progress(&mut self, number: u64, progress: Progress) {
        let Some(peer) = self.peers.get_mut(&number) else { return };
        let before = (mem::replace(&mut peer.progress, progress), number);
        let source = peer.source;
        if let Some(of_source) = self.sources.get_mut(&source) {
            for keys in [&mut of_source.all, &mut of_source.had_time] {
                if keys.remove(&before) {
                    keys.insert((progress, number));
                }
            }
        }
        self.rank(source);
    }

    /// Remembers a source whose agent was admitted, or lost its tunnel.
    pub(super) fn remember(&mut self, source: Source, now: Instant) {
        self.advance(now);
        let forgotten = self.recent.remember(source, now);
        self.rank(source);
        forgotten.into_iter().for_each(|forgotten| self.rank(forgotten));
    }

    /// Notes what time has changed: which peers have had their time, and which sources are
    /// remembered no longer.
    fn advance(&mut self, now: Instant) {
        while let Some(number) = self.in_their_time.first().copied() {
            let Some(peer) = self.peers.get(&number) else { break };
            if now.saturating_duration_since(peer.entered) < CROWD_TIME {
                break;
            }
            let (source, key) = (peer.source, (peer.progress, number));
            self.in_their_time.remove(&number);
            if let Some(of_source) = self.sources.get_mut(&source) {
                of_source.had_time.insert(key);
            }
            self.rank(source);
        }
        while let Some(source) = self.recent.forget_expired(now) {
            self.rank(source);
        }
    }

    /// Gives a source its place in the orders, after a change of its peers or of its share.
    fn rank(&mut self, source: Source) {
        let Some(of_source) = self.sources.get_mut(&source) else { return };
        let excess = of_source.all.len().saturating_sub(self.recent.share(source));
        let rank = Rank {
            first: of_source.all.first().map(|key| (excess, *key)),
            first_in_crowd: of_source.had_time.first().map(|key| (excess > 0, *key)),
        };
        let before = mem::replace(&mut of_source.rank, rank);
        if of_source.all.is_empty() {
            self.sources.remove(&source);
        }
        if before.first != rank.first {
            let entry = |(excess, key)| (excess, Reverse(key), source);
            if let Some(before) = before.first {
                self.order.remove(&entry(before));
            }
            self.order.extend(rank.first.map(entry));
        }
        if before.first_in_crowd != rank.first_in_crowd {
            let entry = |(has_excess, key)| (has_excess, Reverse(key), source);
            if let Some(before) = before.first_in_crowd {
                self.crowd_order.remove(&entry(before));
            }
            self.crowd_order.extend(rank.first_in_crowd.map(entry));
        }
    }

    /// The first to give way, and the number of peers of its source beyond the share.
    fn first_to_give_way(&self) -> Option<(usize, u64)> {
        self.order.last().map(|(excess, Reverse((_, number)), _)| (*excess, *number))
    }

    /// The first to give way in a crowd: of the peers that have had their time, beyond shares first.
    fn first_in_crowd(&self) -> Option<u64> {
        self.crowd_order.last().map(|(_, Reverse((_, number)), _)| *number)
    }

    /// Whether the first to give way is one of a crowd and has time left, which a newcomer of this
    /// source does not take from it. A source of agents within its share is no part of a crowd of
    /// others.
    fn is_crowd(
        &self,
        excess: usize,
        first: u64,
        source: Source,
        progress: Progress,
        now: Instant,
    ) -> bool {
        let peers = self.sources.get(&source).map_or(0, |of_source| of_source.all.len());
        let is_within_share = peers < self.recent.share(source);
        let has_time = self.peers.get(&first).is_some_and(|first| {
            progress <= first.progress && now.saturating_duration_since(first.entered) < CROWD_TIME
        });
        excess <= CROWD_EXCESS && !(is_within_share && excess > 0) && has_time
    }
}

#[cfg(test)]
mod tests;
