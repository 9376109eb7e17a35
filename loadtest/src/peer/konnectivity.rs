//! Konnectivity's server and agent, built from the Go module pinned in `loadtest/konnectivity`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::process::Command;

use super::{Ports, Process, Topology};
use crate::go;

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
        let Some(go) = go::find() else { return Ok(None) };
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("konnectivity");
        let packages = [
            ("server", format!("{MODULE}/cmd/server")),
            ("agent", format!("{MODULE}/cmd/agent")),
            ("fleet", "./fleet".into()),
        ];
        for (name, package) in packages {
            let built = Command::new(&go)
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
                Err(error) => return Err(error.into()),
            }
        }
        let program = |name| folder.join(format!("konnectivity-{name}"));
        let (server, agent) = (program("server"), program("agent"));
        Ok(Some(Self { server, agent, fleet: program("fleet") }))
    }
}

/// The version that the module is pinned to.
pub(crate) fn version() -> &'static str {
    let pinned = include_str!("../../konnectivity/go.mod").lines();
    let mut versions = pinned.filter_map(|line| {
        let (module, version) = line.trim().trim_start_matches("require ").split_once(' ')?;
        (module == MODULE).then(|| version.split(' ').next().unwrap_or(version))
    });
    versions.next().unwrap_or("of an unknown version")
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
