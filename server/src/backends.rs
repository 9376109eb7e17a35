//! The connected backends: which there are, which one a dial takes, and when that changes.
//!
//! ```text
//!  backends            Backends: the registry, shared, and its changes awaited
//!  registry            who is connected, arranged by strategy; pure data
//!  strategy            keys under which a strategy finds a backend
//!  backend             one agent's live tunnel, its permits and its suspicions
//!  departure           how a backend has left, and for how long it is expected back
//!  silence             which agents are silent
//!  recently_reached    targets that an agent reached in the last minutes
//! ```

mod backend;
pub mod departure;
mod recently_reached;
pub mod registry;
pub(crate) mod silence;
mod strategy;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use culvert_transport::TunnelLost;
use culvert_wire::{AgentId, Target};
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};
use tracing::debug;

pub use backend::Backend;
pub(crate) use backend::{Process, StreamPermit};
pub use strategy::Strategy;

use departure::Departure;
use registry::{Candidate, Registry};

/// The connected backends. Clones share them.
#[derive(Clone, Debug)]
pub struct Backends(Arc<State>);

#[derive(Debug)]
struct State {
    registry: Mutex<Registry<Backend>>,
    changed: Notify,
    closed: AtomicBool,
}

impl Backends {
    /// No backends yet; these strategies will choose among them, in this order.
    pub(crate) fn new(strategies: &[Strategy]) -> Self {
        Self(Arc::new(State {
            registry: Mutex::new(Registry::new(strategies)),
            changed: Notify::new(),
            closed: AtomicBool::new(false),
        }))
    }

    /// Gives dials to this backend until the returned guard is dropped.
    ///
    /// Older tunnels of the same agent are suspected: most often a restart left them behind.
    pub(crate) fn register(&self, backend: Arc<Backend>) -> Registration {
        let older = {
            let mut registry = self.registry();
            let older = registry.of_agent(backend.agent_id());
            registry.add(&backend);
            older
        };
        older.iter().for_each(|backend| backend.suspect());
        self.0.changed.notify_waiters();
        Registration { backends: self.clone(), backend }
    }

    /// Removes a backend whose tunnel was lost; one that is not there is no fault.
    pub(crate) fn remove(&self, backend: &Arc<Backend>, lost: &TunnelLost) {
        self.registry().remove(backend, Departure::of(lost), Instant::now());
        self.0.changed.notify_waiters();
    }

    /// Gives a backend no new dials while another one will do.
    pub(crate) fn drain(&self, backend: &Backend) {
        backend.drain();
        self.0.changed.notify_waiters();
    }

    /// Records whether a backend's agent is silent.
    pub(crate) fn set_silent(&self, backend: &Backend, silent: bool) {
        if backend.set_silent(silent) {
            debug!(agent_id = %backend.agent_id(), silent, "an agent fell silent, or is heard again");
            self.0.changed.notify_waiters();
        }
    }

    /// Completes when every backend of this agent is gone or drains.
    ///
    /// # Cancel safety
    /// Cancel safe: it changes nothing.
    pub(crate) async fn until_left(&self, agent_id: &AgentId) {
        self.until_some(|| (!self.is_here(agent_id)).then_some(())).await;
    }

    /// Whether this agent has a backend that does not drain.
    pub(crate) fn is_here(&self, agent_id: &AgentId) -> bool {
        self.registry().of_agent(agent_id).iter().any(|backend| !backend.is_draining())
    }

    /// The backend for a target, if there is any.
    pub(crate) fn choose(&self, target: &Target) -> Option<Arc<Backend>> {
        self.registry().choose(target, fastrand::usize(..))
    }

    /// Until when a backend for a target is expected back; `None` if none has left lately.
    pub(crate) fn expected_until(&self, target: &Target, now: Instant) -> Option<Instant> {
        self.registry().expected_until(target, now)
    }

    /// Completes with a backend for a target once there is one that is not avoided; `None` once
    /// the server stops.
    ///
    /// # Cancel safety
    /// Cancel safe: it changes nothing.
    pub(crate) async fn appears(&self, target: &Target) -> Option<Arc<Backend>> {
        self.until_some(|| {
            let ready = self.choose(target).filter(|backend| !backend.is_avoided());
            let closed = self.0.closed.load(Ordering::Relaxed);
            (ready.is_some() || closed).then_some(ready)
        })
        .await
    }

    /// Ends every wait for a backend: the server stops, and no more will come.
    pub(crate) fn close(&self) {
        self.0.closed.store(true, Ordering::Relaxed);
        self.0.changed.notify_waiters();
    }

    /// Whether the first strategy has any backend: what Konnectivity calls ready.
    pub(crate) fn is_ready(&self) -> bool {
        self.registry().is_ready()
    }

    /// Number of keys that each strategy can choose among.
    pub(crate) fn counts(&self) -> Vec<(Strategy, usize)> {
        self.registry().counts().collect()
    }

    /// Every registered backend, in the order of arrival.
    pub fn all(&self) -> Vec<Arc<Backend>> {
        self.registry().all().to_vec()
    }

    /// Completes when the first strategy can choose among exactly `count` keys.
    ///
    /// # Cancel safety
    /// Cancel safe: it changes nothing.
    pub async fn until(&self, count: usize) {
        let reached = || self.counts().first().is_some_and(|(_, now)| *now == count);
        self.until_some(|| reached().then_some(())).await;
    }

    /// Completes with what `look` finds, which is called again after each change.
    async fn until_some<T>(&self, look: impl Fn() -> Option<T>) -> T {
        loop {
            // Begun before the look, so that a change behind it is not missed.
            let changed = self.0.changed.notified();
            if let Some(found) = look() {
                return found;
            }
            changed.await;
        }
    }

    fn registry(&self) -> MutexGuard<'_, Registry<Backend>> {
        self.0.registry.lock()
    }
}

/// Keeps a backend registered for as long as it lives. A backend whose registration is dropped
/// without a reason counts as lost.
#[derive(Debug)]
pub(crate) struct Registration {
    backends: Backends,
    backend: Arc<Backend>,
}

impl Registration {
    /// Removes the backend, whose tunnel has ended for this reason.
    pub(crate) fn end(self, lost: &TunnelLost) {
        self.backends.remove(&self.backend, lost);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.backends.registry().remove(&self.backend, Departure::Lost, Instant::now());
        self.backends.0.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests;
