//! kube-apiserver's client, set up as flags say.
//!
//! kube-apiserver is reached directly, whatever HTTPS_PROXY says: it is at hand on both sides, and
//! what is in that variable is meant for the way between them.

use std::{path::PathBuf, time::Duration};

use crate::error::with_causes;
pub use k8s_openapi::jiff::Timestamp;
use k8s_openapi::{api::coordination::v1::LeaseSpec, jiff::SignedDuration};
pub use kube::Client;
use kube::{
    Config,
    client::ClientBuilder,
    config::{InClusterError, Kubeconfig, KubeconfigError},
};
use tower::{limit::RateLimitLayer, util::option_layer};

/// Time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long nothing may come on a connection that is waited on; a watch of Leases hears of a renewal
/// every 15 s. Without it a peer that has silently gone would not be missed.
const READ_TIMEOUT: Duration = Duration::from_secs(45);
/// Requests that may exceed a rate for a moment where only the rate is given: client-go's default.
const DEFAULT_BURST: u32 = 10;

/// How to reach kube-apiserver.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KubernetesConfig {
    /// Kubeconfig; `None` is the pod's own service account.
    pub kubeconfig: Option<PathBuf>,
    /// Requests per second; `None` is as many as kube-apiserver answers.
    pub qps: Option<f32>,
    /// Requests that may exceed the rate for a moment; `None` is 10.
    pub burst: Option<u32>,
}

/// kube-apiserver's client cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The kubeconfig cannot be used.
    #[error("--kubeconfig: {}", with_causes(.0))]
    Kubeconfig(#[from] KubeconfigError),
    /// There is no kubeconfig, and this is no pod that may ask.
    #[error("--kubeconfig: none is given, and the pod's own service account cannot be used: {}", with_causes(.0))]
    InCluster(#[from] InClusterError),
    /// What the kubeconfig says makes no client.
    #[error("--kubeconfig: {}", with_causes(.0))]
    Client(#[from] kube::Error),
}

impl KubernetesConfig {
    /// A client. Nothing is asked yet, so that kube-apiserver may start later. Needs a tokio
    /// runtime.
    ///
    /// # Errors
    /// When the kubeconfig, or the pod's service account, cannot be used.
    pub fn client(&self) -> Result<Client, ClientError> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let kubeconfig = Kubeconfig::read_from(path)?;
                let proxied = is_proxied(&kubeconfig);
                let mut config = Config::try_from(kubeconfig)?;
                if !proxied {
                    config.proxy_url = None;
                }
                config
            }
            None => Config::incluster()?,
        };
        config.connect_timeout = Some(CONNECT_TIMEOUT);
        config.read_timeout = Some(READ_TIMEOUT);
        config.reset_reader_on_write = true;
        // Whoever asks tries again in its own time, and tells of what went wrong.
        config.default_retry = false;
        let rate = self.qps.map(|qps| {
            let burst = self.burst.unwrap_or(DEFAULT_BURST);
            RateLimitLayer::new(
                burst.into(),
                Duration::from_secs_f64(f64::from(burst) / f64::from(qps)),
            )
        });
        Ok(ClientBuilder::try_from(config)?.with_layer(&option_layer(rate)).build())
    }
}

/// What kube-apiserver answered, or why it did not, in one line.
pub fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        error => with_causes(error),
    }
}

/// Whether the kubeconfig itself asks for a proxy to the cluster that it means.
fn is_proxied(kubeconfig: &Kubeconfig) -> bool {
    let current = kubeconfig.current_context.as_deref();
    let context = kubeconfig.contexts.iter().find(|context| Some(&*context.name) == current);
    let cluster =
        context.and_then(|context| context.context.as_ref()).map(|context| &context.cluster);
    let mut clusters = kubeconfig.clusters.iter().filter(|named| Some(&named.name) == cluster);
    clusters.any(|named| named.cluster.as_ref().is_some_and(|cluster| cluster.proxy_url.is_some()))
}

/// Until when a Lease holds: its renewal, or where there was none its acquisition, and its duration
/// (`pkg/util/leases.go`). `None` for one that never held.
pub fn lease_expiry(lease: &LeaseSpec) -> Option<Timestamp> {
    let renewed = lease.renew_time.as_ref().or(lease.acquire_time.as_ref())?.0;
    let duration = SignedDuration::from_secs(lease.lease_duration_seconds?.into());
    renewed.checked_add(duration).ok()
}

/// The status of kube-apiserver's answer and the reason in it, for metric labels; `0` and `unreachable`
/// where there was no answer, or none in time.
pub fn labels(error: Option<&kube::Error>) -> (String, String) {
    match error {
        Some(kube::Error::Api(status)) => (status.code.to_string(), status.reason.clone()),
        _ => ("0".into(), "unreachable".into()),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

    use super::*;

    #[test]
    fn a_lease_holds_from_its_last_renewal_for_its_duration() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let lease = |renewed: Option<i64>, acquired: Option<i64>, duration| LeaseSpec {
            renew_time: renewed.map(at).map(MicroTime),
            acquire_time: acquired.map(at).map(MicroTime),
            lease_duration_seconds: duration,
            ..LeaseSpec::default()
        };
        assert_eq!(lease_expiry(&lease(Some(100), Some(1), Some(30))), Some(at(130)));
        assert_eq!(lease_expiry(&lease(None, Some(1), Some(30))), Some(at(31)));
        assert_eq!(lease_expiry(&lease(None, None, Some(30))), None);
        assert_eq!(lease_expiry(&lease(Some(100), None, None)), None);
        assert_eq!(lease_expiry(&lease(Some(100), None, Some(-30))), Some(at(70)));
    }
}
