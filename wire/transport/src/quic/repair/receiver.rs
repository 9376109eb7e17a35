//! Packets that were received, with what copies and repair shards restore.
//!
//! A copy is replaced by the STREAM frame that it stands for, and what repair shards rebuild is added
//! as STREAM frames, before quinn has the packet. So quinn orders the bytes, hands each on once, and
//! keeps windows and limits.
//!
//! To rebuild a burst, the parts of it that have arrived are needed, even if they were read. They are
//! kept for a moment, for streams that are not bulk, while the peer sends repair shards.

mod group;
mod kept;

use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};

use super::{
    super::inspection::{Frame, Frames},
    code::{self, Malformed},
    datagram::{COPY_HEAD, Copy, Datagram, put_stream_head},
};
use group::Groups;
use kept::Kept;

/// Time after repair shards for which bytes are kept.
const EXPECTED: Duration = Duration::from_secs(600);
/// Bursts that may be rebuilt at once, and in a second: each takes half a millisecond.
const REBUILDS: f64 = 100.0;

/// What restores the packets of a connection.
#[derive(Debug)]
pub(super) struct Restorer {
    kept: Kept,
    groups: Groups,
    /// Until when bytes are kept.
    expected_until: Option<Instant>,
    rebuilds: Rebuilds,
    /// Why the peer's datagrams are looked at no more.
    malformed: Option<Malformed>,
    /// Number of bursts that were rebuilt, and of copies that came first.
    pub(super) rebuilt: u64,
    pub(super) used: u64,
}

impl Restorer {
    /// Keeps at most `limit` bytes.
    pub(super) fn new(now: Instant, limit: usize) -> Self {
        Self {
            kept: Kept::new(limit),
            groups: Groups::default(),
            expected_until: None,
            rebuilds: Rebuilds { left: REBUILDS, since: now },
            malformed: None,
            rebuilt: 0,
            used: 0,
        }
    }

    /// Whether packets without datagrams are of interest.
    pub(super) fn is_keeping(&self) -> bool {
        self.expected_until.is_some()
    }

    /// Number of bytes that are kept.
    pub(super) fn cost(&self) -> usize {
        self.kept.cost() + self.groups.cost()
    }

    /// Looks at a packet and changes it. `arrived` counts the end of bytes of a stream and says how
    /// many are new.
    ///
    /// # Errors
    /// Once, when the peer did what it may not; nothing is looked at after it.
    pub(super) fn restore(
        &mut self,
        now: Instant,
        payload: &mut BytesMut,
        mut arrived: impl FnMut(u64, u64) -> u64,
    ) -> Result<(), Malformed> {
        if self.malformed.is_some() {
            return Ok(());
        }
        // From the last on, so that the places of those before stay as they are.
        for place in self.look(now, payload).into_iter().rev() {
            let restored = self.datagram(now, payload, place, &mut arrived);
            restored.inspect_err(|malformed| self.malformed = Some(*malformed))?;
        }
        let rebuilt = self.rebuild(now, &mut arrived);
        if !rebuilt.is_empty() {
            // Before the others: the last frame may reach to the end of the packet.
            let mut joined = BytesMut::with_capacity(rebuilt.len() + payload.len());
            joined.put_slice(&rebuilt);
            joined.put_slice(payload);
            *payload = joined;
        }
        Ok(())
    }

    /// Drops what is kept of a stream.
    pub(super) fn forget(&mut self, stream: u64) {
        self.kept.forget(stream);
        self.groups.forget(stream);
    }

    /// Drops what is too old; whether something is left.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        if self.expected_until.is_some_and(|until| until < now) {
            self.expected_until = None;
        }
        self.kept.expire(now);
        self.groups.expire(now);
        self.cost() > 0
    }

    /// Drops everything that is kept.
    pub(super) fn clear(&mut self) {
        self.kept.clear();
        self.groups.clear();
    }

    /// Keeps the streams' bytes of a packet, and finds its datagrams.
    fn look(&mut self, now: Instant, payload: &[u8]) -> Vec<Place> {
        let (mut places, mut frames) = (Vec::new(), Frames::of(payload));
        loop {
            let start = payload.len() - frames.left();
            let Some(frame) = frames.next() else { return places };
            let end = payload.len() - frames.left();
            match frame {
                Frame::Stream { id, offset, bytes } => self.keep(now, id, offset, bytes),
                Frame::Datagram { bytes } => {
                    places.push(Place { start, content: end - bytes.len(), end });
                }
                _ => {}
            }
        }
    }

    fn keep(&mut self, now: Instant, stream: u64, offset: u64, bytes: &[u8]) {
        if self.is_keeping() {
            self.kept.put(now, stream, offset, bytes);
            self.groups.touch(stream);
        }
    }

    /// Takes what a datagram has, and replaces its frame.
    fn datagram(
        &mut self,
        now: Instant,
        payload: &mut BytesMut,
        place: Place,
        arrived: &mut impl FnMut(u64, u64) -> u64,
    ) -> Result<(), Malformed> {
        let Place { start, content, end } = place;
        match Datagram::parse(&payload[content..end])? {
            Datagram::Copy(copy) => {
                self.keep(now, copy.stream, copy.offset, copy.bytes);
                let last = copy.offset + copy.bytes.len() as u64;
                self.used += u64::from(arrived(copy.stream, last) > 0);
                let mut head = BytesMut::with_capacity(21);
                // One that reaches to the end of the packet may have no room for a length.
                put_stream_head(&mut head, &copy, end < payload.len());
                let bytes = content + COPY_HEAD;
                payload[start..bytes - head.len()].fill(0);
                payload[bytes - head.len()..bytes].copy_from_slice(&head);
                return Ok(());
            }
            Datagram::Shards(shards) => {
                self.expected_until = Some(now + EXPECTED);
                self.groups.put(now, &shards)?;
            }
            Datagram::Other => {}
        }
        // A PING is acknowledged too. quinn would take each byte of PADDING for a frame.
        payload[start] = 0x01;
        payload.copy_within(end.., start + 1);
        payload.truncate(payload.len() - (end - start - 1));
        Ok(())
    }

    /// STREAM frames with what can be rebuilt now.
    fn rebuild(&mut self, now: Instant, arrived: &mut impl FnMut(u64, u64) -> u64) -> BytesMut {
        let mut frames = BytesMut::new();
        while code::is_prepared()
            && let Some(group) = self.groups.next(&self.kept)
            && self.rebuilds.take(now)
        {
            let Some(parts) = group.rebuild(&self.kept) else { continue };
            self.rebuilt += 1;
            for (offset, bytes) in parts {
                let stream = group.stream();
                let part = Copy { stream, offset, bytes: &bytes, is_last: false };
                put_stream_head(&mut frames, &part, true);
                frames.put_slice(&bytes);
                arrived(stream, offset + bytes.len() as u64);
                self.kept.put(now, stream, offset, &bytes);
            }
        }
        frames
    }
}

/// Where a DATAGRAM frame is in a packet.
#[derive(Clone, Copy, Debug)]
struct Place {
    start: usize,
    /// Where its content begins.
    content: usize,
    end: usize,
}

/// How many bursts may be rebuilt now.
#[derive(Debug)]
struct Rebuilds {
    left: f64,
    since: Instant,
}

impl Rebuilds {
    /// Takes one; whether one was left.
    fn take(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.since).as_secs_f64();
        self.left = (self.left + elapsed * REBUILDS).min(REBUILDS);
        self.since = now;
        let is_left = self.left >= 1.0;
        if is_left {
            self.left -= 1.0;
        }
        is_left
    }
}

/// Restores the packets of a script: each has its length before it.
///
/// # Panics
/// When too much is kept, or a packet that could be parsed cannot be any more.
#[cfg(fuzzing)]
pub(in crate::quic) fn exercise(mut script: &[u8]) {
    const LIMIT: usize = 64 * 1024;
    code::prepare();
    let is_known =
        |payload: &[u8]| Frames::of(payload).all(|frame| !matches!(frame, Frame::Unknown { .. }));
    let mut now = Instant::now();
    let mut restorer = Restorer::new(now, LIMIT);
    while let Some(([high, low], rest)) = script.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
        let (packet, rest) = rest.split_at(length);
        script = rest;
        let mut payload = BytesMut::from(packet);
        now += Duration::from_millis(1);
        let _ = restorer.restore(now, &mut payload, |_, _| 1);
        assert!(restorer.kept.cost() <= LIMIT && restorer.groups.cost() <= 256 * 1024);
        assert!(!is_known(packet) || is_known(&payload));
    }
    restorer.expire(now + Duration::from_secs(60));
    assert_eq!(restorer.cost(), 0);
}

#[cfg(test)]
mod tests;
