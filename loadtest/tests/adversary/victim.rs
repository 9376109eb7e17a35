//! The server that is attacked, what it holds, and an honest agent beside the attack.

use std::{sync::Arc, time::Duration};

use culvert_loadtest::{frontend::Protocol, process::Process};
use culvert_transport::tls::{Identity, KeyExchange, authorities, certificates, tunnel_client};
use rustls::ClientConfig;
use serde_json::json;
use tokio::{
    sync::{Mutex, MutexGuard},
    time::{Instant, timeout},
};

use crate::support::{
    deployment::{Deployment, Implementation::Culvert, OPEN_SERVERS},
    eventually,
    kube_api::{ACCOUNT, AUDIENCE, KubeApi, jwt},
};

pub(crate) const MIB: u64 = 1 << 20;
/// Number of the [`token`] of honest agents.
const HONEST: u32 = 9999;

/// Held by the one test that runs.
static ALONE: Mutex<()> = Mutex::const_new(());

/// How agents authenticate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    Certificate,
    Token,
}

/// A server under attack.
pub(crate) struct Victim {
    pub(crate) deployment: Deployment,
    pub(crate) api: KubeApi,
    proof: Proof,
    before: Held,
    _alone: MutexGuard<'static, ()>,
}

/// What the server holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    /// Highest resident memory so far, in bytes.
    pub(crate) peak_memory: u64,
    pub(crate) descriptors: usize,
    /// Length of the log, in bytes.
    pub(crate) log: usize,
    /// Reviews of tokens that kube-apiserver was asked for.
    pub(crate) reviews: usize,
}

impl Victim {
    /// A server whose agents prove who they are in this way.
    pub(crate) async fn start(proof: Proof) -> Self {
        Self::start_with(proof, &[]).await
    }

    /// The same with more flags.
    pub(crate) async fn start_with(proof: Proof, more: &[&str]) -> Self {
        Self::start_serving(Protocol::Connect, proof, more).await
    }

    /// The same with frontends that speak this protocol.
    pub(crate) async fn start_serving(frontend: Protocol, proof: Proof, more: &[&str]) -> Self {
        let alone = ALONE.lock().await;
        let mut deployment = Deployment::without_server(frontend);
        let api = KubeApi::start(&deployment.certificates).await;
        api.accept(&token(HONEST), ACCOUNT, AUDIENCE);
        let token_flags = api.token_flags();
        let mut flags = more.to_vec();
        if proof == Proof::Token {
            flags.extend(token_flags.iter().map(String::as_str));
        }
        deployment.start_server(Culvert, &flags).await;
        let mut victim = Self {
            deployment,
            api,
            proof,
            before: Held { peak_memory: 0, descriptors: 0, log: 0, reviews: 0 },
            _alone: alone,
        };
        // What is made once is made before the attack.
        drop(victim.honest_agent_joins("warm-up").await);
        victim.deployment.until_joined(0).await;
        victim.before = victim.held();
        victim
    }

    /// What the server holds now.
    pub(crate) fn held(&mut self) -> Held {
        let reviews = self.api.reviews().len();
        let log = self.deployment.server_log().len();
        let server = self.deployment.server();
        let folder = format!("/proc/{}/fd", server.id().unwrap());
        Held {
            peak_memory: server.peak_memory().unwrap(),
            descriptors: std::fs::read_dir(folder).unwrap().count(),
            log,
            reviews,
        }
    }

    /// What the server has held beyond what it held before the attack.
    pub(crate) fn cost(&mut self) -> Held {
        let (before, now) = (self.before, self.held());
        let cost = Held {
            peak_memory: now.peak_memory.saturating_sub(before.peak_memory),
            descriptors: now.descriptors.saturating_sub(before.descriptors),
            log: now.log.saturating_sub(before.log),
            reviews: now.reviews.saturating_sub(before.reviews),
        };
        println!("the attack cost {cost:?}");
        cost
    }

    /// Starts an honest agent; how long it takes to join.
    pub(crate) async fn honest_agent_joins(&self, name: &str) -> (Process, Duration) {
        self.honest_agent_joins_with(name, &[]).await
    }

    /// The same with more flags.
    pub(crate) async fn honest_agent_joins_with(
        &self,
        name: &str,
        more: &[&str],
    ) -> (Process, Duration) {
        let begun = Instant::now();
        let mut flags: Vec<_> = more.iter().map(|flag| (*flag).to_owned()).collect();
        if self.proof == Proof::Token {
            let file = self.deployment.certificates.folder().join("honest.token");
            std::fs::write(&file, token(HONEST)).unwrap();
            flags.push(format!("--service-account-token-path={}", file.display()));
        }
        let certificate = self.proof == Proof::Certificate;
        let agent = self.deployment.spawn_agent(Culvert, name, certificate, flags).await;
        let joined = async || agent.metric(OPEN_SERVERS).await.is_ok_and(|open| open > 0.0);
        timeout(Duration::from_secs(40), eventually("an honest agent has joined", joined))
            .await
            .expect("an honest agent does not join during the attack");
        println!("an honest agent joined after {:?}", begun.elapsed());
        (agent, begun.elapsed())
    }

    /// TLS of a peer that trusts the server's CA and speaks these protocols. It has a certificate
    /// where agents need one.
    pub(crate) fn tls(&self, protocols: &[&[u8]]) -> ClientConfig {
        let files = &self.deployment.certificates;
        let pair = files.agent();
        let identity = (self.proof == Proof::Certificate)
            .then(|| Identity::from_pem_files(&pair.certificate, &pair.key).unwrap());
        let roots = authorities(&certificates(&files.ca()).unwrap()).unwrap();
        let mut tls = tunnel_client(Arc::clone(&roots), identity, KeyExchange::Classic).unwrap();
        tls.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        tls
    }
}

/// A token of a service account; kube-apiserver accepts none but [`HONEST`].
pub(crate) fn token(number: u32) -> String {
    jwt(&json!({ "aud": [AUDIENCE], "exp": 4_000_000_000_u32, "jti": number }))
}
