//! Upstream's own server and agent, built from the Go module pinned in `loadtest/konnectivity`.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use tokio::process::Command;

use super::{Daemon, Frontend, Ports, Stage, Started, flags};

/// The module that holds both programs.
const MODULE: &str = "sigs.k8s.io/apiserver-network-proxy";

/// The two programs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The server.
    pub server: PathBuf,
    /// The agent.
    pub agent: PathBuf,
    /// Many agents in one process.
    pub fleet: PathBuf,
}

impl Programs {
    /// Builds them into `folder`; `None` where there is no Go. The first time takes minutes.
    ///
    /// # Errors
    /// When Go is there and cannot build them.
    pub async fn build(folder: &Path) -> anyhow::Result<Option<Self>> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("konnectivity");
        let packages = [
            ("server", format!("{MODULE}/cmd/server")),
            ("agent", format!("{MODULE}/cmd/agent")),
            ("fleet", "./fleet".into()),
        ];
        for (name, package) in packages {
            let built = Command::new("go")
                .args(["build", "-o"])
                .arg(folder.join(format!("konnectivity-{name}")))
                .arg(package)
                .current_dir(&source)
                .output()
                .await;
            match built {
                Ok(built) if built.status.success() => {}
                Ok(built) => {
                    let error = String::from_utf8_lossy(&built.stderr).into_owned();
                    let context = "go build in loadtest/konnectivity";
                    return Err(anyhow::anyhow!(error).context(context));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        let program = |name| folder.join(format!("konnectivity-{name}"));
        let (server, agent) = (program("server"), program("agent"));
        Ok(Some(Self { server, agent, fleet: program("fleet") }))
    }
}

pub(super) async fn start(stage: &Stage, frontend: Frontend) -> anyhow::Result<Started> {
    let server = start_server(stage, flags::server(stage, frontend), flags::PORTS).await?;
    let (agent, args) = (programs(stage)?.agent, flags::agent(stage));
    let agent = Daemon::start(stage, "agent", &stage.node, &stage.node_runtime, agent, args)?;
    Started::when_ready(stage, server, agent).await
}

pub(super) async fn start_server(
    stage: &Stage,
    flags: Vec<String>,
    ports: Ports,
) -> anyhow::Result<Daemon> {
    let program = programs(stage)?.server;
    let server =
        Daemon::start(stage, "server", &stage.server, &stage.server_runtime, program, flags)?;
    server.until_answering(ports.health, "/healthz").await?;
    Ok(server)
}

/// So many agents in one process.
pub(super) fn start_fleet(stage: &Stage, agents: u32) -> anyhow::Result<Daemon> {
    let args = std::iter::once(agents.to_string()).chain(flags::agent(stage)).collect();
    let program = programs(stage)?.fleet;
    Daemon::start(stage, "agent", &stage.node, &stage.node_runtime, program, args)
}

fn programs(stage: &Stage) -> anyhow::Result<Programs> {
    let programs = stage.programs.konnectivity.clone();
    programs.context("Konnectivity was not built: Go is not installed")
}
