//! Files that are read again while the process runs: certificates, keys, CAs, tokens, kubeconfigs.
//!
//! [`Reloads::add`] reads a set of files that belong together, such as a certificate and its key,
//! and makes a value of them. From then on the files are looked at every ten seconds, on SIGHUP, and
//! whenever a part of the process asks for it. Contents are compared, because a Secret volume is
//! updated by a swap of symbolic links, and times of files say little. When contents have changed,
//! a new value replaces the current one; when they cannot be used, the current one stays.
//!
//! A changed set that cannot be used is looked at again after a second and reported only if its
//! contents are still the same: it may be half written, or a key may follow its certificate.

mod certificates;
mod expiry;
mod files;
mod set;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use culvert_transport::tls::Current;
use metrics::Gauge;
use parking_lot::Mutex as SyncMutex;
use tokio::{
    sync::{Mutex, Notify},
    time::{Instant, sleep, timeout},
};
use tracing::info;

pub use self::certificates::Role;
pub(crate) use self::certificates::parse_private_key;
pub use self::files::{Files, LoadError};
use self::{
    expiry::{Expiries, Life},
    set::{Counts, Set},
};
use crate::{metrics::Metrics, rate_limited, threads::on_thread};

/// Time between two looks at the files. kubelet takes a minute to update a Secret volume, and a
/// look reads a few small files.
const INTERVAL: Duration = Duration::from_secs(10);
/// Time after which a changed set that cannot be used is looked at again, and minimum time between
/// looks that parts of the process ask for.
const SETTLE_TIME: Duration = Duration::from_secs(1);
/// Maximum time that a caller of [`Reloads::look`] waits for the file system.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// Time after which a look counts as hung, and minimum time between two warnings about it.
const HUNG_AFTER: Duration = Duration::from_secs(10);
const HUNG_INTERVAL: Duration = Duration::from_secs(60);

/// Minimum time between two log lines about files that cannot be looked at.
const UNSEEN_INTERVAL: Duration = Duration::from_secs(10);

/// Names of the metrics about files.
#[derive(Clone, Copy, Debug)]
pub struct ReloadMetrics {
    /// Counter of reloads, by `file` and `result`.
    pub reloads: &'static str,
    /// Gauge that is above 0 while the contents of a file cannot be used, by `file`.
    pub failing: &'static str,
    /// Gauges of certificates.
    pub certificate: LifeMetrics,
    /// Gauges of tokens.
    pub token: LifeMetrics,
}

/// Names of the metrics of what expires.
#[derive(Clone, Copy, Debug)]
pub struct LifeMetrics {
    /// Gauge of the time until the expiry, in seconds, by `file`.
    pub expiry: &'static str,
    /// Gauge of the time from the begin of the validity to its end, in seconds, by `file`.
    pub lifetime: &'static str,
}

/// The gauges of one file.
#[derive(Debug)]
struct LifeGauges([Gauge; 2]);

impl LifeGauges {
    fn new(metrics: &Metrics, names: LifeMetrics, file: &str) -> Self {
        Self([names.expiry, names.lifetime].map(|name| metrics.gauge(name, &[("file", file)])))
    }

    fn set(&self, life: Option<Life>, now: i64) {
        for (gauge, seconds) in self.0.iter().zip(Life::seconds(life, now)) {
            gauge.set(seconds);
        }
    }
}

/// What expires in one file. There are no gauges for what the file did not hold at first.
#[derive(Debug)]
struct Expiring {
    expiries: Expiries,
    certificate: Option<LifeGauges>,
    token: Option<LifeGauges>,
}

/// The files that a process reads, and reads again. Clones share them.
#[derive(Clone, Debug)]
pub struct Reloads {
    sets: Arc<Mutex<Vec<Set>>>,
    /// Not behind the lock of `sets`, which is held while files are read.
    expiries: Arc<SyncMutex<Vec<Expiring>>>,
    asked: Arc<Notify>,
    metrics: Metrics,
    names: ReloadMetrics,
    clock: Clock,
}

/// The wall clock, in seconds since 1970.
type Clock = fn() -> i64;

impl Reloads {
    /// No files yet.
    pub fn new(metrics: &Metrics, names: ReloadMetrics) -> Self {
        Self::with_clock(metrics, names, wall_clock)
    }

    fn with_clock(metrics: &Metrics, names: ReloadMetrics, clock: Clock) -> Self {
        metrics.describe_counter(
            names.reloads,
            "Files that had changed and were read again, by file and result.",
        );
        metrics.describe_gauge(
            names.failing,
            "Above 0 while the contents of the file cannot be used and older ones are in use.",
        );
        for (names, expiry, lifetime) in [
            (
                names.certificate,
                "Time until the certificate in the file expires, in seconds; negative afterwards.",
                "Time for which the certificate in the file is valid in all, in seconds.",
            ),
            (
                names.token,
                "Time until the token in the file expires, in seconds; negative afterwards.",
                "Time for which the token in the file is valid in all, in seconds.",
            ),
        ] {
            metrics.describe_gauge(names.expiry, expiry);
            metrics.describe_gauge(names.lifetime, lifetime);
        }
        Self {
            sets: Arc::default(),
            expiries: Arc::default(),
            asked: Arc::default(),
            metrics: metrics.clone(),
            names,
            clock,
        }
    }

    /// Reads files, and keeps the value that `load` makes of them up to date. `file` names the set
    /// in metrics and logs. `load` is called from the caller now, which it may block, and from a
    /// thread for blocking work later. Panics while files are being looked at.
    ///
    /// # Errors
    /// When the files cannot be used now.
    pub fn add<T: Send + Sync + 'static>(
        &self,
        file: impl Into<PathBuf>,
        load: impl Fn(&mut Files) -> Result<T, LoadError> + Send + 'static,
    ) -> Result<Current<T>, LoadError> {
        let file = file.into();
        let name = file.display().to_string();
        let count = |result| {
            let labels = [("file", name.as_str()), ("result", result)];
            let counter = self.metrics.counter(self.names.reloads, &labels);
            // A counter is part of a scrape from its first use on.
            counter.increment(0);
            counter
        };
        let now = (self.clock)();
        let failing = self.metrics.gauge(self.names.failing, &[("file", &name)]);
        let counts = Counts { ok: count("ok"), failed: count("failed"), failing };
        let (set, current) = Set::load(file, load, counts, now)?;
        let expiries = set.expiries();
        let gauges = |names| LifeGauges::new(&self.metrics, names, &name);
        let certificate = expiries.next(now).map(|_| gauges(self.names.certificate));
        let token = expiries.token().map(|_| gauges(self.names.token));
        if certificate.is_some() || token.is_some() {
            self.expiries.lock().push(Expiring { expiries, certificate, token });
        }
        let mut sets = self.sets.try_lock().expect("no file is looked at before all are known");
        sets.push(set);
        drop(sets);
        self.check_expiries();
        Ok(current)
    }

    /// Looks at the files for as long as it is polled.
    pub async fn keep(&self) {
        let mut settled = true;
        loop {
            sleep(SETTLE_TIME).await;
            if settled {
                let _ = timeout(INTERVAL - SETTLE_TIME, self.asked.notified()).await;
            }
            self.check_expiries();
            // A file system that hangs must not end the checks of dates.
            settled = match timeout(HUNG_AFTER, self.look_at_all(false)).await {
                Ok(settled) => settled.unwrap_or(true),
                Err(_) => {
                    rate_limited!(HUNG_INTERVAL, WARN, "looking at the files takes too long");
                    true
                }
            };
        }
    }

    /// Why certificates do not fit their use, one text for each fault. For callers before the files
    /// are looked at again; nothing meanwhile.
    pub fn unfit(&self) -> Vec<String> {
        let sets = self.sets.try_lock();
        sets.iter().flat_map(|sets| sets.iter()).flat_map(Set::unfit).cloned().collect()
    }

    /// Has the files looked at soon, because what they hold may be out of date.
    pub fn ask(&self) {
        self.asked.notify_one();
    }

    /// Looks at the files now, and waits for that for at most a second.
    ///
    /// # Cancel safety
    /// Cancel safe: a look that has begun is completed.
    pub async fn look(&self) {
        let _ = timeout(LOOK_TIMEOUT, self.look_at_all(false)).await;
    }

    /// Looks at the files now because an operator asked for it: what cannot be used is reported
    /// although it was reported before.
    ///
    /// # Cancel safety
    /// Cancel safe: a look that has begun is completed.
    pub async fn look_on_request(&self) {
        let begun = Instant::now();
        if self.look_at_all(true).await.is_some() {
            let seconds = begun.elapsed().as_secs_f64();
            info!(seconds, "the files were looked at on request");
        }
    }

    /// Looks at all files; whether no set is to be looked at again soon. `None` if not all could be
    /// looked at, which is logged.
    async fn look_at_all(&self, on_request: bool) -> Option<bool> {
        // One look at a time: a file system that hangs holds one thread.
        let mut sets = self.sets.clone().lock_owned().await;
        let now = (self.clock)();
        let look = move || {
            let looks = sets.iter_mut().map(|set| set.look(now, on_request));
            // Each set is looked at, whatever became of another one.
            let looks: Vec<_> = looks.collect();
            looks.into_iter().try_fold(true, |settled, look| Ok::<_, io::Error>(look? && settled))
        };
        let looked = on_thread("files", look).await.flatten();
        self.check_expiries();
        looked
            .inspect_err(|error| {
                rate_limited!(
                    UNSEEN_INTERVAL, per error = error, at most 8 in all, ERROR,
                    "the files could not be looked at"
                );
            })
            .ok()
    }

    /// Updates the gauges, and warns of certificates that expire soon.
    fn check_expiries(&self) {
        let now = (self.clock)();
        for Expiring { expiries, certificate, token } in &*self.expiries.lock() {
            expiries.warn(now);
            if let Some(gauges) = certificate {
                gauges.set(expiries.next(now), now);
            }
            if let Some(gauges) = token {
                gauges.set(expiries.token(), now);
            }
        }
    }
}

fn wall_clock() -> i64 {
    k8s_openapi::jiff::Timestamp::now().as_second()
}

#[cfg(test)]
mod tests;
