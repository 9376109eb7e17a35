//! What was found out about paths, for later connections to the same peers (RFC 9959, "Careful
//! Resume").
//!
//! The side that sends remembers. A connection learns who its peer is when both have introduced
//! themselves: then the process names the peer's [`KnownPath`]. From then on the connection's
//! controller may begin with what the last one has found, and leaves there what it finds itself.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hash, RandomState},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;

/// Maximum number of paths that are remembered; beyond it the oldest is forgotten. 4096 take
/// 300 KiB.
const MAX_PATHS: usize = 4096;
/// Time after which a path is forgotten. Routes and rates seldom change within it, and the round
/// trip and the first packets are checked in any case.
const LIFETIME: Duration = Duration::from_secs(3600);

/// What a controller has found out about its path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Observed {
    /// Bandwidth, in bytes per second.
    pub(super) bandwidth: f64,
    /// Shortest round-trip time.
    pub(super) min_rtt: Duration,
    /// When it was found.
    pub(super) at: Instant,
}

impl Observed {
    /// When it is too old to be used.
    pub(super) fn expires(&self) -> Instant {
        self.at + LIFETIME
    }
}

/// Result of an attempt to begin with the rate of an earlier connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumption {
    /// The path carried what was sent beyond the window of a new connection.
    Confirmed,
    /// It did not, and the window was cut.
    Retreated,
    /// The round-trip time is another one, so that the connection began as a new one.
    OtherPath,
}

impl Resumption {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Confirmed, Self::Retreated, Self::OtherPath];

    /// The result as a metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Confirmed => "confirmed",
            Self::Retreated => "retreated",
            Self::OtherPath => "other_path",
        }
    }
}

/// The paths that the connections of a process have found out about, at most 4096.
#[derive(Debug, Default)]
pub struct KnownPaths {
    hasher: RandomState,
    paths: Mutex<HashMap<u64, Observed>>,
    results: [AtomicU64; Resumption::ALL.len()],
}

impl KnownPaths {
    /// The path to this peer. Peers are equal where their values are.
    pub fn to(self: &Arc<Self>, peer: impl Hash) -> KnownPath {
        KnownPath { key: self.hasher.hash_one(peer), paths: self.clone() }
    }

    /// Number of attempts with this result.
    pub fn count(&self, result: Resumption) -> u64 {
        self.results[result as usize].load(Ordering::Relaxed)
    }

    /// Removes what is known, so that only one of a peer's connections uses it at a time.
    fn take(&self, key: u64, now: Instant) -> Option<Observed> {
        self.paths.lock().remove(&key).filter(|observed| now < observed.expires())
    }

    fn put(&self, key: u64, observed: Observed) {
        let mut paths = self.paths.lock();
        if paths.len() >= MAX_PATHS && !paths.contains_key(&key) {
            let oldest = paths.iter().min_by_key(|(_, observed)| observed.at);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                paths.remove(&oldest);
            }
        }
        let entry = paths.entry(key).or_insert(observed);
        if entry.at < observed.at {
            *entry = observed;
        }
    }
}

/// What is known of the path to one peer.
#[derive(Clone, Debug)]
pub struct KnownPath {
    paths: Arc<KnownPaths>,
    key: u64,
}

impl KnownPath {
    fn take(&self, now: Instant) -> Option<Observed> {
        self.paths.take(self.key, now)
    }

    pub(super) fn put(&self, observed: Observed) {
        self.paths.put(self.key, observed);
    }
}

/// The connection between a controller and what is known of its path. Clones of a controller share
/// it.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    path: OnceLock<KnownPath>,
    /// What was taken and is not used yet. It is put back when the connection ends.
    unused: Mutex<Option<Observed>>,
}

impl Memory {
    /// Names the path; the first call counts.
    pub(crate) fn set(&self, path: KnownPath) {
        let _ = self.path.set(path);
    }

    /// Whether the path has been named.
    pub(super) fn is_set(&self) -> bool {
        self.path.get().is_some()
    }

    /// What is known of the path, which no other connection gets then.
    pub(super) fn take(&self, now: Instant) -> Option<Observed> {
        let observed = self.path.get()?.take(now);
        *self.unused.lock() = observed;
        observed
    }

    /// Records that more is sent than a new connection may, because of what was taken.
    pub(super) fn used(&self) {
        *self.unused.lock() = None;
    }

    /// Records the result of an attempt.
    pub(super) fn record(&self, result: Resumption) {
        self.used();
        if let Some(KnownPath { paths, .. }) = self.path.get() {
            paths.results[result as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Leaves what was found out for later connections.
    pub(super) fn put(&self, observed: Observed) {
        if let Some(path) = self.path.get() {
            self.used();
            path.put(observed);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Some(unused) = self.unused.get_mut().take() {
            self.put(unused);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(at: Instant) -> Observed {
        Observed { bandwidth: 1e6, min_rtt: Duration::from_millis(50), at }
    }

    fn memory(paths: &Arc<KnownPaths>, peer: &str) -> Memory {
        let memory = Memory::default();
        memory.set(paths.to(peer));
        memory
    }

    #[test]
    fn one_connection_at_a_time_uses_what_is_known_and_gives_it_back_unused() {
        let (paths, now) = (Arc::new(KnownPaths::default()), Instant::now());
        memory(&paths, "a").put(observed(now));
        let (one, other) = (memory(&paths, "a"), memory(&paths, "a"));
        assert_eq!(memory(&paths, "b").take(now), None);
        assert_eq!(one.take(now), Some(observed(now)));
        assert_eq!(other.take(now), None);
        drop(one);
        assert_eq!(other.take(now), Some(observed(now)));
        other.used();
        drop(other);
        assert_eq!(memory(&paths, "a").take(now), None);
    }

    #[test]
    fn what_is_given_back_replaces_nothing_newer() {
        let (paths, now) = (Arc::new(KnownPaths::default()), Instant::now());
        let newer = observed(now + Duration::from_secs(1));
        memory(&paths, "a").put(observed(now));
        let one = memory(&paths, "a");
        one.take(now);
        memory(&paths, "a").put(newer);
        drop(one);
        assert_eq!(memory(&paths, "a").take(now), Some(newer));
    }

    #[test]
    fn what_is_old_is_forgotten() {
        let (paths, now) = (Arc::new(KnownPaths::default()), Instant::now());
        let last = now + LIFETIME - Duration::from_millis(1);
        memory(&paths, "a").put(observed(now));
        assert_eq!(memory(&paths, "a").take(last), Some(observed(now)));
        assert_eq!(memory(&paths, "a").take(now + LIFETIME), None);
    }

    #[test]
    fn the_oldest_of_too_many_paths_is_forgotten() {
        let (paths, now) = (Arc::new(KnownPaths::default()), Instant::now());
        let at = |number: usize| now + Duration::from_millis(number as u64);
        for number in 0..=MAX_PATHS {
            memory(&paths, &number.to_string()).put(observed(at(number)));
        }
        assert_eq!(paths.paths.lock().len(), MAX_PATHS);
        assert_eq!(memory(&paths, "0").take(at(MAX_PATHS)), None);
        assert!(memory(&paths, "1").take(at(MAX_PATHS)).is_some());
    }
}
