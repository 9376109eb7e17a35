//! Which backends are connected, arranged by the keys of each strategy. Pure data: no tasks, no
//! I/O, no clock.

use std::{cmp::Ordering, collections::HashMap, sync::Arc};

use culvert_wire::{AgentId, Target, identifiers::Identifiers};
use tokio::time::Instant;

use super::{departure::Departure, load::Load, strategy::Strategy};

/// What the registry must know of a backend.
pub trait Candidate {
    /// The agent's name.
    fn agent_id(&self) -> &AgentId;
    /// Identifiers that the agent announced.
    fn identifiers(&self) -> &Identifiers;
    /// Whether the backend is to get no new dials while another one will do: it drains, or its
    /// agent is silent.
    fn is_avoided(&self) -> bool;
    /// Whether the agent asked for no new dials.
    fn has_left(&self) -> bool;
    /// Whether the agent may have what the other one's has: it is the same one, as far as both have
    /// proved who they are.
    fn may_replace(&self, other: &Self) -> bool;
    /// How much it has to do.
    fn load(&self) -> Load;
    /// Whether its agent has shown that it lived when this newer backend was there already.
    fn has_outlived_the_arrival_of(&self, newer: &Self) -> bool;
}

/// The better of two backends that both fit: one that is not avoided, else the one with less to do,
/// else the first.
fn better<'a, B: Candidate>(one: &'a Arc<B>, two: &'a Arc<B>) -> &'a Arc<B> {
    match one.is_avoided().cmp(&two.is_avoided()).then_with(|| one.load().order(two.load())) {
        Ordering::Greater => two,
        Ordering::Less | Ordering::Equal => one,
    }
}

/// Two different positions below `count`, chosen by a random number; one twice where there is no
/// other, and none where there is none.
fn two_of(count: usize, random: u64) -> Option<(usize, usize)> {
    let count = u64::try_from(count).ok().filter(|count| *count > 0)?;
    let first = random % count;
    let step = (random / count).checked_rem(count - 1).map_or(0, |step| step + 1);
    Some((first as usize, ((first + step) % count) as usize))
}

/// The connected backends, in the order of arrival and once per configured strategy.
#[derive(Debug)]
pub struct Registry<B> {
    all: Vec<Arc<B>>,
    by_agent: HashMap<AgentId, Vec<Arc<B>>>,
    groups: Vec<(Strategy, Group<B>)>,
    /// Until when backends are expected that have not been here yet.
    any_until: Option<Instant>,
}

impl<B: Candidate> Registry<B> {
    /// An empty registry for these strategies, which are asked in this order.
    pub fn new(strategies: &[Strategy]) -> Self {
        let groups = strategies.iter().map(|strategy| (*strategy, Group::default())).collect();
        Self { all: Vec::new(), by_agent: HashMap::new(), groups, any_until: None }
    }

    /// Expects until then, for any target, a backend that has not been here yet.
    pub fn expect_any_until(&mut self, until: Instant) {
        self.any_until = Some(until);
    }

    /// Adds a backend under every key that a strategy would find it by. Returns the keys for which
    /// it has to wait, because a live backend of another identity has them.
    pub fn add(&mut self, backend: &Arc<B>) -> Vec<String> {
        self.all.push(backend.clone());
        self.by_agent.entry(backend.agent_id().clone()).or_default().push(backend.clone());
        let mut held = Vec::new();
        for (strategy, group) in &mut self.groups {
            for key in strategy.keys(&**backend) {
                if !group.add(key.clone(), backend) {
                    held.push(key);
                }
            }
        }
        held
    }

    /// The keys for which a backend waits, because another identity has them.
    pub fn waits_for(&self, backend: &Arc<B>) -> Vec<String> {
        let mut keys = Vec::new();
        for (strategy, group) in &self.groups {
            keys.extend(strategy.keys(&**backend).into_iter().filter(|key| {
                let bearers = group.backends.get(key);
                bearers.is_some_and(|bearers| contains(&bearers.waiting, backend))
            }));
        }
        keys
    }

    /// Removes a backend that has left; one that is not there is no fault. Returns the keys of all
    /// strategies whose last backend it was.
    pub fn remove(&mut self, backend: &Arc<B>, departure: Departure, now: Instant) -> Vec<String> {
        self.all.retain(|other| !Arc::ptr_eq(other, backend));
        if let Some(of_agent) = self.by_agent.get_mut(backend.agent_id()) {
            of_agent.retain(|other| !Arc::ptr_eq(other, backend));
            if of_agent.is_empty() {
                self.by_agent.remove(backend.agent_id());
            }
        }
        let mut left = Vec::new();
        for (strategy, group) in &mut self.groups {
            for key in strategy.keys(&**backend) {
                if group.remove(&key, backend, departure, now) {
                    left.push(key);
                }
            }
        }
        left
    }

    /// Until when a backend for a target is expected; `None` if none has left lately.
    pub fn expected_until(&self, target: &Target, now: Instant) -> Option<Instant> {
        let until = self.groups.iter().filter_map(|(strategy, group)| match strategy {
            Strategy::Default | Strategy::DefaultRoute if group.is_untouched() => self.any_until,
            Strategy::Default | Strategy::DefaultRoute => group.left.values().max().copied(),
            Strategy::DestHost => group.left.get(target.host()).copied().or(self.any_until),
        });
        until.max().filter(|until| *until > now)
    }

    /// The backend for a target by the first strategy that finds one. Where several fit, it is the
    /// better of two that `random` chooses (Mitzenmacher 2001, the power of two choices): the one
    /// with the least to do would get every dial until that shows.
    pub fn choose(&self, target: &Target, random: u64) -> Option<Arc<B>> {
        self.groups.iter().find_map(|(strategy, group)| match strategy {
            Strategy::Default | Strategy::DefaultRoute => group.any(random),
            Strategy::DestHost => group.of(target.host(), random),
        })
    }

    /// Number of keys that each strategy can choose among.
    pub fn counts(&self) -> impl Iterator<Item = (Strategy, usize)> {
        self.groups.iter().map(|(strategy, group)| (*strategy, group.keys.len()))
    }

    /// Whether a target's host alone decides which backend is chosen.
    pub fn is_by_host_alone(&self) -> bool {
        self.groups.iter().all(|(strategy, _)| *strategy == Strategy::DestHost)
    }

    /// Number of agents that are connected.
    pub fn agent_count(&self) -> usize {
        self.by_agent.len()
    }

    /// Whether the first strategy has any backend: what Konnectivity calls ready.
    pub fn is_ready(&self) -> bool {
        self.groups.first().is_some_and(|(_, group)| !group.keys.is_empty())
    }

    /// Every backend, oldest first.
    pub fn all(&self) -> &[Arc<B>] {
        &self.all
    }

    /// Every backend of this agent, oldest first.
    pub fn of_agent(&self, agent_id: &AgentId) -> &[Arc<B>] {
        self.by_agent.get(agent_id).map_or(&[], Vec::as_slice)
    }
}

/// Backends by key.
#[derive(Debug)]
struct Group<B> {
    keys: Vec<String>,
    backends: HashMap<String, Bearers<B>>,
    /// Keys whose last backend has left, and until when it is expected back.
    left: HashMap<String, Instant>,
}

impl<B> Default for Group<B> {
    fn default() -> Self {
        Self { keys: Vec::new(), backends: HashMap::new(), left: HashMap::new() }
    }
}

/// The backends of one key, each in the order of arrival.
#[derive(Debug)]
struct Bearers<B> {
    /// Tunnels of one agent, or of agents of one identity that announce the same host.
    holders: Vec<Arc<B>>,
    /// Tunnels of other identities, which get the key once its holders are gone.
    waiting: Vec<Arc<B>>,
}

impl<B> Default for Bearers<B> {
    fn default() -> Self {
        Self { holders: Vec::new(), waiting: Vec::new() }
    }
}

fn contains<B>(backends: &[Arc<B>], backend: &Arc<B>) -> bool {
    backends.iter().any(|other| Arc::ptr_eq(other, backend))
}

impl<B: Candidate> Bearers<B> {
    /// Adds a backend. Returns whether the key is its own, or was left by its holders.
    fn add(&mut self, backend: &Arc<B>) -> bool {
        let may_hold = self.holders.iter().all(|holder| backend.may_replace(holder));
        let list = if may_hold { &mut self.holders } else { &mut self.waiting };
        list.push(backend.clone());
        may_hold || self.holders.iter().all(|holder| holder.has_left())
    }

    /// Removes a backend. When the last holder has left, the oldest that waits is the next one, and
    /// with it those of its identity.
    fn remove(&mut self, backend: &Arc<B>) {
        for list in [&mut self.holders, &mut self.waiting] {
            list.retain(|other| !Arc::ptr_eq(other, backend));
        }
        if self.holders.is_empty() {
            for waiting in std::mem::take(&mut self.waiting) {
                self.add(&waiting);
            }
        }
    }

    /// A holder that is not avoided; if all of them have left, the oldest that waits; else the
    /// newest holder.
    fn best(&self, random: u64) -> Option<&Arc<B>> {
        self.ready(random)
            .or_else(|| {
                let have_left = self.holders.iter().all(|holder| holder.has_left());
                let mut waiting = self.waiting.iter().filter(|backend| !backend.is_avoided());
                waiting.next().filter(|_| have_left)
            })
            .or_else(|| self.holders.last())
    }

    /// A holder that is not avoided: the newest tunnel of any agent that has one. An older one may be
    /// what a crash left behind, so it counts only if its agent lived when the newest joined.
    fn ready(&self, random: u64) -> Option<&Arc<B>> {
        let mut ready = self.holders.iter().rev().filter(|backend| !backend.is_avoided());
        let newest = ready.next()?;
        let mut agents = vec![newest];
        for backend in ready.filter(|backend| backend.has_outlived_the_arrival_of(newest)) {
            if agents.iter().all(|other| other.agent_id() != backend.agent_id()) {
                agents.push(backend);
            }
        }
        let (one, two) = two_of(agents.len(), random)?;
        Some(better(agents[one], agents[two]))
    }
}

impl<B: Candidate> Group<B> {
    fn add(&mut self, key: String, backend: &Arc<B>) -> bool {
        self.left.remove(&key);
        let bearers = self.backends.entry(key.clone()).or_insert_with(|| {
            self.keys.push(key);
            Bearers::default()
        });
        bearers.add(backend)
    }

    /// Removes a backend of this key. Returns whether it was the last.
    fn remove(&mut self, key: &str, backend: &Arc<B>, departure: Departure, now: Instant) -> bool {
        let Some(bearers) = self.backends.get_mut(key) else { return false };
        bearers.remove(backend);
        let was_last = bearers.holders.is_empty();
        if was_last {
            self.backends.remove(key);
            self.keys.retain(|other| other != key);
            // Before the map grows, it drops the keys whose time is over.
            if self.left.len() == self.left.capacity() {
                self.left.retain(|_, until| *until > now);
            }
            self.left.insert(key.to_owned(), now + departure.return_limit());
        }
        was_last
    }

    /// Whether no backend has been here yet.
    fn is_untouched(&self) -> bool {
        self.keys.is_empty() && self.left.is_empty()
    }

    /// A backend of the key.
    fn of(&self, key: &str, random: u64) -> Option<Arc<B>> {
        self.backends.get(key)?.best(random).cloned()
    }

    /// A backend of any key: the better of two, or if both are avoided the next one that is not, or
    /// else the first.
    fn any(&self, random: u64) -> Option<Arc<B>> {
        let (one, two) = two_of(self.keys.len(), random)?;
        let of = |key: &String| self.of(key, random);
        let chosen = better(&of(&self.keys[one])?, &of(&self.keys[two])?).clone();
        if !chosen.is_avoided() {
            return Some(chosen);
        }
        let (before, after) = self.keys.split_at(one);
        let ready = after.iter().chain(before).filter_map(of).find(|other| !other.is_avoided());
        ready.or(Some(chosen))
    }
}

#[cfg(test)]
mod tests;
