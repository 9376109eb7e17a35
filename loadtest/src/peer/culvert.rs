//! Culvert's server and agent.

use std::path::PathBuf;

use super::{Daemon, Frontend, Stage, Started, flags};

pub(super) async fn start(stage: &Stage, frontend: Frontend) -> anyhow::Result<Started> {
    let programs = &stage.programs;
    let command = |program: &Option<PathBuf>, side: &str, flags: Vec<String>| {
        let (program, side) = match program {
            Some(program) => (program, None),
            None => (&programs.loadtest, Some(side.to_owned())),
        };
        let flags = side.into_iter().chain(flags).chain(programs.culvert_flags.clone());
        (program.clone(), flags.collect::<Vec<_>>())
    };
    let (program, args) = command(&programs.server, "server", flags::server(stage, frontend));
    let server =
        Daemon::start(stage, "server", &stage.server, &stage.server_runtime, program, args)?;
    server.until_answering(flags::SERVER_HEALTH_PORT, "/healthz").await?;
    let (program, args) = command(&programs.agent, "agent", flags::agent(stage));
    let agent = Daemon::start(stage, "agent", &stage.node, &stage.node_runtime, program, args)?;
    agent.until_answering(flags::AGENT_HEALTH_PORT, "/readyz").await?;
    server.until_answering(flags::SERVER_HEALTH_PORT, "/readyz").await?;
    Ok(Started { socket: Some(flags::socket(stage)), server: Some(server), agent: Some(agent) })
}
