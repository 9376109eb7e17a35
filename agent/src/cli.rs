//! The command line of `culvert-agent`.

use std::{ffi::OsString, process::ExitCode};

use clap::Command;
use culvert_process::{
    cli::{self, BoxError, Program},
    precheck,
    signals::ReloadSignal,
};
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{Agent, Config, operator};

/// Runs an agent with these arguments, the program's path first; see [`cli::main`]. With the name of
/// an operator's command as the first argument, runs that instead.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<_> = args.into_iter().collect();
    operator::run(&args)
        .or_else(|| precheck::run::<AgentProgram>(&args, crate::precheck::check))
        .unwrap_or_else(|| cli::main::<AgentProgram>(args))
}

struct AgentProgram;

impl Program for AgentProgram {
    const NAME: &'static str = "culvert-agent";
    type Config = Config;
    /// That of Konnectivity's agent, which ends in order at its second signal.
    const SECOND_SIGNAL_EXIT_CODE: i32 = 0;

    fn commands() -> Vec<Command> {
        let mut commands = operator::commands();
        commands.push(precheck::command::<Self>());
        commands
    }

    /// A single thread: a tunnel is one connection, which one thread drives at a time. A second
    /// thread is woken for every packet, which costs a third of the throughput.
    fn runtime() -> Builder {
        Builder::new_current_thread()
    }

    async fn run(
        config: Config,
        stop: CancellationToken,
        reload: ReloadSignal,
    ) -> Result<(), BoxError> {
        let agent = Agent::bind(&config)?;
        info!(
            version = env!("CARGO_PKG_VERSION"), agent_id = %config.agent_id,
            server = %config.servers.host, port = config.servers.port,
            health = %agent.health_address(), "culvert-agent runs",
        );
        let files = agent.files().clone();
        tokio::select! {
            () = agent.run(stop.cancelled_owned()) => {}
            never = reload.serve(files) => match never {},
        }
        info!("culvert-agent ends");
        Ok(())
    }
}
