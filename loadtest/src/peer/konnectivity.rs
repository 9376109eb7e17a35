//! Konnectivity's server and agent, built from the Go module pinned in `loadtest/konnectivity`.

use std::{
    io,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use tokio::process::Command;

use super::{Ports, Process, Topology};

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

pub(super) fn start_server(
    topology: &Topology,
    args: Vec<String>,
    ports: Ports,
) -> anyhow::Result<Process> {
    topology.on_server(programs(topology)?.server, args, ports)
}

pub(super) fn start_agent(topology: &Topology) -> anyhow::Result<Process> {
    topology.on_node(programs(topology)?.agent, topology.agent_args())
}

/// Starts this many agents in one process.
pub(super) fn start_fleet(topology: &Topology, agents: u32) -> anyhow::Result<Process> {
    let args = std::iter::once(agents.to_string()).chain(topology.agent_args()).collect();
    topology.on_node(programs(topology)?.fleet, args)
}

fn programs(topology: &Topology) -> anyhow::Result<Programs> {
    let programs = topology.programs.konnectivity.clone();
    programs.context("Konnectivity was not built: Go is not installed")
}
