//! Which stream's bytes go first, decided by what the stream has had: attained service.
//!
//! Nobody says what is a keystroke, because what kube-apiserver and kubelet say to each other is
//! encrypted. But a stream that has sent little lately cannot hold anybody up, so it goes first;
//! one that sends much sinks below it, and rises again while it has nothing to send. Time in which
//! it waits for room does not count as such: forty downloads that share a path are each slow, and
//! all greedy. What goes first is at most three quarters of a tunnel's bytes, so that nothing
//! starves however many streams there are.

use std::{sync::Arc, time::Instant};

use parking_lot::Mutex;

/// What a stream may send per second for ever without sinking, in bytes: 2 Mbit/s, which is more
/// than anybody types or reads.
const ALLOWANCE: u64 = 256 * 1024;
/// A stream sinks below keystrokes when it has had this much beyond the allowance.
const INTERACTIVE: u64 = 32 * 1024;
/// And below short answers when it has had this much.
const SHORT: u64 = 256 * 1024;
/// What is remembered of a stream at most: after two seconds of silence it is as if new.
const MEMORY: u64 = 2 * ALLOWANCE;
/// Bytes that may go first in one go, beyond three of four.
const CREDIT: u64 = 256 * 1024;
/// Bytes that may go first in a second, however little else there is.
const FLOOR: u64 = 640 * 1024;

/// Where a stream stands among its tunnel's others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Whatever sends much.
    Bulk,
    /// Short answers, and the beginning of long ones.
    Short,
    /// Keystrokes, requests, log lines.
    Interactive,
}

impl Class {
    /// The carrier's word for it: higher goes first.
    pub fn priority(self) -> i32 {
        match self {
            Self::Bulk => -10,
            Self::Short => 0,
            Self::Interactive => 10,
        }
    }
}

/// What one direction of a stream has had.
#[derive(Debug)]
pub struct AttainedService {
    bytes: u64,
    /// When the stream last had nothing to send.
    idle_from: Instant,
    tunnel: Arc<PriorityBudget>,
}

impl AttainedService {
    /// Of a stream that has had nothing, on a tunnel whose streams share this.
    pub fn new(tunnel: Arc<PriorityBudget>, now: Instant) -> Self {
        Self { bytes: 0, idle_from: now, tunnel }
    }

    /// Where the stream stands for the next `bytes` bytes, which count from now on.
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

    /// There was room for what was to be written; the stream has nothing more to send for now.
    pub fn on_written(&mut self, now: Instant) {
        self.idle_from = now;
    }
}

/// What all streams of a tunnel had: how many bytes may go first now.
#[derive(Debug)]
pub struct PriorityBudget(Mutex<Credit>);

#[derive(Debug)]
struct Credit {
    bytes: u64,
    at: Instant,
}

impl PriorityBudget {
    /// Of a tunnel that begins.
    pub fn new(now: Instant) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Credit { bytes: CREDIT, at: now })))
    }

    /// Counts bytes that want to go first or not; whether they may. Those that do not pay for three
    /// times as many that do.
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
        /// Whoever keeps to the allowance stays first.
        #[test]
        fn little_is_always_first(writes in prop::collection::vec((1_u64..2000, 1_u64..50), 1..500)) {
            let mut now = Instant::now();
            let mut stream = AttainedService::new(PriorityBudget::new(now), now);
            for (bytes, pause) in writes {
                // At most 2 000 bytes every 8 ms.
                now += millis(8 + pause);
                prop_assert_eq!(stream.on_write(now, bytes), Class::Interactive);
            }
        }

        /// Whoever sends much sinks, and rises again in silence.
        #[test]
        fn much_sinks_and_silence_forgives(chunk in 1_000_u64..65_536, silence in 2_000_u64..100_000) {
            let mut now = Instant::now();
            let mut stream = AttainedService::new(PriorityBudget::new(now), now);
            let mut classes = Vec::new();
            for _ in 0..(MEMORY / chunk + 1) {
                now += millis(1);
                classes.push(stream.on_write(now, chunk));
            }
            prop_assert_eq!(classes.first() == Some(&Class::Interactive), chunk <= INTERACTIVE);
            prop_assert_eq!(classes.last(), Some(&Class::Bulk));
            now += millis(silence);
            prop_assert_eq!(stream.on_write(now, 64), Class::Interactive);
        }

        /// Whoever always has more to send than there is room for sinks for good, however slow it
        /// is.
        #[test]
        fn greed_is_no_silence(chunk in 1_000_u64..65_536, wait in 1_u64..10_000) {
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
            let mut streams: Vec<_> = (0..40).map(|_| AttainedService::new(budget.clone(), now)).collect();
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
