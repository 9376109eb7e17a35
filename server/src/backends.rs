//! One agent as the server sees it: a live tunnel that takes dials until it drains or dies.

pub mod recently_reached;
pub mod registry;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use culvert_transport::Tunnel;
use culvert_wire::{AgentId, InstanceId, Target, control::Hello, identifiers::Identifiers};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::{
    agents::admission::Authenticated,
    backends::{
        recently_reached::RecentlyReached,
        registry::{Candidate, Registry},
    },
    config::Strategy,
};

/// One agent's live tunnel.
#[derive(Debug)]
pub struct Backend {
    /// The tunnel that dials travel on.
    pub tunnel: Tunnel,
    /// What the agent reached lately.
    pub recently_reached: RecentlyReached,
    agent_id: AgentId,
    instance: InstanceId,
    identifiers: Identifiers,
    streams: Arc<Semaphore>,
    open_streams: AtomicUsize,
    draining: AtomicBool,
    suspicions: Notify,
}

impl Backend {
    /// The backend that this tunnel's agent introduced itself as, once it was admitted.
    pub fn new(tunnel: Tunnel, hello: Hello, _: Authenticated, max_streams: u32) -> Self {
        Self {
            tunnel,
            recently_reached: RecentlyReached::default(),
            agent_id: hello.agent_id,
            instance: hello.instance,
            identifiers: hello.identifiers,
            streams: Arc::new(Semaphore::new(max_streams as usize)),
            open_streams: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            suspicions: Notify::new(),
        }
    }

    /// Which process of the agent's name this is.
    pub fn instance(&self) -> InstanceId {
        self.instance
    }

    /// Takes one place among the streams this agent may carry; `None` when all are taken.
    pub fn permit(self: &Arc<Self>) -> Option<StreamPermit> {
        let permit = self.streams.clone().try_acquire_owned().ok()?;
        self.open_streams.fetch_add(1, Ordering::Relaxed);
        Some(StreamPermit { backend: self.clone(), _permit: permit })
    }

    /// Streams that are being dialed or spliced now.
    pub fn open_streams(&self) -> usize {
        self.open_streams.load(Ordering::Relaxed)
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Asks whoever drives the tunnel to find out whether the agent is alive.
    pub fn suspect(&self) {
        self.suspicions.notify_one();
    }

    /// Completes when somebody doubts that the agent is alive.
    pub async fn suspected(&self) {
        self.suspicions.notified().await;
    }
}

impl Candidate for Backend {
    fn agent_id(&self) -> &AgentId {
        &self.agent_id
    }

    fn identifiers(&self) -> &Identifiers {
        &self.identifiers
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// A place among a backend's streams, given back when dropped.
#[derive(Debug)]
pub struct StreamPermit {
    backend: Arc<Backend>,
    _permit: OwnedSemaphorePermit,
}

impl StreamPermit {
    /// Whose place it is.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        self.backend.open_streams.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The connected backends, shared by everybody who needs them. Clones share them.
#[derive(Clone, Debug)]
pub struct Backends(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registry: Mutex<Registry<Backend>>,
    changed: Notify,
    closed: AtomicBool,
}

impl Backends {
    /// No backends yet, to be chosen by these strategies.
    pub fn new(strategies: &[Strategy]) -> Self {
        Self(Arc::new(Shared {
            registry: Mutex::new(Registry::new(strategies)),
            changed: Notify::new(),
            closed: AtomicBool::new(false),
        }))
    }

    /// Takes dials for this backend until the returned guard is dropped.
    ///
    /// Older tunnels under the same name are doubted: most often they are what a restart left.
    pub fn register(&self, backend: Arc<Backend>) -> Registration {
        let older = {
            let mut registry = self.registry();
            let older = registry.of_agent(&backend.agent_id);
            registry.add(&backend);
            older
        };
        older.iter().for_each(|backend| backend.suspect());
        self.0.changed.notify_waiters();
        Registration { backends: self.clone(), backend }
    }

    /// Gives an agent no new dials while another will do.
    pub fn drain(&self, backend: &Backend) {
        backend.drain();
        self.0.changed.notify_waiters();
    }

    /// Completes when no backend of this agent is left but such as drain.
    ///
    /// # Cancel safety
    /// Cancel safe: it only looks.
    pub async fn until_left(&self, agent_id: &AgentId) {
        loop {
            let changed = self.0.changed.notified();
            if !self.is_here(agent_id) {
                return;
            }
            changed.await;
        }
    }

    /// Whether this agent has a backend here that does not drain.
    pub fn is_here(&self, agent_id: &AgentId) -> bool {
        self.registry().of_agent(agent_id).iter().any(|backend| !backend.is_draining())
    }

    /// The backend for a target, if there is any.
    pub fn choose(&self, target: &Target) -> Option<Arc<Backend>> {
        self.registry().choose(target, fastrand::usize(..))
    }

    /// For how long a backend for a target may still come back that was there a moment ago, if there
    /// was one.
    pub fn expected_for(&self, target: &Target, now: Instant) -> Option<Duration> {
        self.registry().expected_for(target, now)
    }

    /// Completes with a backend for a target once there is one that takes dials; `None` when no more
    /// will come.
    ///
    /// # Cancel safety
    /// Cancel safe: it only looks.
    pub async fn appears(&self, target: &Target) -> Option<Arc<Backend>> {
        loop {
            let changed = self.0.changed.notified();
            if let Some(backend) = self.choose(target).filter(|backend| !backend.is_draining()) {
                return Some(backend);
            }
            if self.0.closed.load(Ordering::Relaxed) {
                return None;
            }
            changed.await;
        }
    }

    /// Says that no more backends will come, because the server stops: nobody waits for any.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::Relaxed);
        self.0.changed.notify_waiters();
    }

    /// Whether the first strategy has any backend: what Konnectivity calls ready.
    pub fn is_ready(&self) -> bool {
        self.registry().is_ready()
    }

    /// How many keys each strategy can choose among.
    pub fn counts(&self) -> Vec<(Strategy, usize)> {
        self.registry().counts().collect()
    }

    /// Completes when the first strategy can choose among exactly `count` keys.
    ///
    /// # Cancel safety
    /// Cancel safe: it only looks.
    pub async fn until(&self, count: usize) {
        loop {
            let changed = self.0.changed.notified();
            if self.counts().first().is_some_and(|(_, now)| *now == count) {
                return;
            }
            changed.await;
        }
    }

    fn registry(&self) -> MutexGuard<'_, Registry<Backend>> {
        // Every change to the registry is complete before it could panic.
        self.0.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps a backend among the connected ones for as long as it lives.
#[derive(Debug)]
pub struct Registration {
    backends: Backends,
    backend: Arc<Backend>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.backends.registry().remove(&self.backend, Instant::now());
        self.backends.0.changed.notify_waiters();
    }
}

/// How long a doubted agent may take to answer before its tunnel is closed: well above the pause
/// of a busy node, well below what a person waits for.
pub const SUSPECT_LIMIT: Duration = Duration::from_millis(1500);
