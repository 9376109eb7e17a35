//! The agent's memory of QUIC's failures on the path to its servers, and for how long each is
//! believed. Pure: the caller brings time and randomness.

use std::time::Duration;

use tokio::time::Instant;

/// Ratio of the time for which a failure is believed to that of the failure before.
const GROWTH: u32 = 2;
/// Time for which QUIC has to work until the failures before are forgotten. QUIC that comes and
/// goes more quickly is avoided for longer each time, so that an agent does not flap with it.
const HELD: Duration = Duration::from_secs(600);

/// Whether QUIC is worth trying.
#[derive(Clone, Debug)]
pub(crate) struct QuicHealth {
    first: Duration,
    failures: u32,
    believed_until: Option<Instant>,
    worked_at: Option<Instant>,
}

impl QuicHealth {
    /// Maximum time for which a failure is believed. One handshake per such time finds out whether
    /// QUIC works again.
    pub(crate) const LONGEST: Duration = Duration::from_secs(600);

    /// No failures yet. The first one will be believed for about `first`.
    pub(crate) fn new(first: Duration) -> Self {
        Self { first, failures: 0, believed_until: None, worked_at: None }
    }

    /// The end of the time for which QUIC is believed to fail; `None` when it is worth trying.
    pub(crate) fn fails_until(&self, now: Instant) -> Option<Instant> {
        self.believed_until.filter(|until| now < *until)
    }

    /// Records that a handshake over QUIC failed or that a tunnel over QUIC fell silent. `random`,
    /// from 0 to 1, spreads the next attempts of many agents over half the time. A failure while
    /// QUIC is believed to fail is not counted.
    pub(crate) fn on_failed(&mut self, now: Instant, random: f64) {
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

    /// Records that a handshake over QUIC succeeded. QUIC may be tried again; the failures before
    /// are not forgotten yet.
    pub(crate) fn on_worked(&mut self, now: Instant) {
        self.believed_until = None;
        self.worked_at.get_or_insert(now);
    }

    /// Forgets all failures, because what caused them is gone.
    pub(crate) fn forget(&mut self) {
        *self = Self::new(self.first);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seconds for which each of `failures` failures in a row is believed.
    fn believed(health: &mut QuicHealth, now: &mut Instant, failures: usize) -> Vec<u64> {
        let mut seconds = Vec::new();
        for _ in 0..failures {
            health.on_failed(*now, 0.5);
            let until = health.fails_until(*now).unwrap();
            seconds.push((until - *now).as_secs());
            *now = until;
        }
        seconds
    }

    #[test]
    fn each_failure_is_believed_for_longer_up_to_a_limit() {
        let (mut health, mut now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(health.fails_until(now), None);
        assert_eq!(believed(&mut health, &mut now, 8), [10, 20, 40, 80, 160, 320, 600, 600]);
        assert_eq!(health.fails_until(now), None);
    }

    #[test]
    fn failures_while_quic_is_believed_to_fail_count_once() {
        let (mut health, now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        health.on_failed(now, 0.5);
        health.on_failed(now + Duration::from_secs(9), 0.5);
        assert_eq!(health.fails_until(now), Some(now + Duration::from_secs(10)));
    }

    #[test]
    fn quic_that_comes_and_goes_is_avoided_for_longer_each_time() {
        let (mut health, mut now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(believed(&mut health, &mut now, 2), [10, 20]);
        health.on_worked(now);
        assert_eq!(health.fails_until(now), None);
        now += HELD - Duration::from_secs(1);
        assert_eq!(believed(&mut health, &mut now, 1), [40]);
    }

    #[test]
    fn quic_that_has_worked_for_long_starts_again_with_the_first_time() {
        let (mut health, mut now) = (QuicHealth::new(Duration::from_secs(10)), Instant::now());
        assert_eq!(believed(&mut health, &mut now, 3), [10, 20, 40]);
        health.on_worked(now);
        // Further tunnels do not start the time again.
        health.on_worked(now + HELD / 2);
        now += HELD;
        assert_eq!(believed(&mut health, &mut now, 1), [10]);
        health.forget();
        assert_eq!(believed(&mut health, &mut now, 1), [10]);
    }

    #[test]
    fn agents_spread_their_next_attempts() {
        let now = Instant::now();
        let until = |random| {
            let mut health = QuicHealth::new(Duration::from_secs(10));
            health.on_failed(now, random);
            health.fails_until(now).unwrap() - now
        };
        assert_eq!(until(0.0), Duration::from_millis(7500));
        assert_eq!(until(1.0), Duration::from_millis(12_500));
    }
}
