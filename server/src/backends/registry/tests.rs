use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::Duration,
};

use culvert_wire::identifiers::Identifier;

use super::*;
use crate::backends::departure::{LOST_RETURN_LIMIT, RETURN_LIMIT};

struct Fake {
    agent_id: AgentId,
    identifiers: Identifiers,
    /// Identities that are equal may replace one another.
    identity: &'static str,
    avoided: AtomicBool,
    left: AtomicBool,
    pending_dials: AtomicUsize,
    /// Whether it has outlived the arrival of any other.
    alive: AtomicBool,
}

impl Candidate for Fake {
    fn agent_id(&self) -> &AgentId {
        &self.agent_id
    }

    fn identifiers(&self) -> &Identifiers {
        &self.identifiers
    }

    fn is_avoided(&self) -> bool {
        self.avoided.load(Ordering::Relaxed) || self.has_left()
    }

    fn has_left(&self) -> bool {
        self.left.load(Ordering::Relaxed)
    }

    fn may_replace(&self, other: &Self) -> bool {
        self.identity == other.identity
    }

    fn load(&self) -> Load {
        Load { pending_dials: self.pending_dials.load(Ordering::Relaxed), rtt: None }
    }

    fn has_outlived_the_arrival_of(&self, _: &Self) -> bool {
        self.alive.load(Ordering::Relaxed)
    }
}

fn fake(name: &str, identifiers: &[(&str, &str)]) -> Arc<Fake> {
    fake_of("", name, identifiers)
}

fn fake_of(identity: &'static str, name: &str, identifiers: &[(&str, &str)]) -> Arc<Fake> {
    let identifiers: Vec<_> =
        identifiers.iter().map(|(key, value)| Identifier::new(key, value).unwrap()).collect();
    Arc::new(Fake {
        agent_id: name.parse().unwrap(),
        identifiers: identifiers.try_into().unwrap(),
        identity,
        avoided: AtomicBool::new(false),
        left: AtomicBool::new(false),
        pending_dials: AtomicUsize::new(0),
        alive: AtomicBool::new(false),
    })
}

fn registry(strategies: &[Strategy], backends: &[&Arc<Fake>]) -> Registry<Fake> {
    let mut registry = Registry::new(strategies);
    for backend in backends {
        assert_eq!(registry.add(backend), [""; 0]);
    }
    registry
}

fn target(address: &str) -> Target {
    address.parse().unwrap()
}

#[track_caller]
fn assert_chosen(found: Option<Arc<Fake>>, expected: &Arc<Fake>) {
    assert!(found.is_some_and(|found| Arc::ptr_eq(&found, expected)));
}

#[test]
fn default_reaches_every_agent_and_prefers_those_not_avoided() {
    let (a, b, c) = (fake("a", &[]), fake("b", &[]), fake("c", &[]));
    let registry = registry(&[Strategy::Default], &[&a, &b, &c]);
    for (random, expected) in [(0, &a), (1, &b), (2, &c), (3, &a)] {
        assert_chosen(registry.choose(&target("x:1"), random), expected);
    }
    b.avoided.store(true, Ordering::Relaxed);
    assert_chosen(registry.choose(&target("x:1"), 1), &c);
    a.avoided.store(true, Ordering::Relaxed);
    c.avoided.store(true, Ordering::Relaxed);
    assert_chosen(registry.choose(&target("x:1"), 1), &b);
}

#[test]
fn of_two_agents_the_one_with_fewer_pending_dials_is_chosen() {
    let agents: Vec<_> = (0..10).map(|number| fake(&format!("a{number}"), &[])).collect();
    let registry = registry(&[Strategy::Default], &agents.iter().collect::<Vec<_>>());
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..1000 {
        let chosen = registry.choose(&target("x:1"), random.u64(..)).unwrap();
        chosen.pending_dials.fetch_add(1, Ordering::Relaxed);
    }
    let pending = agents.iter().map(|agent| agent.pending_dials.load(Ordering::Relaxed));
    let (least, most) = (pending.clone().min().unwrap(), pending.max().unwrap());
    // A random choice alone leaves 30 between them; costs within a quarter are equal.
    assert!(least * 5 >= most * 3, "{least} to {most}, seed {seed}");
}

#[test]
fn live_agents_of_one_host_share_its_dials_and_older_tunnels_of_one_agent_get_none() {
    let host = [("host", "vip")];
    let (a, b, b_again) = (fake("a", &host), fake("b", &host), fake("b", &host));
    let registry = registry(&[Strategy::DestHost], &[&a, &b, &b_again]);
    let chosen = |random| registry.choose(&target("vip:80"), random);
    for random in 0..4 {
        assert_chosen(chosen(random), &b_again);
    }
    a.alive.store(true, Ordering::Relaxed);
    b.alive.store(true, Ordering::Relaxed);
    assert_chosen(chosen(0), &b_again);
    assert_chosen(chosen(1), &a);
    a.pending_dials.store(2, Ordering::Relaxed);
    assert_chosen(chosen(1), &b_again);
    b_again.avoided.store(true, Ordering::Relaxed);
    b.left.store(true, Ordering::Relaxed);
    assert_chosen(chosen(0), &a);
}

#[test]
fn two_positions_differ_and_reach_every_pair() {
    assert_eq!(two_of(0, 7), None);
    assert_eq!(two_of(1, 7), Some((0, 0)));
    let pairs: std::collections::BTreeSet<_> =
        (0..6).filter_map(|random| two_of(3, random)).collect();
    assert_eq!(Vec::from_iter(pairs), [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]);
}

#[test]
fn nothing_is_found_in_an_empty_registry() {
    let strategies = [Strategy::DestHost, Strategy::DefaultRoute, Strategy::Default];
    let registry = registry(&strategies, &[]);
    assert!(registry.choose(&target("x:1"), 7).is_none());
    assert!(!registry.is_ready());
}

#[test]
fn after_the_start_each_host_is_expected_that_no_agent_has_announced() {
    let (start, limit) = (Instant::now(), Duration::from_secs(10));
    let agent = fake("a", &[("host", "node-1")]);
    let mut registry = registry(&[Strategy::DestHost], &[]);
    let expected = |registry: &Registry<Fake>, address| {
        registry.expected_until(&target(address), start).map(|until| until - start)
    };
    assert_eq!(expected(&registry, "node-1:80"), None);
    registry.expect_any_until(start + limit);
    assert_eq!(expected(&registry, "node-1:80"), Some(limit));
    assert_eq!(registry.expected_until(&target("node-1:80"), start + limit), None);
    registry.add(&agent);
    registry.remove(&agent, Departure::InOrder, start);
    assert_eq!(expected(&registry, "node-1:80"), Some(RETURN_LIMIT));
    assert_eq!(expected(&registry, "node-2:80"), Some(limit));
}

#[test]
fn the_newest_tunnel_of_an_agent_is_used_and_the_older_one_stays_behind_it() {
    let (old, new) = (fake("a", &[]), fake("a", &[]));
    let mut registry = registry(&[Strategy::Default], &[&old, &new]);
    assert_eq!(registry.counts().collect::<Vec<_>>(), [(Strategy::Default, 1)]);
    assert_eq!(registry.of_agent(&old.agent_id).len(), 2);
    assert_chosen(registry.choose(&target("x:1"), 0), &new);
    let now = Instant::now();
    registry.remove(&new, Departure::Lost, now);
    assert_chosen(registry.choose(&target("x:1"), 0), &old);
    assert_eq!(registry.expected_until(&target("x:1"), now), None);
    registry.remove(&old, Departure::InOrder, now);
    // What is removed already says nothing new about the departure.
    registry.remove(&old, Departure::Lost, now);
    assert_eq!(registry.expected_until(&target("x:1"), now), Some(now + RETURN_LIMIT));
    assert!(!registry.is_ready());
}

#[test]
fn a_backend_that_was_lost_is_expected_back_for_longer_than_one_that_left_in_order() {
    let (one, two) = (fake("one", &[("ipv4", "10.0.0.1")]), fake("two", &[("host", "node-2")]));
    let mut registry = registry(&[Strategy::DestHost], &[&one, &two]);
    let start = Instant::now();
    let moment = Duration::from_millis(1);
    let expected = |registry: &Registry<Fake>, address, now| {
        registry.expected_until(&target(address), now).map(|until| until - start)
    };
    assert_eq!(expected(&registry, "10.0.0.1:80", start), None);
    registry.remove(&one, Departure::InOrder, start);
    registry.remove(&two, Departure::Lost, start);
    for (address, limit) in [("10.0.0.1:80", RETURN_LIMIT), ("node-2:80", LOST_RETURN_LIMIT)] {
        assert_eq!(expected(&registry, address, start + limit - moment), Some(limit));
        assert_eq!(expected(&registry, address, start + limit), None);
    }
    assert_eq!(expected(&registry, "10.0.0.9:80", start), None, "no backend was ever there");
    registry.add(&two);
    assert_eq!(expected(&registry, "node-2:80", start), None, "it is back");
}

#[test]
fn any_agent_that_has_left_is_expected_where_any_agent_will_do() {
    let agents: Vec<_> = (0..1000).map(|number| fake(&format!("a{number}"), &[])).collect();
    let mut registry = registry(&[Strategy::Default], &agents.iter().collect::<Vec<_>>());
    let mut now = Instant::now();
    for agent in &agents {
        now += RETURN_LIMIT / 2;
        registry.remove(agent, Departure::InOrder, now);
    }
    assert_eq!(registry.expected_until(&target("x:1"), now), Some(now + RETURN_LIMIT));
    assert!(registry.groups[0].1.left.len() < 10, "those before are forgotten");
}

#[test]
fn strategies_are_asked_in_order_and_fall_through() {
    let host = fake("host", &[("ipv4", "10.0.0.1"), ("host", "node-1"), ("ipv6", "fd00::1")]);
    let route = fake("route", &[("default-route", "true"), ("host", "other")]);
    let order = [Strategy::DestHost, Strategy::DefaultRoute];
    let registry = registry(&order, &[&host, &route]);
    for address in ["10.0.0.1:80", "node-1:80", "[fd00::1]:80"] {
        assert_chosen(registry.choose(&target(address), 1), &host);
    }
    assert_chosen(registry.choose(&target("10.9.9.9:80"), 1), &route);
    assert_eq!(
        registry.counts().collect::<Vec<_>>(),
        [(Strategy::DestHost, 4), (Strategy::DefaultRoute, 1)]
    );
}

#[test]
fn an_identifier_of_one_identity_is_not_taken_over_by_another() {
    let host = [("host", "node-1")];
    let victim = fake_of("victim", "a", &host);
    let stranger = fake_of("stranger", "b", &[("host", "node-1"), ("host", "node-2")]);
    let mut registry = registry(&[Strategy::DestHost], &[&victim]);
    assert_eq!(registry.add(&stranger), ["node-1"]);
    assert_eq!(registry.waits_for(&stranger), ["node-1"]);
    assert_eq!(registry.waits_for(&victim), [""; 0]);
    let chosen = |registry: &Registry<Fake>, host| registry.choose(&target(host), 0);
    assert_chosen(chosen(&registry, "node-1:80"), &victim);
    assert_chosen(chosen(&registry, "node-2:80"), &stranger);
    // Silence is not enough: the path may cause it.
    victim.avoided.store(true, Ordering::Relaxed);
    assert_chosen(chosen(&registry, "node-1:80"), &victim);
    victim.avoided.store(false, Ordering::Relaxed);
    let again = fake_of("victim", "a", &host);
    assert_eq!(registry.add(&again), [""; 0]);
    assert_chosen(chosen(&registry, "node-1:80"), &again);
    let now = Instant::now();
    registry.remove(&again, Departure::Lost, now);
    assert_chosen(chosen(&registry, "node-1:80"), &victim);
    registry.remove(&victim, Departure::Lost, now);
    assert_chosen(chosen(&registry, "node-1:80"), &stranger);
    assert_eq!(registry.waits_for(&stranger), [""; 0]);
    assert_eq!(registry.expected_until(&target("node-1:80"), now), None);
    registry.remove(&stranger, Departure::Lost, now);
    assert!(chosen(&registry, "node-1:80").is_none());
    assert!(registry.groups[0].1.backends.is_empty() && registry.by_agent.is_empty());
}

#[test]
fn an_identifier_whose_holder_drains_is_served_by_the_one_that_waits() {
    let host = [("host", "node-1")];
    let (old, new) = (fake_of("old", "a", &host), fake_of("new", "b", &host));
    let mut registry = registry(&[Strategy::DestHost], &[&old]);
    old.left.store(true, Ordering::Relaxed);
    assert_eq!(registry.add(&new), [""; 0], "no conflict");
    assert_chosen(registry.choose(&target("node-1:80"), 0), &new);
    new.avoided.store(true, Ordering::Relaxed);
    assert_chosen(registry.choose(&target("node-1:80"), 0), &old);
}

#[test]
fn agents_of_all_identities_share_what_is_for_any_agent() {
    let route = [("default-route", "true")];
    let (a, b) = (fake_of("one", "a", &route), fake_of("two", "b", &route));
    let strategies = [Strategy::DefaultRoute, Strategy::Default];
    let registry = registry(&strategies, &[&a, &b]);
    assert_chosen(registry.choose(&target("x:1"), 0), &a);
    assert_chosen(registry.choose(&target("x:1"), 1), &b);
}
