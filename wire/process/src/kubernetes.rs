//! Set-up of kube-apiserver's client.
//!
//! HTTPS_PROXY does not apply: both sides reach kube-apiserver directly, and the variable is meant
//! for the path between agent and server.

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

/// Time limit of a connection attempt.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time without a byte after which a connection that is being read fails, so that a lost peer is
/// noticed. A watch of Leases receives a renewal every 15 s.
const READ_TIMEOUT: Duration = Duration::from_secs(45);
/// Burst size where only the rate is given, in requests; client-go's default.
const DEFAULT_BURST: u32 = 10;

/// Access to kube-apiserver.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KubernetesConfig {
    /// Kubeconfig file; `None` is the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Maximum rate, in requests per second; `None` is no limit.
    pub qps: Option<f32>,
    /// Burst size, in requests; `None` is 10.
    pub burst: Option<u32>,
}

/// The client of kube-apiserver cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The kubeconfig cannot be used.
    #[error("--kubeconfig: {}", with_causes(.0))]
    Kubeconfig(#[from] KubeconfigError),
    /// There is no kubeconfig, and the process is not in a pod with a service account.
    #[error("--kubeconfig: none is given, and the pod's own service account cannot be used: {}", with_causes(.0))]
    InCluster(#[from] InClusterError),
    /// The kubeconfig is not valid for a client.
    #[error("--kubeconfig: {}", with_causes(.0))]
    Client(#[from] kube::Error),
}

impl KubernetesConfig {
    /// A client. It sends no request yet, so kube-apiserver may start later. Panics outside a tokio
    /// runtime.
    ///
    /// # Errors
    /// If the kubeconfig, or the pod's service account, cannot be used.
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
        // The callers retry with intervals of their own, and log the failures.
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

/// The answer of kube-apiserver, or the reason why there is none, in one line.
pub fn reason(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        error => with_causes(error),
    }
}

/// Whether the kubeconfig names a proxy for its current cluster.
fn is_proxied(kubeconfig: &Kubeconfig) -> bool {
    let current = kubeconfig.current_context.as_deref();
    let context = kubeconfig.contexts.iter().find(|context| Some(&*context.name) == current);
    let cluster =
        context.and_then(|context| context.context.as_ref()).map(|context| &context.cluster);
    let mut clusters = kubeconfig.clusters.iter().filter(|named| Some(&named.name) == cluster);
    clusters.any(|named| named.cluster.as_ref().is_some_and(|cluster| cluster.proxy_url.is_some()))
}

/// End of a Lease: its duration after its renewal or, without a renewal, after its acquisition
/// (Konnectivity's `pkg/util/leases.go`). `None` for a Lease without these times.
pub fn lease_expiry(lease: &LeaseSpec) -> Option<Timestamp> {
    let renewed = lease.renew_time.as_ref().or(lease.acquire_time.as_ref())?.0;
    let duration = SignedDuration::from_secs(lease.lease_duration_seconds?.into());
    renewed.checked_add(duration).ok()
}

/// Status code and reason of kube-apiserver's answer, as metric labels; `0` and `unreachable`
/// without an answer in time.
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
    fn a_lease_ends_its_duration_after_its_last_renewal() {
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
