//! The memory of sources from which agents were admitted lately.

use std::{collections::HashMap, time::Duration};

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
pub(super) struct Recent(HashMap<Source, Agents>);

/// The agents of one source.
#[derive(Debug)]
struct Agents {
    last: Instant,
    /// Number of admissions without a pause of [`LIFE`].
    admissions: usize,
}

impl Recent {
    /// Remembers a source whose agent was admitted, or lost its tunnel.
    pub(super) fn remember(&mut self, source: Source, now: Instant) {
        self.forget_expired(source, now);
        let agents = self.0.entry(source).or_insert(Agents { last: now, admissions: 0 });
        agents.last = now;
        agents.admissions = agents.admissions.saturating_add(1);
    }

    /// Makes room for a source: for one that is remembered no longer, or else the oldest one.
    fn forget_expired(&mut self, source: Source, now: Instant) {
        if self.share(source, now) > 0 {
            return;
        }
        self.0.remove(&source);
        if self.0.len() < MAX_SOURCES {
            return;
        }
        self.0.retain(|_, agents| !agents.is_expired(now));
        if self.0.len() >= MAX_SOURCES
            && let Some((oldest, _)) = self.0.iter().min_by_key(|(_, agents)| agents.last)
        {
            let oldest = *oldest;
            self.0.remove(&oldest);
        }
    }

    /// Number of connections that this source may have under way before it counts as any other;
    /// 0 for one that is not remembered.
    pub(super) fn share(&self, source: Source, now: Instant) -> usize {
        let agents = self.0.get(&source).filter(|agents| !agents.is_expired(now));
        agents.map_or(0, |agents| agents.admissions.saturating_add(MIN_SHARE).min(MAX_SHARE))
    }
}

impl Agents {
    fn is_expired(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.last) >= LIFE
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn source(number: usize) -> Source {
        Source::of(Ipv4Addr::from_bits(u32::try_from(number).unwrap()).into())
    }

    #[test]
    fn a_source_has_a_share_for_an_hour_which_grows_with_its_agents() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        assert_eq!(recent.share(source(1), now), 0);
        recent.remember(source(1), now);
        assert_eq!(recent.share(source(1), now), MIN_SHARE + 1);
        recent.remember(source(1), now + LIFE / 2);
        assert_eq!(recent.share(source(1), now + LIFE), MIN_SHARE + 2);
        assert_eq!(recent.share(source(1), now + LIFE + LIFE / 2), 0);
        recent.remember(source(1), now + LIFE * 2);
        assert_eq!(recent.share(source(1), now + LIFE * 2), MIN_SHARE + 1);
        for _ in 0..1000 {
            recent.remember(source(1), now + LIFE * 2);
        }
        assert_eq!(recent.share(source(1), now + LIFE * 2), MAX_SHARE);
    }

    #[test]
    fn the_oldest_source_is_forgotten_first() {
        let (mut recent, now) = (Recent::default(), Instant::now());
        for number in 0..MAX_SOURCES {
            let millis = u64::try_from(number).unwrap();
            recent.remember(source(number), now + Duration::from_millis(millis));
        }
        let later = now + LIFE / 2;
        recent.remember(source(0), later);
        recent.remember(source(MAX_SOURCES), later);
        assert_eq!(recent.0.len(), MAX_SOURCES);
        let shares = [0, 1, 2, MAX_SOURCES].map(|number| recent.share(source(number), later));
        assert_eq!(shares, [MIN_SHARE + 2, 0, MIN_SHARE + 1, MIN_SHARE + 1]);
        recent.remember(source(MAX_SOURCES + 1), later + LIFE);
        assert_eq!(recent.0.len(), 1, "expired ones make room");
    }
}
