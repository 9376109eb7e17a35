//! Packets on their way to a Konnectivity peer.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use tokio::sync::mpsc;
use tokio_stream::Stream;

use super::packet::Packet;

/// Packets of connections that may wait for HTTP/2. One is being sent while the next is made.
const CARRIED: usize = 4;
/// Packets that may wait without belonging to a connection that could wait: dials, and answers to
/// what makes no sense. A peer that leaves more unread is not worth waiting for.
const URGENT: usize = 1024;

/// Where packets to a Konnectivity peer go.
#[derive(Clone, Debug)]
pub struct Outbound {
    carried: mpsc::Sender<Packet>,
    urgent: mpsc::Sender<Packet>,
}

/// The packets, in the order in which they go: urgent ones first. Ends when every [`Outbound`] is
/// gone.
#[derive(Debug)]
pub struct Packets {
    carried: mpsc::Receiver<Packet>,
    urgent: mpsc::Receiver<Packet>,
}

/// The peer does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer leaves {URGENT} packets unread")]
pub struct PeerNotReading;

/// Both ends of the way to a Konnectivity peer.
pub fn outbound() -> (Outbound, Packets) {
    let (carried, carried_packets) = mpsc::channel(CARRIED);
    let (urgent, urgent_packets) = mpsc::channel(URGENT);
    let packets = Packets { carried: carried_packets, urgent: urgent_packets };
    (Outbound { carried, urgent }, packets)
}

impl Outbound {
    /// Sends a packet of a connection behind those before it, waiting while the peer does not read;
    /// whether the peer is still there.
    ///
    /// # Cancel safety
    /// Dropping the future sends nothing.
    pub async fn carry(&self, packet: Packet) -> bool {
        self.carried.send(packet).await.is_ok()
    }

    /// Sends a packet that belongs to no connection, before all others.
    ///
    /// # Errors
    /// When the peer leaves too much unread. One that is gone is no error; its stream tells that.
    pub fn send_urgent(&self, packet: Packet) -> Result<(), PeerNotReading> {
        match self.urgent.try_send(packet) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(PeerNotReading),
        }
    }

    /// Completes when the peer is gone.
    pub async fn closed(&self) {
        self.carried.closed().await;
    }
}

impl Stream for Packets {
    type Item = Packet;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Packet>> {
        let urgent = self.urgent.poll_recv(cx);
        if let Poll::Ready(Some(packet)) = urgent {
            return Poll::Ready(Some(packet));
        }
        match self.carried.poll_recv(cx) {
            Poll::Ready(Some(packet)) => Poll::Ready(Some(packet)),
            Poll::Ready(None) if urgent.is_ready() => Poll::Ready(None),
            _ => Poll::Pending,
        }
    }
}
