//! The memory of sources from which agents were admitted lately.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use tokio::time::Instant;

use super::source::Source;

/// Time for which a source is remembered after its last agent was admitted or lost.
const LIFE: Duration = Duration::from_secs(60 * 60);
/// Maximum number of sources that are remembered.
const MAX_SOURCES: usize = 16 * 1024;
/// Number of connections that a remembered source may have under way in any case. An agent tries
/// several addresses and both carriers at once.
const MIN_SHARE: usize = 4;
/// Maximum number of connections that a remembered source may have under way, however many agents
/// it has: behind one NAT may be a cluster.
const MAX_SHARE: usize = 128;

/// Sources of agents.
#[derive(Debug, Default)]
pub(super) struct Recent {
    sources: HashMap<Source, Agents>,
    /// The same sources, the one whose agents were here longest ago first.
    order: BTreeSet<(Instant, Source)>,
}

/// The agents of one source.
#[derive(Debug)]
struct Agents {
    last: Instant,
    /// Number of admissions without a pause of [`LIFE`].
    admissions: usize,
}

impl Recent {
    /// Remembers a source whose agent was admitted, or lost its tunnel. Returns the oldest source if
    /// it is forgotten to make room.
    pub(super) fn remember(&mut self, source: Source, now: Instant) -> Option<Source> {
        let agents = self.sources.entry(source).or_insert(Agents { last: now, admissions: 0 });
        self.order.remove(&(agents.last, source));
        agents.last = now;
        agents.admissions = agents.admissions.saturating_add(1);
        self.order.insert((now, source));
        if self.sources.len() <= MAX_SOURCES {
            return None;
        }
        self.forget_first()
    }

    /// Forgets a source that is remembered for long enough, if there is one. It has a share until
    /// then.
    pub(super) fn forget_expired(&mut self, now: Instant) -> Option<Source> {
        let (last, _) = self.order.first()?;
        if now.saturating_duration_since(*last) < LIFE {
            return None;
        }
        self.forget_first()
    }

    fn forget_first(&mut self) -> Option<Source> {
        let (_, source) = self.order.pop_first()?;
        self.sources.remove(&source);
        Some(source)
    }

    /// Number of connections that this source may have under way before it counts as any other;
    /// 0 for one that is not remembered.
    pub(super) fn share(&self, source: Source) -> usize {
        let agents = self.sources.get(&source);
        agents.map_or(0, |agents| agents.admissions.saturating_add(MIN_SHARE).min(MAX_SHARE))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn source(number: usize) -> Source {
        Source::of(Ipv4Addr::from_bits(u32::try_from(number).unwrap()).into())
    }

    impl Recent {
        /// The share at this time, after the expired ones were forgotten.
        fn share_at(&mut self, source: Source, now: Instant) -> usize {
            while self.forget_expired(now).is_some() {}
            assert_eq!(self.sources.len(), self.order.len());
            self.share(source)
        }
    }

    #[test]
    fn a_source_has_a_share_for_an_hour_which_grows_with_its_agents() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        assert_eq!(recent.share(source(1)), 0);
        recent.remember(source(1), now);
        assert_eq!(recent.share_at(source(1), now), MIN_SHARE + 1);
        recent.remember(source(1), now + LIFE / 2);
        assert_eq!(recent.share_at(source(1), now + LIFE), MIN_SHARE + 2);
        assert_eq!(recent.share_at(source(1), now + LIFE + LIFE / 2), 0);
        recent.remember(source(1), now + LIFE * 2);
        assert_eq!(recent.share_at(source(1), now + LIFE * 2), MIN_SHARE + 1);
        for _ in 0..1000 {
            recent.remember(source(1), now + LIFE * 2);
        }
        assert_eq!(recent.share_at(source(1), now + LIFE * 2), MAX_SHARE);
    }

    #[test]
    fn the_oldest_source_is_forgotten_first() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        for number in 0..MAX_SOURCES {
            let millis = u64::try_from(number).unwrap();
            recent.remember(source(number), now + Duration::from_millis(millis));
        }
        let later = now + LIFE / 2;
        assert_eq!(recent.remember(source(0), later), None);
        assert_eq!(recent.remember(source(MAX_SOURCES), later), Some(source(1)));
        assert_eq!(recent.sources.len(), MAX_SOURCES);
        let shares = [0, 1, 2, MAX_SOURCES].map(|number| recent.share(source(number)));
        assert_eq!(shares, [MIN_SHARE + 2, 0, MIN_SHARE + 1, MIN_SHARE + 1]);
        recent.share_at(source(0), later + LIFE);
        assert_eq!(recent.sources.len(), 0, "expired ones are forgotten");
    }
}
