//! How many servers there are, counted by their Leases.

use std::{
    collections::HashMap,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_wire::process::{
    kubernetes::{self, ClientError, Timestamp, lease_expiry},
    logging::RateLimited,
};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use tokio::time::sleep;
use tokio_stream::{Stream, StreamExt as _};
use tracing::warn;

use crate::{config::LeaseConfig, metrics::AgentMetrics, servers::Servers};

/// Counts the servers' Leases.
#[derive(Debug)]
pub struct LeaseCount {
    api: Api<Lease>,
    selector: String,
}

impl LeaseCount {
    /// Nothing is counted yet. Needs a tokio runtime.
    ///
    /// # Errors
    /// When kube-apiserver cannot be asked.
    pub fn new(config: &LeaseConfig) -> Result<Self, ClientError> {
        let api = Api::namespaced(config.kubernetes.client()?, &config.namespace);
        Ok(Self { api, selector: config.selector.clone() })
    }

    /// Counts for as long as it is polled. Until the Leases were listed once, the servers' own count
    /// holds; while kube-apiserver does not answer, those that were seen last, until they expire.
    pub async fn keep(self, servers: Arc<Servers>, metrics: Arc<AgentMetrics>) {
        let selected = watcher::Config::default().labels(&self.selector);
        let events = pin!(watcher(self.api, selected).default_backoff());
        count(events, &servers, &metrics).await;
    }
}

async fn count(
    mut events: impl Stream<Item = Result<Event<Lease>, watcher::Error>> + Unpin,
    servers: &Servers,
    metrics: &AgentMetrics,
) {
    static FAILED: RateLimited = RateLimited::new(Duration::from_secs(60));
    let mut leases = Leases::default();
    let mut list_begun = Instant::now();
    loop {
        let now = Timestamp::now();
        if let Some(count) = leases.count(now) {
            servers.set_lease_count(count);
        }
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(event)) => {
                    match &event {
                        Event::Init => list_begun = Instant::now(),
                        Event::InitDone => metrics.leases_listed(list_begun),
                        _ => {}
                    }
                    leases.on_event(event);
                }
                Some(Err(error)) => {
                    metrics.leases_failed(&error);
                    if let Some(suppressed) = FAILED.admit(Instant::now()) {
                        let error = reason(&error);
                        warn!(error, suppressed, "the servers' Leases are not seen, will try again");
                    }
                }
                None => return,
            },
            () = until(leases.next_expiry(now), now) => {}
        }
    }
}

fn reason(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => kubernetes::reason(error),
        watcher::Error::WatchError(status) => status.message.clone(),
        error => error.to_string(),
    }
}

/// Completes at this time; never without one.
async fn until(expiry: Option<Timestamp>, now: Timestamp) {
    match expiry {
        Some(expiry) => sleep(expiry.duration_since(now).try_into().unwrap_or_default()).await,
        None => std::future::pending().await,
    }
}

/// The Leases that there are, by name, and until when each holds.
#[derive(Debug, Default)]
struct Leases {
    /// `None` before the first list.
    known: Option<HashMap<String, Timestamp>>,
    /// A list that is not complete.
    listed: HashMap<String, Timestamp>,
}

impl Leases {
    fn on_event(&mut self, event: Event<Lease>) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(lease) => note(&mut self.listed, lease),
            Event::InitDone => self.known = Some(std::mem::take(&mut self.listed)),
            Event::Apply(lease) => note(self.known.get_or_insert_default(), lease),
            Event::Delete(lease) => {
                if let (Some(known), Some(name)) = (&mut self.known, lease.metadata.name) {
                    known.remove(&name);
                }
            }
        }
    }

    /// How many hold, and 1 where none does; `None` before the first list.
    fn count(&self, now: Timestamp) -> Option<u32> {
        let holding = self.known.as_ref()?.values().filter(|expiry| **expiry > now).count();
        Some(u32::try_from(holding).unwrap_or(u32::MAX).max(1))
    }

    /// When the next one will have expired.
    fn next_expiry(&self, now: Timestamp) -> Option<Timestamp> {
        self.known.iter().flat_map(HashMap::values).copied().filter(|expiry| *expiry > now).min()
    }
}

/// Enters a Lease; one that never held counts as none.
fn note(leases: &mut HashMap<String, Timestamp>, lease: Lease) {
    let Some(name) = lease.metadata.name else { return };
    match lease.spec.as_ref().and_then(lease_expiry) {
        Some(expiry) => leases.insert(name, expiry),
        None => leases.remove(&name),
    };
}

#[cfg(test)]
mod tests {
    use k8s_openapi::{
        api::coordination::v1::LeaseSpec,
        apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    };

    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn lease(name: &str, renewed: Option<i64>) -> Lease {
        Lease {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec {
                renew_time: renewed.map(at).map(MicroTime),
                lease_duration_seconds: Some(30),
                ..LeaseSpec::default()
            }),
        }
    }

    fn listed(leases: impl IntoIterator<Item = Lease>) -> Leases {
        let mut all = Leases::default();
        all.on_event(Event::Init);
        leases.into_iter().for_each(|lease| all.on_event(Event::InitApply(lease)));
        all.on_event(Event::InitDone);
        all
    }

    #[test]
    fn nothing_is_counted_before_the_list_is_complete() {
        let mut leases = Leases::default();
        leases.on_event(Event::Init);
        leases.on_event(Event::InitApply(lease("a", Some(100))));
        assert_eq!(leases.count(at(100)), None);
        leases.on_event(Event::InitDone);
        assert_eq!(leases.count(at(100)), Some(1));
    }

    #[test]
    fn leases_that_hold_are_counted_as_they_come_and_go() {
        let mut leases = listed([lease("a", Some(100)), lease("b", Some(110)), lease("c", None)]);
        assert_eq!(leases.count(at(120)), Some(2));
        leases.on_event(Event::Apply(lease("c", Some(120))));
        assert_eq!(leases.count(at(120)), Some(3));
        leases.on_event(Event::Delete(lease("b", Some(110))));
        assert_eq!(leases.count(at(120)), Some(2));
    }

    #[test]
    fn a_lease_that_is_not_renewed_counts_until_it_expires() {
        let mut leases = listed([lease("a", Some(100)), lease("b", Some(110))]);
        assert_eq!(leases.next_expiry(at(120)), Some(at(130)));
        assert_eq!(leases.count(at(130)), Some(1));
        leases.on_event(Event::Apply(lease("a", Some(130))));
        assert_eq!(leases.count(at(130)), Some(2));
        assert_eq!(leases.next_expiry(at(130)), Some(at(140)));
    }

    #[test]
    fn where_none_holds_there_is_one_server() {
        let leases = listed([lease("a", Some(100))]);
        assert_eq!(leases.count(at(500)), Some(1));
        assert_eq!(leases.next_expiry(at(500)), None);
        assert_eq!(listed([]).count(at(500)), Some(1));
    }

    #[test]
    fn a_list_made_anew_forgets_what_is_not_in_it() {
        let mut leases = listed([lease("a", Some(100)), lease("b", Some(100))]);
        leases.on_event(Event::Init);
        assert_eq!(leases.count(at(100)), Some(2), "those of before hold meanwhile");
        leases.on_event(Event::InitApply(lease("a", Some(100))));
        leases.on_event(Event::InitDone);
        assert_eq!(leases.count(at(100)), Some(1));
    }
}
