//! The flags that server and agent of either make take, being drop-ins for one another.

use std::path::{Path, PathBuf};

use super::{Frontend, Ports, Stage};

/// The ports of the only server.
pub(super) const PORTS: Ports = Ports { tunnel: 8132, admin: 8133, health: 8134 };
const AGENT_ADMIN_PORT: u16 = 8135;
/// Where an agent says whether it is ready.
pub(crate) const AGENT_HEALTH_PORT: u16 = 8136;

pub(super) fn socket(stage: &Stage) -> PathBuf {
    numbered_socket(stage, 0)
}

fn numbered_socket(stage: &Stage, number: usize) -> PathBuf {
    stage.certificates.folder().join(format!("frontend-{number}.sock"))
}

/// Of one of several servers.
pub(super) fn server_of(
    stage: &Stage,
    frontend: Frontend,
    number: usize,
    count: u32,
    ports: Ports,
) -> Vec<String> {
    let pair = stage.certificates.server();
    let mode = match frontend {
        Frontend::Grpc => "grpc",
        Frontend::Connect => "http-connect",
    };
    vec![
        flag("uds-name", &numbered_socket(stage, number)),
        "--delete-existing-uds-file=true".into(),
        format!("--mode={mode}"),
        "--server-port=0".into(),
        flag("cluster-cert", &pair.certificate),
        flag("cluster-key", &pair.key),
        flag("cluster-ca-cert", &stage.certificates.ca()),
        format!("--agent-bind-address={}", stage.server_address),
        format!("--agent-port={}", ports.tunnel),
        format!("--admin-port={}", ports.admin),
        "--admin-bind-address=127.0.0.1".into(),
        format!("--health-port={}", ports.health),
        "--health-bind-address=127.0.0.1".into(),
        format!("--server-id=server-{number}"),
        format!("--server-count={count}"),
    ]
}

/// Of the only server.
pub(super) fn server(stage: &Stage, frontend: Frontend) -> Vec<String> {
    server_of(stage, frontend, 0, 1, PORTS)
}

pub(super) fn agent(stage: &Stage) -> Vec<String> {
    let pair = stage.certificates.agent();
    vec![
        flag("ca-cert", &stage.certificates.ca()),
        flag("agent-cert", &pair.certificate),
        flag("agent-key", &pair.key),
        format!("--proxy-server-host={}", stage.server_address),
        format!("--proxy-server-port={}", PORTS.tunnel),
        format!("--admin-server-port={AGENT_ADMIN_PORT}"),
        "--admin-bind-address=127.0.0.1".into(),
        format!("--health-server-port={AGENT_HEALTH_PORT}"),
        "--health-server-host=127.0.0.1".into(),
    ]
}

fn flag(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}
