//! Copies and repair shards of what streams write, so that a lost packet does not make short writes
//! wait.
//!
//! A lost packet is detected by packets that arrive after it or by a time-out, and then sent again: at
//! least one more round trip. What short writes need beside their streams costs next to nothing: one
//! more copy of a write that fits a packet, and for a burst of more packets shards of a code, from which
//! any few of them can be rebuilt. Both travel in datagrams, a moment after the first packets. They are
//! sent while the path loses packets, and within a budget.
//!
//! ```text
//! writes ──▶ bursts ──▶ amount, for the loss ──▶ code ──▶ datagrams ┄┄▶ restored packets ──▶ quinn
//! ```
//= docs/protocol.md#10-hedging-and-repair

mod amount;
mod bursts;
mod code;
mod datagram;
mod loss;
mod receiver;
mod recent;
mod restoring;
mod sender;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::Relaxed},
};

use bytes::Bytes;
use culvert_wire::code::CloseCode;
use parking_lot::Mutex;
use tokio::{select, sync::Notify, time::sleep_until};
use tokio_util::task::AbortOnDropHandle;

use self::sender::{Kind, Outgoing};
use super::{close_reason::CloseReason, inspection::Inbound};
use crate::now;

#[cfg(fuzzing)]
pub(super) use self::receiver::exercise;
pub(super) use self::restoring::Restoring;

/// Numbers of what was sent and received beside the streams of a connection.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counts {
    /// Copies sent, and those that arrived before what they are copies of.
    pub(super) copies_sent: u64,
    pub(super) copies_used: u64,
    /// Datagrams sent that had repair shards, and bursts that were rebuilt.
    pub(super) repairs_sent: u64,
    pub(super) bursts_rebuilt: u64,
}

/// Copies and repair shards of one connection, sent and received. They end when it is dropped.
#[derive(Debug)]
pub(super) struct Repair {
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    connection: quinn::Connection,
    close_reason: CloseReason,
    outgoing: Mutex<Outgoing>,
    sooner: Notify,
    restoring: Arc<Restoring>,
    copies_sent: AtomicU64,
    repairs_sent: AtomicU64,
}

impl Repair {
    /// Starts to send copies, of at most `rate` bytes per second, and to use the peer's; and repair
    /// shards, if the peer knows them.
    pub(super) fn begin(
        connection: quinn::Connection,
        close_reason: CloseReason,
        inbound: &Inbound,
        rate: u32,
        repairs: bool,
    ) -> Self {
        let restoring = Arc::new(Restoring::new(inbound.unread().cloned()));
        inbound.set_restoring(restoring.clone());
        let shared = Arc::new(Shared {
            connection,
            close_reason,
            outgoing: Mutex::new(Outgoing::new(rate, repairs, now())),
            sooner: Notify::new(),
            restoring,
            copies_sent: AtomicU64::new(0),
            repairs_sent: AtomicU64::new(0),
        });
        let task = crate::task::owned(run(shared.clone()));
        Self { shared, _task: task }
    }

    /// What is to be kept of this write until [`Self::written`].
    pub(super) fn keep(&self, chunk: &Bytes) -> Option<Bytes> {
        let read = || self.shared.connection.stats();
        self.shared.outgoing.lock().wants(now(), chunk.len(), read).then(|| chunk.clone())
    }

    /// Takes what was just written at this offset of the stream.
    pub(super) fn written(&self, stream: u64, offset: u64, chunk: Bytes) {
        let is_sooner = self.shared.outgoing.lock().write(now(), stream, offset, chunk);
        self.shared.notify(is_sooner);
    }

    /// The stream ends at this offset.
    pub(super) fn finished(&self, stream: u64, offset: u64) {
        let mut outgoing = self.shared.outgoing.lock();
        let read = || self.shared.connection.stats();
        if outgoing.wants(now(), 0, read) {
            let is_sooner = outgoing.finish(now(), stream, offset);
            drop(outgoing);
            self.shared.notify(is_sooner);
        }
    }

    /// The stream was reset.
    pub(super) fn forget(&self, stream: u64) {
        self.shared.outgoing.lock().forget(stream);
    }

    pub(super) fn counts(&self) -> Counts {
        let (copies_used, bursts_rebuilt) = self.shared.restoring.counts();
        Counts {
            copies_sent: self.shared.copies_sent.load(Relaxed),
            copies_used,
            repairs_sent: self.shared.repairs_sent.load(Relaxed),
            bursts_rebuilt,
        }
    }
}

/// Sends what is due and drops what is old, until the connection ends or the peer breaks the protocol.
async fn run(shared: Arc<Shared>) {
    let malformed = select! {
        () = shared.send() => return,
        () = shared.restoring.tidy() => return,
        () = shared.drain() => return,
        malformed = shared.restoring.malformed() => malformed,
    };
    let reason = malformed.to_string();
    shared.close_reason.close(&shared.connection, CloseCode::PROTOCOL_VIOLATION, &reason);
}

impl Shared {
    fn notify(&self, is_sooner: bool) {
        if is_sooner {
            self.sooner.notify_one();
        }
    }

    /// Sends what is due, for ever.
    async fn send(&self) {
        loop {
            let next = self.outgoing.lock().next_at();
            match next {
                Some(next) => select! {
                    () = sleep_until(next.into()) => {}
                    () = self.sooner.notified() => continue,
                },
                None => {
                    self.sooner.notified().await;
                    continue;
                }
            }
            self.plan().await;
            while let Some((kind, datagram)) = self.due() {
                // Without datagrams the streams themselves are enough.
                if self.connection.send_datagram(datagram).is_ok() {
                    match kind {
                        Kind::Copy => self.copies_sent.fetch_add(1, Relaxed),
                        Kind::Repair => self.repairs_sent.fetch_add(1, Relaxed),
                    };
                }
            }
        }
    }

    /// Encodes the bursts that are over. Others write meanwhile.
    async fn plan(&self) {
        let room = self.connection.max_datagram_size().unwrap_or(0);
        loop {
            let planned = self.outgoing.lock().planned(now(), room);
            let Some(planned) = planned else { return };
            if planned.has_shards() && !code::is_prepared() {
                restoring::prepare().await;
            }
            let datagrams = planned.datagrams();
            self.outgoing.lock().push(&planned, datagrams);
        }
    }

    fn due(&self) -> Option<(Kind, Bytes)> {
        self.outgoing.lock().due(now())
    }

    /// Takes the datagrams that came before both sides had agreed on them, until the connection ends.
    async fn drain(&self) {
        while self.connection.read_datagram().await.is_ok() {}
    }
}
