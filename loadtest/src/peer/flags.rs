//! The flags that server and agent of either make take, being drop-ins for one another.

use std::path::{Path, PathBuf};

use super::{Frontend, Stage};

/// Where agents come in.
const TUNNEL_PORT: u16 = 8132;
const SERVER_ADMIN_PORT: u16 = 8133;
/// Where a server says whether it is ready.
pub(super) const SERVER_HEALTH_PORT: u16 = 8134;
const AGENT_ADMIN_PORT: u16 = 8135;
/// Where an agent says whether it is ready.
pub(super) const AGENT_HEALTH_PORT: u16 = 8136;

pub(super) fn socket(stage: &Stage) -> PathBuf {
    stage.certificates.folder().join("frontend.sock")
}

pub(super) fn server(stage: &Stage, frontend: Frontend) -> Vec<String> {
    let pair = stage.certificates.server();
    let mode = match frontend {
        Frontend::Grpc => "grpc",
        Frontend::Connect => "http-connect",
    };
    vec![
        flag("uds-name", &socket(stage)),
        "--delete-existing-uds-file=true".into(),
        format!("--mode={mode}"),
        "--server-port=0".into(),
        flag("cluster-cert", &pair.certificate),
        flag("cluster-key", &pair.key),
        flag("cluster-ca-cert", &stage.certificates.ca()),
        format!("--agent-bind-address={}", stage.server_address),
        format!("--agent-port={TUNNEL_PORT}"),
        format!("--admin-port={SERVER_ADMIN_PORT}"),
        "--admin-bind-address=127.0.0.1".into(),
        format!("--health-port={SERVER_HEALTH_PORT}"),
        "--health-bind-address=127.0.0.1".into(),
    ]
}

pub(super) fn agent(stage: &Stage) -> Vec<String> {
    let pair = stage.certificates.agent();
    vec![
        flag("ca-cert", &stage.certificates.ca()),
        flag("agent-cert", &pair.certificate),
        flag("agent-key", &pair.key),
        format!("--proxy-server-host={}", stage.server_address),
        format!("--proxy-server-port={TUNNEL_PORT}"),
        format!("--admin-server-port={AGENT_ADMIN_PORT}"),
        "--admin-bind-address=127.0.0.1".into(),
        format!("--health-server-port={AGENT_HEALTH_PORT}"),
        "--health-server-host=127.0.0.1".into(),
    ]
}

fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}
