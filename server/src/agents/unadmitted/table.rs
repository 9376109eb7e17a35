//! The one table of peers that are not admitted yet, whatever carries them.
//!
//! The table is bounded. When it is full, a newcomer takes the place of another peer, so that no
//! peer can keep others out by staying: of the source with the most peers beyond its share, the one
//! that has proved least, and among those the oldest. A crowd of many sources is different: see
//! [`peers`].

mod peers;

use std::{net::IpAddr, sync::Arc};

use culvert_process::metrics::Counted;
use culvert_transport::Carrier;
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use self::peers::Peers;
use super::source::Source;
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

/// The table is full of peers that must not give way to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::agents) struct NoRoom;

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
        self.peers.lock().len() * CROWDED_PART >= self.limit
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
        let source = Source::of(address);
        let (number, gives_way) = {
            let mut peers = self.peers.lock();
            // With the lock held, so that time goes on from peer to peer.
            peers.enter(self.limit, source, progress, Instant::now())?
        };
        Ok(Place {
            table: self.clone(),
            source,
            number,
            gives_way,
            counted: self.metrics.unadmitted(carrier),
            _permit: permit,
        })
    }

    /// Remembers the source of an agent that has lost its tunnel, and will come again.
    pub(in crate::agents) fn remember(&self, address: IpAddr) {
        self.peers.lock().remember(Source::of(address), Instant::now());
    }
}

/// The place of one peer in the table, which it leaves when this is dropped.
#[derive(Debug)]
pub(in crate::agents) struct Place {
    table: Arc<UnadmittedTable>,
    source: Source,
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
    pub(super) fn set_progress(&self, progress: Progress) {
        self.table.peers.lock().set_progress(self.number, progress);
    }

    /// Records what carries the peer, once that is known.
    pub(super) fn set_carrier(&mut self, carrier: Carrier) {
        self.counted = self.table.metrics.unadmitted(carrier);
    }

    /// Leaves the table and remembers the source: the peer is admitted.
    pub(super) fn admitted(self) {
        self.table.peers.lock().remember(self.source, Instant::now());
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.table.peers.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests;
