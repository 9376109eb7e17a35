//! When the agent dials which server of the set at the server's own address. Pure, as
//! [`Plan`](super::Plan): the caller brings time, randomness and the servers that have a tunnel.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use culvert_wire::ServerId;
use tokio::time::Instant;

use crate::{
    config::SyncConfig,
    connector::{backoff::Backoff, plan::LossCause},
    tunnels::KnownServers,
};

/// Maximum number of dials that run at the same time.
const MAX_RUNNING: usize = 16;
/// Time for a first dial after which the server is also looked for at the address of all servers. A
/// handshake whose first packet is lost takes about as long.
const PATIENCE: Duration = Duration::from_secs(1);

/// Dials of servers at their own addresses.
#[derive(Debug)]
pub(crate) struct Direct {
    /// The set that the targets are of.
    known: Arc<KnownServers>,
    /// Whether a set with an address was recorded.
    has_begun: bool,
    targets: BTreeMap<ServerId, Target>,
    interval: Duration,
    delays: Backoff,
}

/// A server whose addresses are known.
#[derive(Debug)]
struct Target {
    addresses: Vec<SocketAddr>,
    /// When the next dial is due.
    at: Instant,
    /// When the pending dial began.
    pending: Option<Instant>,
    /// Whether the last dial did not lead to the server.
    failed: bool,
    /// Whether any dial has led to the server.
    has_worked: bool,
    delays: Backoff,
}

impl Target {
    /// Whether the server is expected to be reached soon.
    fn is_promising(&self, now: Instant) -> bool {
        !self.failed && self.pending.is_none_or(|begun| now < begun + PATIENCE)
    }
}

impl Direct {
    /// No server is known yet.
    pub(crate) fn new(sync: &SyncConfig) -> Self {
        Self {
            known: Arc::default(),
            has_begun: false,
            targets: BTreeMap::new(),
            interval: sync.interval,
            delays: Backoff::new(sync.interval, sync.interval_cap),
        }
    }

    /// Records the set. The servers of the first one are dialed at once. Later additions are
    /// reported to all agents at the same time, and each agent waits for half of `--sync-interval`
    /// and a random part of the rest.
    pub(crate) fn on_known(&mut self, known: &Arc<KnownServers>, now: Instant, random: f64) {
        if Arc::ptr_eq(&self.known, known) {
            return;
        }
        self.known = known.clone();
        let at = match self.has_begun {
            false => now,
            true => now + self.interval.mul_f64(0.5 + random / 2.0),
        };
        self.targets.retain(|id, target| target.addresses == known.addresses(id));
        for (id, addresses) in known.located() {
            self.has_begun = true;
            self.targets.entry(id.clone()).or_insert_with(|| Target {
                addresses: addresses.clone(),
                at,
                pending: None,
                failed: false,
                has_worked: false,
                delays: self.delays.clone(),
            });
        }
    }

    /// Number of servers without a tunnel that a dial is likely to reach soon.
    pub(crate) fn promising(&self, connected: &[ServerId], now: Instant) -> usize {
        let missing = self.targets.iter().filter(|(id, _)| !connected.contains(id));
        missing.filter(|(_, target)| target.is_promising(now)).count()
    }

    /// Number of servers without a tunnel that this agent has reached at their own addresses before.
    pub(crate) fn proven(&self, connected: &[ServerId]) -> usize {
        let missing = self.targets.iter().filter(|(id, _)| !connected.contains(id));
        missing.filter(|(_, target)| target.has_worked).count()
    }

    /// When [`due`](Self::due) or [`promising`](Self::promising) will have another result; `None`
    /// while only events change them. `running` is the number of dials that have not ended.
    pub(crate) fn next(
        &self,
        connected: &[ServerId],
        running: usize,
        now: Instant,
    ) -> Option<Instant> {
        let has_room = running < MAX_RUNNING;
        let missing = self.targets.iter().filter(|(id, _)| !connected.contains(id));
        let times = missing.filter_map(|(_, target)| match target.pending {
            None => has_room.then_some(target.at),
            Some(begun) => Some(begun + PATIENCE).filter(|at| *at > now),
        });
        times.min()
    }

    /// The servers to dial now, with their addresses. Their dials are pending from now on.
    pub(crate) fn due(
        &mut self,
        connected: &[ServerId],
        running: usize,
        now: Instant,
    ) -> Vec<(ServerId, Vec<SocketAddr>)> {
        let room = MAX_RUNNING.saturating_sub(running);
        let due = |(id, target): &(&ServerId, &mut Target)| {
            target.pending.is_none() && target.at <= now && !connected.contains(id)
        };
        let due = self.targets.iter_mut().filter(due).take(room);
        due.map(|(id, target)| {
            target.pending = Some(now);
            (id.clone(), target.addresses.clone())
        })
        .collect()
    }

    /// Records that a dial has ended, and whether the server has a tunnel now.
    pub(crate) fn on_ended(&mut self, id: &ServerId, reached: bool, now: Instant, random: f64) {
        let Some(target) = self.targets.get_mut(id) else { return };
        target.pending = None;
        target.failed = !reached;
        target.has_worked |= reached;
        if reached {
            target.delays.reset();
            target.at = now + target.delays.now(random);
        } else {
            target.at = now + target.delays.next(random);
        }
    }

    /// Records that the tunnel of a server was lost, as [`Plan::on_lost`](super::Plan::on_lost).
    pub(crate) fn on_lost(&mut self, id: &ServerId, cause: LossCause, now: Instant, random: f64) {
        let Some(target) = self.targets.get_mut(id) else { return };
        target.at = match cause {
            LossCause::Server => now + target.delays.now(random),
            LossCause::Path => now,
        };
    }
}

#[cfg(test)]
mod tests;
