use std::{collections::BTreeMap, net::Ipv4Addr};

use proptest::prelude::*;

use super::*;

const LIMIT: usize = 12;

fn source(number: u8) -> Source {
    Source::of(Ipv4Addr::new(192, 0, 2, number).into())
}

/// The same rules, by looking at every peer each time.
#[derive(Default)]
struct Model {
    peers: BTreeMap<u64, (Source, Progress, Instant)>,
    last_number: u64,
    /// When an agent of the source was last here, and the number of its admissions.
    recent: HashMap<Source, (Instant, usize)>,
}

impl Model {
    fn share(&self, source: Source, now: Instant) -> usize {
        let hour = Duration::from_secs(3600);
        let agents = self.recent.get(&source).filter(|(last, _)| now - *last < hour);
        agents.map_or(0, |(_, admissions)| (admissions + 4).min(128))
    }

    fn count(&self, source: Source) -> usize {
        self.peers.values().filter(|(of, ..)| *of == source).count()
    }

    fn excess(&self, source: Source, now: Instant) -> usize {
        self.count(source).saturating_sub(self.share(source, now))
    }

    /// The number of the peer that gives way, if one has to.
    fn enter(
        &mut self,
        source: Source,
        progress: Progress,
        now: Instant,
    ) -> Result<Option<u64>, NoRoom> {
        let mut leaves = None;
        if self.peers.len() >= LIMIT {
            let key = |number: u64| Reverse((self.peers[&number].1, number));
            let excess = |number: u64| self.excess(self.peers[&number].0, now);
            let first = self.peers.keys().copied().max_by_key(|n| (excess(*n), key(*n))).unwrap();
            let within_share = self.count(source) < self.share(source, now);
            let has_time = |number: u64| now - self.peers[&number].2 < CROWD_TIME;
            let is_crowd = excess(first) <= CROWD_EXCESS
                && !(within_share && excess(first) > 0)
                && progress <= self.peers[&first].1
                && has_time(first);
            leaves = Some(first);
            if is_crowd {
                let had_time = self.peers.keys().copied().filter(|number| !has_time(*number));
                let first = had_time.max_by_key(|number| (excess(*number) > 0, key(*number)));
                leaves = Some(first.ok_or(NoRoom)?);
            }
            self.peers.remove(&leaves.unwrap());
        }
        self.last_number += 1;
        self.peers.insert(self.last_number, (source, progress, now));
        Ok(leaves)
    }

    fn remember(&mut self, source: Source, now: Instant) {
        if self.share(source, now) == 0 {
            self.recent.remove(&source);
        }
        let agents = self.recent.entry(source).or_insert((now, 0));
        *agents = (now, agents.1 + 1);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Enter(u8, Progress),
    Leave(prop::sample::Index),
    Progress(prop::sample::Index, Progress),
    Remember(u8),
    Wait(Duration),
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    let progress =
        || prop::sample::select(vec![Progress::Silent, Progress::Heard, Progress::Connected]);
    let source = || prop_oneof![0..3_u8, 0..30_u8];
    prop_oneof![
        12 => (source(), progress()).prop_map(|(from, progress)| Step::Enter(from, progress)),
        2 => index().prop_map(Step::Leave),
        3 => (index(), progress()).prop_map(|(which, progress)| Step::Progress(which, progress)),
        1 => source().prop_map(Step::Remember),
        4 => (0..400_u64).prop_map(|millis| Step::Wait(Duration::from_millis(millis))),
        1 => (0..4000_u64).prop_map(|seconds| Step::Wait(Duration::from_secs(seconds))),
    ]
}

impl Peers {
    /// Asserts that the orders have exactly what the peers have.
    fn check(&self) {
        let of = |source: &Source| &self.sources[source];
        for (number, peer) in &self.peers {
            let had_time = of(&peer.source).had_time.contains(&(peer.progress, *number));
            assert!(of(&peer.source).all.contains(&(peer.progress, *number)));
            assert_eq!(self.in_their_time.contains(number), !had_time);
        }
        let all: usize = self.sources.values().map(|of_source| of_source.all.len()).sum();
        let had_time: usize = self.sources.values().map(|of_source| of_source.had_time.len()).sum();
        assert_eq!(all, self.peers.len());
        assert_eq!(had_time + self.in_their_time.len(), self.peers.len());
        assert_eq!(self.order.len(), self.sources.len());
        assert!(self.crowd_order.len() <= self.sources.len());
    }
}

proptest! {
    #[test]
    fn the_same_peers_give_way_as_by_looking_at_all(
        steps in prop::collection::vec(step(), 0..300),
    ) {
        let (mut peers, mut model, mut now) = (Peers::default(), Model::default(), Instant::now());
        let mut tokens: BTreeMap<u64, CancellationToken> = BTreeMap::new();
        let nth = |model: &Model, which: prop::sample::Index| {
            (!model.peers.is_empty())
                .then(|| *model.peers.keys().nth(which.index(model.peers.len())).unwrap())
        };
        for step in steps {
            match step {
                Step::Enter(from, progress) => {
                    let expected = model.enter(source(from), progress, now);
                    let entered = peers.enter(LIMIT, source(from), progress, now);
                    let found = entered.map(|(number, token)| {
                        prop_assert_eq!(number, model.last_number);
                        let gave_way: Vec<_> = tokens
                            .extract_if(.., |_, token| token.is_cancelled())
                            .map(|(number, _)| number)
                            .collect();
                        tokens.insert(number, token);
                        prop_assert!(gave_way.len() <= 1);
                        Ok(gave_way.first().copied())
                    });
                    match found {
                        Ok(found) => prop_assert_eq!(Ok(found?), expected),
                        Err(no_room) => prop_assert_eq!(Err(no_room), expected),
                    }
                }
                Step::Leave(which) => {
                    if let Some(number) = nth(&model, which) {
                        model.peers.remove(&number);
                        tokens.remove(&number);
                        prop_assert!(peers.remove(number));
                        prop_assert!(!peers.remove(number));
                    }
                }
                Step::Progress(which, progress) => {
                    if let Some(number) = nth(&model, which) {
                        model.peers.get_mut(&number).unwrap().1 = progress;
                        peers.set_progress(number, progress);
                    }
                }
                Step::Remember(from) => {
                    model.remember(source(from), now);
                    peers.remember(source(from), now);
                }
                Step::Wait(time) => now += time,
            }
            prop_assert_eq!(peers.len(), model.peers.len());
            peers.check();
        }
    }
}
