//! Handshakes take turns, so that the server goes on to receive packets and those that have begun end
//! soon.
//!
//! After a restart of the server all agents come at once. The work for a ClientHello is a fraction of
//! a millisecond. A thousand of them in the runtime's queue delay all else that is in it for a hundred
//! times that, the task that reads the UDP socket included: its buffer overflows, handshakes wait for
//! packets that were dropped, and most are given up. So a few are in the queue, and the others wait:
//! those over QUIC before the first cryptography, those over TCP with their ClientHello in the
//! kernel's buffer.

use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout},
};
use tokio_util::sync::PollSemaphore;

use super::{fair_queue::FairQueue, unadmitted::Source};

/// Number of turns at once: work of a few milliseconds.
const TURNS: usize = 8;
/// Longest turn. The ClientHello of a peer whose turn is longer is not complete.
const TURN_TIME: Duration = Duration::from_millis(50);
/// Maximum number of peers in a line.
const MAX_WAITING: usize = 1024;
/// From so many on, a peer must prove that it receives at its address before it may wait.
const CROWDED: usize = 64;
/// Longest time in a line; the peer has given up, or sends its first packet again.
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Turns of the handshakes over one carrier. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct HandshakeTurns(Arc<Semaphore>);

impl Default for HandshakeTurns {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TURNS)))
    }
}

impl HandshakeTurns {
    /// Waits for a turn; peers have theirs in the order in which they come.
    ///
    /// # Cancel safety
    /// Cancel safe, but the peer loses its position.
    pub(in crate::agents) async fn next(&self) -> HandshakeTurn {
        let permit = self.0.clone().acquire_owned().await;
        HandshakeTurn { _permit: permit.expect("the semaphore is never closed") }
    }
}

/// The turn of one handshake.
#[derive(Debug)]
pub(in crate::agents) struct HandshakeTurn {
    _permit: OwnedSemaphorePermit,
}

impl HandshakeTurn {
    /// The turn ends when the peer's ClientHello was processed, or after [`TURN_TIME`].
    ///
    /// # Cancel safety
    /// Cancel safe; the turn ends.
    pub(in crate::agents) async fn until(self, hello: impl Future<Output = ()>) {
        let _ = timeout(TURN_TIME, hello).await;
    }

    /// Does a handshake that begins with the peer's ClientHello. The turn ends when the handshake
    /// waits for the peer.
    ///
    /// # Cancel safety
    /// As the handshake; its turn ends.
    pub(in crate::agents) async fn first_poll<T>(self, handshake: impl Future<Output = T>) -> T {
        let mut handshake = pin!(handshake);
        let first = poll_fn(|cx| Poll::Ready(handshake.as_mut().poll(cx))).await;
        drop(self);
        match first {
            Poll::Ready(output) => output,
            Poll::Pending => handshake.await,
        }
    }
}

/// Peers that wait for a turn. Sources take turns, and a full line turns away the newest peer of the
/// source with most of them.
#[derive(Debug)]
pub(in crate::agents) struct Line<T> {
    waiting: FairQueue<Source, (Instant, T)>,
    turns: PollSemaphore,
}

/// What comes of a peer that has waited.
#[derive(Debug)]
pub(in crate::agents) enum Waited<T> {
    /// It has waited too long.
    TooLong(T),
    /// It has its turn.
    HasTurn(T, HandshakeTurn),
}

impl<T> Line<T> {
    /// An empty line.
    pub(in crate::agents) fn new(turns: &HandshakeTurns) -> Self {
        Self { waiting: FairQueue::new(MAX_WAITING), turns: PollSemaphore::new(turns.0.clone()) }
    }

    /// Whether peers must prove that they receive at their address before they may wait.
    pub(in crate::agents) fn is_crowded(&self) -> bool {
        self.waiting.len() >= CROWDED
    }

    /// Adds a peer of this source. Returns the peer that is turned away for it, if the line is full.
    pub(in crate::agents) fn push(&mut self, source: Source, peer: T) -> Option<T> {
        self.waiting.push(source, (Instant::now(), peer)).map(|(_, peer)| peer)
    }

    /// The next peer. Pending while none waits or has its turn.
    ///
    /// # Cancel safety
    /// Cancel safe: the line keeps its position among those that wait for turns.
    pub(in crate::agents) async fn next(&mut self) -> Waited<T> {
        if self.waiting.is_empty() {
            std::future::pending::<()>().await;
        }
        let permit = poll_fn(|cx| self.turns.poll_acquire(cx)).await;
        let turn = HandshakeTurn { _permit: permit.expect("the semaphore is never closed") };
        let (since, peer) = self.waiting.pop().expect("there was one, and nothing took it");
        if since.elapsed() > MAX_WAIT { Waited::TooLong(peer) } else { Waited::HasTurn(peer, turn) }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::pending, net::IpAddr};

    use tokio::task::JoinSet;

    use super::*;

    async fn is_ready(future: impl Future) -> bool {
        timeout(Duration::ZERO, future).await.is_ok()
    }

    fn source(number: u8) -> Source {
        Source::of(IpAddr::from([192, 0, 2, number]))
    }

    /// Takes all turns, for peers whose ClientHello is never complete.
    async fn all_taken(turns: &HandshakeTurns) -> JoinSet<()> {
        let mut handshakes = JoinSet::new();
        for _ in 0..TURNS {
            handshakes.spawn(turns.next().await.until(pending()));
        }
        handshakes
    }

    #[tokio::test(start_paused = true)]
    async fn peers_wait_in_turns_of_sources_until_a_handshake_ends() {
        let turns = HandshakeTurns::default();
        let mut line = Line::new(&turns);
        let mut taken: Vec<_> = Vec::new();
        for _ in 0..TURNS {
            taken.push(turns.next().await);
        }
        for (from, peer) in [(1, "a"), (1, "b"), (2, "c")] {
            assert!(line.push(source(from), peer).is_none());
        }
        assert!(!is_ready(line.next()).await);
        let mut order = Vec::new();
        for taken in taken.drain(..3) {
            taken.until(async {}).await;
            let Waited::HasTurn(peer, turn) = line.next().await else { panic!("too long") };
            order.push((peer, turn));
        }
        assert_eq!(order.iter().map(|(peer, _)| *peer).collect::<String>(), "acb");
        assert!(!is_ready(turns.next()).await);
        assert!(!is_ready(line.next()).await);
    }

    #[tokio::test(start_paused = true)]
    async fn the_turn_of_a_peer_whose_hello_is_not_complete_ends() {
        let turns = HandshakeTurns::default();
        let begun = Instant::now();
        let _handshakes = all_taken(&turns).await;
        assert!(!is_ready(turns.next()).await);
        let _next = turns.next().await;
        assert_eq!(begun.elapsed(), TURN_TIME);
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_that_waits_for_its_peer_goes_on_without_a_turn() {
        let turns = HandshakeTurns::default();
        let mut slow = JoinSet::new();
        for number in 0..TURNS {
            let handshake = tokio::time::sleep(Duration::from_secs(number as u64));
            slow.spawn(turns.next().await.first_poll(handshake));
        }
        tokio::task::yield_now().await;
        assert!(is_ready(all_taken(&turns)).await);
        slow.join_all().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_line_turns_away_the_newest_of_the_source_with_most() {
        let mut line = Line::new(&HandshakeTurns::default());
        for peer in 0..MAX_WAITING {
            assert_eq!(line.is_crowded(), peer >= CROWDED);
            assert_eq!(line.push(source(1), peer), None);
        }
        assert_eq!(line.push(source(1), MAX_WAITING), Some(MAX_WAITING));
        assert_eq!(line.push(source(2), MAX_WAITING), Some(MAX_WAITING - 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_has_waited_too_long_gets_no_turn() {
        let turns = HandshakeTurns::default();
        let mut line = Line::new(&turns);
        line.push(source(1), "old");
        tokio::time::advance(MAX_WAIT + Duration::from_millis(1)).await;
        line.push(source(1), "new");
        assert!(matches!(line.next().await, Waited::TooLong("old")));
        assert!(matches!(line.next().await, Waited::HasTurn("new", _)));
        let _handshakes = all_taken(&turns).await;
    }
}
