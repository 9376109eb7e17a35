//! The operator's side: commands that ask a running server.

use std::{ffi::OsString, path::PathBuf, process::ExitCode};

use clap::{Command, CommandFactory as _, Parser};
use culvert_process::{
    go_flags::{self, Exit},
    kubernetes::Timestamp,
    operator::{
        client::{self, Client, pretty},
        streams::{DEFAULT_LIMIT, Side, StreamList, parse_limit, stream_table},
        table::escape,
        top::{self, TopFlags},
    },
    version,
};

use super::{
    agents::{AgentEntry, table},
    answers::Concerned,
};

const PROGRAM: &str = "culvert-server";

/// Lists the agents of the server on this host, one line for each tunnel.
#[derive(Debug, Parser)]
#[command(name = "culvert-server agents", version = version::text(), max_term_width = 100)]
struct Agents {
    #[command(flatten)]
    server: RunningServer,

    /// Print JSON, with more about each agent
    #[arg(long)]
    json: bool,
}

/// Lists the live streams of the server on this host, the oldest first.
#[derive(Debug, Parser)]
#[command(name = "culvert-server streams", version = version::text(), max_term_width = 100)]
struct Streams {
    #[command(flatten)]
    server: RunningServer,

    /// Print JSON, with class and state of each stream and measurements of its tunnel
    #[arg(long)]
    json: bool,

    /// List the streams of this agent alone
    #[arg(long, value_name = "AGENT")]
    agent: Option<String>,

    /// Maximum number of streams in the list, up to 20000
    #[arg(long, value_name = "COUNT", default_value_t = DEFAULT_LIMIT, value_parser = parse_limit)]
    limit: usize,
}

/// Drains the server on this host and ends it, as SIGTERM does; with --agent, keeps new dials from
/// that agent instead.
///
/// Without --agent: the server is no longer ready, takes no new agents and no new connections of
/// kube-apiserver, and asks its agents to drain. Open connections have --graceful-shutdown-timeout to
/// end (0 by default: they are cut at once); then the process exits with 0. The command does not wait
/// for that.
///
/// With --agent: the agent gets no new dials while another one can take them. Its streams go on, it
/// stays connected, and it is not informed. This lasts until its tunnels end: an agent that connects
/// again gets dials again.
#[derive(Debug, Parser)]
#[command(name = "culvert-server drain", version = version::text(), max_term_width = 100)]
struct Drain {
    #[command(flatten)]
    server: RunningServer,

    /// Name of the agent to drain, instead of the server
    #[arg(long, value_name = "AGENT")]
    agent: Option<String>,
}

/// Ends the tunnels of an agent: it is asked to drain, and its tunnels are closed when their streams
/// have ended, or after 30 s. It may connect again if it still has a proof of its identity.
#[derive(Debug, Parser)]
#[command(name = "culvert-server evict", version = version::text(), max_term_width = 100)]
struct Evict {
    #[command(flatten)]
    server: RunningServer,

    /// Name of the agent
    #[arg(value_name = "AGENT")]
    agent: String,
}

/// Lists the busiest live streams of the server on this host once per second: class of what the server
/// sends, rates, round-trip time and lost packets of the tunnel, and what each stream waits for.
#[derive(Debug, Parser)]
#[command(name = "culvert-server top", version = version::text(), max_term_width = 100)]
struct Top {
    #[command(flatten)]
    server: RunningServer,

    #[command(flatten)]
    top: TopFlags,
}

#[derive(Debug, clap::Args)]
struct RunningServer {
    /// Path of the server's --operator-socket
    #[arg(
        long,
        value_name = "PATH",
        env = "CULVERT_OPERATOR_SOCKET",
        default_value = "/run/culvert-server/operator.sock"
    )]
    socket: PathBuf,
}

impl RunningServer {
    fn client(&self) -> Client<'_> {
        Client { program: PROGRAM, socket: &self.socket }
    }
}

/// The commands, for help and completion scripts.
pub(crate) fn commands() -> Vec<Command> {
    vec![
        Agents::command().name("agents"),
        Streams::command().name("streams"),
        Top::command().name("top"),
        Drain::command().name("drain"),
        Evict::command().name("evict"),
    ]
}

/// Runs the command that these arguments name, the program's path first; `None` if they name none.
pub(crate) fn run(args: &[OsString]) -> Option<ExitCode> {
    client::run(PROGRAM, args, |name, rest| {
        Some(match name {
            "agents" => go_flags::try_parse_from(rest).and_then(|flags| agents(&flags)),
            "streams" => go_flags::try_parse_from(rest).and_then(|flags| streams(&flags)),
            "drain" => go_flags::try_parse_from(rest).and_then(|flags| drain(&flags)),
            "evict" => go_flags::try_parse_from(rest).and_then(|flags| evict(&flags)),
            "top" => go_flags::try_parse_from(rest)
                .and_then(|flags: Top| top::run(&flags.server.client(), &flags.top, Side::Server)),
            _ => return None,
        })
    })
}

fn agents(flags: &Agents) -> Result<String, Exit> {
    let entries: Vec<AgentEntry> = flags.server.client().get("/agents", &[])?;
    match flags.json {
        true => pretty(PROGRAM, &entries),
        false => Ok(table(&entries, Timestamp::now())),
    }
}

fn streams(flags: &Streams) -> Result<String, Exit> {
    let limit = flags.limit.to_string();
    let mut parameters = vec![("limit", limit.as_str())];
    parameters.extend(flags.agent.as_deref().map(|agent| ("peer", agent)));
    let list: StreamList = flags.server.client().get("/streams", &parameters)?;
    match flags.json {
        true => pretty(PROGRAM, &list),
        false => Ok(stream_table(&list, "AGENT")),
    }
}

fn drain(flags: &Drain) -> Result<String, Exit> {
    let parameters: Vec<_> =
        flags.agent.as_deref().map(|agent| ("agent", agent)).into_iter().collect();
    let Concerned { tunnels } = flags.server.client().post("/drain", &parameters)?;
    Ok(match &flags.agent {
        Some(agent) => {
            format!("agent {} drains: no new dials on {tunnels} tunnels\n", escape(agent))
        }
        None => format!("the server drains {tunnels} tunnels and ends\n"),
    })
}

fn evict(flags: &Evict) -> Result<String, Exit> {
    let _: Concerned = flags.server.client().post("/evict", &[("agent", &flags.agent)])?;
    Ok(format!("agent {} is sent away\n", escape(&flags.agent)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_too_large_is_a_fault_of_its_flag() {
        let error = Streams::try_parse_from(["streams", "--limit=99999"]).unwrap_err().to_string();
        assert!(error.contains("--limit") && error.contains("up to 20000"), "{error}");
        assert_eq!(Streams::try_parse_from(["streams", "--limit=20000"]).unwrap().limit, 20000);
    }

    fn code(args: &[&str]) -> Option<u8> {
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        run(&args).map(|code| u8::from(code != ExitCode::SUCCESS))
    }

    #[test]
    fn only_the_names_of_commands_are_commands() {
        assert_eq!(code(&["culvert-server"]), None);
        assert_eq!(code(&["culvert-server", "--help"]), None);
        assert_eq!(code(&["culvert-server", "--uds-name=agents"]), None);
        for name in ["agents", "streams", "drain", "evict"] {
            assert_eq!(code(&["culvert-server", name, "--help"]), Some(0), "{name}");
        }
        assert_eq!(code(&["culvert-server", "agents", "--socket=/nowhere"]), Some(1));
        assert_eq!(code(&["culvert-server", "drain", "--socket=/nowhere"]), Some(1));
        assert_eq!(code(&["culvert-server", "evict"]), Some(1));
        assert_eq!(code(&["culvert-server", "evict", "a", "b"]), Some(1));
    }
}
