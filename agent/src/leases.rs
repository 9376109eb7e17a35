//! The number of servers, counted by their Leases.

use std::{collections::HashMap, pin::pin, sync::Arc, time::Duration};

use culvert_process::{
    kubernetes::{self, CurrentClient, Timestamp, lease_expiry},
    rate_limited,
};
use k8s_openapi::api::coordination::v1::Lease;
use kube::{
    Api,
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt as _};

use crate::{config::LeaseConfig, metrics::AgentMetrics, tunnels::ServerTunnels};

/// Minimum interval between log lines about kube-apiserver's failures.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Counts the servers' Leases.
#[derive(Debug)]
pub(crate) struct LeaseCount {
    client: CurrentClient,
    namespace: String,
    selector: String,
}

impl LeaseCount {
    /// Counts nothing yet.
    pub(crate) fn new(config: &LeaseConfig, client: CurrentClient) -> Self {
        let (namespace, selector) = (config.namespace.clone(), config.selector.clone());
        Self { client, namespace, selector }
    }

    /// Counts for as long as it is polled. Until the Leases were listed once, the number that
    /// servers report applies; while kube-apiserver does not answer, the last count.
    pub(crate) async fn keep(mut self, servers: Arc<ServerTunnels>, metrics: Arc<AgentMetrics>) {
        // Thousands of agents may list at once, so from kube-apiserver's memory and not from etcd.
        let selected = watcher::Config::default().labels(&self.selector).any_semantic();
        let mut leases = Leases::default();
        loop {
            let client = self.client.clone();
            let api = Api::namespaced(client.get(), &self.namespace);
            let events = pin!(watcher(api, selected.clone()).default_backoff());
            let counting = count(events, &mut leases, &servers, &metrics, || client.failed());
            tokio::select! {
                () = counting => return,
                // The Leases are listed anew with the new client; until then the last count stays.
                () = self.client.replaced() => {}
            }
        }
    }
}

async fn count(
    mut events: impl Stream<Item = Result<Event<Lease>, watcher::Error>> + Unpin,
    leases: &mut Leases,
    servers: &ServerTunnels,
    metrics: &AgentMetrics,
    failed: impl Fn(),
) {
    let mut list_begun = Instant::now();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                match &event {
                    Event::Init => list_begun = Instant::now(),
                    Event::InitDone => metrics.leases_listed(list_begun),
                    _ => {}
                }
                if let Some(count) = leases.on_event(event, Timestamp::now()) {
                    servers.set_lease_count(count);
                }
            }
            Err(error) => {
                failed();
                metrics.leases_failed(&error);
                let error = reason(&error);
                rate_limited!(
                    FAILURE_LOG_INTERVAL,
                    WARN,
                    error,
                    "the servers' Leases are not seen, will try again"
                );
            }
        }
    }
}

fn reason(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => kubernetes::reason(error),
        watcher::Error::WatchError(status) => kubernetes::status_text(status),
        error => error.to_string(),
    }
}

/// The servers' Leases by name, each with its expiry.
#[derive(Debug, Default)]
struct Leases {
    /// `None` before the first list.
    known: Option<HashMap<String, Timestamp>>,
    /// A list that is not complete yet.
    listed: HashMap<String, Timestamp>,
}

impl Leases {
    /// Number of Leases that have not expired after this event, at least 1; `None` before the first
    /// list.
    ///
    /// There is no timer for expiry. Live servers renew their Leases, and the next such event shows
    /// that another one has expired. Without any event kube-apiserver does not answer, neither to
    /// the agent nor to the servers that renew, and the last count stays.
    fn on_event(&mut self, event: Event<Lease>, now: Timestamp) -> Option<u32> {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(lease) => record(&mut self.listed, lease),
            Event::InitDone => self.known = Some(std::mem::take(&mut self.listed)),
            Event::Apply(lease) => record(self.known.get_or_insert_default(), lease),
            Event::Delete(lease) => {
                if let (Some(known), Some(name)) = (&mut self.known, lease.metadata.name) {
                    known.remove(&name);
                }
            }
        }
        let holding = self.known.as_ref()?.values().filter(|expiry| **expiry > now).count();
        Some(u32::try_from(holding).unwrap_or(u32::MAX).max(1))
    }
}

/// Records a Lease. One without an expiry counts as none.
fn record(leases: &mut HashMap<String, Timestamp>, lease: Lease) {
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

    /// What is counted after a list at this second.
    fn list(all: &mut Leases, second: i64, leases: impl IntoIterator<Item = Lease>) -> Option<u32> {
        all.on_event(Event::Init, at(second));
        for lease in leases {
            all.on_event(Event::InitApply(lease), at(second));
        }
        all.on_event(Event::InitDone, at(second))
    }

    #[test]
    fn nothing_is_counted_before_the_list_is_complete() {
        let mut leases = Leases::default();
        assert_eq!(leases.on_event(Event::Init, at(100)), None);
        assert_eq!(leases.on_event(Event::InitApply(lease("a", Some(100))), at(100)), None);
        assert_eq!(leases.on_event(Event::InitDone, at(100)), Some(1));
    }

    #[test]
    fn valid_leases_are_counted_as_they_come_and_go() {
        let mut leases = Leases::default();
        let three = [lease("a", Some(100)), lease("b", Some(110)), lease("c", None)];
        assert_eq!(list(&mut leases, 120, three), Some(2));
        assert_eq!(leases.on_event(Event::Apply(lease("c", Some(120))), at(120)), Some(3));
        assert_eq!(leases.on_event(Event::Delete(lease("b", Some(110))), at(120)), Some(2));
    }

    #[test]
    fn the_renewal_of_one_lease_shows_that_another_has_expired() {
        let mut leases = Leases::default();
        assert_eq!(list(&mut leases, 120, [lease("a", Some(100)), lease("b", Some(110))]), Some(2));
        assert_eq!(leases.on_event(Event::Apply(lease("b", Some(129))), at(129)), Some(2));
        assert_eq!(leases.on_event(Event::Apply(lease("b", Some(144))), at(144)), Some(1));
        assert_eq!(leases.on_event(Event::Apply(lease("a", Some(150))), at(150)), Some(2));
    }

    #[test]
    fn without_a_valid_lease_there_is_one_server() {
        let mut leases = Leases::default();
        assert_eq!(list(&mut leases, 500, [lease("a", Some(100))]), Some(1));
        assert_eq!(list(&mut leases, 500, []), Some(1));
    }

    #[test]
    fn a_new_list_replaces_the_one_before() {
        let mut leases = Leases::default();
        list(&mut leases, 100, [lease("a", Some(100)), lease("b", Some(100))]);
        assert_eq!(
            leases.on_event(Event::Init, at(101)),
            Some(2),
            "the list before stays until the new one is complete"
        );
        leases.on_event(Event::InitApply(lease("a", Some(100))), at(101));
        assert_eq!(leases.on_event(Event::InitDone, at(101)), Some(1));
    }
}
