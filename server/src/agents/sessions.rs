//! The sessions of agents' processes: what outlives their tunnels.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use culvert_process::metrics::ResumedStreams;
use culvert_transport::{
    Tunnel, TunnelLost,
    resume::{Session, SessionTunnel},
};
use culvert_wire::{AgentId, InstanceId, resume::SessionInfo};
use parking_lot::Mutex;

use crate::backends::Process;

/// The sessions of all agents' processes.
#[derive(Debug)]
pub(crate) struct Sessions {
    /// This server process.
    instance: InstanceId,
    /// Time for which a stream waits for a tunnel; zero if none does.
    timeout: Duration,
    observer: Arc<ResumedStreams>,
    next_tunnel: AtomicU64,
    by_agent: Mutex<HashMap<AgentId, Vec<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    process: Process,
    session: Arc<Session>,
}

impl Sessions {
    /// No sessions yet, whose streams wait for a tunnel at most this long; zero turns sessions off.
    pub(crate) fn new(timeout: Duration, observer: Arc<ResumedStreams>) -> Self {
        Self {
            instance: InstanceId(std::array::from_fn(|_| fastrand::u8(..))),
            timeout,
            observer,
            next_tunnel: AtomicU64::new(1),
            by_agent: Mutex::default(),
        }
    }

    /// Whether there are sessions.
    pub(crate) fn are_on(&self) -> bool {
        !self.timeout.is_zero()
    }

    /// What an agent is told about its session and about its new tunnel.
    pub(crate) fn introduce(&self) -> SessionInfo {
        let tunnel = self.next_tunnel.fetch_add(1, Ordering::Relaxed);
        SessionInfo { instance: self.instance, tunnel }
    }

    /// Adds a tunnel with this number to the session of its process. The sessions of older processes
    /// of the agent that have no tunnel end: the agent was started again.
    pub(crate) fn enter(
        &self,
        process: &Process,
        tunnel: Tunnel,
        number: u64,
    ) -> Arc<SessionTunnel> {
        let mut by_agent = self.by_agent.lock();
        let entries = by_agent.entry(process.agent_id().clone()).or_default();
        let over: Vec<_> = entries
            .extract_if(.., |entry| {
                !process.continues(&entry.process)
                    && process.replaces(&entry.process)
                    && entry.session.tunnels() == 0
            })
            .collect();
        let entry = entries.iter().find(|entry| process.continues(&entry.process));
        let session = match entry {
            Some(entry) => entry.session.clone(),
            None => {
                let session = Session::new(self.timeout, self.observer.clone());
                entries.push(Entry { process: process.clone(), session: session.clone() });
                session
            }
        };
        let joined = session.join(tunnel, number);
        drop(by_agent);
        over.iter().for_each(|entry| entry.session.end(&TunnelLost::PeerRestarted));
        joined
    }

    /// Removes a tunnel that was lost, and the session of its process if that was the last one. Waits
    /// as long as streams of the session wait for another tunnel.
    ///
    /// # Cancel safety
    /// When the future is dropped, the session stays.
    pub(crate) async fn leave(&self, process: &Process, tunnel: &SessionTunnel, lost: &TunnelLost) {
        tunnel.leave(lost);
        let session = tunnel.session();
        if session.tunnels() > 0 {
            return;
        }
        if lost.is_resumable() && session.streams() > 0 && !self.has_newer(process, session) {
            tokio::select! {
                () = session.expired() => {}
                () = session.rejoined() => return,
            }
        }
        session.end(lost);
        self.remove(process, session);
    }

    /// Whether the agent has another process with a tunnel.
    fn has_newer(&self, process: &Process, session: &Arc<Session>) -> bool {
        let by_agent = self.by_agent.lock();
        let entries = by_agent.get(process.agent_id()).map_or(&[][..], Vec::as_slice);
        let position = entries.iter().position(|entry| Arc::ptr_eq(&entry.session, session));
        let newer = entries.iter().skip(position.map_or(0, |position| position + 1));
        newer
            .into_iter()
            .any(|entry| entry.session.tunnels() > 0 && entry.process.replaces(process))
    }

    fn remove(&self, process: &Process, session: &Arc<Session>) {
        let mut by_agent = self.by_agent.lock();
        let Some(entries) = by_agent.get_mut(process.agent_id()) else { return };
        entries
            .retain(|entry| !Arc::ptr_eq(&entry.session, session) || entry.session.tunnels() > 0);
        if entries.is_empty() {
            by_agent.remove(process.agent_id());
        }
    }
}
