//! The sessions with server processes: what outlives the tunnels to them.

use std::{sync::Arc, time::Duration};

use culvert_process::metrics::ResumedStreams;
use culvert_transport::{
    Tunnel, TunnelLost,
    resume::{Session, SessionTunnel},
};
use culvert_wire::{InstanceId, ServerId, resume::SessionInfo};
use parking_lot::Mutex;
use tokio::task::JoinSet;

/// The sessions of one agent process.
#[derive(Debug)]
pub(crate) struct Sessions {
    /// Time for which a stream waits for a tunnel; zero if none does.
    timeout: Duration,
    observer: Arc<ResumedStreams>,
    entries: Arc<Mutex<Vec<Entry>>>,
    /// Those that wait for the end of a session without tunnels.
    ending: Mutex<JoinSet<()>>,
}

#[derive(Debug)]
struct Entry {
    server_id: ServerId,
    instance: InstanceId,
    session: Arc<Session>,
}

impl Sessions {
    /// No sessions yet, whose streams wait for a tunnel at most this long; zero turns sessions off.
    pub(crate) fn new(timeout: Duration, observer: Arc<ResumedStreams>) -> Self {
        Self { timeout, observer, entries: Arc::default(), ending: Mutex::default() }
    }

    /// Whether there are sessions.
    pub(crate) fn are_on(&self) -> bool {
        !self.timeout.is_zero()
    }

    /// Adds a tunnel to the session with its server process. Sessions without tunnels with older
    /// processes of the server end: it was started again.
    pub(crate) fn enter(
        &self,
        server_id: &ServerId,
        info: SessionInfo,
        tunnel: Tunnel,
    ) -> Arc<SessionTunnel> {
        let SessionInfo { instance, tunnel: number } = info;
        let mut entries = self.entries.lock();
        let over: Vec<_> = entries
            .extract_if(.., |entry| {
                entry.server_id == *server_id
                    && entry.instance != instance
                    && entry.session.tunnels() == 0
            })
            .collect();
        let entry = entries.iter().find(|entry| entry.instance == instance);
        let session = match entry {
            Some(entry) => entry.session.clone(),
            None => {
                let session = Session::new(self.timeout, self.observer.clone());
                let server_id = server_id.clone();
                entries.push(Entry { server_id, instance, session: session.clone() });
                session
            }
        };
        let joined = session.join(tunnel, number);
        drop(entries);
        over.iter().for_each(|entry| entry.session.end(&TunnelLost::PeerRestarted));
        joined
    }

    /// Removes a tunnel that was lost. The session ends if it was the last one, once no stream waits
    /// for another tunnel.
    pub(crate) fn leave(&self, tunnel: &SessionTunnel, lost: &TunnelLost) {
        tunnel.leave(lost);
        let session = tunnel.session().clone();
        if session.tunnels() > 0 {
            return;
        }
        let waits = lost.is_resumable() && session.streams() > 0;
        let (entries, lost) = (self.entries.clone(), lost.clone());
        let end = move |session: &Arc<Session>| {
            session.end(&lost);
            let is_over = |entry: &Entry| {
                Arc::ptr_eq(&entry.session, session) && entry.session.tunnels() == 0
            };
            entries.lock().retain(|entry| !is_over(entry));
        };
        if !waits {
            end(&session);
            return;
        }
        let mut ending = self.ending.lock();
        while ending.try_join_next().is_some() {}
        ending.spawn(async move {
            tokio::select! {
                () = session.expired() => end(&session),
                () = session.rejoined() => {}
            }
        });
    }
}
