//! The number of servers, counted by their Leases.

use std::{pin::pin, sync::Arc, time::Duration};

use culvert_process::{
    kubernetes::{
        CurrentClient, Timestamp,
        leases::{Leases, watch_error},
    },
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
                leases.on_event(event);
                if let Some(count) = valid(leases, Timestamp::now()) {
                    servers.set_lease_count(count);
                }
            }
            Err(error) => {
                failed();
                metrics.leases_failed(&error);
                let error = watch_error(&error);
                rate_limited!(
                    FAILURE_LOG_INTERVAL, per error = error, at most 8 in all, WARN,
                    "the servers' Leases are not seen, will try again"
                );
            }
        }
    }
}

/// Number of Leases that have not expired, at least 1; `None` before the first list.
fn valid(leases: &Leases, now: Timestamp) -> Option<u32> {
    let holding = leases.valid(now)?.count();
    Some(u32::try_from(holding).unwrap_or(u32::MAX).max(1))
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

    fn lease(name: &str, renewed: i64) -> Lease {
        Lease {
            metadata: ObjectMeta { name: Some(name.into()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec {
                renew_time: Some(MicroTime(at(renewed))),
                lease_duration_seconds: Some(30),
                ..LeaseSpec::default()
            }),
        }
    }

    #[test]
    fn the_renewal_of_one_lease_shows_that_another_has_expired() {
        let mut leases = Leases::default();
        assert_eq!(valid(&leases, at(120)), None);
        leases.on_list([lease("a", 100), lease("b", 110)]);
        assert_eq!(valid(&leases, at(120)), Some(2));
        leases.on_event(Event::Apply(lease("b", 129)));
        assert_eq!(valid(&leases, at(129)), Some(2));
        leases.on_event(Event::Apply(lease("b", 144)));
        assert_eq!(valid(&leases, at(144)), Some(1));
        leases.on_event(Event::Apply(lease("a", 150)));
        assert_eq!(valid(&leases, at(150)), Some(2));
    }

    #[test]
    fn without_a_valid_lease_there_is_one_server() {
        let mut leases = Leases::default();
        leases.on_list([lease("a", 100)]);
        assert_eq!(valid(&leases, at(500)), Some(1));
        leases.on_list([]);
        assert_eq!(valid(&leases, at(500)), Some(1));
    }
}
