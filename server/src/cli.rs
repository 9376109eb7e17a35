//! The command line of `culvert-server`.

use std::{ffi::OsString, process::ExitCode};

use clap::Command;
use culvert_process::{
    cli::{self, BoxError, Program},
    precheck,
    signals::ReloadSignal,
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::{Config, Server, operator};

/// Runs a server with these arguments, the program's path first; see [`cli::main`]. With the name
/// of an operator's command as the first argument, runs that instead.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<_> = args.into_iter().collect();
    operator::run(&args)
        .or_else(|| precheck::run::<ServerProgram>(&args, crate::precheck::check))
        .unwrap_or_else(|| cli::main::<ServerProgram>(args))
}

struct ServerProgram;

impl Program for ServerProgram {
    const NAME: &'static str = "culvert-server";
    type Config = Config;

    fn commands() -> Vec<Command> {
        let mut commands = operator::commands();
        commands.push(precheck::command::<Self>());
        commands
    }

    async fn run(
        config: Config,
        stop: CancellationToken,
        reload: ReloadSignal,
    ) -> Result<(), BoxError> {
        let server = Server::bind(&config)?;
        info!(
            version = env!("CARGO_PKG_VERSION"), server_id = %config.server_id,
            frontend = %server.frontend_address()?, tunnels = %server.tunnel_address()?,
            health = %server.health_address(), admin = %server.admin_address(),
            "culvert-server runs",
        );
        let files = server.files().clone();
        tokio::select! {
            ended = server.run(stop.cancelled_owned()) => ended?,
            never = reload.serve(files) => match never {},
        }
        info!("culvert-server ends");
        Ok(())
    }
}
