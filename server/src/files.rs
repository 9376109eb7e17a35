//! The files that the server reads, and reads again: all in one place.

use std::path::Path;

use culvert_process::{
    faults::{CertificatePair, ConfigErrors, Faults},
    kubernetes::CurrentClient,
    metrics::Metrics,
    reload::{Files, LifeMetrics, ReloadMetrics, Reloads, Role},
};
use culvert_transport::{
    quic::ResetKey,
    tls::{CertificateRules, ClientVerifier, Current, ServerCredentials},
};

use crate::{
    config::{AgentIdentity, Config, FrontendListen},
    reset_key::reset_key_owner,
};

/// Names of the metrics.
const METRICS: ReloadMetrics = ReloadMetrics {
    reloads: "culvert_server_reload_total",
    failing: "culvert_server_reload_failing",
    certificate: LifeMetrics {
        expiry: "culvert_server_certificate_expiry_seconds",
        lifetime: "culvert_server_certificate_lifetime_seconds",
    },
    token: LifeMetrics {
        expiry: "culvert_server_token_expiry_seconds",
        lifetime: "culvert_server_token_lifetime_seconds",
    },
};

/// What the server's files hold, kept up to date.
#[derive(Debug)]
pub(crate) struct ServerFiles {
    /// Keeps all others up to date.
    pub(crate) reloads: Reloads,
    /// For agents.
    pub(crate) agents: ServerCredentials,
    /// For frontends over TCP; `None` for a Unix socket.
    pub(crate) frontend: Option<ServerCredentials>,
    /// The secret of stateless resets; `None` for a random one.
    pub(crate) reset_key: Option<Current<ResetKey>>,
    /// For kube-apiserver's reviews of tokens; `None` when agents need none.
    pub(crate) reviews: Option<CurrentClient>,
    /// For Leases; `None` when the server keeps none. With a client of its own, a Lease is renewed
    /// in time, however many reviews wait.
    pub(crate) leases: Option<CurrentClient>,
    /// For the addresses of nodes; `None` when no rule needs them.
    pub(crate) nodes: Option<CurrentClient>,
}

impl ServerFiles {
    /// Reads all files for the first time. It blocks. Needs a tokio runtime.
    ///
    /// # Errors
    /// With every file that cannot be used.
    pub(crate) fn read(config: &Config, metrics: &Metrics) -> Result<Self, ConfigErrors> {
        let reloads = Reloads::new(metrics, METRICS);
        let mut faults = Faults::new();
        let agents = &config.agents;
        let flags = ["cluster-cert", "cluster-ca-cert"];
        let ca = agents.client_ca.as_deref();
        let rules = config.tls.rules;
        let for_agents =
            credentials(&reloads, flags, &agents.certificate, (ca, rules), &mut faults);
        let for_frontends = match &config.frontend.listen {
            FrontendListen::Unix { .. } => Some(None),
            FrontendListen::Tcp { certificate, client_ca, .. } => {
                let flags = ["server-cert", "server-ca-cert"];
                let ca = Some(client_ca.as_path());
                credentials(&reloads, flags, certificate, (ca, rules), &mut faults).map(Some)
            }
        };
        let reset_key =
            reset_key_owner().map(|owner| reset_key(&reloads, config, owner, &mut faults));
        let [reviews, leases, nodes] = kubernetes(&reloads, config, &mut faults);
        // Warnings were logged.
        faults.finish()?;
        let read = "what cannot be read is a fault";
        Ok(Self {
            reloads,
            agents: for_agents.expect(read),
            frontend: for_frontends.expect(read),
            reset_key: reset_key.map(|key| key.expect(read)),
            reviews,
            leases,
            nodes,
        })
    }
}

/// A certificate, and the CA and the rules of the clients' certificates; `None` along with a fault.
fn credentials(
    reloads: &Reloads,
    [certificate_flag, ca_flag]: [&'static str; 2],
    pair: &CertificatePair,
    (client_ca, rules): (Option<&Path>, CertificateRules),
    faults: &mut Faults,
) -> Option<ServerCredentials> {
    let watched = pair.clone();
    let load = move |files: &mut Files| Ok(files.identity(&watched, Role::Server)?.1);
    let identity = faults.checked(certificate_flag, reloads.add(&pair.certificate, load));
    let client_ca = match client_ca {
        None => Some(None),
        Some(path) => {
            let watched = path.to_owned();
            let load = move |files: &mut Files| {
                Ok(ClientVerifier::new(files.authorities(&watched)?.into(), rules)?)
            };
            faults.checked(ca_flag, reloads.add(path, load)).map(Some)
        }
    };
    Some(ServerCredentials { identity: identity?, client_ca: client_ca? })
}

/// Clients for reviews of tokens, for Leases and for nodes, where they are needed and without a
/// fault. Nodes are looked up where something else says how kube-apiserver is reached.
fn kubernetes(
    reloads: &Reloads,
    config: &Config,
    faults: &mut Faults,
) -> [Option<CurrentClient>; 3] {
    let (needs_reviews, needs_leases) = (config.agents.token.is_some(), config.leases.is_some());
    let has_access = needs_reviews || needs_leases || config.kubernetes.kubeconfig.is_some();
    let needs_nodes = has_access && config.agents.claims.identity == AgentIdentity::Node;
    if !needs_reviews && !needs_leases && !needs_nodes {
        return [None, None, None];
    }
    // Reviews and lookups of nodes have limits of their own.
    let paced = [false, true, false];
    let clients = faults.checked("kubeconfig", config.kubernetes.clients(reloads, paced));
    let Some([reviews, leases, nodes]) = clients else { return [None, None, None] };
    [needs_reviews.then_some(reviews), needs_leases.then_some(leases), needs_nodes.then_some(nodes)]
}

/// The secret of stateless resets; `None` along with a fault.
fn reset_key(
    reloads: &Reloads,
    config: &Config,
    owner: String,
    faults: &mut Faults,
) -> Option<Current<ResetKey>> {
    match config.agents.reset_key_file.clone() {
        Some(file) => {
            let load = {
                let file = file.clone();
                move |files: &mut Files| Ok(ResetKey::derive(&files.secret(&file)?, &owner))
            };
            faults.checked("reset-key-file", reloads.add(file, load))
        }
        None => {
            // By default a restart keeps the secret for as long as it keeps the private key.
            let key_file = config.agents.certificate.key.clone();
            let load = {
                let key_file = key_file.clone();
                move |files: &mut Files| {
                    Ok(ResetKey::derive(files.private_key(&key_file)?.secret_der(), &owner))
                }
            };
            faults.checked("cluster-key", reloads.add(key_file, load))
        }
    }
}
