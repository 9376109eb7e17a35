//! What is sent beside the streams: copies and repair shards of what was written lately, when they
//! are due and as far as the budget allows.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::{
    amount::{self, Amount, Repaired},
    bursts::{Burst, Bursts},
    code::{self, Division},
    datagram::{COPY_HEAD, Copy, SHARDS_HEAD, Shards},
    loss::Path,
};

/// Longest write that is sent twice to a peer that knows no repair shards, in bytes: a keystroke, a
/// line, a small request.
const THIN: usize = 1000;
/// Approximate cost of a datagram to the path beyond its bytes, in bytes.
const OVERHEAD: usize = 48;
/// Bytes of a packet that are not a stream's: headers, the AEAD's tag, a frame's head.
const PACKET_OVERHEAD: usize = 34;
/// Share of the budget that repair shards leave to copies.
const RESERVE: f64 = 0.25;
/// Maximum number of bytes that wait until they are due.
const MAX_QUEUED: usize = 256 * 1024;

/// What a datagram is, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Copy,
    Repair,
}

/// What a connection sends beside its streams.
#[derive(Debug)]
pub(super) struct Outgoing {
    path: Path,
    budget: Budget,
    bursts: Bursts,
    /// Whether the peer knows repair shards.
    repairs: bool,
    /// Datagrams, by when they are due and a number that tells apart those due together.
    queue: BTreeMap<(Instant, u64), (Kind, Bytes)>,
    queued: usize,
    number: u64,
}

/// A burst, and what is to be sent of it.
#[derive(Debug)]
pub(super) struct Planned {
    burst: Burst,
    plan: Plan,
    /// When the first datagram is due, and how long after it the last.
    due: Instant,
    spread: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Plan {
    /// Copies of each write alone.
    Writes,
    /// So many copies of the whole burst.
    Copies(usize),
    Repair {
        size: usize,
        amount: Amount,
    },
}

impl Outgoing {
    /// Sends at most `rate` bytes per second.
    pub(super) fn new(rate: u32, repairs: bool, now: Instant) -> Self {
        Self {
            path: Path::default(),
            budget: Budget::new(rate, now),
            bursts: Bursts::default(),
            repairs,
            queue: BTreeMap::new(),
            queued: 0,
            number: 0,
        }
    }

    /// Whether something is to be sent of a write of so many bytes that happens now.
    pub(super) fn wants(
        &mut self,
        now: Instant,
        length: usize,
        read: impl FnOnce() -> quinn::ConnectionStats,
    ) -> bool {
        if self.budget.rate == 0.0 || (!self.repairs && length > THIN) {
            return false;
        }
        self.path.sample(now, read);
        self.path.is_lossy(now)
    }

    /// Records bytes that were written at this position of a stream; whether the caller of
    /// [`Self::next_at`] has to look again.
    pub(super) fn write(&mut self, now: Instant, stream: u64, offset: u64, bytes: Bytes) -> bool {
        let before = self.next_at();
        self.bursts.write(now, stream, offset, bytes);
        self.is_sooner_than(before)
    }

    /// Records that a stream ends at this position; as [`Self::write`].
    pub(super) fn finish(&mut self, now: Instant, stream: u64, offset: u64) -> bool {
        if !self.repairs {
            return false;
        }
        let before = self.next_at();
        self.bursts.finish(now, stream, offset);
        self.is_sooner_than(before)
    }

    /// Records that a stream was reset.
    pub(super) fn forget(&mut self, stream: u64) {
        self.bursts.forget(stream);
    }

    fn is_sooner_than(&self, before: Option<Instant>) -> bool {
        self.next_at().is_some_and(|next| before.is_none_or(|before| next < before))
    }

    /// When there is something to do next.
    pub(super) fn next_at(&self) -> Option<Instant> {
        let due = self.queue.first_key_value().map(|((due, _), _)| *due);
        let over = self.bursts.over_at(self.path.pause());
        due.into_iter().chain(over).min()
    }

    /// A datagram that is due.
    pub(super) fn due(&mut self, now: Instant) -> Option<(Kind, Bytes)> {
        let entry = self.queue.first_entry().filter(|entry| entry.key().0 <= now)?;
        let (kind, datagram) = entry.remove();
        self.queued -= datagram.len();
        Some((kind, datagram))
    }

    /// A burst that is over and of which something is to be sent, where a datagram has room for so
    /// many bytes. What that costs is taken from the budget.
    pub(super) fn planned(&mut self, now: Instant, room: usize) -> Option<Planned> {
        loop {
            let burst = self.bursts.take(now, self.path.pause())?;
            let Some(plan) = self.plan(now, &burst, room) else { continue };
            let pause = self.path.pause();
            // Shards follow the packets that they repair.
            let left = burst.first + self.path.time_of(burst.length);
            let due = if matches!(plan, Plan::Repair { .. }) { now.max(left) } else { now };
            return Some(Planned { burst, plan, due, spread: pause });
        }
    }

    fn plan(&mut self, now: Instant, burst: &Burst, room: usize) -> Option<Plan> {
        self.budget.fill(now);
        if !self.repairs {
            let cost = burst.length + burst.writes.len() * (COPY_HEAD + OVERHEAD);
            return self.budget.take(cost).then_some(Plan::Writes);
        }
        if burst.length + COPY_HEAD <= room {
            let cost = burst.length + OVERHEAD;
            let copies =
                (0..amount::copies(self.path.loss())).take_while(|_| self.budget.take(cost));
            return Some(copies.count()).filter(|copies| *copies > 0).map(Plan::Copies);
        }
        let room = room.checked_sub(SHARDS_HEAD)?;
        let size = amount::shard_size(burst.length, room);
        let packet = self.path.mtu().checked_sub(PACKET_OVERHEAD).filter(|packet| *packet > 0)?;
        let repaired = Repaired {
            sources: burst.length.div_ceil(size),
            packets: burst.length.div_ceil(packet),
            shards_of_packet: (packet - 1) as f64 / size as f64 + 1.0,
            shards_of_datagram: (room / size).max(1),
        };
        let full = repaired.shards_of_datagram * size + SHARDS_HEAD + OVERHEAD;
        let amount = repaired.amount(self.path.loss(), self.budget.affordable(full))?;
        self.budget.take(amount.datagrams * (amount.shards * size + SHARDS_HEAD + OVERHEAD));
        Some(Plan::Repair { size, amount })
    }

    /// Has these datagrams sent when they are due, one after another. What exceeds the queue is not
    /// sent.
    pub(super) fn push(&mut self, planned: &Planned, datagrams: Vec<(Kind, Bytes)>) {
        let last = u32::try_from(datagrams.len()).unwrap_or(u32::MAX).max(2) - 1;
        for (number, (kind, datagram)) in (0_u32..).zip(datagrams) {
            if self.queued + datagram.len() <= MAX_QUEUED {
                self.queued += datagram.len();
                self.number += 1;
                let due = planned.due + planned.spread * number / last;
                self.queue.insert((due, self.number), (kind, datagram));
            }
        }
    }
}

impl Planned {
    /// Whether the code is needed for it.
    pub(super) fn has_shards(&self) -> bool {
        matches!(self.plan, Plan::Repair { .. })
    }

    /// The datagrams, in the order in which they are to be sent. It takes some microseconds for a
    /// burst that has shards.
    pub(super) fn datagrams(&self) -> Vec<(Kind, Bytes)> {
        let Burst { stream, offset, is_last, .. } = self.burst;
        let copy = |offset, bytes: &[u8], is_last| {
            (Kind::Copy, Copy { stream, offset, bytes, is_last }.encode())
        };
        match self.plan {
            Plan::Writes => {
                let mut offset = offset;
                let writes = self.burst.writes.iter().map(|write| {
                    let datagram = copy(offset, write, false);
                    offset += write.len() as u64;
                    datagram
                });
                writes.collect()
            }
            Plan::Copies(count) => vec![copy(offset, &self.bytes(), is_last); count],
            Plan::Repair { size, amount } => {
                let mut datagrams = self.shards(size, amount);
                if is_last {
                    datagrams.push(copy(offset + self.burst.length as u64, &[], true));
                }
                datagrams
            }
        }
    }

    fn bytes(&self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(self.burst.length);
        self.burst.writes.iter().for_each(|write| bytes.put_slice(write));
        bytes.freeze()
    }

    fn shards(&self, size: usize, amount: Amount) -> Vec<(Kind, Bytes)> {
        let Burst { stream, offset, length, .. } = self.burst;
        let count = amount.datagrams * amount.shards;
        let Ok(division) = Division::new(length, size, count) else { return Vec::new() };
        let shards = code::encode(division, self.bytes().chunk());
        let datagrams = shards.chunks(amount.shards * size).enumerate().map(|(number, bytes)| {
            let first = number * amount.shards;
            (Kind::Repair, Shards { stream, offset, division, first, bytes }.encode())
        });
        datagrams.collect()
    }
}

/// Bytes that may be sent beside the streams.
#[derive(Debug)]
struct Budget {
    /// What it gains, in bytes per second.
    rate: f64,
    /// Bytes that may be sent now; at most a quarter of a second's.
    bytes: f64,
    /// When it was last filled up.
    filled: Instant,
}

#[expect(clippy::cast_precision_loss, reason = "a burst has at most 64 KiB")]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is rounded down")]
impl Budget {
    fn new(rate: u32, now: Instant) -> Self {
        let rate = f64::from(rate);
        Self { rate, bytes: rate / 4.0, filled: now }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.bytes = (self.bytes + elapsed * self.rate).min(self.rate / 4.0);
        self.filled = now;
    }

    /// Takes this cost; whether there was so much.
    fn take(&mut self, cost: usize) -> bool {
        let is_left = self.bytes >= cost as f64;
        if is_left {
            self.bytes -= cost as f64;
        }
        is_left
    }

    /// Number of datagrams of this cost that repair shards may take.
    fn affordable(&self, cost: usize) -> usize {
        ((self.bytes - self.rate / 4.0 * RESERVE).max(0.0) / cost as f64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{datagram::Datagram, loss::tests::counters},
        *,
    };

    const ROOM: usize = 1371;

    /// What a peer gets of a path that loses packets.
    fn lossy(rate: u32, repairs: bool) -> (Outgoing, Instant) {
        let mut outgoing = Outgoing::new(rate, repairs, Instant::now());
        let now = Instant::now();
        assert!(outgoing.wants(now, 1, || counters(64, 1, 100 * 1400)));
        (outgoing, now)
    }

    /// All datagrams that follow within a second, with the milliseconds after which they are sent.
    fn sent(outgoing: &mut Outgoing, start: Instant) -> Vec<(u128, Kind, Bytes)> {
        let mut sent = Vec::new();
        while let Some(now) = outgoing.next_at() {
            while let Some(planned) = outgoing.planned(now, ROOM) {
                outgoing.push(&planned, planned.datagrams());
            }
            while let Some((kind, datagram)) = outgoing.due(now) {
                sent.push(((now - start).as_millis(), kind, datagram));
            }
        }
        sent
    }

    #[test]
    fn nothing_is_sent_on_a_path_without_loss_or_without_a_budget() {
        let now = Instant::now();
        let mut outgoing = Outgoing::new(100_000, true, now);
        assert!(!outgoing.wants(now, 64, || counters(50, 0, 0)));
        let mut outgoing = Outgoing::new(0, true, now);
        assert!(!outgoing.wants(now, 64, || counters(50, 1, 0)));
    }

    #[test]
    fn thin_writes_that_follow_soon_are_sent_in_one_copy() {
        let (mut outgoing, now) = lossy(100_000, true);
        assert!(outgoing.write(now, 4, 10, Bytes::from_static(b"one")));
        assert!(!outgoing.write(now, 4, 13, Bytes::from_static(b"two")));
        outgoing.finish(now, 4, 16);
        let [(2, Kind::Copy, datagram)] = &sent(&mut outgoing, now)[..] else { panic!() };
        let copy = Copy { stream: 4, offset: 10, bytes: b"onetwo", is_last: true };
        assert_eq!(Datagram::parse(datagram), Ok(Datagram::Copy(copy)));
    }

    #[test]
    fn a_burst_has_repair_shards_and_a_copy_of_its_end() {
        let (mut outgoing, now) = lossy(1_000_000, true);
        let burst: Bytes = (0..16_384).map(|number| number as u8).collect();
        outgoing.write(now, 4, 10, burst.clone());
        outgoing.finish(now, 4, 10 + 16_384);
        let sent = sent(&mut outgoing, now);
        let (repair, copies): (Vec<_>, Vec<_>) =
            sent.iter().partition(|(_, kind, _)| *kind == Kind::Repair);
        let mut shards = Vec::new();
        for (_, _, datagram) in &repair {
            let Ok(Datagram::Shards(parsed)) = Datagram::parse(datagram) else { panic!() };
            assert_eq!((parsed.stream, parsed.offset, parsed.division.length), (4, 10, 16_384));
            assert_eq!(parsed.first * parsed.division.size, shards.len());
            assert_eq!(parsed.division.count % repair.len(), 0);
            shards.extend_from_slice(parsed.bytes);
            if shards.len() == parsed.division.count * parsed.division.size {
                assert_eq!(shards, code::encode(parsed.division, &burst));
                shards.clear();
            }
        }
        assert!(repair.len() >= 3 && shards.is_empty());
        let times: Vec<_> = repair.iter().map(|(at, ..)| *at).collect();
        assert!(times[0] >= 2 && *times.last().unwrap() <= 5, "{times:?}");
        let end = Copy { stream: 4, offset: 10 + 16_384, bytes: &[], is_last: true };
        assert_eq!(copies.len(), 1);
        assert_eq!(Datagram::parse(&copies[0].2), Ok(Datagram::Copy(end)));
    }

    #[test]
    fn a_peer_that_knows_no_repair_gets_copies_of_thin_writes_alone() {
        let (mut outgoing, now) = lossy(1_000_000, false);
        assert!(!outgoing.wants(now, THIN + 1, || panic!("it is not looked at")));
        outgoing.write(now, 0, 0, vec![1; THIN].into());
        outgoing.write(now, 0, 1000, vec![2; THIN].into());
        assert!(!outgoing.finish(now, 0, 2000));
        let sent = sent(&mut outgoing, now);
        for ((_, _, datagram), (offset, byte)) in sent.iter().zip([(0, 1), (1000, 2)]) {
            let copy = Copy { stream: 0, offset, bytes: &[byte; THIN], is_last: false };
            assert_eq!(Datagram::parse(datagram), Ok(Datagram::Copy(copy)));
        }
        assert_eq!(sent.len(), 2);
    }

    #[test]
    fn what_is_sent_keeps_to_the_rate() {
        for burst in [100, 8000] {
            let (mut outgoing, start) = lossy(100_000, true);
            let mut bytes = 0;
            for millis in 0..10_000 {
                let now = start + Duration::from_millis(millis);
                outgoing.write(now, millis * 4, 0, vec![1; burst].into());
                while let Some(planned) = outgoing.planned(now, ROOM) {
                    bytes += planned.datagrams().iter().map(|it| it.1.len() + 30).sum::<usize>();
                }
            }
            // Ten seconds and a quarter of one.
            assert!((900_000..=1_030_000).contains(&bytes), "{bytes}");
        }
    }

    #[test]
    fn repair_shards_leave_a_part_of_the_budget_to_copies() {
        let (mut outgoing, now) = lossy(100_000, true);
        for stream in 0..20 {
            outgoing.write(now, stream, 0, vec![1; 8000].into());
        }
        let shards = sent(&mut outgoing, now).len();
        outgoing.write(now, 100, 0, vec![1; 64].into());
        assert_eq!(sent(&mut outgoing, now).len(), 1);
        assert!((3..20).contains(&shards), "{shards}");
    }

    #[test]
    fn nothing_is_sent_of_a_stream_that_was_reset() {
        let (mut outgoing, now) = lossy(100_000, true);
        outgoing.write(now, 0, 0, vec![1; 100].into());
        outgoing.forget(0);
        assert_eq!(outgoing.next_at(), None);
    }

    #[test]
    fn what_waits_is_bounded() {
        let (mut outgoing, now) = lossy(1 << 30, true);
        for stream in 0..1000 {
            outgoing.write(now, stream, 0, vec![1; 65_536].into());
            while let Some(planned) = outgoing.planned(now, ROOM) {
                outgoing.push(&planned, planned.datagrams());
            }
        }
        assert!(outgoing.queued <= MAX_QUEUED && outgoing.queued > MAX_QUEUED / 2);
    }
}
