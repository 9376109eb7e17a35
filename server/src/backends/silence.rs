//! Which agents are silent: nothing came from them for longer than a keep-alive takes.
//!
//! An idle tunnel whose path fails has nothing in flight, so that nothing else shows the failure.
//! A silent agent keeps its tunnel, because the path may return before the idle time-out. Dials go
//! to another backend while there is one, and a dial that has no other asks the agent at once
//! whether it is alive.

use std::time::Duration;

use culvert_transport::{Carrier, TunnelStats};
use tokio::{
    task::yield_now,
    time::{Instant, MissedTickBehavior, interval},
};

use super::{Backend, Backends};

/// Interval of the looks at all tunnels.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Interval of the reports about ids that several agents have.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Minimum time for the answer to a keep-alive: a lost one is sent again within it.
const ANSWER_LIMIT: Duration = Duration::from_millis(1500);
/// Minimum time for the answer, in round trips.
const ANSWER_ROUND_TRIPS: u32 = 6;
/// Number of tunnels that are looked at before other tasks run.
const BATCH: usize = 256;

/// Records which agents are silent, and reports ids that several live agents have, for as long as it
/// is polled. Each tunnel is pinged once it was idle for `keep_alive_interval`; without it no agent
/// is silent.
pub(crate) async fn watch(backends: Backends, keep_alive_interval: Option<Duration>) {
    let mut looks = interval(LOOK_INTERVAL);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last_look, mut last_report) = (Instant::now(), Instant::now());
    loop {
        looks.tick().await;
        let since_last = last_look.elapsed();
        last_look = Instant::now();
        // This process did not run meanwhile, and what agents sent is not read yet.
        let has_paused = since_last > 2 * LOOK_INTERVAL;
        for batch in backends.all().chunks(BATCH) {
            for backend in batch {
                look(&backends, backend, keep_alive_interval, has_paused);
            }
            yield_now().await;
        }
        if last_report.elapsed() >= REPORT_INTERVAL {
            last_report = Instant::now();
            backends.report_duplicates();
        }
    }
}

/// Records whether one agent is silent. After a pause its clock starts again, and its state stays.
fn look(
    backends: &Backends,
    backend: &Backend,
    keep_alive_interval: Option<Duration>,
    has_paused: bool,
) {
    // A bridge to a Konnectivity agent lives in this process, and sends nothing while it is idle.
    if backend.tunnel.carrier() == Carrier::Grpc {
        return;
    }
    let stats = backend.tunnel.stats();
    backend.recent_loss.sample(&stats, Instant::now());
    if has_paused {
        return backend.heard.restart(&stats, Instant::now());
    }
    let quiet_for = backend.heard.quiet_for(&stats, Instant::now());
    if let Some(keep_alive_interval) = keep_alive_interval {
        let limit = keep_alive_interval + ANSWER_LIMIT.max(stats.rtt * ANSWER_ROUND_TRIPS);
        backends.set_silent(backend, quiet_for > limit);
    }
}

/// When something last came from an agent, as far as the looks show.
#[derive(Debug)]
pub(super) struct Heard(parking_lot::Mutex<(u64, Instant)>);

impl Heard {
    /// An agent that has just been heard.
    pub(super) fn now() -> Self {
        Self(parking_lot::Mutex::new((0, Instant::now())))
    }

    /// The last look that found something new, or when the tunnel began.
    pub(super) fn last(&self) -> Instant {
        self.0.lock().1
    }

    /// Records that something came.
    #[cfg(test)]
    pub(super) fn hear(&self) {
        self.0.lock().1 = Instant::now();
    }

    /// Counts from now on, as if the agent had just been heard.
    fn restart(&self, stats: &TunnelStats, now: Instant) {
        *self.0.lock() = (stats.received_bytes, now);
    }

    /// Time since the last look that found something new, or zero if this one does.
    fn quiet_for(&self, stats: &TunnelStats, now: Instant) -> Duration {
        let mut heard = self.0.lock();
        if heard.0 != stats.received_bytes {
            *heard = (stats.received_bytes, now);
        }
        now.saturating_duration_since(heard.1)
    }
}

#[cfg(test)]
mod tests {
    use culvert_transport::{
        Settings,
        qmux::Peer,
        test_util::{Pair, Side},
    };
    use tokio::time::{advance, sleep, timeout};

    use super::*;
    use crate::{
        backends::{Strategy, registry::Candidate},
        testing::{TestAgent, target},
    };

    const KEEP_ALIVE: Duration = Duration::from_secs(5);

    /// A tunnel whose both ends keep it alive.
    async fn pair(keep_alive_interval: Option<Duration>) -> Pair {
        let settings = Settings { keep_alive_interval, ..Settings::default() };
        Pair::new(Peer::local(Carrier::Tcp), &settings, &settings).await.unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_agent_whose_keep_alives_are_answered_is_not_silent() {
        let backends = Backends::new(&[Strategy::Default]);
        let agent = TestAgent::join_on(&backends, "a", pair(Some(KEEP_ALIVE)).await);
        let watching = watch(backends.clone(), Some(KEEP_ALIVE));
        let never = timeout(Duration::from_secs(3600), async {
            tokio::join!(watching, async {
                loop {
                    sleep(LOOK_INTERVAL / 2).await;
                    assert!(!agent.backend.is_silent());
                }
            })
        });
        assert!(never.await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_agent_is_noticed_before_a_dial_has_failed_and_heard_again_when_it_speaks() {
        let backends = Backends::new(&[Strategy::Default]);
        let pair = pair(Some(KEEP_ALIVE)).await;
        let line = pair.line.clone();
        let agent = TestAgent::join_on(&backends, "a", pair);
        let _watch = culvert_transport::task::owned(watch(backends.clone(), Some(KEEP_ALIVE)));
        line.silence(Side::Agent);
        let begun = Instant::now();
        backends.until_some(|| agent.backend.is_silent().then_some(())).await;
        let noticed = begun.elapsed();
        let limit = KEEP_ALIVE + ANSWER_LIMIT;
        assert!((limit..limit + 2 * LOOK_INTERVAL).contains(&noticed), "{noticed:?}");
        assert!(agent.backend.is_avoided());
        assert!(backends.choose(&target("x:1")).is_some(), "there is no other");
        line.restore(Side::Agent);
        backends.appears(&target("x:1")).await;
        assert!(!agent.backend.is_silent());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_of_the_process_makes_no_agent_silent() {
        let backends = Backends::new(&[Strategy::Default]);
        // Without keep-alives nothing is heard after the pause either.
        let agent = TestAgent::join_on(&backends, "a", pair(None).await);
        let _watch = culvert_transport::task::owned(watch(backends.clone(), Some(KEEP_ALIVE)));
        sleep(LOOK_INTERVAL).await;
        advance(KEEP_ALIVE * 3).await;
        sleep(KEEP_ALIVE).await;
        assert!(!agent.backend.is_silent());
        sleep(KEEP_ALIVE).await;
        assert!(agent.backend.is_silent());
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_keep_alive_no_agent_is_silent() {
        let backends = Backends::new(&[Strategy::Default]);
        let agent = TestAgent::join(&backends, "a").await;
        let watching = timeout(Duration::from_secs(3600), watch(backends.clone(), None));
        assert!(watching.await.is_err());
        assert!(!agent.backend.is_silent());
    }
}
