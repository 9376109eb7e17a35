//! Which stream's bytes go first, decided by how much it has sent: least attained service.
//!
//! The tunnel cannot see which bytes are a keystroke: kube-apiserver and kubelet encrypt what they
//! send each other. But a stream that has sent little lately cannot delay the others, so it goes
//! first. One that sends much sinks below it, and rises again while it has nothing to send. Time in
//! which it waits for room does not count as idle: of forty downloads that share a path each is
//! slow, and each sends as much as it can. At most three quarters of a tunnel's bytes go first, so
//! that nothing starves however many streams there are.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;

/// Rate at which a stream may send for ever without sinking, in bytes per second: 2 Mbit/s, which
/// is more than people type or read.
const ALLOWANCE: u64 = 256 * 1024;
/// Bytes beyond the allowance after which a stream sinks below [`Class::Interactive`].
const INTERACTIVE: u64 = 32 * 1024;
/// Bytes beyond the allowance after which a stream sinks below [`Class::Short`].
const SHORT: u64 = 256 * 1024;
/// Maximum number of bytes that count against a stream: after two idle seconds it is as if new.
const MEMORY: u64 = 2 * ALLOWANCE;
/// Bytes that may go first at once, beyond three of four.
const CREDIT: u64 = 256 * 1024;
/// Rate at which bytes may go first however little else there is, in bytes per second.
const FLOOR: u64 = 640 * 1024;

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
        if self.tunnel.admits(now, bytes, class > Class::Bulk) { class } else { Class::Bulk }
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
}

impl PriorityBudget {
    /// The budget of a new tunnel.
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Credit { bytes: CREDIT, at: now })))
    }

    /// Counts bytes that are to go first or not, and returns whether they do. Each byte that does
    /// not pays for three that do.
    fn admits(&self, now: Instant, bytes: u64, first: bool) -> bool {
        let mut credit = self.0.lock();
        let elapsed = now.saturating_duration_since(credit.at).as_secs_f64();
        credit.bytes = (credit.bytes + (elapsed * FLOOR as f64) as u64).min(CREDIT);
        credit.at = now;
        let may = first && bytes <= credit.bytes;
        credit.bytes = match may {
            true => credit.bytes - bytes,
            false => (credit.bytes + 3 * bytes).min(CREDIT),
        };
        may
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

        /// However many streams there are and whatever they send, a quarter is left for the rest.
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
                prop_assert!(first <= CREDIT + all / 4 * 3);
            }
        }
    }
}
