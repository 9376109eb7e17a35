//! The Lease by which agents count this server, and the end of those that other servers left behind.
//!
//! Names, times and labels are stock's (`pkg/server/leases`), so that servers of both makes count as
//! one set.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_wire::process::{
    kubernetes::{self, Client, Timestamp, lease_expiry},
    logging::RateLimited,
};
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
use tracing::{debug, info, warn};

use crate::{
    config::LeaseConfig,
    metrics::{LeaseCall, ServerMetrics},
};

/// How long a Lease holds that is not renewed, in seconds.
const DURATION_SECONDS: i32 = 30;
/// How often it is renewed, and others are looked after.
const RENEW_INTERVAL: Duration = Duration::from_secs(15);
/// How soon after a failure: often enough within one duration.
const RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// Time for all requests of one round, and for the last one.
const ROUND_TIMEOUT: Duration = Duration::from_secs(10);

/// Keeps one server's Lease.
#[derive(Debug)]
pub struct Leases {
    api: Api<Lease>,
    name: String,
    server_id: String,
    labels: BTreeMap<String, String>,
    metrics: Arc<ServerMetrics>,
}

impl Leases {
    /// The Lease of this server; nothing is published yet.
    pub fn new(
        client: Client,
        config: &LeaseConfig,
        server_id: &str,
        metrics: Arc<ServerMetrics>,
    ) -> Self {
        Self {
            api: Api::namespaced(client, &config.namespace),
            name: format!("konnectivity-proxy-server-{server_id}"),
            server_id: server_id.into(),
            labels: config.labels.iter().cloned().collect(),
            metrics,
        }
    }

    /// Publishes and renews the Lease and removes expired ones, until told to stop; then takes its own
    /// back, so that no agent looks for a server that goes.
    pub async fn keep(self, stop: CancellationToken) {
        static FAILED: RateLimited = RateLimited::new(Duration::from_secs(60));
        loop {
            let round = timeout(ROUND_TIMEOUT, async {
                self.renew(Timestamp::now()).await?;
                self.cull(Timestamp::now()).await
            });
            let failed = match round.await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(kubernetes::reason(&error)),
                Err(_) => Some(format!("no answer within {ROUND_TIMEOUT:?}")),
            };
            let pause = match &failed {
                // A spread, so that the servers of a set do not ask all at once.
                None => RENEW_INTERVAL.mul_f64(0.96 + 0.08 * fastrand::f64()),
                Some(_) => RETRY_INTERVAL.mul_f64(0.5 + fastrand::f64()),
            };
            if let Some(error) = failed
                && let Some(suppressed) = FAILED.admit(Instant::now())
            {
                warn!(error, suppressed, "the server's Lease is not kept, will try again");
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = sleep(pause) => {}
            }
        }
        let params = DeleteParams::default();
        match timeout(ROUND_TIMEOUT, self.api.delete(&self.name, &params)).await {
            Ok(Ok(_)) => debug!(lease = self.name, "the server's Lease is taken back"),
            Ok(Err(error)) => {
                let error = kubernetes::reason(&error);
                info!(error, "the server's Lease stays until it expires");
            }
            Err(_) => info!(error = "no answer", "the server's Lease stays until it expires"),
        }
    }

    async fn renew(&self, now: Timestamp) -> kube::Result<()> {
        let params = PostParams::default();
        match self.api.get_opt(&self.name).await? {
            Some(lease) => self.api.replace(&self.name, &params, &self.renewed(lease, now)).await?,
            None => self.api.create(&params, &self.renewed(Lease::default(), now)).await?,
        };
        Ok(())
    }

    /// The Lease as it is to be from now on; what others noted on it stays.
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
    async fn cull(&self, now: Timestamp) -> kube::Result<()> {
        let labels: Vec<_> =
            self.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let begun = Instant::now();
        let listed = self.api.list(&ListParams::default().labels(&labels.join(","))).await;
        self.metrics.lease_call(LeaseCall::List, begun, listed.as_ref().err());
        for lease in listed?.items {
            let expiry = lease.spec.as_ref().and_then(lease_expiry);
            let (false, Some(name)) = (expiry > Some(now), lease.metadata.name) else { continue };
            let resource_version = lease.metadata.resource_version;
            let params = DeleteParams::default()
                .preconditions(Preconditions { resource_version, uid: lease.metadata.uid });
            let begun = Instant::now();
            let deleted = self.api.delete(&name, &params).await;
            self.metrics.lease_call(LeaseCall::Delete, begun, deleted.as_ref().err());
            match deleted {
                Ok(_) => {
                    info!(lease = name, "a Lease that expired is removed");
                    self.metrics.lease_culled();
                }
                // Another server was faster, or its owner renewed it.
                Err(error) => debug!(lease = name, %error, "an expired Lease stays"),
            }
        }
        Ok(())
    }
}
