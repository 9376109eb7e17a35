//! The carrier of Culvert's agent, watched while a run goes on.

use std::{io, net::Ipv4Addr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::{
    runtime::Handle,
    task::AbortHandle,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{carrier::Serving, http, peer::AGENT_HEALTH_PORT};

/// Interval at which the agent is asked: the precision of a switch.
const ASK_INTERVAL: Duration = Duration::from_millis(50);
/// Time for an answer: a frozen agent gives none.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Asks an agent for its carrier at intervals, until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    seen: Arc<Mutex<Vec<Sighting>>>,
    task: AbortHandle,
}

/// A carrier that differs from the one before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sighting {
    /// Time at which it was first seen.
    pub(super) at: Instant,
    pub(super) serving: Serving,
}

impl Watch {
    /// Watches the agent of the host whose runtime this is.
    pub(super) fn start(node: &Handle) -> Self {
        let seen: Arc<Mutex<Vec<Sighting>>> = Arc::default();
        let task = node.spawn(watch(Arc::clone(&seen))).abort_handle();
        Self { seen, task }
    }

    /// Every carrier so far, in order.
    pub(super) fn seen(&self) -> Vec<Sighting> {
        self.seen.lock().clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn watch(seen: Arc<Mutex<Vec<Sighting>>>) {
    let mut ticks = interval(ASK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // While there is no tunnel the last carrier counts: the next may be the same again.
        if let Ok(Ok(Some(serving))) = timeout(ANSWER_TIMEOUT, ask()).await {
            let mut seen = seen.lock();
            if seen.last().is_none_or(|last| last.serving.carrier != serving.carrier) {
                seen.push(Sighting { at: Instant::now(), serving });
            }
        }
    }
}

/// What serves now.
async fn ask() -> io::Result<Option<Serving>> {
    let address = (Ipv4Addr::LOCALHOST, AGENT_HEALTH_PORT);
    let readiness = http::get(address, "/readyz?verbose").await?;
    Ok(Serving::from_readiness(&readiness.body))
}

/// The first change of carrier after one moment and before another.
pub(super) fn switch(seen: &[Sighting], after: Instant, before: Instant) -> Option<&Sighting> {
    // The first is where it began, and changes nothing.
    let mut changes = seen.iter().skip(1);
    changes.find(|sighting| sighting.at > after && sighting.at <= before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::carrier::Carrier;

    #[test]
    fn a_switch_belongs_to_the_event_before_it() {
        let start = Instant::now();
        let at = |second| start + Duration::from_secs(second);
        let sighting = |second, carrier| Sighting {
            at: at(second),
            serving: Serving { carrier, reason: String::new() },
        };
        let seen =
            [sighting(1, Carrier::Quic), sighting(5, Carrier::Tcp), sighting(9, Carrier::Quic)];
        let carrier = |after, before| {
            switch(&seen, at(after), at(before)).map(|sighting| sighting.serving.carrier)
        };
        assert_eq!(carrier(0, 4), None);
        assert_eq!(carrier(3, 7), Some(Carrier::Tcp));
        assert_eq!(carrier(7, 20), Some(Carrier::Quic));
        assert_eq!(carrier(10, 20), None);
    }
}
