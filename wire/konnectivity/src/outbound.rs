//! The queue of packets to a Konnectivity peer.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use tokio::sync::mpsc;
use tokio_stream::Stream;

use super::packet::Packet;

/// Maximum number of packets of connections in the queue: one is sent while the next is made.
const QUEUED: usize = 4;
/// Maximum number of urgent packets in the queue: dials, and answers to packets without a
/// connection. Their senders cannot wait, so a peer that leaves more unread is disconnected.
const URGENT: usize = 1024;

/// The sending end of the queue. Clones share it.
#[derive(Clone, Debug)]
pub struct Outbound {
    queued: mpsc::Sender<Packet>,
    urgent: mpsc::Sender<Packet>,
}

/// The packets in the order in which they are sent: urgent ones first. Ends when every
/// [`Outbound`] was dropped.
#[derive(Debug)]
pub struct Packets {
    queued: mpsc::Receiver<Packet>,
    urgent: mpsc::Receiver<Packet>,
}

/// The peer leaves too many urgent packets unread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer leaves {URGENT} packets unread")]
pub struct PeerNotReading;

/// Both ends of a queue.
pub fn outbound() -> (Outbound, Packets) {
    let (queued, queued_packets) = mpsc::channel(QUEUED);
    let (urgent, urgent_packets) = mpsc::channel(URGENT);
    let packets = Packets { queued: queued_packets, urgent: urgent_packets };
    (Outbound { queued, urgent }, packets)
}

impl Outbound {
    /// Sends a packet of a connection, and waits while the peer does not read. Returns whether the
    /// peer is still there.
    ///
    /// # Cancel safety
    /// Dropping the future sends nothing.
    pub async fn send(&self, packet: Packet) -> bool {
        self.queued.send(packet).await.is_ok()
    }

    /// Sends a packet that belongs to no connection, ahead of those that do.
    ///
    /// # Errors
    /// If the peer leaves too much unread. A peer that has gone is no error: its stream ends.
    pub fn send_urgent(&self, packet: Packet) -> Result<(), PeerNotReading> {
        match self.urgent.try_send(packet) {
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Full(_)) => Err(PeerNotReading),
        }
    }

    /// Completes when the peer has gone.
    ///
    /// # Cancel safety
    /// Cancel safe: it only waits.
    pub async fn closed(&self) {
        self.queued.closed().await;
    }
}

impl Stream for Packets {
    type Item = Packet;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Packet>> {
        let urgent = self.urgent.poll_recv(cx);
        if let Poll::Ready(Some(packet)) = urgent {
            return Poll::Ready(Some(packet));
        }
        match self.queued.poll_recv(cx) {
            Poll::Ready(Some(packet)) => Poll::Ready(Some(packet)),
            Poll::Ready(None) if urgent.is_ready() => Poll::Ready(None),
            _ => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt as _;

    use super::*;

    #[tokio::test]
    async fn urgent_packets_are_sent_first_and_the_queue_ends_with_its_last_sender() {
        let (outbound, mut packets) = outbound();
        let other = outbound.clone();
        assert!(outbound.send(Packet::close_request(1)).await);
        other.send_urgent(Packet::close_dial(2)).unwrap();
        drop((outbound, other));
        assert_eq!(packets.next().await, Some(Packet::close_dial(2)));
        assert_eq!(packets.next().await, Some(Packet::close_request(1)));
        assert_eq!(packets.next().await, None);
    }

    #[tokio::test]
    async fn a_peer_that_leaves_urgent_packets_unread_is_an_error() {
        let (outbound, packets) = outbound();
        for dial in 0..1024 {
            assert_eq!(outbound.send_urgent(Packet::close_dial(dial)), Ok(()));
        }
        assert_eq!(outbound.send_urgent(Packet::drain()), Err(PeerNotReading));
        drop(packets);
    }

    #[tokio::test]
    async fn a_peer_that_has_gone_takes_nothing_and_is_no_error() {
        let (outbound, packets) = outbound();
        let waiting = tokio::time::timeout(std::time::Duration::ZERO, outbound.closed()).await;
        assert!(waiting.is_err(), "the peer is still there");
        drop(packets);
        outbound.closed().await;
        assert_eq!(outbound.send_urgent(Packet::drain()), Ok(()));
        assert!(!outbound.send(Packet::drain()).await);
    }
}
