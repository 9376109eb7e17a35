//! Many agents in one process: `fleet FIRST COUNT FLAGS…`, with the number of the first agent and
//! the agent's own flags.
//!
//! Each has a tunnel, a socket and ports of its own; they share nothing but threads.

use std::{ffi::OsString, net::Ipv4Addr, process::ExitCode};

use anyhow::Context as _;
use culvert_agent::{Agent, config::Config};
use culvert_process::logging;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{runtime::Runtime, task::JoinSet};

use crate::flags;

/// Runs the agents until the process is ended.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert-loadtest fleet: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<()> {
    let first = number(&mut args).context("the number of the first agent is missing")?;
    let count = number(&mut args).context("the number of agents is missing")?;
    let config: Config = flags::config(args)?;
    logging::init(&config.log)?;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    Runtime::new()?.block_on(async {
        let mut agents = JoinSet::new();
        for number in first..first.saturating_add(count) {
            let agent_id = format!("agent-{number}").parse()?;
            let any = (Ipv4Addr::LOCALHOST, 0).into();
            let config =
                Config { agent_id, health_address: any, admin_address: any, ..config.clone() };
            agents.spawn(Agent::bind(&config)?.run(std::future::pending()));
        }
        agents.join_all().await;
        Ok(())
    })
}

fn number(args: &mut impl Iterator<Item = OsString>) -> Option<usize> {
    args.next()?.to_str()?.parse().ok()
}
