//! Culvert's server and agent.

use std::path::PathBuf;

use super::{Ports, Process, Topology};

pub(super) fn start_server(
    topology: &Topology,
    args: Vec<String>,
    ports: Ports,
) -> anyhow::Result<Process> {
    let args = [args, topology.server_flags.clone()].concat();
    let (program, args) = command(topology, &topology.programs.server, "server", args);
    topology.on_server(program, args, ports)
}

pub(super) fn start_agent(topology: &Topology) -> anyhow::Result<Process> {
    let args = [topology.agent_args(), topology.agent_flags.clone()].concat();
    let (program, args) = command(topology, &topology.programs.agent, "agent", args);
    topology.on_node(program, args)
}

/// Starts this many agents in one process.
/// Maximum number of agents in a process of a fleet, each of which takes about twelve descriptors.
const AGENTS_PER_PROCESS: u32 = 1000;

pub(super) fn start_fleet(topology: &Topology, agents: u32) -> anyhow::Result<Vec<Process>> {
    let start = |first: u32| {
        let count = AGENTS_PER_PROCESS.min(agents - first);
        let command = vec!["fleet".to_owned(), first.to_string(), count.to_string()];
        let more = [vec!["-v=1".to_owned()], topology.agent_flags.clone()].concat();
        let args = [command, topology.agent_args(), more, topology.programs.culvert_flags.clone()];
        topology.on_node(topology.programs.loadtest.clone(), args.concat())
    };
    (0..agents).step_by(AGENTS_PER_PROCESS as usize).map(start).collect()
}

/// The program of one side, and its arguments.
fn command(
    topology: &Topology,
    program: &Option<PathBuf>,
    side: &str,
    args: Vec<String>,
) -> (PathBuf, Vec<String>) {
    let (program, side) = match program {
        Some(program) => (program, None),
        None => (&topology.programs.loadtest, Some(side.to_owned())),
    };
    let more = topology.programs.culvert_flags.clone();
    (program.clone(), side.into_iter().chain(args).chain(more).collect())
}
