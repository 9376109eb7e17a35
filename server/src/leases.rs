//! The Lease by which agents count this server, and the removal of those that other servers left.
//!
//! Names, times and labels are Konnectivity's (`pkg/server/leases`), so that Konnectivity servers
//! and ours count as one set.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_process::{
    kubernetes::{self, CurrentClient, Timestamp, lease_expiry},
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
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use crate::{
    config::LeaseConfig,
    metrics::{LeaseRequest, ServerMetrics},
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

/// Keeps the Lease of one server, and removes expired ones of others.
#[derive(Debug)]
pub(crate) struct LeaseController {
    client: CurrentClient,
    namespace: String,
    name: String,
    server_id: String,
    labels: BTreeMap<String, String>,
    metrics: Arc<ServerMetrics>,
}

impl LeaseController {
    /// The controller of this server's Lease. Nothing is published yet.
    pub(crate) fn new(
        client: CurrentClient,
        config: &LeaseConfig,
        server_id: &ServerId,
        metrics: Arc<ServerMetrics>,
    ) -> Self {
        Self {
            client,
            namespace: config.namespace.clone(),
            name: format!("konnectivity-proxy-server-{server_id}"),
            server_id: server_id.to_string(),
            labels: config.labels.iter().cloned().collect(),
            metrics,
        }
    }

    /// Publishes and renews the Lease and removes expired ones, until `stop` is cancelled; then
    /// removes its own, so that no agent looks for a server that stops.
    pub(crate) async fn keep(self, stop: CancellationToken) {
        // A request in progress does not delay the stop.
        while stop.run_until_cancelled(self.round()).await.is_some() {}
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
                LOG_INTERVAL,
                WARN,
                error,
                "the server's Lease is not kept, will try again"
            );
        } else if let Err(error) = self.cull(Timestamp::now()).await {
            rate_limited!(
                LOG_INTERVAL,
                WARN,
                error,
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

    /// Removes the Leases of this set that have expired, unless they are renewed meanwhile.
    async fn cull(&self, now: Timestamp) -> Result<(), String> {
        let labels: Vec<_> =
            self.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let begun = Instant::now();
        let listed =
            answered(self.api().list(&ListParams::default().labels(&labels.join(",")))).await;
        self.count(LeaseRequest::List, begun, listed.as_ref().err());
        for lease in listed.map_err(|error| error.to_string())?.items {
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
    #[error("no answer within {CALL_TIMEOUT:?}")]
    Silent,
}

/// The answer to a request, if it comes in time.
async fn answered<T>(call: impl Future<Output = kube::Result<T>>) -> Result<T, Unanswered> {
    Ok(timeout(CALL_TIMEOUT, call).await.map_err(|_| Unanswered::Silent)??)
}
