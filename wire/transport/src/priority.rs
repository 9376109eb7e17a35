//! Which stream's bytes go first, decided by how much it has sent: least attained service.
//!
//! The tunnel cannot see which bytes are a keystroke: kube-apiserver and kubelet encrypt what they
//! send each other. But a stream that has sent little lately cannot delay the others, so it goes
//! first. One that sends much sinks below it, and rises again while it has nothing to send. Time in
//! which it waits for room does not count as idle: of forty downloads that share a path each is
//! slow, and each sends as much as it can.
//!
//! The lowest class gets a quarter of the path, however slow the path is and however many streams
//! there are: a quarter may go first in any case, and beyond it each byte of the lowest class pays
//! for two that go first. A stream that has more to send than may go first sinks.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Rate at which a stream may send for ever without sinking, in bytes per second: 2 Mbit/s, which
/// is more than people type or read.
pub(crate) const ALLOWANCE: u64 = 256 * 1024;
/// Bytes beyond the allowance after which a stream sinks below [`Class::Interactive`].
const INTERACTIVE: u64 = 32 * 1024;
/// Bytes beyond the allowance after which a stream sinks below [`Class::Short`].
pub(crate) const SHORT: u64 = 256 * 1024;
/// Maximum number of bytes that count against a stream: after two idle seconds it is as if new.
const MEMORY: u64 = 2 * ALLOWANCE;
/// Bytes that may go first at once, beyond those that others pay for.
const CREDIT: u64 = 256 * 1024;
/// Bytes that may go first for each byte of the lowest class.
const PAID: u64 = 2;
/// Rate at which bytes may go first however little else there is, in bytes per second; at most a
/// quarter of what the path carries.
const FLOOR: u64 = 640 * 1024;
/// Interval at which the rate of the path is measured.
const MEASURED_EVERY: Duration = Duration::from_millis(250);
/// How often a byte counts that should go first and may not, so that of the streams that go first
/// those sink that send most. One that sends a few KiB per second is as before with its next write.
const EXCESS: u64 = 8;

/// The rank of a stream among its tunnel's others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Streams that send much.
    Bulk,
    /// Short answers, and the beginning of long ones.
    Short,
    /// Keystrokes, requests, log lines.
    Interactive,
}

impl Class {
    /// The priority by which carriers know the class; higher goes first.
    pub fn priority(self) -> i32 {
        match self {
            Self::Bulk => -10,
            Self::Short => 0,
            Self::Interactive => 10,
        }
    }
}

/// How much one direction of a stream has sent.
#[derive(Debug)]
pub struct AttainedService {
    /// Bytes that count against the stream, at most [`MEMORY`].
    bytes: u64,
    /// When the stream last had nothing to send.
    idle_from: Instant,
    tunnel: Arc<PriorityBudget>,
}

impl AttainedService {
    /// The service of a new stream on the tunnel whose streams share this budget.
    pub fn new(tunnel: Arc<PriorityBudget>, now: Instant) -> Self {
        Self { bytes: 0, idle_from: now, tunnel }
    }

    /// The class of the stream's next `bytes` bytes, which count from now on.
    pub fn on_write(&mut self, now: Instant, bytes: u64) -> Class {
        let idle = now.saturating_duration_since(self.idle_from);
        let forgiven = idle.as_secs_f64() * ALLOWANCE as f64;
        self.bytes = self.bytes.saturating_sub(forgiven as u64).saturating_add(bytes).min(MEMORY);
        self.idle_from = now;
        let class = if self.bytes <= INTERACTIVE {
            Class::Interactive
        } else if self.bytes <= SHORT {
            Class::Short
        } else {
            Class::Bulk
        };
        if self.tunnel.admits(now, bytes, class > Class::Bulk) {
            return class;
        }
        self.bytes = self.bytes.saturating_add((EXCESS - 1) * bytes).min(MEMORY);
        Class::Bulk
    }

    /// The budget that the tunnel's streams share.
    pub(crate) fn tunnel(&self) -> &PriorityBudget {
        &self.tunnel
    }

    /// Records that the bytes were taken: the stream has nothing more to send for now.
    pub fn on_written(&mut self, now: Instant) {
        self.idle_from = now;
    }
}

/// How many bytes of a tunnel's streams may go first now.
#[derive(Debug)]
pub struct PriorityBudget(Mutex<Credit>);

#[derive(Debug)]
struct Credit {
    /// Bytes that may go first, at most [`CREDIT`].
    bytes: u64,
    /// When they were last counted.
    at: Instant,
    /// Rate at which they grow, in bytes per second.
    floor: u64,
    /// When the path is to be measured next.
    measure_at: Instant,
}

impl PriorityBudget {
    /// The budget of a new tunnel.
    pub fn new(now: Instant) -> Arc<Self> {
        let credit = Credit { bytes: CREDIT, at: now, floor: FLOOR, measure_at: now };
        Arc::new(Self(Mutex::new(credit)))
    }

    /// Takes the rate of the path from `measure`, in bytes per second, if it is time for that.
    pub(crate) fn measure(&self, now: Instant, measure: impl FnOnce() -> Option<u64>) {
        {
            let mut credit = self.0.lock();
            if now < credit.measure_at {
                return;
            }
            credit.measure_at = now + MEASURED_EVERY;
        }
        if let Some(rate) = measure() {
            self.set_path_rate(now, rate);
        }
    }

    fn set_path_rate(&self, now: Instant, rate: u64) {
        let mut credit = self.0.lock();
        credit.refill(now);
        credit.floor = FLOOR.min(rate / 4);
    }

    /// Counts bytes that are to go first or not, and returns whether they do.
    fn admits(&self, now: Instant, bytes: u64, first: bool) -> bool {
        let mut credit = self.0.lock();
        credit.refill(now);
        let may = first && bytes <= credit.bytes;
        credit.bytes = match may {
            true => credit.bytes - bytes,
            false => (credit.bytes + PAID * bytes).min(CREDIT),
        };
        may
    }
}

impl Credit {
    fn refill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.bytes = (self.bytes + (elapsed * self.floor as f64) as u64).min(CREDIT);
        self.at = self.at.max(now);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    proptest! {
        /// A stream that keeps to the allowance stays first.
        #[test]
        fn a_stream_that_sends_little_is_always_first(
            writes in prop::collection::vec((1_u64..2000, 1_u64..50), 1..500),
        ) {
            let mut now = Instant::now();
            let mut stream = AttainedService::new(PriorityBudget::new(now), now);
            for (bytes, pause) in writes {
                // At most 2 000 bytes every 8 ms.
                now += millis(8 + pause);
                prop_assert_eq!(stream.on_write(now, bytes), Class::Interactive);
            }
        }

        /// A stream that sends much sinks, and rises again while it is idle.
        #[test]
        fn a_stream_that_sends_much_sinks_until_it_is_idle(
            chunk in 1_000_u64..65_536,
            idle in 2_000_u64..100_000,
        ) {
            let mut now = Instant::now();
            let mut stream = AttainedService::new(PriorityBudget::new(now), now);
            let mut classes = Vec::new();
            for _ in 0..(MEMORY / chunk + 1) {
                now += millis(1);
                classes.push(stream.on_write(now, chunk));
            }
            prop_assert_eq!(classes.first() == Some(&Class::Interactive), chunk <= INTERACTIVE);
            prop_assert_eq!(classes.last(), Some(&Class::Bulk));
            now += millis(idle);
            prop_assert_eq!(stream.on_write(now, 64), Class::Interactive);
        }

        /// A stream that always has more to send than there is room for sinks for good, however
        /// slow it is.
        #[test]
        fn a_stream_that_waits_for_room_is_not_idle(chunk in 1_000_u64..65_536, wait in 1_u64..10_000) {
            let mut now = Instant::now();
            let mut stream = AttainedService::new(PriorityBudget::new(now), now);
            for _ in 0..(SHORT / chunk + 1) {
                stream.on_write(now, chunk);
                now += millis(wait);
                stream.on_written(now);
            }
            prop_assert_eq!(stream.on_write(now, 64), Class::Bulk);
        }

        /// However many streams there are and whatever they send, a third is left for the rest while
        /// no time passes.
        #[test]
        fn nothing_starves(writes in prop::collection::vec((0_usize..40, 1_u64..65_536), 1..2000)) {
            let now = Instant::now();
            let budget = PriorityBudget::new(now);
            let new = |_| AttainedService::new(budget.clone(), now);
            let mut streams: Vec<_> = (0..40).map(new).collect();
            let (mut first, mut all) = (0, 0);
            for (stream, bytes) in writes {
                all += bytes;
                if streams[stream].on_write(now, bytes) > Class::Bulk {
                    first += bytes;
                }
                prop_assert!(first <= CREDIT + all / 3 * 2 + 2);
            }
        }

    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Log tails that keep to their allowance share a path that is slower than all of them with
        /// a download. The lowest class gets a quarter of the path, and tails that sank take part
        /// in it.
        #[test]
        fn bulk_gets_its_share_of_a_path_that_is_slower_than_what_goes_first(
            path in 16_u64 * 1024..1024 * 1024,
            tails in 1_usize..6,
            write in 64_u64..16 * 1024,
        ) {
            let (bulk, sent) = share(path, tails, write);
            let quarter = sent / 4 / (tails as u64 + 1);
            prop_assert!(bulk + CREDIT / 4 >= quarter / 4 * 3, "{bulk} of {sent}");
        }
    }

    /// One stream on a simulated path.
    struct Sender {
        service: AttainedService,
        class: Class,
        queued: u64,
        /// Bytes that wait for room in the queue.
        waiting: u64,
    }

    /// Bytes that a stream's queue takes.
    const WINDOW: u64 = 256 * 1024;

    impl Sender {
        fn write(&mut self, now: Instant, bytes: u64) {
            self.class = self.service.on_write(now, bytes);
            self.waiting = bytes;
            self.take(now);
        }

        /// Moves what waits into the queue, once there is room.
        fn take(&mut self, now: Instant) {
            if self.waiting > 0 && self.queued + self.waiting <= WINDOW {
                self.queued += std::mem::take(&mut self.waiting);
                self.service.on_written(now);
            }
        }
    }

    /// Bytes of a download and of all streams that a path of this rate has carried in half a minute,
    /// where each of the others writes `write` bytes at a time, at the rate of its allowance.
    fn share(path: u64, tails: usize, write: u64) -> (u64, u64) {
        let start = Instant::now();
        let budget = PriorityBudget::new(start);
        budget.set_path_rate(start, path);
        let mut streams: Vec<_> = (0..=tails)
            .map(|_| Sender {
                service: AttainedService::new(budget.clone(), start),
                class: Class::Interactive,
                queued: 0,
                waiting: 0,
            })
            .collect();
        let (mut of_bulk, mut sent, mut turn) = (0, 0, 0);
        let (mut due, mut room) = (vec![0; streams.len()], 0);
        for tick in 1..=30_000 {
            let now = start + millis(tick);
            for (index, stream) in streams.iter_mut().enumerate() {
                stream.take(now);
                due[index] += ALLOWANCE / 1000;
                if index == 0 {
                    due[0] = 2 * WINDOW;
                }
                let write = if index == 0 { 16 * 1024 } else { write };
                while stream.waiting == 0 && due[index] >= write {
                    due[index] -= write;
                    stream.write(now, write);
                }
            }
            room += path / 1000;
            while room >= PACKET {
                // Streams of one class take turns.
                turn += 1;
                let in_turn = |index: &usize| (streams[*index].class, (index + turn) % (tails + 1));
                let ready = (0..=tails).filter(|index| streams[*index].queued > 0);
                let Some(next) = ready.max_by_key(in_turn) else { break };
                let bytes = streams[next].queued.min(PACKET);
                streams[next].queued -= bytes;
                room -= bytes;
                sent += bytes;
                of_bulk += if next == 0 { bytes } else { 0 };
            }
            room = room.min(PACKET);
        }
        (of_bulk, sent)
    }

    /// Length of a packet, in bytes.
    const PACKET: u64 = 1400;
}
