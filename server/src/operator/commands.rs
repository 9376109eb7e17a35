//! The operator's side: commands that ask a running server.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bytes::Bytes;
use clap::{Command, CommandFactory as _, Parser};
use culvert_process::{
    go_flags::{self, Exit},
    kubernetes::Timestamp,
};
use form_urlencoded::byte_serialize;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use tokio::{net::UnixStream, runtime::Builder, time::timeout};

use super::agents::{AgentEntry, table};

/// Time for the server to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of an answer, in bytes.
const MAX_ANSWER: usize = 256 << 20;

/// Lists the agents of the server on this host, one line for each tunnel.
#[derive(Debug, Parser)]
#[command(name = "culvert-server agents", version, max_term_width = 100)]
struct Agents {
    #[command(flatten)]
    server: RunningServer,

    /// Print JSON, with more about each agent
    #[arg(long)]
    json: bool,
}

/// Ends the tunnels of an agent: it is asked to drain, and its tunnels are closed when their streams
/// have ended, or after 30 s. It may connect again if it still has a proof of its identity.
#[derive(Debug, Parser)]
#[command(name = "culvert-server evict", version, max_term_width = 100)]
struct Evict {
    #[command(flatten)]
    server: RunningServer,

    /// Name of the agent
    #[arg(value_name = "AGENT")]
    agent: String,
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

/// The commands, for help and completion scripts.
pub(crate) fn commands() -> Vec<Command> {
    vec![Agents::command().name("agents"), Evict::command().name("evict")]
}

/// Runs the command that these arguments name, the program's path first; `None` if they name none.
pub(crate) fn run(args: &[OsString]) -> Option<ExitCode> {
    let name = args.get(1)?.to_str()?;
    // Help and errors name the whole command.
    let program = OsString::from(format!("culvert-server {name}"));
    let rest = std::iter::once(program).chain(args.iter().skip(2).cloned());
    let result = match name {
        "agents" => go_flags::try_parse_from(rest).and_then(|flags| agents(&flags)),
        "evict" => go_flags::try_parse_from(rest).and_then(|flags| evict(&flags)),
        _ => return None,
    };
    let exit = match result {
        Ok(text) => Exit { code: 0, text },
        Err(exit) => exit,
    };
    Some(exit.print())
}

fn agents(flags: &Agents) -> Result<String, Exit> {
    let answer = ask(&flags.server, Method::GET, "/agents")?;
    let entries: Vec<AgentEntry> =
        serde_json::from_slice(&answer).map_err(|error| failed(&error))?;
    if flags.json {
        let text = serde_json::to_string_pretty(&entries).map_err(|error| failed(&error))?;
        return Ok(text + "\n");
    }
    Ok(table(&entries, Timestamp::now()))
}

fn evict(flags: &Evict) -> Result<String, Exit> {
    let agent: String = byte_serialize(flags.agent.as_bytes()).collect();
    ask(&flags.server, Method::POST, &format!("/evict?agent={agent}"))?;
    Ok(format!("agent {} is sent away\n", flags.agent.escape_debug()))
}

/// The body of the server's answer.
fn ask(server: &RunningServer, method: Method, path: &str) -> Result<Bytes, Exit> {
    let runtime = Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| failed(&error))?;
    let answer = async {
        timeout(ANSWER_TIMEOUT, request(&server.socket, method, path))
            .await
            .unwrap_or_else(|_| Err(failed(&format!("no answer within {ANSWER_TIMEOUT:?}"))))
    };
    match runtime.block_on(answer)? {
        (StatusCode::OK, body) => Ok(body),
        (_, body) => {
            let reason: String = serde_json::from_slice(&body).unwrap_or_default();
            Err(failed(&reason))
        }
    }
}

async fn request(socket: &Path, method: Method, path: &str) -> Result<(StatusCode, Bytes), Exit> {
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        failed(&format!(
            "cannot reach the server at {}: {error}; is its --operator-socket that path?",
            socket.display()
        ))
    })?;
    let (mut requests, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    let _driver = culvert_transport::task::owned(connection);
    let request = Request::builder().method(method).uri(path).header(HOST, "operator");
    let request = request.body(Empty::<Bytes>::new()).map_err(|error| failed(&error))?;
    let response = requests.send_request(request).await.map_err(|error| failed(&error))?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    Ok((status, body.map_err(|error| failed(&error))?.to_bytes()))
}

fn failed(error: &dyn std::fmt::Display) -> Exit {
    Exit { code: 1, text: format!("culvert-server: {error}\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(args: &[&str]) -> Option<u8> {
        let args: Vec<_> = args.iter().map(OsString::from).collect();
        run(&args).map(|code| u8::from(code != ExitCode::SUCCESS))
    }

    #[test]
    fn only_the_names_of_commands_are_commands() {
        assert_eq!(code(&["culvert-server"]), None);
        assert_eq!(code(&["culvert-server", "--help"]), None);
        assert_eq!(code(&["culvert-server", "--uds-name=agents"]), None);
        assert_eq!(code(&["culvert-server", "agents", "--help"]), Some(0));
        assert_eq!(code(&["culvert-server", "agents", "--socket=/nowhere"]), Some(1));
        assert_eq!(code(&["culvert-server", "evict"]), Some(1));
        assert_eq!(code(&["culvert-server", "evict", "a", "b"]), Some(1));
    }
}
