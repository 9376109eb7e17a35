//! The files that the agent reads, and reads again: all in one place.

use std::path::PathBuf;

use culvert_process::{
    faults::{ConfigErrors, Faults},
    kubernetes::CurrentClient,
    metrics::Metrics,
    reload::{Files, LifeMetrics, LoadError, ReloadMetrics, Reloads, Role},
};
use culvert_transport::{
    tcp::Proxies,
    tls::{Current, Identity},
};
use culvert_wire::control::Secret;
use rustls::RootCertStore;
use tracing::warn;

use crate::config::{Config, EgressConfig, Policy};

/// Names of the metrics.
const METRICS: ReloadMetrics = ReloadMetrics {
    reloads: "culvert_agent_reload_total",
    failing: "culvert_agent_reload_failing",
    certificate: LifeMetrics {
        expiry: "culvert_agent_certificate_expiry_seconds",
        lifetime: "culvert_agent_certificate_lifetime_seconds",
    },
    token: LifeMetrics {
        expiry: "culvert_agent_token_expiry_seconds",
        lifetime: "culvert_agent_token_lifetime_seconds",
    },
};

/// What the agent's files hold, kept up to date.
#[derive(Debug)]
pub(crate) struct AgentFiles {
    /// Keeps all others up to date.
    pub(crate) reloads: Reloads,
    /// CA of the servers' certificates.
    pub(crate) ca: Current<RootCertStore>,
    /// The agent's certificate, if it has one.
    pub(crate) identity: Option<Current<Identity>>,
    /// The agent's token, if it has one.
    pub(crate) token: Option<Current<Secret>>,
    /// The proxies, with the CA of the one that is reached over TLS.
    pub(crate) proxies: Proxies,
    /// Rules of the flags and of the file, for targets.
    pub(crate) policy: Current<Policy>,
    /// For Leases; `None` when the agent counts none.
    pub(crate) leases: Option<CurrentClient>,
}

impl AgentFiles {
    /// Reads all files for the first time. It blocks. Needs a tokio runtime.
    ///
    /// # Errors
    /// With every file that cannot be used.
    pub(crate) fn read(config: &Config, metrics: &Metrics) -> Result<Self, ConfigErrors> {
        let reloads = Reloads::new(metrics, METRICS);
        let mut faults = Faults::new();
        let servers = &config.servers;
        let ca_file = servers.ca.clone();
        let ca = reloads.add(&servers.ca, move |files: &mut Files| files.authorities(&ca_file));
        let ca = faults.checked("ca-cert", ca);
        let identity = servers.certificate.clone().map(|pair| {
            let file = pair.certificate.clone();
            reloads.add(file, move |files: &mut Files| Ok(files.identity(&pair, Role::Client)?.0))
        });
        let identity = identity.map(|result| faults.checked("agent-cert", result));
        let token = servers.token_file.clone().map(|file| add_token(&reloads, file));
        let token = token.map(|result| faults.checked("service-account-token-path", result));
        let leases = config.sync.leases.as_ref();
        let leases = leases.map(|leases| leases.kubernetes.clients(&reloads, [true]));
        let leases = leases.map(|result| faults.checked("kubeconfig", result));
        let policy = add_policy(&reloads, &config.egress);
        let policy = faults.checked("egress-policy-file", policy);
        let proxies = with_authorities(&reloads, config.proxies.clone());
        // Warnings were logged.
        faults.finish()?;
        let read = "what cannot be read is a fault";
        Ok(Self {
            reloads,
            ca: ca.expect(read),
            identity: identity.map(|identity| identity.expect(read)),
            token: token.map(|token| token.expect(read)),
            proxies,
            policy: policy.expect(read),
            leases: leases.map(|leases| {
                let [client] = leases.expect(read);
                client
            }),
        })
    }
}

fn add_token(reloads: &Reloads, file: PathBuf) -> Result<Current<Secret>, LoadError> {
    reloads.add(file.clone(), move |files: &mut Files| files.token(&file))
}

fn add_policy(reloads: &Reloads, config: &EgressConfig) -> Result<Current<Policy>, LoadError> {
    let flags = config.policy.clone();
    match config.policy_file.clone() {
        None => Ok(Current::fixed(flags)),
        Some(file) => {
            let path = file.clone();
            reloads.add(file, move |files: &mut Files| flags.with_file(&path, files))
        }
    }
}

/// The proxies with their CA. A file that cannot be used is no reason not to start: the agent may
/// not need the proxy.
fn with_authorities(reloads: &Reloads, proxies: Proxies) -> Proxies {
    let Some(file) = proxies.authorities() else { return proxies };
    let watched = file.clone();
    match reloads.add(file, move |files: &mut Files| files.authorities(&watched)) {
        Ok(kept) => proxies.with_kept_authorities(kept),
        Err(error) => {
            warn!(%error, "the CA of the proxy cannot be used");
            proxies
        }
    }
}

#[cfg(test)]
mod tests {
    use culvert_process::{faults::CertificatePair, kubernetes::KubernetesConfig};

    use super::*;
    use crate::{config::LeaseConfig, metrics::AgentMetrics, test_support};

    #[tokio::test]
    async fn every_file_that_cannot_be_used_is_reported_with_its_flag() {
        let folder = tempfile::tempdir().unwrap();
        let absent = |name: &str| folder.path().join(name);
        let mut config = test_support::config(&[]);
        config.servers.ca = absent("ca");
        let (certificate, key) = (absent("crt"), absent("key"));
        config.servers.certificate = Some(CertificatePair { certificate, key });
        config.servers.token_file = Some(absent("token"));
        config.egress.policy_file = Some(absent("policy"));
        let kubeconfig = Some(absent("kubeconfig"));
        config.sync.leases = Some(LeaseConfig {
            namespace: "n".into(),
            selector: "s".into(),
            kubernetes: KubernetesConfig { kubeconfig, ..KubernetesConfig::default() },
        });
        let metrics = AgentMetrics::new().unwrap();
        let faults = AgentFiles::read(&config, metrics.inner()).unwrap_err().to_string();
        let flags = [
            ("ca-cert", "ca"),
            ("agent-cert", "crt"),
            ("service-account-token-path", "token"),
            ("egress-policy-file", "policy"),
            ("kubeconfig", "kubeconfig"),
        ];
        for (flag, name) in flags {
            let fault = format!("--{flag}: cannot read {}", absent(name).display());
            assert!(faults.contains(&fault), "{fault} in {faults}");
        }
    }

    #[tokio::test]
    async fn a_changed_egress_policy_is_used_and_a_bad_or_empty_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy");
        let write = |text: &str| std::fs::write(&file, text).unwrap();
        write("allow 10.0.0.0/8");
        let reloads = Reloads::new(AgentMetrics::new().unwrap().inner(), METRICS);
        let flags = Policy { deny: vec!["10.9.0.0/16".parse().unwrap()], ..Policy::default() };
        let config = EgressConfig { policy: flags, policy_file: Some(file.clone()), audit: false };
        let policy = add_policy(&reloads, &config).unwrap();
        let allowed = || format!("{:?}", policy.get().allow);
        assert_eq!(allowed(), "[10.0.0.0/8]");
        for (text, expected) in [
            ("allow 10.0.0.0/8, fd00::/8", "[10.0.0.0/8, fd00::/8]"),
            ("allow 10.0.0.0/33", "[10.0.0.0/8, fd00::/8]"),
            ("", "[10.0.0.0/8, fd00::/8]"),
            ("allow 192.168.0.0/16", "[192.168.0.0/16]"),
        ] {
            write(text);
            reloads.look_on_request().await;
            assert_eq!(allowed(), expected, "{text}");
            assert_eq!(format!("{:?}", policy.get().deny), "[10.9.0.0/16]", "{text}");
        }
    }
}
