//! The operator's side: commands that ask a running agent.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Command, CommandFactory as _, Parser};
use culvert_process::{
    go_flags::{self, Exit},
    kubernetes::Timestamp,
    operator::{
        client::{self, Client, pretty},
        streams::{DEFAULT_LIMIT, Side, StreamList, parse_limit, stream_table},
        top::{self, TopFlags},
    },
    version,
};

use super::status::{Status, render};

const PROGRAM: &str = "culvert-agent";

/// Shows the state of the agent on this host: its servers, why QUIC is not in use, when its proofs of
/// identity expire, its egress policy, and the memory that it holds for its peers.
#[derive(Debug, Parser)]
#[command(name = "culvert-agent status", version = version::text(), max_term_width = 100)]
struct StatusFlags {
    #[command(flatten)]
    agent: RunningAgent,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Lists the live streams of the agent on this host, the oldest first.
#[derive(Debug, Parser)]
#[command(name = "culvert-agent streams", version = version::text(), max_term_width = 100)]
struct Streams {
    #[command(flatten)]
    agent: RunningAgent,

    /// Print JSON, with class and state of each stream and measurements of its tunnel
    #[arg(long)]
    json: bool,

    /// List the streams of this server alone
    #[arg(long, value_name = "SERVER")]
    server: Option<String>,

    /// Maximum number of streams in the list, up to 20000
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_LIMIT, value_parser = parse_limit)]
    limit: usize,
}

/// Lists the busiest live streams of the agent on this host once per second: class of what the agent
/// sends, rates, round-trip time and lost packets of the tunnel, and what each stream waits for.
#[derive(Debug, Parser)]
#[command(name = "culvert-agent top", version = version::text(), max_term_width = 100)]
struct Top {
    #[command(flatten)]
    agent: RunningAgent,

    #[command(flatten)]
    top: TopFlags,
}

#[derive(Debug, clap::Args)]
struct RunningAgent {
    /// Path of the agent's --operator-socket
    #[arg(
        long,
        value_name = "PATH",
        env = "CULVERT_OPERATOR_SOCKET",
        default_value = "/run/culvert-agent/operator.sock"
    )]
    socket: PathBuf,
}

impl RunningAgent {
    fn client(&self) -> Client<'_> {
        Client { program: PROGRAM, socket: &self.socket }
    }
}

/// The commands, for help and completion scripts.
pub(crate) fn commands() -> Vec<Command> {
    vec![
        StatusFlags::command().name("status"),
        Streams::command().name("streams"),
        Top::command().name("top"),
    ]
}

/// Runs the command that these arguments name, the program's path first; `None` if they name none.
pub(crate) fn run(args: &[OsString]) -> Option<ExitCode> {
    client::run(PROGRAM, args, |name, rest| {
        Some(match name {
            "status" => go_flags::try_parse_from(rest).and_then(|flags| status(&flags)),
            "streams" => go_flags::try_parse_from(rest).and_then(|flags| streams(&flags)),
            "top" => go_flags::try_parse_from(rest)
                .and_then(|flags: Top| top::run(&flags.agent.client(), &flags.top, Side::Agent)),
            _ => return None,
        })
    })
}

fn status(flags: &StatusFlags) -> Result<String, Exit> {
    let status: Status = flags.agent.client().get("/status", &[])?;
    match flags.json {
        true => pretty(PROGRAM, &status),
        false => Ok(render(&status, Timestamp::now())),
    }
}

fn streams(flags: &Streams) -> Result<String, Exit> {
    let limit = flags.limit.to_string();
    let mut parameters = vec![("limit", limit.as_str())];
    parameters.extend(flags.server.as_deref().map(|server| ("peer", server)));
    let list: StreamList = flags.agent.client().get("/streams", &parameters)?;
    match flags.json {
        true => pretty(PROGRAM, &list),
        false => Ok(stream_table(&list, "SERVER")),
    }
}
