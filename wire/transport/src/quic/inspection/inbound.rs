//! What the frames that a connection received are measured by.

use std::{
    collections::VecDeque,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use bytes::BytesMut;
use parking_lot::Mutex;
use quinn::Side;

use super::{
    super::repair::Restoring,
    frames::{Frame, Frames},
    unread::Streams,
};
use crate::budget::TunnelUnread;

/// Number of retirements of connection ids that a peer may send at once: more than it has ids, with
/// repetitions of lost ones.
const RETIREMENTS: u32 = 64;
/// Maximum number of pieces of TLS in a packet, and of streams before the peer is admitted. quinn
/// joins what waits behind a gap again and again when it comes in small pieces, which takes more time
/// than a stranger may cost. It sends one or two itself.
const MAX_PIECES: usize = 16;
/// Frame type that does not exist, for which quinn closes a connection.
const NO_FRAME: u8 = 0x3f;

/// Why packets of a connection are refused, for the log.
const EXCESS: &str = "more RETIRE_CONNECTION_ID frames than the peer has connection ids";

/// The frames that a connection has received.
#[derive(Debug)]
pub(crate) struct Inbound {
    retirements: Mutex<Retirements>,
    /// Whether the peer is a stranger.
    is_stranger: AtomicBool,
    /// Why the peer's packets are refused from now on.
    violation: OnceLock<&'static str>,
    streams: Mutex<Streams>,
    /// The part of the streams' bytes in the process's, once the peer is admitted.
    unread: OnceLock<Arc<TunnelUnread>>,
    /// What datagrams restore, once both sides have agreed on them.
    restoring: OnceLock<Arc<Restoring>>,
}

impl Inbound {
    /// The frames of a connection whose end here this is. Its peer may be a stranger, which
    /// [`Self::admit`] ends.
    pub(super) fn new(side: Side, stream_window: u32, is_stranger: bool) -> Self {
        Self {
            is_stranger: is_stranger.into(),
            retirements: Mutex::new(Retirements::new(Instant::now())),
            violation: OnceLock::new(),
            streams: Mutex::new(Streams::new(side, stream_window)),
            unread: OnceLock::new(),
            restoring: OnceLock::new(),
        }
    }

    /// Looks at the frames of the packet with this number; whether quinn may have it. Replaces it by
    /// one that ends the connection, if the peer does what it may not.
    ///
    /// A packet without data loses the padding at its end: quinn takes each byte of it for a frame,
    /// and probes of the path's MTU are thousands of them. What datagrams restore is added.
    pub(super) fn inspect(&self, number: u64, payload: &mut BytesMut) -> bool {
        if self.unread.get().is_some_and(|unread| unread.is_cut()) {
            return false;
        }
        if self.violation.get().is_none() {
            let is_stranger = self.is_stranger.load(Relaxed);
            let (mut pieces, mut retirements) = (0, 0_u32);
            let (mut has_data, mut has_datagram, mut end, mut needed) = (false, false, 0, 0);
            let mut frames = Frames::of(payload);
            while let Some(frame) = frames.next() {
                has_data |= frame.has_data();
                has_datagram |= matches!(frame, Frame::Datagram { .. });
                let begin = end;
                end = payload.len() - frames.left();
                // One byte stays, because a packet has a frame.
                needed = if frame == Frame::Padding { begin + 1 } else { end };
                pieces += usize::from(is_piece(&frame, is_stranger));
                if pieces > MAX_PIECES {
                    return false;
                }
                retirements = retirements.saturating_add(self.retirements_of(frame));
            }
            if !has_data {
                payload.truncate(needed);
            }
            if retirements > 0 && !self.retirements.lock().take(number, retirements, Instant::now())
            {
                let _ = self.violation.set(EXCESS);
            }
            if let Some(restoring) = self.restoring.get() {
                restoring.restore(payload, has_datagram, |id, end| self.receive(id, end));
            }
        }
        if self.violation.get().is_some() {
            payload.iter_mut().take(1).for_each(|byte| *byte = NO_FRAME);
        }
        true
    }

    /// The peer is no stranger any more.
    pub(crate) fn admit(&self) {
        self.is_stranger.store(false, Relaxed);
    }

    /// Counts the bytes of a frame; how many retirements it is at most.
    fn retirements_of(&self, frame: Frame<'_>) -> u32 {
        match frame {
            Frame::Retirement => 1,
            Frame::Unknown { retirements } => u32::try_from(retirements).unwrap_or(u32::MAX),
            Frame::Stream { id, offset, bytes } => {
                self.receive(id, offset.saturating_add(bytes.len() as u64));
                0
            }
            Frame::Crypto | Frame::Datagram { .. } | Frame::Padding | Frame::Other => 0,
        }
    }

    /// Counts the end of bytes of a stream; how many of them are new.
    fn receive(&self, id: u64, end: u64) -> u64 {
        // Locked for as long as it counts, so that `count` counts nothing twice.
        let mut streams = self.streams.lock();
        let new = streams.receive(id, end);
        if let Some(unread) = self.unread.get().filter(|_| new > 0) {
            unread.add(new);
        }
        new
    }

    /// Restores packets from now on by what their datagrams have. The first call counts.
    pub(crate) fn set_restoring(&self, restoring: Arc<Restoring>) {
        let _ = self.restoring.set(restoring);
    }

    /// A stream that was opened or accepted.
    pub(crate) fn begin(&self, id: u64) {
        self.streams.lock().begin(id);
    }

    /// Bytes of a stream that were read.
    pub(crate) fn read(&self, id: u64, count: u64) {
        self.remove(|streams| streams.read(id, count));
    }

    /// Number of bytes of a stream that have arrived and were not read.
    pub(crate) fn unread_of(&self, id: u64) -> u64 {
        self.streams.lock().unread_of(id)
    }

    /// A stream that has ended.
    pub(crate) fn end(&self, id: u64) {
        self.remove(|streams| streams.end(id));
        if let Some(restoring) = self.restoring.get() {
            restoring.forget(id);
        }
    }

    fn remove(&self, gone: impl FnOnce(&mut Streams) -> u64) {
        let mut streams = self.streams.lock();
        let gone = gone(&mut streams);
        if let Some(unread) = self.unread.get() {
            unread.remove(gone);
        }
    }

    /// Counts what arrives from now on, and what has arrived, in the process's bytes.
    pub(crate) fn count(&self, unread: Arc<TunnelUnread>) {
        let streams = self.streams.lock();
        if self.unread.get().is_none() {
            unread.add(streams.bytes());
            let _ = self.unread.set(unread);
        }
    }

    /// The bytes of the connection in the process's; `None` before the peer is admitted.
    pub(crate) fn unread(&self) -> Option<&Arc<TunnelUnread>> {
        self.unread.get()
    }

    /// What the peer did that it may not, after which the connection was closed.
    pub(crate) fn violation(&self) -> Option<&'static str> {
        self.violation.get().copied()
    }
}

/// Whether a stranger's packet has few pieces of TLS and of streams.
pub(super) fn has_few_pieces(payload: &[u8]) -> bool {
    Frames::of(payload).filter(|frame| is_piece(frame, true)).nth(MAX_PIECES).is_none()
}

/// Whether a packet may have [`MAX_PIECES`] of such frames.
fn is_piece(frame: &Frame<'_>, is_stranger: bool) -> bool {
    match frame {
        Frame::Crypto => true,
        Frame::Stream { .. } => is_stranger,
        _ => false,
    }
}

/// The retirements of connection ids that a peer may send.
#[derive(Debug)]
struct Retirements {
    allowance: Allowance,
    /// Numbers of the latest packets that had some, so that a packet counts once: an observer on the
    /// path can repeat it. quinn drops repetitions after this.
    packets: VecDeque<u64>,
}

impl Retirements {
    fn new(now: Instant) -> Self {
        Self { allowance: Allowance::new(RETIREMENTS, now), packets: VecDeque::new() }
    }

    /// Takes the retirements of a packet; whether so many are left.
    fn take(&mut self, packet: u64, count: u32, now: Instant) -> bool {
        if self.packets.contains(&packet) {
            return true;
        }
        if self.packets.len() >= RETIREMENTS as usize {
            self.packets.pop_front();
        }
        self.packets.push_back(packet);
        self.allowance.take(count, now)
    }
}

/// A number of events, of which one more is allowed each second.
#[derive(Debug)]
struct Allowance {
    most: u32,
    left: u32,
    /// The time up to which events were added.
    since: Instant,
}

impl Allowance {
    fn new(most: u32, now: Instant) -> Self {
        Self { most, left: most, since: now }
    }

    /// Takes a number of events; whether so many are left.
    fn take(&mut self, count: u32, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.since).as_secs();
        self.since += Duration::from_secs(seconds);
        let more = u32::try_from(seconds).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(more).min(self.most);
        let is_left = count <= self.left;
        self.left = self.left.saturating_sub(count);
        is_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(frames: &[u8]) -> BytesMut {
        BytesMut::from(frames)
    }

    #[test]
    fn an_allowance_grows_by_one_each_second_up_to_its_most() {
        let begun = Instant::now();
        let mut allowance = Allowance::new(10, begun);
        assert!(allowance.take(10, begun));
        assert!(!allowance.take(1, begun + Duration::from_millis(999)));
        assert!(allowance.take(1, begun + Duration::from_millis(1001)));
        assert!(allowance.take(1, begun + Duration::from_millis(2000)));
        assert!(!allowance.take(1, begun + Duration::from_millis(2500)));
        assert!(!allowance.take(11, begun + Duration::from_secs(3600)));
        assert!(allowance.take(10, begun + Duration::from_secs(7200)));
    }

    #[test]
    fn a_packet_has_few_pieces_of_tls_and_a_strangers_few_of_streams() {
        let crypto = |count| packet(&[6, 4, 1, 7].repeat(count));
        let stream = |count| packet(&[0x0e, 0, 4, 1, 7].repeat(count));
        let inbound = Inbound::new(Side::Server, 1 << 20, true);
        for mut few in [crypto(MAX_PIECES), stream(MAX_PIECES)] {
            assert!(inbound.inspect(0, &mut few));
        }
        for mut excess in [crypto(MAX_PIECES + 1), stream(MAX_PIECES + 1)] {
            assert!(!inbound.inspect(0, &mut excess));
        }
        inbound.admit();
        assert!(inbound.inspect(0, &mut stream(MAX_PIECES + 1)));
        assert!(!inbound.inspect(0, &mut crypto(MAX_PIECES + 1)));
    }

    #[test]
    fn packets_are_refused_once_a_peer_has_retired_too_many_ids() {
        let inbound = Inbound::new(Side::Server, 1 << 20, false);
        let mut allowed = packet(&[0x19, 1].repeat(RETIREMENTS as usize));
        let original = allowed.clone();
        for _repetition in 0..3 {
            assert!(inbound.inspect(7, &mut allowed));
            assert_eq!(allowed, original);
        }
        assert_eq!(inbound.violation(), None);
        let mut ping = packet(&[1]);
        inbound.inspect(8, &mut ping);
        assert_eq!(ping[..], [1]);

        let mut excess = packet(&[0x19, 1, 0x19, 1]);
        inbound.inspect(9, &mut excess);
        assert_eq!((excess[0], inbound.violation()), (NO_FRAME, Some(EXCESS)));
        inbound.inspect(10, &mut ping);
        assert_eq!(ping[..], [NO_FRAME]);
        assert!(inbound.inspect(11, &mut packet(&[])));
    }

    #[test]
    fn padding_at_the_end_of_a_packet_without_data_is_cut() {
        let inbound = Inbound::new(Side::Server, 1 << 20, false);
        let padding = [0; 1000];
        let inspected = |frames: &[u8]| {
            let mut payload = packet(&[frames, &padding].concat());
            assert!(inbound.inspect(0, &mut payload));
            payload
        };
        for frames in [&[][..], &[1], &[0x1a, 1, 2, 3, 4, 5, 6, 7, 8], &[0, 0, 1]] {
            assert_eq!(inspected(frames)[..], [frames, &[0]].concat());
        }
        let (crypto, stream) = ([6, 4, 1, 7], [0x0a, 0, 1, 7]);
        for frames in [&crypto[..], &stream, &[0x31, 1, 7], &[0x3f]] {
            assert_eq!(inspected(frames)[..], [frames, &padding].concat());
        }
    }
}
