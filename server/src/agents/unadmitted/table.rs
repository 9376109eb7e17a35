//! The one table of peers that are not admitted yet, whatever carries them.
//!
//! The table is bounded. When it is full, a newcomer takes the place of another peer, so that no
//! peer can keep others out by staying: of the source with the most peers beyond its share, the one
//! that has proved least, and among those the oldest.
//!
//! A crowd of many sources with a few peers each is different, such as all agents after a restart
//! of the server. There each peer stays for [`CROWD_TIME`] at least, and newcomers are refused
//! meanwhile: if each took the place of another, all would be sent away in their handshakes.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use culvert_process::metrics::Counted;
use culvert_transport::Carrier;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use super::{recent::Recent, source::Source};
use crate::metrics::ServerMetrics;

/// Maximum number of peers in the table.
const MAX_PEERS: usize = 1024;
/// Minimum of that number, on a machine with few descriptors.
const MIN_PEERS: usize = 16;
/// The table has one part in so many of the descriptors: the others are for health checks,
/// frontends and tunnels.
const DESCRIPTOR_PARTS: u64 = 4;
/// Number of peers that gave way and may still hold their connection, until their task ends it.
const MAX_LEAVING: usize = 64;
/// The table is crowded from one part in so many on.
const CROWDED_PART: usize = 4;

/// Maximum number of peers beyond its share of a source in a crowd. An agent tries several addresses
/// and both carriers at once.
const CROWD_EXCESS: usize = 3;
/// Time that a peer has in a crowd: for a handshake over a long path.
const CROWD_TIME: Duration = Duration::from_secs(1);

/// What a peer has proved; more makes it give way later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::agents) enum Progress {
    /// Nothing; over QUIC, not even that it receives at its address.
    Silent,
    /// It has sent bytes; over QUIC, it receives at its address.
    Heard,
    /// The handshake is complete.
    Connected,
}

/// Peers that are not admitted yet, and the memory of those that were.
#[derive(Debug)]
pub(crate) struct UnadmittedTable {
    limit: usize,
    /// One permit for each peer in the table, and for each that is leaving it.
    permits: Arc<Semaphore>,
    metrics: Arc<ServerMetrics>,
    peers: Mutex<Peers>,
}

#[derive(Debug, Default)]
struct Peers {
    count: usize,
    /// Number of the last peer that entered.
    last_number: u64,
    /// Sources with at least one peer.
    sources: HashMap<Source, OfSource>,
    recent: Recent,
}

/// Peers of one source, the first to give way first.
#[derive(Debug, Default)]
struct OfSource(BTreeMap<(Progress, u64), Peer>);

#[derive(Clone, Debug)]
struct Peer {
    entered: Instant,
    /// Cancelled when the peer is to give way.
    gives_way: CancellationToken,
}

/// The table is full of peers that must not give way to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::agents) struct NoRoom;

/// A peer that may give way.
struct Candidate {
    source: Source,
    key: (Progress, u64),
    entered: Instant,
    /// Number of peers of its source beyond the share.
    excess: usize,
}

impl UnadmittedTable {
    /// An empty table, for a process that may open so many descriptors.
    pub(crate) fn new(descriptors: u64, metrics: Arc<ServerMetrics>) -> Self {
        let part = usize::try_from(descriptors / DESCRIPTOR_PARTS).unwrap_or(usize::MAX);
        Self::with_limit(part.clamp(MIN_PEERS, MAX_PEERS), metrics)
    }

    /// An empty table for so many peers.
    pub(crate) fn with_limit(limit: usize, metrics: Arc<ServerMetrics>) -> Self {
        let permits = Arc::new(Semaphore::new(limit + MAX_LEAVING));
        Self { limit, permits, metrics, peers: Mutex::default() }
    }

    /// Whether peers must prove that they receive at their address before they enter.
    pub(in crate::agents) fn is_crowded(&self) -> bool {
        self.peers.lock().count * CROWDED_PART >= self.limit
    }

    /// Enters a peer that was accepted just now. If the table is full, another gives way.
    ///
    /// It waits only while too many of those that gave way have not ended their connections.
    ///
    /// # Errors
    /// When the table is full of a crowd.
    ///
    /// # Cancel safety
    /// Cancel safe: the peer has not entered.
    pub(in crate::agents) async fn enter(
        self: &Arc<Self>,
        address: IpAddr,
        carrier: Carrier,
        progress: Progress,
    ) -> Result<Place, NoRoom> {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = permit.expect("the semaphore is never closed");
        let (source, gives_way) = (Source::of(address), CancellationToken::new());
        let peer = Peer { entered: Instant::now(), gives_way: gives_way.clone() };
        let number = self.peers.lock().enter(self.limit, source, progress, peer)?;
        Ok(Place {
            table: self.clone(),
            source,
            progress,
            number,
            gives_way,
            counted: self.metrics.unadmitted(carrier),
            _permit: permit,
        })
    }

    /// Remembers the source of an agent that has lost its tunnel, and will come again.
    pub(in crate::agents) fn remember(&self, address: IpAddr) {
        self.peers.lock().recent.remember(Source::of(address), Instant::now());
    }
}

impl Peers {
    fn enter(
        &mut self,
        limit: usize,
        source: Source,
        progress: Progress,
        peer: Peer,
    ) -> Result<u64, NoRoom> {
        if self.count >= limit
            && let Some(mut first) = self.first_to_give_way(peer.entered)
        {
            if self.is_crowd(&first, source, progress, peer.entered) {
                first = self.first_without_time(peer.entered).ok_or(NoRoom)?;
            }
            if let Some(Peer { gives_way, .. }) = self.remove(first.source, first.key) {
                gives_way.cancel();
            }
        }
        self.count += 1;
        self.last_number += 1;
        self.sources.entry(source).or_default().0.insert((progress, self.last_number), peer);
        Ok(self.last_number)
    }

    fn first_to_give_way(&self, now: Instant) -> Option<Candidate> {
        let first_of = |(source, of_source): (&Source, &OfSource)| {
            let (key, peer) = of_source.0.first_key_value()?;
            let (source, key, entered) = (*source, *key, peer.entered);
            Some(Candidate { source, key, entered, excess: self.excess(source, of_source, now) })
        };
        let firsts = self.sources.iter().filter_map(first_of);
        firsts.max_by_key(|first| (first.excess, Reverse(first.key)))
    }

    /// The first to give way in a crowd: of the peers that have had their time, beyond shares first.
    fn first_without_time(&self, now: Instant) -> Option<Candidate> {
        let of = |(source, of_source): (&Source, &OfSource)| {
            let (source, excess) = (*source, self.excess(*source, of_source, now));
            let has_had_time =
                |(_, peer): &(_, &Peer)| now.duration_since(peer.entered) >= CROWD_TIME;
            let (key, peer) = of_source.0.iter().find(has_had_time)?;
            Some(Candidate { source, key: *key, entered: peer.entered, excess })
        };
        let firsts = self.sources.iter().filter_map(of);
        firsts.max_by_key(|first| (first.excess > 0, Reverse(first.key)))
    }

    /// Number of peers of a source beyond its share.
    fn excess(&self, source: Source, of_source: &OfSource, now: Instant) -> usize {
        of_source.0.len().saturating_sub(self.recent.share(source, now))
    }

    /// Whether the first to give way is one of a crowd and has time left, which a newcomer of this
    /// source does not take from it. A source of agents within its share is no part of a crowd of
    /// others.
    fn is_crowd(
        &self,
        first: &Candidate,
        source: Source,
        progress: Progress,
        now: Instant,
    ) -> bool {
        let peers = self.sources.get(&source).map_or(0, |of_source| of_source.0.len());
        let is_within_share = peers < self.recent.share(source, now);
        first.excess <= CROWD_EXCESS
            && !(is_within_share && first.excess > 0)
            && progress <= first.key.0
            && now.saturating_duration_since(first.entered) < CROWD_TIME
    }

    /// Removes a peer, unless it gave way before.
    fn remove(&mut self, source: Source, key: (Progress, u64)) -> Option<Peer> {
        let of_source = self.sources.get_mut(&source)?;
        let peer = of_source.0.remove(&key)?;
        if of_source.0.is_empty() {
            self.sources.remove(&source);
        }
        self.count -= 1;
        Some(peer)
    }

    fn set_progress(&mut self, source: Source, (before, number): (Progress, u64), now: Progress) {
        if let Some(of_source) = self.sources.get_mut(&source)
            && let Some(peer) = of_source.0.remove(&(before, number))
        {
            of_source.0.insert((now, number), peer);
        }
    }
}

/// The place of one peer in the table, which it leaves when this is dropped.
#[derive(Debug)]
pub(in crate::agents) struct Place {
    table: Arc<UnadmittedTable>,
    source: Source,
    progress: Progress,
    number: u64,
    gives_way: CancellationToken,
    /// Counts the peer, under its carrier.
    counted: Counted,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Cancelled when the peer is to give way.
    pub(super) fn gives_way(&self) -> &CancellationToken {
        &self.gives_way
    }

    /// Records what the peer has proved by now.
    pub(super) fn set_progress(&mut self, progress: Progress) {
        let key = (self.progress, self.number);
        self.table.peers.lock().set_progress(self.source, key, progress);
        self.progress = progress;
    }

    /// Records what carries the peer, once that is known.
    pub(super) fn set_carrier(&mut self, carrier: Carrier) {
        self.counted = self.table.metrics.unadmitted(carrier);
    }

    /// Leaves the table and remembers the source: the peer is admitted.
    pub(super) fn admitted(self) {
        self.table.peers.lock().recent.remember(self.source, Instant::now());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.peers.lock().remove(self.source, (self.progress, self.number));
    }
}

#[cfg(test)]
mod tests;
