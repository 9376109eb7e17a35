//! The connected backends: which there are, which one a dial takes, and when that changes.
//!
//! ```text
//!  backends            Backends: the registry, shared, and its changes awaited
//!  registry            who is connected, arranged by strategy; pure data
//!  strategy            keys under which a strategy finds a backend
//!  backend             one agent's live tunnel, its permits and its suspicions
//!  load                how much a backend has to do
//!  ejection            backends through which dials time out
//!  dismissal           why this server ends a backend
//!  duplicates          ids that several live agents have
//!  departure           how a backend has left, and for how long it is expected back
//!  absence             why there is no backend for a target, in words
//!  silence             which agents are silent
//!  recent_loss         share of an agent's packets that were lost in the last minute
//!  recently_reached    targets that an agent reached in the last minutes
//! ```

mod absence;
mod backend;
pub mod departure;
mod dismissal;
pub(crate) mod duplicates;
mod ejection;
pub mod load;
mod recent_loss;
mod recently_reached;
pub mod registry;
pub(crate) mod silence;
mod strategy;

use std::{
    hash::RandomState,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use culvert_transport::TunnelLost;
use culvert_wire::{AgentId, Target};
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};
use tracing::debug;

pub(crate) use absence::Absence;
pub use backend::Backend;
pub(crate) use backend::{PendingDial, Process, StreamPermit};
pub(crate) use dismissal::Dismissal;
pub use strategy::Strategy;

use absence::{Departed, Departures};
use departure::{Departure, START_LIMIT};
use registry::{Candidate, Registry};

use crate::agents::{
    admission::AcceptedToken,
    identity::{Claims, Identity},
};

/// Maximum number of tunnels of one agent process. One that moves between carriers leaves a tunnel
/// behind for as long as that has streams; more than these are of an agent that fails again and
/// again. Agents that share an id by mistake are several processes, and do not end one another.
const MAX_TUNNELS_PER_PROCESS: usize = 32;
/// Maximum number of tunnels of one id that its agent has proved to be, in all processes. Without it
/// the credential of one node could take the tunnels of all others, in the name of ever new
/// processes.
const MAX_TUNNELS_PER_ID: usize = 128;

/// Time for which the start of the server may be why no agent is connected.
const RECENT_START: Duration = Duration::from_secs(120);

/// Why a backend is not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RegisterError {
    /// A live agent of another identity has the id.
    #[error("the id is that of another agent: {holder}")]
    IdHeld {
        /// Who that is.
        holder: String,
    },
    /// All agents together have as many tunnels as they may.
    #[error("there are {0} tunnels of agents, see --max-agent-tunnels")]
    TooManyTunnels(usize),
}

/// The connected backends. Clones share them.
#[derive(Clone, Debug)]
pub struct Backends(Arc<State>);

#[derive(Debug)]
struct State {
    registry: Mutex<Registry<Backend>>,
    departures: Mutex<Departures>,
    hashes: RandomState,
    started: Instant,
    max_tunnels: usize,
    changed: Notify,
    closed: AtomicBool,
}

impl Backends {
    /// No backends yet; these strategies will choose among them, in this order.
    #[cfg(test)]
    pub(crate) fn new(strategies: &[Strategy]) -> Self {
        Self::limited(strategies, usize::MAX)
    }

    /// The same, with at most this many backends.
    pub(crate) fn limited(strategies: &[Strategy], max_tunnels: usize) -> Self {
        Self(Arc::new(State {
            registry: Mutex::new(Registry::new(strategies)),
            departures: Mutex::default(),
            hashes: RandomState::new(),
            started: Instant::now(),
            max_tunnels,
            changed: Notify::new(),
            closed: AtomicBool::new(false),
        }))
    }

    /// Expects agents that have not joined yet, from now on for a while: the server has just started.
    pub(crate) fn expect_first(&self) {
        self.registry().expect_any_until(Instant::now() + START_LIMIT);
    }

    /// Whether a backend of an agent with these claims may be registered.
    ///
    /// An agent of another identity that has the id is not suspected for it: a claim, repeated, would
    /// make each pause of that agent's path the end of its tunnel, and the id free.
    ///
    /// # Errors
    /// When it may not.
    pub(crate) fn admit(&self, claims: &Claims) -> Result<(), RegisterError> {
        self.check(&self.registry(), claims)
    }

    fn check(&self, registry: &Registry<Backend>, claims: &Claims) -> Result<(), RegisterError> {
        let holder = registry.of_agent(&claims.agent_id).iter().rfind(|holder| {
            let holder_claims = &holder.claims;
            !holder.is_draining() && !claims.identity.may_replace(&holder_claims.identity)
        });
        match holder {
            Some(holder) => {
                Err(RegisterError::IdHeld { holder: holder.claims.identity.to_string() })
            }
            None if registry.all().len() >= self.0.max_tunnels => {
                Err(RegisterError::TooManyTunnels(registry.all().len()))
            }
            None => Ok(()),
        }
    }

    /// Gives dials to this backend until the returned guard is dropped.
    ///
    /// Older tunnels of the same agent are suspected: most often a restart left them behind. The
    /// oldest are dismissed when there are too many.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    pub(crate) fn register(&self, backend: Arc<Backend>) -> Result<Registration, RegisterError> {
        let (older, held) = {
            let mut registry = self.registry();
            self.check(&registry, &backend.claims)?;
            let older = registry.of_agent(backend.agent_id()).to_vec();
            let held = registry.add(&backend);
            (older, held)
        };
        let (expiry, token) = (*backend.expiry().borrow(), backend.token());
        let process = backend.process();
        let of_process: Vec<_> =
            older.iter().filter(|older| process.continues(&older.process())).collect();
        of_process.iter().for_each(|older| older.renew(expiry, token.as_ref()));
        of_process.iter().for_each(|older| older.supersede());
        dismiss_oldest(&of_process, MAX_TUNNELS_PER_PROCESS);
        if backend.claims.is_id_proven {
            let of_identity: Vec<_> =
                older.iter().filter(|older| backend.may_replace(older)).collect();
            dismiss_oldest(&of_identity, MAX_TUNNELS_PER_ID);
        }
        older.iter().for_each(|backend| backend.suspect());
        self.0.changed.notify_waiters();
        Ok(Registration { backends: self.clone(), backend, held })
    }

    /// Renews the proof of all tunnels of a backend's process with this token. Returns whether
    /// `identity` is that of the backend.
    pub(crate) fn renew(
        &self,
        backend: &Backend,
        identity: &Identity,
        token: Option<&AcceptedToken>,
    ) -> bool {
        let is_same = identity.may_replace(&backend.claims.identity);
        if is_same {
            let expiry = identity.expires(Instant::now());
            let tunnels = self.registry().of_agent(backend.agent_id()).to_vec();
            let process = backend.process();
            let of_process = tunnels.iter().filter(|tunnel| process.continues(&tunnel.process()));
            of_process.for_each(|tunnel| tunnel.renew(expiry, token));
        }
        is_same
    }

    /// Ends every tunnel of an agent. Returns how many there are.
    pub(crate) fn evict(&self, agent_id: &AgentId) -> usize {
        let tunnels = self.registry().of_agent(agent_id).to_vec();
        tunnels.iter().for_each(|tunnel| tunnel.dismiss(Dismissal::Evicted));
        tunnels.len()
    }

    /// Gives every tunnel of an agent no new dials while another agent will do. Returns how many
    /// there are.
    pub(crate) fn drain_agent(&self, agent_id: &AgentId) -> usize {
        let tunnels = self.registry().of_agent(agent_id).to_vec();
        tunnels.iter().for_each(|tunnel| self.drain(tunnel));
        tunnels.len()
    }

    /// Identifiers for which a backend waits, because an agent of another identity has them.
    pub(crate) fn waits_for(&self, backend: &Arc<Backend>) -> Vec<String> {
        self.registry().waits_for(backend)
    }

    /// Removes a backend whose tunnel was lost; one that is not there is no fault.
    pub(crate) fn remove(&self, backend: &Arc<Backend>, lost: &TunnelLost) {
        self.remove_as(backend, Departure::of(lost), absence::cause(lost));
    }

    fn remove_as(&self, backend: &Arc<Backend>, departure: Departure, cause: &'static str) {
        let now = Instant::now();
        let left = self.registry().remove(backend, departure, now);
        if !left.is_empty() {
            let departed = Departed {
                agent_id: backend.agent_id().clone(),
                at: now,
                carrier: backend.tunnel.carrier(),
                cause,
                loss_percent: backend.loss_percent(),
            };
            self.0.departures.lock().note(left, departed);
        }
        self.0.changed.notify_waiters();
    }

    /// Records a dial through a backend that got a reply in time, whatever it was.
    pub(crate) fn dial_replied(&self, backend: &Backend) {
        backend.outcomes.replied(Instant::now());
    }

    /// Records a dial through a backend that timed out. The backend is ejected when that was so for
    /// some dials in a row, while dials through others had replies; never more than half of all.
    /// Returns for how long it is ejected, if it is now.
    pub(crate) fn dial_timed_out(&self, backend: &Backend, target: &Target) -> Option<Duration> {
        let now = Instant::now();
        let since = backend.outcomes.timed_out(target, &self.0.hashes, now)?;
        let registry = self.registry();
        let all = registry.all();
        let ejected = all.iter().filter(|other| other.outcomes.is_ejected(now)).count();
        let others_reply = all.iter().any(|other| other.outcomes.has_replied_since(since));
        (others_reply && 2 * (ejected + 1) <= all.len()).then(|| backend.outcomes.eject(now))
    }

    /// Why there is no backend for a target.
    pub(crate) fn absence(&self, target: &Target) -> Absence {
        let now = Instant::now();
        let (by_host_alone, connected) = {
            let registry = self.registry();
            (registry.is_by_host_alone(), registry.agent_count())
        };
        let departures = self.0.departures.lock();
        let departed = match by_host_alone {
            true => departures.of(target.host()),
            false => departures.last(),
        };
        let since_start = now.saturating_duration_since(self.0.started);
        Absence {
            host: by_host_alone.then(|| target.host().to_owned()),
            departed,
            connected,
            started: (since_start < RECENT_START).then_some(since_start),
            now,
        }
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

    /// Whether the process of a backend that is registered has another one.
    pub(crate) fn has_another(&self, backend: &Backend) -> bool {
        let registry = self.registry();
        let of_agent = registry.of_agent(backend.agent_id()).iter();
        of_agent.filter(|other| other.instance() == backend.instance()).count() > 1
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
        self.registry().choose(target, fastrand::u64(..))
    }

    /// Until when a backend for a target is expected; `None` if none has left lately, and the server
    /// has not just started.
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

/// Dismisses the oldest of these tunnels, so that with a new one `most` are left. Those that were
/// dismissed before may still be among them.
fn dismiss_oldest(older: &[&Arc<Backend>], most: usize) {
    let excess = (older.len() + 1).saturating_sub(most);
    older[..excess].iter().for_each(|backend| backend.dismiss(Dismissal::Crowded));
}

/// Keeps a backend registered for as long as it lives. A backend whose registration is dropped
/// without a reason counts as lost.
#[derive(Debug)]
pub(crate) struct Registration {
    backends: Backends,
    backend: Arc<Backend>,
    held: Vec<String>,
}

impl Registration {
    /// Identifiers that agents of other identities had when the backend was registered.
    pub(crate) fn held(&self) -> &[String] {
        &self.held
    }

    /// Removes the backend, whose tunnel has ended for this reason.
    pub(crate) fn end(self, lost: &TunnelLost) {
        self.backends.remove(&self.backend, lost);
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.backends.remove_as(&self.backend, Departure::Lost, "its connection ended");
    }
}

#[cfg(test)]
mod tests;
