//! Files that expire, or cannot be used.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use culvert_loadtest::process::{Signal, free_port};
use culvert_process::kubernetes::Timestamp;
use serde_json::json;

use super::{Bench, Fault};
use crate::support::kube_api::jwt;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// A tenth of 90 days is nine days.
pub(crate) async fn certificate_expires_soon(bench: Bench) -> Fault {
    let now = SystemTime::now();
    let pair = bench.certificates.issue_for("expires-soon", now - 85 * DAY, now + 5 * DAY).unwrap();
    let (certificate, key) = (pair.certificate.display(), pair.key.display());
    let flags = [format!("--agent-cert={certificate}"), format!("--agent-key={key}")];
    let agent = bench.common.agent("certificate_expires_soon", &flags).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move { agent })
}

/// That of the frontend: agents go on.
pub(crate) async fn server_certificate_expired(bench: Bench) -> Fault {
    let now = SystemTime::now();
    let pair = bench.certificates.issue_for("expired", now - 30 * DAY, now - DAY).unwrap();
    let site = bench.site("server_certificate_expired");
    let server = site.server_over_tls(free_port().unwrap(), &pair).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move { (server, agent) })
}

pub(crate) async fn token_expires_soon(bench: Bench) -> Fault {
    let now = Timestamp::now().as_second();
    let token = jwt(&json!({ "sub": "a", "iat": now - 3500, "exp": now + 100 }));
    let file = bench.common.file("expires-soon.token");
    fs::write(&file, token).unwrap();
    let flag = format!("--service-account-token-path={}", file.display());
    let agent = bench.common.agent("token_expires_soon", &[flag]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move { agent })
}

pub(crate) async fn unusable_policy(bench: Bench) -> Fault {
    let file = bench.common.file("egress-policy");
    fs::write(&file, "allow 127.0.0.0/8\n").unwrap();
    let flag = format!("--egress-policy-file={}", file.display());
    let mut agent = bench.common.agent("unusable_policy", &[flag]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move {
        fs::write(&file, "allow nothing that can be parsed\n").unwrap();
        agent.process.signal(Signal::Reload).await.unwrap();
        agent
    })
}
