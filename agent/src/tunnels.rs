//! The agent's tunnels, by server: the one in use, those that a better one has replaced, and the
//! servers that there should be.

pub(crate) mod liveness;
mod quic_notes;
mod server_set;
mod server_tunnel;
pub(crate) mod session;
pub(crate) mod sessions;
mod sweep;

use std::{
    cmp::Reverse,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use culvert_process::rate_limited;
use culvert_wire::ServerId;
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};

use self::sweep::Sweep;
pub(crate) use self::{
    quic_notes::QuicNotes,
    server_set::KnownServers,
    server_tunnel::{NewTunnel, PeerVersion, Rank, ServerTunnel, Suspicion},
};
use crate::config::CountSource;

/// The outcome of [`ServerTunnels::add`].
#[derive(Debug)]
pub(crate) enum AddOutcome {
    /// The server had no tunnel.
    New(Arc<ServerTunnel>),
    /// The tunnel replaces another one of its server, which is retired.
    Replaced {
        /// The tunnel that was added.
        added: Arc<ServerTunnel>,
        /// The one that it replaces.
        retired: Arc<ServerTunnel>,
    },
    /// The server has a tunnel that is as good. The new one was not added.
    Duplicate,
}

/// All tunnels of one agent. The connector changes them; metrics, readiness and the Lease count
/// share them.
#[derive(Debug, Default)]
pub struct ServerTunnels {
    tunnels: Mutex<Vec<Arc<ServerTunnel>>>,
    /// Number of servers that the last server to welcome the agent reported; 0 before the first.
    reported_count: AtomicU32,
    /// Number of servers that hold Leases; 0 where Leases are not counted, or not yet.
    lease_count: AtomicU32,
    count_source: CountSource,
    quic: Mutex<QuicNotes>,
    /// The set of servers: what those with tunnels sent last or, without any, the last set.
    known: Mutex<Arc<KnownServers>>,
    sweep: Mutex<Sweep>,
    changed: Notify,
}

impl ServerTunnels {
    /// No tunnels yet. `source` applies where Leases are counted.
    pub(crate) fn new(source: CountSource) -> Self {
        Self { count_source: source, ..Self::default() }
    }

    /// Adds a tunnel whose server has welcomed the agent, unless the server has one that is as good
    /// and answers. A tunnel that is replaced is retired.
    pub(crate) fn add(&self, new: NewTunnel, now: Instant) -> AddOutcome {
        let mut tunnels = self.lock();
        let in_use = in_use_of(&tunnels, &new.server_id).cloned();
        if in_use.as_ref().is_some_and(|other| other.is_as_good_as(new.rank)) {
            return AddOutcome::Duplicate;
        }
        let added = Arc::new(ServerTunnel::new(new, now));
        tunnels.push(added.clone());
        drop(tunnels);
        let outcome = match in_use {
            None => AddOutcome::New(added),
            Some(retired) => {
                retired.retire();
                AddOutcome::Replaced { added, retired }
            }
        };
        self.update_known();
        outcome
    }

    /// Whether the server has a tunnel that is as good as one of `rank`, and answers: another one
    /// would be an [`AddOutcome::Duplicate`].
    pub(crate) fn is_duplicate(&self, server_id: &ServerId, rank: Rank) -> bool {
        in_use_of(&self.lock(), server_id).is_some_and(|other| other.is_as_good_as(rank))
    }

    /// Removes a tunnel that has ended.
    pub(crate) fn remove(&self, tunnel: &Arc<ServerTunnel>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, tunnel));
        self.update_known();
    }

    /// Records that the server of a tunnel sent another set of servers, and their number. One that
    /// is empty changes nothing.
    pub(crate) fn set_servers(&self, tunnel: &ServerTunnel, servers: KnownServers, count: u32) {
        self.set_reported_count(count);
        if !servers.is_empty() {
            tunnel.set_servers(servers);
            self.update_known();
        }
        self.changed.notify_one();
    }

    /// The set of servers, as far as servers sent it.
    pub(crate) fn known(&self) -> Arc<KnownServers> {
        self.known.lock().clone()
    }

    fn update_known(&self) {
        let mut sets: Vec<_> = self.in_use().iter().map(|tunnel| tunnel.servers()).collect();
        sets.retain(|(_, servers)| !servers.is_empty());
        if sets.is_empty() {
            return;
        }
        sets.sort_by_key(|(since, _)| Reverse(*since));
        let union = KnownServers::union(sets.iter().map(|(_, servers)| servers));
        let mut known = self.known.lock();
        if **known == union {
            return;
        }
        let [(_, addresses), (_, others)] = union.counts();
        *known = Arc::new(union);
        drop(known);
        let servers = addresses + others;
        rate_limited!(
            Duration::from_secs(1),
            INFO,
            servers,
            addresses,
            "the set of servers has changed"
        );
    }

    /// Records that the peer of a tunnel is suspected to be gone, or that it answers.
    pub(crate) fn set_suspicion(&self, tunnel: &ServerTunnel, suspicion: Option<Suspicion>) {
        if tunnel.set_suspicion(suspicion) {
            self.changed.notify_one();
        }
    }

    /// Records that a server was lost without a close: it crashed, or its path failed.
    pub(crate) fn on_server_lost(&self, now: Instant) {
        self.sweep.lock().on_server_lost(now);
    }

    /// Whether a tunnel that was quiet for this time is to be pinged before its keep-alive of this
    /// interval; the caller then does so.
    pub(crate) fn is_ping_due(
        &self,
        tunnel: &ServerTunnel,
        now: Instant,
        quiet: Duration,
        keep_alive_interval: Option<Duration>,
    ) -> bool {
        let (mut index, mut count) = (None, 0);
        for other in self.lock().iter().filter(|other| !other.is_retired()) {
            if std::ptr::eq(&**other, tunnel) {
                index = Some(count);
            }
            count += 1;
        }
        index.is_some_and(|index| {
            self.sweep.lock().is_due(now, quiet, (index, count), keep_alive_interval)
        })
    }

    /// Records that the agent's certificate was replaced: each tunnel is to be made anew.
    pub(crate) fn outdate(&self) {
        let tunnels = self.in_use();
        // A Konnectivity server does not end what has expired.
        let renewable = tunnels.iter().filter(|tunnel| tunnel.rank != Rank::Grpc);
        renewable.for_each(|tunnel| tunnel.outdate());
    }

    /// Completes when a tunnel became suspect or answers again, or the number of servers or their
    /// set changed.
    ///
    /// # Cancel safety
    /// Cancel safe: a change while no caller waited completes the next call. It is for one caller
    /// at a time.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Records the number of servers that a server reported.
    pub(crate) fn set_reported_count(&self, count: u32) {
        self.reported_count.store(count, Ordering::Relaxed);
    }

    /// Records the number of servers that hold Leases.
    pub(crate) fn set_lease_count(&self, count: u32) {
        if self.lease_count.swap(count, Ordering::Relaxed) != count {
            self.changed.notify_one();
        }
    }

    /// Number of servers, as far as the agent knows; 0 before it knows any.
    pub fn count(&self) -> u32 {
        let known = u32::try_from(self.known.lock().len()).unwrap_or(u32::MAX);
        // The last server to welcome the agent may be the one that knows of no others.
        let reported = self.reported_count.load(Ordering::Relaxed).max(known);
        match (self.lease_count.load(Ordering::Relaxed), self.count_source) {
            (0, _) => reported,
            (leases, CountSource::Leases) => leases,
            (leases, CountSource::Larger) => leases.max(reported),
        }
    }

    /// Number of servers that the agent has a tunnel to.
    pub fn connected(&self) -> u32 {
        u32::try_from(self.in_use().len()).unwrap_or(u32::MAX)
    }

    /// The servers that the agent has a tunnel to.
    pub(crate) fn connected_servers(&self) -> Vec<ServerId> {
        self.in_use().iter().map(|tunnel| tunnel.server_id.clone()).collect()
    }

    /// Whether the agent has a tunnel to any server: Konnectivity's condition for readiness.
    pub fn is_connected(&self) -> bool {
        self.lock().iter().any(|tunnel| !tunnel.is_retired())
    }

    /// Number of tunnels that were replaced and still carry streams.
    pub(crate) fn retired(&self) -> usize {
        self.lock().iter().filter(|tunnel| tunnel.is_retired()).count()
    }

    /// One line about each tunnel, for the answer of `/readyz?verbose`.
    pub(crate) fn describe(&self) -> Vec<String> {
        let now = Instant::now();
        self.lock().iter().map(|tunnel| tunnel.describe(now)).collect()
    }

    /// The tunnels that dials arrive on, one for each server.
    pub(crate) fn in_use(&self) -> Vec<Arc<ServerTunnel>> {
        self.lock().iter().filter(|tunnel| !tunnel.is_retired()).cloned().collect()
    }

    /// All tunnels, those in use and those that a better one has replaced.
    pub(crate) fn all(&self) -> Vec<Arc<ServerTunnel>> {
        self.lock().clone()
    }

    /// What is known about QUIC on the path to the servers.
    pub(crate) fn quic(&self) -> MutexGuard<'_, QuicNotes> {
        self.quic.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<ServerTunnel>>> {
        self.tunnels.lock()
    }
}

/// The tunnel in use to one server.
fn in_use_of<'a>(
    tunnels: &'a [Arc<ServerTunnel>],
    server_id: &ServerId,
) -> Option<&'a Arc<ServerTunnel>> {
    tunnels.iter().find(|tunnel| tunnel.server_id == *server_id && !tunnel.is_retired())
}

#[cfg(test)]
mod tests;
