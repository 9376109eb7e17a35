//! One connection of a Konnectivity peer as the local side of a splice.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use culvert_transport::{
    RecvHalf, SendHalf,
    budget::{Held, Holder, StreamMemory},
    splice::{Abort, Local, LocalFault, LocalRead, LocalWrite, Meter, Outcome, splice},
};
use culvert_wire::{bounded::PeerText, code::StreamCode};
use parking_lot::Mutex;

use super::{
    data::DataWriter,
    inbox::{End, Inbox, Waiting},
    outbound::Outbound,
    packet::Packet,
};

/// Maximum number of bytes in a DATA packet; Konnectivity's server has the same limit.
const MAX_DATA_LEN: usize = 32 * 1024;

/// Role of the Konnectivity peer, which decides the packet that ends a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// An agent. It gets CLOSE_REQ and answers with CLOSE_RSP.
    Agent,
    /// A server. It gets CLOSE_RSP and does not answer.
    Server,
}

/// Maximum number of bytes that wait for all readers of one peer together. Above it, the reader
/// with the most bytes waiting is cut off.
const TOTAL_LIMIT: usize = 128 * 1024 * 1024;

/// The connections of one Konnectivity peer, by connection id. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Connections {
    inboxes: Arc<Mutex<HashMap<i64, Arc<Inbox>>>>,
    waiting: Waiting,
    memory: Arc<StreamMemory>,
}

impl Connections {
    /// No connections yet. What waits for their readers is held by this memory.
    pub fn new(memory: &Arc<StreamMemory>) -> Self {
        Self { memory: memory.clone(), ..Self::default() }
    }

    /// Adds a connection and returns its inbox, which receives what the peer sends on it. A
    /// connection that has the same id already is cut.
    pub fn insert(&self, id: i64) -> Arc<Inbox> {
        let inbox =
            Arc::new(Inbox::new(self.waiting.clone(), self.memory.holder(Held::Konnectivity)));
        if let Some(other) = self.inboxes.lock().insert(id, inbox.clone()) {
            let reason = PeerText::lossy(b"the peer gave its id to another connection");
            other.end(End::Cut { code: StreamCode::MALFORMED, reason });
        }
        inbox
    }

    /// Adds bytes from the peer to the inbox of a connection. Returns the inbox, or `None` if no
    /// connection has this id.
    fn push(&self, id: i64, bytes: Bytes) -> Option<Arc<Inbox>> {
        let inbox = self.inboxes.lock().get(&id).cloned()?;
        inbox.push(bytes);
        if self.waiting.bytes() > TOTAL_LIMIT
            && let Some(fullest) = self.inboxes.lock().values().max_by_key(|inbox| inbox.held())
        {
            let reason = format!("more than {TOTAL_LIMIT} bytes wait for all readers of the peer");
            let reason = PeerText::truncated(reason);
            fullest.end(End::Cut { code: StreamCode::OVERLOADED, reason });
        }
        Some(inbox)
    }

    /// Adds bytes from the peer to the inbox of a connection, and waits for its reader as
    /// [`Inbox`] describes. Returns whether a connection has this id.
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

    /// Removes a connection; what the peer sends on it is ignored from now on.
    pub fn remove(&self, id: i64) -> Option<Arc<Inbox>> {
        self.inboxes.lock().remove(&id)
    }

    /// Removes a connection, unless another one has its id by now.
    fn remove_own(&self, id: i64, inbox: &Arc<Inbox>) {
        let mut connections = self.inboxes.lock();
        if connections.get(&id).is_some_and(|current| Arc::ptr_eq(current, inbox)) {
            connections.remove(&id);
        }
    }
}

/// Splices a connection of the Konnectivity peer and a stream until both have ended, and sends the
/// peer the packet that ends the connection.
///
/// Konnectivity has no half-close: the end of one direction ends both, after everything that was
/// sent before it.
///
/// # Cancel safety
/// Dropping the future resets the stream. The peer gets no packet.
pub async fn carry(
    (id, inbox): (i64, Arc<Inbox>),
    side: Side,
    stream: (SendHalf, RecvHalf),
    outbound: Outbound,
    connections: &Connections,
    meter: &Meter,
) -> Outcome {
    let close = Arc::new(ClosePacket { id, side, outbound, sent: AtomicBool::new(false) });
    let reader = KonnectivityRead { inbox: inbox.clone() };
    let data = DataWriter::new(id, MAX_DATA_LEN);
    let writer = KonnectivityWrite { inbox: inbox.clone(), close: close.clone(), data };
    let outcome = splice(Local::new(reader, writer, NoAbort), stream, meter).await;
    connections.remove_own(id, &inbox);
    let reason = match &outcome.end {
        Ok(_) => String::new(),
        Err(cut) => cut.to_string(),
    };
    close.send(reason).await;
    outcome
}

/// The packet that ends a connection, sent once.
#[derive(Debug)]
struct ClosePacket {
    id: i64,
    side: Side,
    outbound: Outbound,
    sent: AtomicBool,
}

impl ClosePacket {
    async fn send(&self, reason: String) {
        if self.sent.load(Ordering::Relaxed) {
            return;
        }
        let packet = match self.side {
            Side::Agent => Packet::close_request(self.id),
            Side::Server => Packet::close_response(self.id, reason),
        };
        // A peer that has gone needs no packet.
        self.outbound.send(packet).await;
        self.sent.store(true, Ordering::Relaxed);
    }
}

/// Bytes from the peer.
#[derive(Debug)]
struct KonnectivityRead {
    inbox: Arc<Inbox>,
}

impl LocalRead for KonnectivityRead {
    async fn read(&mut self, holder: &Arc<Holder>) -> Result<Option<Bytes>, LocalFault> {
        Ok(self.inbox.take().await?.map(|bytes| holder.hold_bytes(bytes)))
    }

    async fn failed(&mut self) -> LocalFault {
        self.inbox.cut().await
    }
}

/// Bytes to the peer.
#[derive(Debug)]
struct KonnectivityWrite {
    inbox: Arc<Inbox>,
    close: Arc<ClosePacket>,
    data: DataWriter,
}

impl LocalWrite for KonnectivityWrite {
    async fn write(&mut self, chunks: &mut [Bytes]) -> Result<(), LocalFault> {
        let send = async |packet| match self.close.outbound.send(packet).await {
            true => Ok(()),
            false => Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset).into()),
        };
        self.data.write(chunks, send).await
    }

    fn progress(&self) -> Option<Arc<AtomicU64>> {
        Some(self.data.taken())
    }

    async fn finish(&mut self) -> Result<(), LocalFault> {
        self.close.send(String::new()).await;
        if self.close.side == Side::Server {
            self.inbox.end(End::Finished);
        }
        Ok(())
    }

    /// Ends the connection for a server, which reads no more after it has closed.
    async fn gone(&mut self) {
        if self.close.side == Side::Server {
            self.close.send(String::new()).await;
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
mod tests;
