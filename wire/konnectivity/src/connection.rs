//! One connection of a Konnectivity peer as the local side of a splice.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use culvert_transport::{
    RecvHalf, SendHalf,
    splice::{Abort, Local, LocalFault, LocalRead, LocalWrite, Meter, Outcome, splice},
};
use culvert_wire::code::StreamCode;

use super::{
    batches::batches,
    inbox::{End, Held, Inbox},
    outbound::Outbound,
    packet::Packet,
};

/// The largest DATA packet: what Konnectivity's own server sends at most.
const MAX_DATA_LEN: usize = 32 * 1024;

/// Which side of the protocol the Konnectivity peer is, and so how a connection's end is told to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// An agent: CLOSE_REQ, which it answers with CLOSE_RSP.
    Agent,
    /// A server: CLOSE_RSP, which nothing follows.
    Server,
}

/// Bytes that wait for all readers of one peer together at most; then the one furthest behind is cut off.
const TOTAL_LIMIT: usize = 128 * 1024 * 1024;

/// The connections of one Konnectivity peer, by their names. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Connections {
    inboxes: Arc<Mutex<HashMap<i64, Arc<Inbox>>>>,
    held: Held,
}

impl Connections {
    /// Enters a connection; what the peer sends on it goes to the inbox from now on.
    pub fn enter(&self, id: i64) -> Arc<Inbox> {
        let inbox = Arc::new(Inbox::new(self.held.clone()));
        if let Some(other) = self.lock().insert(id, inbox.clone()) {
            let reason = "the peer gave its name to another connection".into();
            other.end(End::Cut { code: StreamCode::MALFORMED, reason });
        }
        inbox
    }

    /// Adds bytes that the peer sent to the inbox of a connection, which it gives back; `None` if there
    /// is no connection of this name.
    fn push(&self, id: i64, bytes: Bytes) -> Option<Arc<Inbox>> {
        let inbox = self.lock().get(&id).cloned()?;
        inbox.push(bytes);
        if self.held.bytes() > TOTAL_LIMIT
            && let Some(fullest) = self.lock().values().max_by_key(|inbox| inbox.held())
        {
            let reason = format!("more than {TOTAL_LIMIT} bytes wait for all readers of the peer");
            fullest.end(End::Cut { code: StreamCode::OVERLOADED, reason });
        }
        Some(inbox)
    }

    /// Adds bytes that the peer sent to the inbox of a connection, and waits a moment if its reader is
    /// far behind. Returns whether there is a connection of this name.
    ///
    /// # Cancel safety
    /// The bytes are added at once; dropping the future only ends the wait.
    pub async fn deliver(&self, id: i64, bytes: Bytes) -> bool {
        match self.push(id, bytes) {
            Some(inbox) => {
                inbox.pace().await;
                true
            }
            None => false,
        }
    }

    /// Takes a connection out; what the peer sends on it has no meaning from now on.
    pub fn remove(&self, id: i64) -> Option<Arc<Inbox>> {
        self.lock().remove(&id)
    }

    /// Takes a connection out if it still is this one.
    fn leave(&self, id: i64, inbox: &Arc<Inbox>) {
        let mut connections = self.lock();
        if connections.get(&id).is_some_and(|entered| Arc::ptr_eq(entered, inbox)) {
            connections.remove(&id);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<i64, Arc<Inbox>>> {
        // Every change is complete before it could panic.
        self.inboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Joins a connection of the Konnectivity peer and a stream until both have ended; the peer is told the
/// end. There is no half-close: the end of either direction ends both, behind what was sent before.
///
/// # Cancel safety
/// Dropping the future resets the stream; the peer is told nothing.
pub async fn carry(
    (id, inbox): (i64, Arc<Inbox>),
    side: Side,
    stream: (SendHalf, RecvHalf),
    outbound: Outbound,
    connections: &Connections,
    meter: &Meter,
) -> Outcome {
    let closing = Arc::new(Closing { id, side, outbound, told: AtomicBool::new(false) });
    let reader = KonnectivityRead { inbox: inbox.clone() };
    let writer = KonnectivityWrite { inbox: inbox.clone(), closing: closing.clone() };
    let outcome = splice(Local::new(reader, writer, NoAbort), stream, meter).await;
    connections.leave(id, &inbox);
    let reason = match &outcome.end {
        Ok(_) => String::new(),
        Err(cut) => cut.to_string(),
    };
    closing.tell(reason).await;
    outcome
}

/// How the peer is told that a connection is over, once.
#[derive(Debug)]
struct Closing {
    id: i64,
    side: Side,
    outbound: Outbound,
    told: AtomicBool,
}

impl Closing {
    async fn tell(&self, reason: String) {
        if self.told.load(Ordering::Relaxed) {
            return;
        }
        let packet = match self.side {
            Side::Agent => Packet::close_request(self.id),
            Side::Server => Packet::close_response(self.id, reason),
        };
        // A peer that is gone need not be told.
        self.outbound.carry(packet).await;
        self.told.store(true, Ordering::Relaxed);
    }
}

/// What the peer sends.
#[derive(Debug)]
struct KonnectivityRead {
    inbox: Arc<Inbox>,
}

impl LocalRead for KonnectivityRead {
    async fn read(&mut self) -> Result<Option<Bytes>, LocalFault> {
        self.inbox.take().await
    }

    async fn failed(&mut self) -> LocalFault {
        self.inbox.cut().await
    }
}

/// What the peer gets.
#[derive(Debug)]
struct KonnectivityWrite {
    inbox: Arc<Inbox>,
    closing: Arc<Closing>,
}

impl KonnectivityWrite {
    async fn send(&self, data: Bytes) -> Result<(), LocalFault> {
        match self.closing.outbound.carry(Packet::data(self.closing.id, data)).await {
            true => Ok(()),
            false => Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()),
        }
    }
}

impl LocalWrite for KonnectivityWrite {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        for piece in batches(chunks, MAX_DATA_LEN) {
            self.send(piece).await?;
        }
        Ok(())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        self.closing.tell(String::new()).await;
        if self.closing.side == Side::Server {
            self.inbox.end(End::Finished);
        }
        Ok(())
    }

    /// A peer that has closed reads no more, and is told that this side is done as well.
    async fn gone(&mut self) {
        if self.closing.side == Side::Server {
            self.closing.tell(String::new()).await;
        }
    }
}

/// An abort that does nothing: the caller of the splice sends its end to the peer.
#[derive(Debug)]
pub struct NoAbort;

impl Abort for NoAbort {
    fn abort(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn when_all_readers_together_are_too_far_behind_the_last_of_them_is_cut_off() {
        let connections = Connections::default();
        let inboxes: Vec<_> = (0..20).map(|id| connections.enter(id)).collect();
        let chunk = Bytes::from(vec![7; 1 << 20]);
        // The third is ahead of the others, and nobody is beyond a limit of its own.
        assert!(connections.push(3, chunk.clone()).is_some());
        for _ in 0..6 {
            for id in 0..20 {
                assert!(connections.push(id, chunk.clone()).is_some());
            }
        }
        assert!(connections.held.bytes() <= TOTAL_LIMIT);
        for id in 0..8 {
            connections.push(id, chunk.clone());
        }
        assert_eq!(inboxes[3].cut().await.code, StreamCode::OVERLOADED);
        assert!(connections.held.bytes() <= TOTAL_LIMIT);
        assert_eq!(inboxes[4].take().await.unwrap().unwrap().len(), 16 * 1024);
        assert!(connections.push(99, chunk).is_none());
        drop((inboxes, connections.inboxes));
        assert_eq!(connections.held.bytes(), 0);
    }
}
