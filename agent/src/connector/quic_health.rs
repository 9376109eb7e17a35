//! What the agent remembers of QUIC on the way to its servers: whether it gets through, and for how
//! long to believe that it does not. Pure: the caller brings time and randomness.

use std::time::{Duration, Instant};

/// Each failure is believed this many times as long as the one before.
const GROWTH: u32 = 2;
/// QUIC that has held for this long makes the failures before it forgotten. One that comes and goes
/// quicker is left alone for longer each time, so that an agent does not flap with it.
const HELD: Duration = Duration::from_secs(600);

/// Whether QUIC is worth trying.
#[derive(Clone, Debug)]
pub struct QuicHealth {
    first: Duration,
    failures: u32,
    believed_until: Option<Instant>,
    worked_at: Option<Instant>,
}

impl QuicHealth {
    /// How long a failure is believed at most: as often, one handshake is spent on finding out.
    pub const LONGEST: Duration = Duration::from_secs(600);

    /// Nothing was tried yet; a first failure will be believed for about so long.
    pub fn new(first: Duration) -> Self {
        Self { first, failures: 0, believed_until: None, worked_at: None }
    }

    /// Until when QUIC counts as failing, if it does.
    pub fn fails_until(&self, now: Instant) -> Option<Instant> {
        self.believed_until.filter(|until| now < *until)
    }

    /// QUIC did not get through, or fell silent. `random` is from 0 to 1 and spreads a fleet's next
    /// attempts over half their interval. A failure during the time in which none was expected to
    /// work says nothing new.
    pub fn on_failed(&mut self, now: Instant, random: f64) {
        if self.fails_until(now).is_some() {
            return;
        }
        if self.worked_at.is_some_and(|at| now.saturating_duration_since(at) >= HELD) {
            self.failures = 0;
        }
        self.worked_at = None;
        let believed =
            self.first.saturating_mul(GROWTH.saturating_pow(self.failures)).min(Self::LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.believed_until = Some(now + believed.mul_f64(0.75 + 0.5 * random.clamp(0.0, 1.0)));
    }

    /// A tunnel over QUIC came to be. It may be tried again, and is not trusted yet.
    pub fn on_worked(&mut self, now: Instant) {
        self.believed_until = None;
        self.worked_at.get_or_insert(now);
    }

    /// What was known is about something that is not there any more.
    pub fn forget(&mut self) {
        *self = Self::new(self.first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long each of so many failures in a row is believed, in seconds.
    fn believed(memory: &mut QuicHealth, now: &mut Instant, failures: usize) -> Vec<u64> {
        let mut seconds = Vec::new();
        for _ in 0..failures {
            memory.on_failed(*now, 0.5);
            let until = memory.fails_until(*now).unwrap();
            seconds.push((until - *now).as_secs());
            *now = until;
        }
        seconds
    }

    #[test]
    fn each_failure_is_believed_for_longer_up_to_a_limit() {
        let (mut memory, mut now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(memory.fails_until(now), None);
        assert_eq!(believed(&mut memory, &mut now, 8), [10, 20, 40, 80, 160, 320, 600, 600]);
        assert_eq!(memory.fails_until(now), None);
    }

    #[test]
    fn failures_while_none_was_expected_to_work_count_once() {
        let (mut memory, now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        memory.on_failed(now, 0.5);
        memory.on_failed(now + Duration::from_secs(9), 0.5);
        assert_eq!(memory.fails_until(now), Some(now + Duration::from_secs(10)));
    }

    #[test]
    fn what_comes_and_goes_is_left_alone_for_longer_each_time() {
        let (mut memory, mut now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(believed(&mut memory, &mut now, 2), [10, 20]);
        memory.on_worked(now);
        assert_eq!(memory.fails_until(now), None);
        now += HELD - Duration::from_secs(1);
        assert_eq!(believed(&mut memory, &mut now, 1), [40]);
    }

    #[test]
    fn what_has_held_is_trusted_again() {
        let (mut memory, mut now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(believed(&mut memory, &mut now, 3), [10, 20, 40]);
        memory.on_worked(now);
        // Further tunnels do not make it begin anew.
        memory.on_worked(now + HELD / 2);
        now += HELD;
        assert_eq!(believed(&mut memory, &mut now, 1), [10]);
        memory.forget();
        assert_eq!(believed(&mut memory, &mut now, 1), [10]);
    }

    #[test]
    fn a_fleet_does_not_come_back_in_step() {
        let now = Instant::now();
        let until = |random| {
            let mut memory = QuicHealth::new(Duration::from_secs(10));
            memory.on_failed(now, random);
            memory.fails_until(now).unwrap() - now
        };
        assert_eq!(until(0.0), Duration::from_millis(7500));
        assert_eq!(until(1.0), Duration::from_millis(12_500));
    }
}
