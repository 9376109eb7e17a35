//! Culvert's server and agent.

use std::path::PathBuf;

use super::{Daemon, Frontend, Ports, Stage, Started, flags};

pub(super) async fn start(stage: &Stage, frontend: Frontend) -> anyhow::Result<Started> {
    let server = start_server(stage, flags::server(stage, frontend), flags::PORTS).await?;
    let flags = flags::agent(stage).into_iter().chain(stage.agent_flags.iter().cloned()).collect();
    let (program, args) = command(stage, &stage.programs.agent, "agent", flags);
    let agent = Daemon::start(stage, "agent", &stage.node, &stage.node_runtime, program, args)?;
    Started::when_ready(stage, server, agent).await
}

pub(super) async fn start_server(
    stage: &Stage,
    flags: Vec<String>,
    ports: Ports,
) -> anyhow::Result<Daemon> {
    let flags = flags.into_iter().chain(stage.server_flags.iter().cloned()).collect();
    let (program, args) = command(stage, &stage.programs.server, "server", flags);
    let server =
        Daemon::start(stage, "server", &stage.server, &stage.server_runtime, program, args)?;
    server.until_answering(ports.health, "/healthz").await?;
    Ok(server)
}

/// So many agents in one process.
pub(super) fn start_fleet(stage: &Stage, agents: u32) -> anyhow::Result<Daemon> {
    let loadtest = stage.programs.loadtest.clone();
    let more = [stage.agent_flags.clone(), stage.programs.culvert_flags.clone()].concat();
    let args = ["fleet".to_owned(), agents.to_string()].into_iter();
    let args = args.chain(flags::agent(stage)).chain(["-v=1".into()]).chain(more).collect();
    Daemon::start(stage, "agent", &stage.node, &stage.node_runtime, loadtest, args)
}

/// The program that is this side, and its arguments.
fn command(
    stage: &Stage,
    program: &Option<PathBuf>,
    side: &str,
    flags: Vec<String>,
) -> (PathBuf, Vec<String>) {
    let (program, side) = match program {
        Some(program) => (program, None),
        None => (&stage.programs.loadtest, Some(side.to_owned())),
    };
    let more = stage.programs.culvert_flags.clone();
    (program.clone(), side.into_iter().chain(flags).chain(more).collect())
}
