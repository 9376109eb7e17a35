//! One agent as the server sees it: a live tunnel that takes dials until it drains or is lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use culvert_transport::{Carrier, Tunnel, resume::SessionTunnel};
use culvert_wire::{
    AgentId, InstanceId, bounded::Text, control::Hello, identifiers::Identifiers, version::Features,
};
use parking_lot::Mutex;
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, SetOnce, watch},
    time::Instant,
};

use super::{
    dismissal::{Dismissal, Dismissed},
    ejection::Outcomes,
    load::Load,
    recent_loss::RecentLoss,
    recently_reached::RecentlyReached,
    registry::Candidate,
    silence::Heard,
};
use crate::agents::{
    admission::AcceptedToken,
    identity::{Claims, Expiry, Identity},
};

/// One process of one agent: an agent that is started again is another one.
///
/// The instance is what the agent says, and so is the id where any is allowed. So tunnels lead to
/// the same process only if their agents have proved the same identity.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    identity: Arc<Identity>,
    agent_id: AgentId,
    instance: InstanceId,
}

impl Process {
    /// The agent's name.
    pub(crate) fn agent_id(&self) -> &AgentId {
        &self.agent_id
    }

    /// Whether the agent of this process may take the place of `older`, whichever its process.
    pub(crate) fn replaces(&self, older: &Self) -> bool {
        self.agent_id == older.agent_id && self.identity.may_replace(&older.identity)
    }

    /// Whether a tunnel of this process may be one of `older` too: it has the same identity, or the
    /// same one with more proof.
    pub(crate) fn continues(&self, older: &Self) -> bool {
        (&self.agent_id, self.instance) == (&older.agent_id, older.instance)
            && self.identity.may_replace(&older.identity)
    }
}

impl PartialEq for Process {
    fn eq(&self, other: &Self) -> bool {
        self.continues(other) && other.continues(self)
    }
}

/// Time after which an older Konnectivity agent is alive that is still connected.
const GRPC_LIFE_SIGN: Duration = Duration::from_secs(60);

/// One agent's live tunnel.
#[derive(Debug)]
pub struct Backend {
    /// The tunnel that carries the dials.
    pub tunnel: Tunnel,
    /// Targets that the agent reached recently.
    pub(crate) recently_reached: RecentlyReached,
    /// Whose tunnel it is, by its own account and by its proof.
    pub(crate) claims: Claims,
    /// When the agent joined.
    pub(crate) since: Instant,
    instance: InstanceId,
    revision: u16,
    software: Text<64>,
    permits: Arc<Semaphore>,
    open_streams: AtomicUsize,
    pending_dials: AtomicUsize,
    pub(super) outcomes: Outcomes,
    draining: AtomicBool,
    superseded: SetOnce<()>,
    suspicions: Notify,
    pub(super) heard: Heard,
    pub(super) recent_loss: RecentLoss,
    silent: AtomicBool,
    dismissed: Dismissed,
    /// When the proof of the identity expires; `None` for one that does not.
    expiry: watch::Sender<Option<Expiry>>,
    /// The token that this expiry is of; `None` where agents need none.
    token: Mutex<Option<AcceptedToken>>,
    renews: bool,
    /// Notified when the last open stream has ended.
    emptied: Notify,
    /// The tunnel's place in the session of its process, if the agent resumes streams.
    session: Option<Arc<SessionTunnel>>,
}

impl Backend {
    /// The backend that the agent with these claims introduced itself as on this tunnel. It carries
    /// at most `max_streams` streams at once.
    pub(crate) fn new(tunnel: Tunnel, hello: Hello, claims: Claims, max_streams: u32) -> Self {
        let since = Instant::now();
        let expiry = claims.identity.expires(since);
        Self {
            tunnel,
            recently_reached: RecentlyReached::default(),
            claims,
            since,
            instance: hello.instance,
            revision: hello.revision,
            software: hello.software,
            permits: Arc::new(Semaphore::new(max_streams as usize)),
            open_streams: AtomicUsize::new(0),
            pending_dials: AtomicUsize::new(0),
            outcomes: Outcomes::default(),
            draining: AtomicBool::new(false),
            superseded: SetOnce::new(),
            suspicions: Notify::new(),
            heard: Heard::now(),
            recent_loss: RecentLoss::now(),
            silent: AtomicBool::new(false),
            dismissed: Dismissed::default(),
            expiry: watch::Sender::new(expiry),
            token: Mutex::default(),
            renews: hello.features.contains(Features::RENEWAL),
            emptied: Notify::new(),
            session: None,
        }
    }

    /// The same, whose streams outlive its tunnel.
    #[must_use]
    pub(crate) fn with_session(self, session: Option<Arc<SessionTunnel>>) -> Self {
        Self { session, ..self }
    }

    /// The tunnel's place in the session of its process, if the agent resumes streams.
    pub(crate) fn session(&self) -> Option<&Arc<SessionTunnel>> {
        self.session.as_ref()
    }

    /// The same, of an agent that was admitted with this token.
    #[must_use]
    pub(crate) fn with_token(self, token: Option<AcceptedToken>) -> Self {
        Self { token: Mutex::new(token), ..self }
    }

    /// The agent process, which differs after each restart of the same agent.
    pub(crate) fn instance(&self) -> InstanceId {
        self.instance
    }

    /// The process that the tunnel leads to.
    pub(crate) fn process(&self) -> Process {
        Process {
            identity: self.claims.identity.clone(),
            agent_id: self.claims.agent_id.clone(),
            instance: self.instance,
        }
    }

    /// The agent's revision of the protocol.
    pub(crate) fn revision(&self) -> u16 {
        self.revision
    }

    /// Name and version of the agent's software, as the agent calls itself.
    pub(crate) fn software(&self) -> &Text<64> {
        &self.software
    }

    /// A permit for one more stream; `None` while the agent carries as many as it may.
    pub(crate) fn permit(self: &Arc<Self>) -> Option<StreamPermit> {
        let permit = self.permits.clone().try_acquire_owned().ok()?;
        self.open_streams.fetch_add(1, Ordering::Relaxed);
        Some(StreamPermit { backend: self.clone(), _permit: permit })
    }

    /// Counts a dial that waits for the agent's reply, until the guard is dropped.
    pub(crate) fn dial_pending(self: &Arc<Self>) -> PendingDial {
        self.pending_dials.fetch_add(1, Ordering::Relaxed);
        PendingDial(self.clone())
    }

    /// Whether dials go to other agents for a while, because those through this one time out.
    pub(crate) fn is_ejected(&self) -> bool {
        self.outcomes.is_ejected(Instant::now())
    }

    /// Number of streams that are being dialed or spliced now.
    pub fn open_streams(&self) -> usize {
        self.open_streams.load(Ordering::Relaxed)
    }

    pub(super) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the agent asked for no new dials.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Records that the same process has a newer tunnel.
    pub(super) fn supersede(&self) {
        let _ = self.superseded.set(());
    }

    /// Completes once the same process has a newer tunnel.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn superseded(&self) {
        self.superseded.wait().await;
    }

    /// Records whether the agent is silent. Returns whether that has changed.
    pub(super) fn set_silent(&self, silent: bool) -> bool {
        self.silent.swap(silent, Ordering::Relaxed) != silent
    }

    /// Whether nothing came from the agent for longer than a keep-alive takes.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// Whether something came from the agent this long after a newer tunnel did.
    pub(super) fn is_heard_since(&self, newer: &Self, time: Duration) -> bool {
        match self.tunnel.carrier() {
            Carrier::Quic | Carrier::Tcp => self.heard.last() > newer.since + time,
            Carrier::Grpc => newer.since.elapsed() > GRPC_LIFE_SIGN + time,
        }
    }

    /// Share of the packets to the agent that were lost in the last minute, in percent; `None` where
    /// that is not known.
    pub(crate) fn loss_percent(&self) -> Option<u8> {
        self.recent_loss.percent(self.tunnel.carrier(), &self.tunnel.stats())
    }

    /// Whether the agent renews its proof while it is connected.
    pub(crate) fn renews(&self) -> bool {
        self.renews
    }

    /// When the proof of the identity expires, as it is now and when it was renewed.
    pub(crate) fn expiry(&self) -> watch::Receiver<Option<Expiry>> {
        self.expiry.subscribe()
    }

    /// The token that the proof's expiry is of; `None` where agents need none.
    pub(crate) fn token(&self) -> Option<AcceptedToken> {
        self.token.lock().clone()
    }

    /// Renews the proof with this token, unless the one that it has is better.
    pub(super) fn renew(&self, renewed: Option<Expiry>, token: Option<&AcceptedToken>) {
        self.expiry.send_if_modified(|expiry| {
            let is_longer = match (&*expiry, &renewed) {
                (Some(old), Some(new)) => new.at > old.at,
                (Some(_), None) => true,
                (None, _) => false,
            };
            if is_longer {
                *expiry = renewed;
                *self.token.lock() = token.cloned();
            }
            is_longer
        });
    }

    /// Asks the task that drives the tunnel to end it.
    pub(crate) fn dismiss(&self, dismissal: Dismissal) {
        self.dismissed.set(dismissal);
    }

    /// Completes when the backend was dismissed.
    ///
    /// # Cancel safety
    /// Cancel safe, and any number of callers may wait.
    pub(crate) async fn dismissed(&self) -> Dismissal {
        self.dismissed.get().await
    }

    /// Completes when no stream is open.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn emptied(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.open_streams() == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// Asks the task that drives the tunnel to find out whether the agent is alive.
    pub(crate) fn suspect(&self) {
        self.suspicions.notify_one();
    }

    /// Completes when the agent was suspected since the last call; for one waiter.
    ///
    /// # Cancel safety
    /// Cancel safe: a suspicion is taken only when the future completes.
    pub(crate) async fn suspected(&self) {
        self.suspicions.notified().await;
    }
}

impl Candidate for Backend {
    fn agent_id(&self) -> &AgentId {
        &self.claims.agent_id
    }

    fn identifiers(&self) -> &Identifiers {
        &self.claims.identifiers
    }

    fn is_avoided(&self) -> bool {
        self.is_draining() || self.is_silent() || self.is_ejected()
    }

    fn has_left(&self) -> bool {
        self.is_draining()
    }

    fn may_replace(&self, other: &Self) -> bool {
        self.claims.identity.may_replace(&other.claims.identity)
    }

    fn load(&self) -> Load {
        let rtt = match self.tunnel.carrier() {
            Carrier::Grpc => None,
            Carrier::Quic | Carrier::Tcp => Some(self.tunnel.stats().rtt),
        };
        let rtt = rtt.filter(|rtt| !rtt.is_zero());
        Load { pending_dials: self.pending_dials.load(Ordering::Relaxed), rtt }
    }

    fn has_outlived_the_arrival_of(&self, newer: &Self) -> bool {
        match self.tunnel.carrier() {
            Carrier::Quic | Carrier::Tcp => self.heard.last() > newer.since,
            // The keep-alive of Konnectivity's protocol has ended the connection of a dead agent by
            // then.
            Carrier::Grpc => newer.since.elapsed() > GRPC_LIFE_SIGN,
        }
    }
}

/// A dial that waits for the reply of an agent.
#[derive(Debug)]
pub(crate) struct PendingDial(Arc<Backend>);

impl Drop for PendingDial {
    fn drop(&mut self) {
        self.0.pending_dials.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Permission to have one stream open on a backend, given back when dropped.
#[derive(Debug)]
pub(crate) struct StreamPermit {
    backend: Arc<Backend>,
    _permit: OwnedSemaphorePermit,
}

impl StreamPermit {
    /// The backend that gave the permit.
    pub(crate) fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        if self.backend.open_streams.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.backend.emptied.notify_waiters();
        }
    }
}
