//! Thin writes sent a second time, so that a lost packet does not make a keystroke wait.
//!
//! A lost packet is detected by packets that arrive after it or by a time-out, and then sent again:
//! at least one more round trip. A thin stream, such as keystrokes, has so few bytes that sending
//! them twice costs next to nothing. The second copy travels in a datagram of its own, a moment
//! after the first, and names the stream and the offset of its bytes. It is used only if the stream
//! itself has not brought them yet: every byte is handed on once, in order, whichever copy is
//! faster.
//!
//! Copies are sent while the path loses packets, and within a budget.
//= docs/protocol.md#10-hedging

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use culvert_wire::code::CloseCode;
use parking_lot::Mutex;
use tokio::{select, sync::Notify, time::sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::close_reason::CloseReason;
use crate::now;

/// The first byte of a datagram that carries a copy; others belong to later revisions.
const KIND: u8 = 0x20;
/// Bytes before a copy's own: kind, stream, offset.
const HEAD_LEN: usize = 1 + 8 + 8;
/// Longest write that is sent twice, in bytes: a keystroke, a line, a small request. With its head
/// it fits a datagram on every path that carries QUIC.
const THIN: usize = 1000;
/// Approximate cost of a copy to the path beyond its bytes, in bytes.
const OVERHEAD: usize = 48;
/// Time after a loss for which the path counts as lossy.
const MEMORY: Duration = Duration::from_secs(60);
/// Interval at which the path's count of losses is read.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(50);
/// A copy follows the first after one part in so many of a round trip: late enough not to be lost
/// with it, soon enough not to matter.
const DELAY_SHARE: u32 = 32;
const DELAY_MIN: Duration = Duration::from_millis(1);
const DELAY_MAX: Duration = Duration::from_millis(10);
/// Maximum number of copies ahead of a stream's reader that are kept.
const MAX_AHEAD: usize = 32;

/// Second copies of one connection, sent and received. They end when it is dropped.
#[derive(Debug)]
pub(super) struct Hedging {
    shared: Arc<Shared>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Shared {
    connection: quinn::Connection,
    close_reason: CloseReason,
    outgoing: Mutex<Outgoing>,
    queued: Notify,
    slots: Mutex<HashMap<u64, Arc<Slot>>>,
    sent: AtomicU64,
    used: AtomicU64,
}

impl Hedging {
    /// Starts to send copies, of at most `rate` bytes per second, and to use the peer's.
    pub(super) fn begin(
        connection: quinn::Connection,
        close_reason: CloseReason,
        rate: u32,
    ) -> Self {
        let shared = Arc::new(Shared {
            connection,
            close_reason,
            outgoing: Mutex::new(Outgoing::new(rate, now())),
            queued: Notify::new(),
            slots: Mutex::default(),
            sent: AtomicU64::new(0),
            used: AtomicU64::new(0),
        });
        let task = crate::task::owned(run(shared.clone()));
        Self { shared, _task: task }
    }

    /// A copy of this write, if it is to be sent twice: it is thin, the path loses packets, and the
    /// budget allows it.
    pub(super) fn hedge(&self, chunk: &Bytes) -> Option<Bytes> {
        if chunk.len() > THIN {
            return None;
        }
        let mut outgoing = self.shared.outgoing.lock();
        let path = || self.shared.connection.stats().path;
        outgoing.admits(now(), chunk.len(), path).then(|| chunk.clone())
    }

    /// Sends a copy of what was just written at this offset of the stream.
    pub(super) fn send(&self, stream: u64, offset: u64, chunk: &[u8]) {
        let mut datagram = BytesMut::with_capacity(HEAD_LEN + chunk.len());
        datagram.put_u8(KIND);
        datagram.put_u64(stream);
        datagram.put_u64(offset);
        datagram.put_slice(chunk);
        self.shared.outgoing.lock().push(now(), datagram.freeze());
        self.shared.queued.notify_one();
    }

    /// Keeps copies for this stream until the returned reader of them is dropped.
    pub(super) fn expect(&self, stream: u64) -> Copies {
        let slot = Arc::new(Slot::default());
        self.shared.slots.lock().insert(stream, slot.clone());
        Copies { stream, slot, shared: self.shared.clone(), position: Position::default() }
    }

    /// Number of copies sent, and of copies that arrived before what they are copies of.
    pub(super) fn counts(&self) -> (u64, u64) {
        let now = |count: &AtomicU64| count.load(Ordering::Relaxed);
        (now(&self.shared.sent), now(&self.shared.used))
    }
}

/// Sends copies when they are due and takes the peer's, until the connection ends.
async fn run(shared: Arc<Shared>) {
    loop {
        select! {
            datagram = shared.due() => {
                // Without datagrams the stream itself is enough.
                if shared.connection.send_datagram(datagram).is_ok() {
                    shared.sent.fetch_add(1, Ordering::Relaxed);
                }
            }
            datagram = shared.connection.read_datagram() => {
                let Ok(datagram) = datagram else { return };
                if shared.take(datagram).is_err() {
                    let (code, reason) = (CloseCode::PROTOCOL_VIOLATION, "a datagram is too short");
                    return shared.close_reason.close(&shared.connection, code, reason);
                }
            }
        }
    }
}

/// A datagram ends before its head does.
struct TooShort;

impl Shared {
    /// The next datagram, when it is due.
    ///
    /// # Cancel safety
    /// Cancel safe: a datagram is taken only when the future completes.
    async fn due(&self) -> Bytes {
        loop {
            let front = self.outgoing.lock().queue.front().map(|(due, _)| *due);
            match front {
                Some(due) => {
                    sleep_until(due.into()).await;
                    if let Some((_, datagram)) = self.outgoing.lock().queue.pop_front() {
                        return datagram;
                    }
                }
                None => self.queued.notified().await,
            }
        }
    }

    fn take(&self, mut datagram: Bytes) -> Result<(), TooShort> {
        if datagram.try_get_u8().map_err(|_| TooShort)? != KIND {
            return Ok(());
        }
        let stream = datagram.try_get_u64().map_err(|_| TooShort)?;
        let offset = datagram.try_get_u64().map_err(|_| TooShort)?;
        // None for a stream that has ended here, or has not begun.
        let Some(slot) = self.slots.lock().get(&stream).cloned() else { return Ok(()) };
        slot.put(offset, &datagram);
        Ok(())
    }
}

/// The copies that are to be sent, and the budget of them.
#[derive(Debug)]
struct Outgoing {
    /// Datagrams, and when they are due.
    queue: VecDeque<(Instant, Bytes)>,
    /// What the budget gains, in bytes per second.
    rate: f64,
    /// Bytes that may be sent as copies now; at most a quarter of a second's.
    budget: f64,
    /// When the budget was last filled up.
    filled: Instant,
    sampled: Option<Instant>,
    lost_packets: u64,
    lossy_until: Option<Instant>,
    delay: Duration,
}

impl Outgoing {
    fn new(rate: u32, now: Instant) -> Self {
        Self {
            queue: VecDeque::new(),
            rate: rate.into(),
            budget: f64::from(rate) / 4.0,
            filled: now,
            sampled: None,
            lost_packets: 0,
            lossy_until: None,
            delay: DELAY_MIN,
        }
    }

    /// Whether a write of `length` bytes is to be sent twice; counts it if so.
    fn admits(
        &mut self,
        now: Instant,
        length: usize,
        path: impl FnOnce() -> quinn::PathStats,
    ) -> bool {
        self.sample(now, path);
        if self.lossy_until.is_none_or(|until| until < now) {
            return false;
        }
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.budget = (self.budget + elapsed * self.rate).min(self.rate / 4.0);
        self.filled = now;
        #[expect(clippy::cast_precision_loss, reason = "a thin write has at most a thousand bytes")]
        let cost = (length + OVERHEAD) as f64;
        let admitted = self.budget >= cost;
        if admitted {
            self.budget -= cost;
        }
        admitted
    }

    /// Reads the path's losses and its round-trip time, if it is time for that.
    fn sample(&mut self, now: Instant, path: impl FnOnce() -> quinn::PathStats) {
        if self.sampled.is_some_and(|last| now.duration_since(last) < SAMPLE_INTERVAL) {
            return;
        }
        self.sampled = Some(now);
        let path = path();
        if path.lost_packets > self.lost_packets {
            self.lossy_until = Some(now + MEMORY);
        }
        self.lost_packets = path.lost_packets;
        self.delay = (path.rtt / DELAY_SHARE).clamp(DELAY_MIN, DELAY_MAX);
    }

    fn push(&mut self, now: Instant, datagram: Bytes) {
        self.queue.push_back((now + self.delay, datagram));
    }
}

/// Copies of one stream that have arrived and may be ahead of it.
#[derive(Debug, Default)]
struct Slot {
    /// Offset of the reader's next byte.
    next: AtomicU64,
    ahead: Mutex<Vec<(u64, Bytes)>>,
    arrived: Notify,
}

impl Slot {
    fn put(&self, offset: u64, copy: &[u8]) {
        let next = self.next.load(Ordering::Relaxed);
        let Some(end) = offset.checked_add(copy.len() as u64) else { return };
        if end <= next {
            return;
        }
        let mut ahead = self.ahead.lock();
        ahead.retain(|(offset, copy)| offset + copy.len() as u64 > next);
        if ahead.len() < MAX_AHEAD {
            // A slice of the datagram would keep the whole batch of packets that it came in.
            ahead.push((offset, Bytes::copy_from_slice(copy)));
            drop(ahead);
            self.arrived.notify_one();
        }
    }

    /// The bytes from `next` on, as far as a copy has them.
    fn get(&self, next: u64) -> Option<Bytes> {
        let ahead = self.ahead.lock();
        ahead.iter().find_map(|(offset, copy)| {
            let skipped = usize::try_from(next.checked_sub(*offset)?).ok()?;
            (skipped < copy.len()).then(|| copy.slice(skipped..))
        })
    }
}

/// The copies of one stream, for its reader.
#[derive(Debug)]
pub(super) struct Copies {
    stream: u64,
    slot: Arc<Slot>,
    shared: Arc<Shared>,
    position: Position,
}

impl Copies {
    /// Completes with the stream's next bytes when a copy has them.
    ///
    /// # Cancel safety
    /// Cancel safe: bytes are taken only when the future completes.
    pub(super) async fn next(&mut self) -> Bytes {
        loop {
            if let Some(copy) = self.slot.get(self.position.next) {
                self.position.copied(copy.len());
                self.publish();
                self.shared.used.fetch_add(1, Ordering::Relaxed);
                return copy;
            }
            self.slot.arrived.notified().await;
        }
    }

    /// Counts bytes that the stream brought. Returns how many of them, at the front, copies had
    /// brought before.
    pub(super) fn stale(&mut self, arrived: usize) -> usize {
        let stale = self.position.arrived(arrived);
        self.publish();
        stale
    }

    /// Shows the slot how far the reader has come.
    fn publish(&self) {
        self.slot.next.store(self.position.next, Ordering::Relaxed);
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.shared.slots.lock().remove(&self.stream);
    }
}

/// The offsets of a stream's reader and of the stream itself.
#[derive(Clone, Copy, Debug, Default)]
struct Position {
    /// Bytes handed on.
    next: u64,
    /// Bytes that the stream brought; never more than were handed on.
    taken: u64,
}

impl Position {
    /// Counts bytes that a copy brought.
    fn copied(&mut self, length: usize) {
        self.next += length as u64;
    }

    /// Counts bytes that the stream brought. Returns how many of them, at the front, have been
    /// handed on before.
    fn arrived(&mut self, length: usize) -> usize {
        let length = length as u64;
        let stale = (self.next - self.taken).min(length);
        self.taken += length;
        self.next = self.next.max(self.taken);
        // At most `length`, which was one.
        usize::try_from(stale).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whichever copies arrive in whichever order, each byte is handed on once and in order.
        #[test]
        fn every_byte_is_handed_on_once(
            chunks in prop::collection::vec(1_usize..40, 1..40),
            copies in prop::collection::vec((0_usize..800, 1_usize..60, 0_usize..40), 0..80),
            limit in 1_usize..80,
        ) {
            let total: usize = chunks.iter().sum();
            let stream: Vec<u8> = (0..total).map(|offset| offset as u8).collect();
            let (slot, mut position, mut out) = (Slot::default(), Position::default(), Vec::new());
            let mut offset = 0;
            for (round, chunk) in chunks.iter().enumerate() {
                for (start, length, _) in copies.iter().filter(|(.., when)| *when == round) {
                    let end = (start + length).min(total);
                    if *start < end {
                        slot.put(*start as u64, &stream[*start..end]);
                    }
                }
                while let Some(mut copy) = slot.get(position.next) {
                    copy.truncate(limit);
                    position.copied(copy.len());
                    slot.next.store(position.next, Ordering::Relaxed);
                    out.extend_from_slice(&copy);
                }
                let arrived = &stream[offset..offset + chunk];
                out.extend_from_slice(&arrived[position.arrived(*chunk)..]);
                slot.next.store(position.next, Ordering::Relaxed);
                offset += chunk;
            }
            prop_assert_eq!(out, stream);
        }
    }

    fn path(rtt: u64, lost_packets: u64) -> quinn::PathStats {
        let mut path = quinn::PathStats::default();
        path.rtt = Duration::from_millis(rtt);
        path.lost_packets = lost_packets;
        path
    }

    #[test]
    fn copies_are_sent_while_the_path_loses_packets() {
        let start = Instant::now();
        let mut outgoing = Outgoing::new(100_000, start);
        assert!(!outgoing.admits(start, 64, || path(50, 0)));
        let later = start + SAMPLE_INTERVAL;
        assert!(outgoing.admits(later, 64, || path(50, 1)));
        assert!(outgoing.admits(later + MEMORY, 64, || path(50, 1)));
        assert!(!outgoing.admits(later + MEMORY + SAMPLE_INTERVAL, 64, || path(50, 1)));
    }

    #[test]
    fn copies_keep_to_their_budget() {
        let start = Instant::now();
        let mut outgoing = Outgoing::new(10_000, start);
        let sent: usize = (0..10_000_u64)
            .map(|number| start + Duration::from_millis(number))
            .map(|now| outgoing.admits(now, 100, || path(50, 1)))
            .filter(|admitted| *admitted)
            .count();
        // Ten seconds and a quarter of one.
        let most = 10_250 * 10 / (100 + OVERHEAD);
        assert!((most - 5..=most).contains(&sent), "{sent} of {most}");
        assert!(!Outgoing::new(0, start).admits(start, 0, || path(50, 1)), "no budget, no copies");
    }

    #[test]
    fn a_copy_follows_soon_and_not_at_once() {
        for (rtt, delay) in [(1, 1), (64, 2), (2_000, 10)] {
            let mut outgoing = Outgoing::new(1, Instant::now());
            outgoing.sample(Instant::now(), || path(rtt, 0));
            assert_eq!(outgoing.delay, Duration::from_millis(delay));
        }
    }

    #[test]
    fn a_stalled_reader_keeps_few_copies() {
        let slot = Slot::default();
        for number in 0..1000 {
            slot.put(number * 10, &[0; 10]);
        }
        assert_eq!(slot.ahead.lock().len(), MAX_AHEAD);
        slot.next.store(5_000, Ordering::Relaxed);
        slot.put(5_000, &[0; 10]);
        assert_eq!(slot.ahead.lock().len(), 1);
        slot.put(u64::MAX, &[0; 10]);
        assert_eq!(slot.ahead.lock().len(), 1, "an offset beyond every stream's end");
    }
}
