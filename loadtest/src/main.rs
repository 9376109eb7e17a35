//! `culvert-loadtest`: what an operator looks at before switching.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use culvert_loadtest::demo::{self, Options};

/// Culvert on one machine: a demo, and later the measurements.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Flags {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run server, agents and targets in this process, with certificates made on the spot, and
    /// show sessions like exec, logs and port-forward at work through the tunnel
    Demo(Options),
}

fn main() -> ExitCode {
    let Flags { command: Command::Demo(options) } = Flags::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(demo::run(&options)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert-loadtest: {error:#}");
            ExitCode::FAILURE
        }
    }
}
