//! The Lease by which agents count this server and other servers know it, and the removal of those
//! that other servers left.
//!
//! Names, times and labels are Konnectivity's (`pkg/server/leases`), so that Konnectivity servers
//! and ours count as one set.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_process::{
    kubernetes::{
        self, CurrentClient, Timestamp, lease_expiry,
        leases::{ADDRESS_ANNOTATION, Leases, watch_error},
    },
    rate_limited,
};
use culvert_wire::ServerId;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
};
use kube::{
    Api,
    api::{DeleteParams, ListParams, PostParams, Preconditions},
    runtime::{
        WatchStreamExt as _,
        watcher::{self, Event, watcher},
    },
};
use parking_lot::Mutex;
use tokio::time::{sleep, timeout};
use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::{
    config::LeaseConfig,
    metrics::{LeaseRequest, ServerMetrics},
    server_set::ServerSet,
};

/// Time after its last renewal until a Lease expires, in seconds.
const DURATION_SECONDS: i32 = 30;
/// Interval between renewals, and between looks at the others.
const RENEW_INTERVAL: Duration = Duration::from_secs(15);
/// Interval between attempts after a failure: several fit into one duration.
const RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// Time for one request: two of them and a pause are well within one duration.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Minimum time between two log lines about one repeating failure.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Annotations of a Lease.
type Annotations = BTreeMap<String, String>;

/// Keeps the Lease of one server, follows those of others, and removes expired ones of others.
#[derive(Debug)]
pub(crate) struct LeaseController {
    client: CurrentClient,
    namespace: String,
    name: String,
    server_id: String,
    labels: BTreeMap<String, String>,
    /// The Leases of the set, from lists and from the watch.
    leases: Mutex<Leases>,
    server_set: Arc<ServerSet>,
    metrics: Arc<ServerMetrics>,
}

impl LeaseController {
    /// The controller of this server's Lease. Nothing is published yet.
    pub(crate) fn new(
        client: CurrentClient,
        config: &LeaseConfig,
        server_id: &ServerId,
        server_set: Arc<ServerSet>,
        metrics: Arc<ServerMetrics>,
    ) -> Self {
        Self {
            client,
            namespace: config.namespace.clone(),
            name: format!("konnectivity-proxy-server-{server_id}"),
            server_id: server_id.to_string(),
            labels: config.labels.iter().cloned().collect(),
            leases: Mutex::default(),
            server_set,
            metrics,
        }
    }

    /// Publishes and renews the Lease and removes expired ones, until `stop` is cancelled; then
    /// removes its own, so that no agent looks for a server that stops.
    pub(crate) async fn keep(self, stop: CancellationToken) {
        let rounds = async {
            loop {
                self.round().await;
            }
        };
        // A request in progress does not delay the stop.
        let both = async { tokio::join!(rounds, self.watch()) };
        stop.run_until_cancelled(both).await;
        match answered(self.api().delete(&self.name, &DeleteParams::default())).await {
            Ok(_) => debug!(lease = self.name, "the server's Lease is taken back"),
            Err(error) => {
                let error = error.to_string();
                info!(error, "the server's Lease stays until it expires");
            }
        }
    }

    fn api(&self) -> Api<Lease> {
        Api::namespaced(self.client.get(), &self.namespace)
    }

    /// Renews the Lease, removes expired ones, and pauses until the next renewal.
    async fn round(&self) {
        let renewed = self.renew(Timestamp::now()).await;
        self.metrics.lease_renewed(renewed.is_ok());
        let pause = match &renewed {
            // Jitter, so that the servers of a set do not send their requests all at once.
            Ok(()) => RENEW_INTERVAL.mul_f64(0.96 + 0.08 * fastrand::f64()),
            Err(_) => RETRY_INTERVAL.mul_f64(0.5 + fastrand::f64()),
        };
        if let Err(error) = renewed {
            self.client.failed();
            rate_limited!(
                LOG_INTERVAL, per error = error, at most 8 in all, WARN,
                "the server's Lease is not kept, will try again"
            );
        } else if let Err(error) = self.cull(Timestamp::now()).await {
            rate_limited!(
                LOG_INTERVAL, per error = error, at most 8 in all, WARN,
                "expired Leases are not removed, will try again"
            );
        }
        sleep(pause).await;
    }

    async fn renew(&self, now: Timestamp) -> Result<(), String> {
        let params = PostParams::default();
        let text = |error: Unanswered| error.to_string();
        match answered(self.api().get_opt(&self.name)).await.map_err(text)? {
            Some(lease) => {
                let lease = self.renewed(lease, now);
                answered(self.api().replace(&self.name, &params, &lease)).await.map_err(text)?
            }
            None => {
                let lease = self.renewed(Lease::default(), now);
                answered(self.api().create(&params, &lease)).await.map_err(text)?
            }
        };
        Ok(())
    }

    /// The Lease with a new renewal time. Fields of other writers stay.
    fn renewed(&self, mut lease: Lease, now: Timestamp) -> Lease {
        lease.metadata = ObjectMeta {
            name: Some(self.name.clone()),
            namespace: None,
            labels: Some(self.labels.clone()),
            annotations: self.annotations(lease.metadata.annotations),
            ..lease.metadata
        };
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.server_id.clone()),
            lease_duration_seconds: Some(DURATION_SECONDS),
            renew_time: Some(MicroTime(now)),
            ..lease.spec.unwrap_or_default()
        });
        lease
    }

    /// The annotations with this server's address, if it has one to advertise.
    fn annotations(&self, others: Option<Annotations>) -> Option<Annotations> {
        let mut annotations = others.unwrap_or_default();
        annotations.remove(ADDRESS_ANNOTATION);
        let addresses = self.server_set.advertised();
        annotations.extend(addresses.map(|address| (ADDRESS_ANNOTATION.to_owned(), address)));
        (!annotations.is_empty()).then_some(annotations)
    }

    fn selector(&self) -> String {
        let labels: Vec<_> =
            self.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        labels.join(",")
    }

    /// Follows the Leases of the set, so that agents are sent changes within seconds. Without the
    /// permission to watch, the list of each round is what they are sent.
    async fn watch(&self) -> Infallible {
        let selected = watcher::Config::default().labels(&self.selector());
        let mut client = self.client.clone();
        loop {
            let events = pin!(watcher(self.api(), selected.clone()).default_backoff());
            tokio::select! {
                () = self.follow(events) => {}
                () = client.replaced() => {}
            }
        }
    }

    async fn follow(
        &self,
        mut events: impl Stream<Item = Result<Event<Lease>, watcher::Error>> + Unpin,
    ) {
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => self.record(|leases| leases.on_event(event)),
                Err(error) => {
                    self.client.failed();
                    let error = watch_error(&error);
                    rate_limited!(
                        LOG_INTERVAL, per error = error, at most 8 in all, WARN,
                        "the servers' Leases are not watched, they are listed every 15 s"
                    );
                }
            }
        }
    }

    /// Records Leases, and what they say about the set of servers.
    fn record(&self, change: impl FnOnce(&mut Leases)) {
        let mut leases = self.leases.lock();
        change(&mut leases);
        if let Some(holders) = leases.valid(Timestamp::now()) {
            self.server_set.set_leased(holders);
        }
    }

    /// Removes the Leases of this set that have expired, unless they are renewed meanwhile.
    async fn cull(&self, now: Timestamp) -> Result<(), String> {
        let begun = Instant::now();
        let listed =
            answered(self.api().list(&ListParams::default().labels(&self.selector()))).await;
        self.count(LeaseRequest::List, begun, listed.as_ref().err());
        let listed = listed.map_err(|error| error.to_string())?.items;
        self.record(|leases| leases.on_list(listed.clone()));
        for lease in listed {
            let expiry = lease.spec.as_ref().and_then(lease_expiry);
            let (false, Some(name)) = (expiry > Some(now), lease.metadata.name) else { continue };
            let resource_version = lease.metadata.resource_version;
            let params = DeleteParams::default()
                .preconditions(Preconditions { resource_version, uid: lease.metadata.uid });
            let begun = Instant::now();
            let deleted = answered(self.api().delete(&name, &params)).await;
            self.count(LeaseRequest::Delete, begun, deleted.as_ref().err());
            match deleted {
                Ok(_) => {
                    info!(lease = name, "a Lease that expired is removed");
                    self.metrics.lease_culled();
                }
                // Another server has removed it, or its owner has renewed it.
                Err(error) => debug!(lease = name, %error, "an expired Lease stays"),
            }
        }
        Ok(())
    }

    fn count(&self, request: LeaseRequest, begun: Instant, failed: Option<&Unanswered>) {
        let (code, reason) = match failed {
            None => ("200".into(), String::new()),
            Some(Unanswered::Refused(error)) => kubernetes::labels(Some(error)),
            Some(Unanswered::Silent) => kubernetes::labels(None),
        };
        self.metrics.lease_request(request, begun, &code, &reason);
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    #[error("{}", kubernetes::reason(.0))]
    Refused(#[from] kube::Error),
    #[error("kube-apiserver did not answer within {CALL_TIMEOUT:?}")]
    Silent,
}

/// The answer to a request, if it comes in time.
async fn answered<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, Unanswered> {
    Ok(timeout(CALL_TIMEOUT, call).await.map_err(|_| Unanswered::Silent)??)
}
