//! Upstream's own server and agent, built from the Go module pinned in `loadtest/konnectivity`.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use tokio::process::Command;

use super::{Daemon, Frontend, Stage, Started, flags};

/// The module that holds both programs.
const MODULE: &str = "sigs.k8s.io/apiserver-network-proxy";

/// The two programs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The server.
    pub server: PathBuf,
    /// The agent.
    pub agent: PathBuf,
}

impl Programs {
    /// Builds them into `folder`; `None` where there is no Go. The first time takes minutes.
    ///
    /// # Errors
    /// When Go is there and cannot build them.
    pub async fn build(folder: &Path) -> anyhow::Result<Option<Self>> {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("konnectivity");
        for side in ["server", "agent"] {
            let built = Command::new("go")
                .args(["build", "-o"])
                .arg(folder.join(format!("konnectivity-{side}")))
                .arg(format!("{MODULE}/cmd/{side}"))
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
        let program = |side| folder.join(format!("konnectivity-{side}"));
        Ok(Some(Self { server: program("server"), agent: program("agent") }))
    }
}

pub(super) async fn start(stage: &Stage, frontend: Frontend) -> anyhow::Result<Started> {
    let programs = stage.programs.konnectivity.clone();
    let Programs { server, agent } =
        programs.context("Konnectivity was not built: Go is not installed")?;
    let args = flags::server(stage, frontend);
    let server =
        Daemon::start(stage, "server", &stage.server, &stage.server_runtime, server, args)?;
    server.until_answering(flags::SERVER_HEALTH_PORT, "/healthz").await?;
    let args = flags::agent(stage);
    let agent = Daemon::start(stage, "agent", &stage.node, &stage.node_runtime, agent, args)?;
    agent.until_answering(flags::AGENT_HEALTH_PORT, "/readyz").await?;
    server.until_answering(flags::SERVER_HEALTH_PORT, "/readyz").await?;
    Ok(Started { socket: Some(flags::socket(stage)), server: Some(server), agent: Some(agent) })
}
