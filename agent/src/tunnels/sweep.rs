//! When the tunnels of an agent are pinged although their own keep-alive is not due, so that the loss
//! of servers is noticed early. Pure: the caller brings time.
//!
//! Servers that crash or are restarted together are noticed by the first ping that one of them does
//! not know. So the pings of all tunnels are spread over the keep-alive interval, and after the loss
//! of one server the others are pinged at once and often. Each ping puts off the keep-alive of its
//! tunnel: spreading them costs no more pings.

use std::time::Duration;

use tokio::time::Instant;

/// Time for which a tunnel may be quiet while servers are being lost. It is less than the interval
/// of the checks, so each check finds that it has passed.
const ALERT_QUIET_LIMIT: Duration = Duration::from_millis(400);
/// Time for which the loss of one server lets the agent expect the loss of others.
const ALERT_TIME: Duration = Duration::from_secs(5);

/// What decides about early pings of all tunnels of one agent.
#[derive(Debug)]
pub(crate) struct Sweep {
    /// When the first of the periods began in which each tunnel is pinged once.
    begun: Instant,
    /// When a server was last lost without a close.
    lost_at: Option<Instant>,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { begun: Instant::now(), lost_at: None }
    }
}

impl Sweep {
    /// Records that a server was lost without a close.
    pub(crate) fn on_server_lost(&mut self, now: Instant) {
        self.lost_at = Some(now);
    }

    /// Whether a tunnel that was quiet for this time is to be pinged. It is the one at `index` of
    /// `tunnels`, each with this keep-alive interval.
    pub(crate) fn is_due(
        &self,
        now: Instant,
        quiet: Duration,
        (index, tunnels): (u32, u32),
        keep_alive_interval: Option<Duration>,
    ) -> bool {
        if self.lost_at.is_some_and(|at| now.saturating_duration_since(at) < ALERT_TIME) {
            return quiet >= ALERT_QUIET_LIMIT;
        }
        let Some(interval) = keep_alive_interval.filter(|_| tunnels > 1) else { return false };
        let turn = self.begun + interval / tunnels * index;
        now.checked_duration_since(turn).is_some_and(|elapsed| {
            let since_turn = elapsed.as_nanos() % interval.as_nanos().max(1);
            quiet.as_nanos() > since_turn
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP_ALIVE: Option<Duration> = Some(Duration::from_secs(5));

    fn millis(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    #[test]
    fn pings_of_twenty_tunnels_are_spread_over_the_keep_alive_interval() {
        let sweep = Sweep::default();
        let mut heard = [sweep.begun; 20];
        let mut pinged = Vec::new();
        for at in (0..20_000).step_by(50) {
            let now = sweep.begun + millis(at);
            for (index, heard) in (0..).zip(&mut heard) {
                if sweep.is_due(now, now - *heard, (index, 20), KEEP_ALIVE) {
                    *heard = now;
                    pinged.push((at, index));
                }
            }
        }
        let turns = (1..80).map(|turn: u32| (u64::from(turn) * 250, turn % 20));
        let first = turns.filter(|(at, _)| *at < 20_000).collect::<Vec<_>>();
        // Each is pinged a moment after its turn began.
        let found: Vec<_> = pinged.iter().map(|(at, index)| (at / 250 * 250, *index)).collect();
        assert_eq!(found, first);
    }

    #[test]
    fn the_only_tunnel_and_tunnels_without_keep_alive_are_not_pinged_early() {
        let sweep = Sweep::default();
        let now = sweep.begun + millis(60_000);
        assert!(!sweep.is_due(now, millis(60_000), (0, 1), KEEP_ALIVE));
        assert!(!sweep.is_due(now, millis(60_000), (0, 20), None));
    }

    #[test]
    fn all_tunnels_are_pinged_for_some_seconds_after_a_loss() {
        let mut sweep = Sweep::default();
        let lost = sweep.begun;
        sweep.on_server_lost(lost);
        for tunnels in [(0, 1), (7, 20)] {
            assert!(sweep.is_due(lost, millis(400), tunnels, None));
            assert!(!sweep.is_due(lost, millis(399), tunnels, None));
        }
        assert!(!sweep.is_due(lost + millis(5000), millis(400), (7, 20), None));
    }
}
