//! The operator's side: a command asks the process of this host.

use std::{
    error::Error as _,
    ffi::OsString,
    fmt::Display,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use bytes::Bytes;
use form_urlencoded::Serializer;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Method, Request, StatusCode, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::UnixStream, runtime::Builder, time::timeout};

use crate::go_flags::Exit;

/// Time for the process to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of an answer, in bytes.
const MAX_ANSWER: usize = 256 << 20;

/// A running process and its operator's socket.
#[derive(Debug)]
pub struct Client<'a> {
    /// Name of the program, the prefix of errors.
    pub program: &'static str,
    /// Path of its --operator-socket.
    pub socket: &'a PathBuf,
}

/// Runs `command` with the arguments behind the command's name if they begin with a name that it
/// knows; `None` if they do not. The program's path comes first.
pub fn run(
    program: &'static str,
    args: &[OsString],
    command: impl FnOnce(&str, Vec<OsString>) -> Option<Result<String, Exit>>,
) -> Option<ExitCode> {
    let name = args.get(1)?.to_str()?;
    // Help and errors name the whole command.
    let whole = OsString::from(format!("{program} {name}"));
    let rest = std::iter::once(whole).chain(args.iter().skip(2).cloned()).collect();
    let exit = match command(name, rest)? {
        Ok(text) => Exit { code: 0, text },
        Err(exit) => exit,
    };
    Some(exit.print())
}

/// `value` as JSON for people and programs.
///
/// # Errors
/// When it has no form in JSON; the fault is ours.
pub fn pretty<T: Serialize>(program: &str, value: &T) -> Result<String, Exit> {
    let text = serde_json::to_string_pretty(value).map_err(|error| failed(program, &error))?;
    Ok(text + "\n")
}

/// The end of a command that failed.
pub fn failed(program: &str, error: &dyn Display) -> Exit {
    Exit { code: 1, text: format!("{program}: {error}\n") }
}

impl Client<'_> {
    /// What the process answers to a question.
    ///
    /// # Errors
    /// When it cannot be reached, refuses, or does not answer in time.
    pub fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        parameters: &[(&str, &str)],
    ) -> Result<T, Exit> {
        self.ask(&Method::GET, path, parameters)
    }

    /// What the process answers to a request that changes something.
    ///
    /// # Errors
    /// When it cannot be reached, refuses, or does not answer in time.
    pub fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        parameters: &[(&str, &str)],
    ) -> Result<T, Exit> {
        self.ask(&Method::POST, path, parameters)
    }

    fn ask<T: DeserializeOwned>(
        &self,
        method: &Method,
        path: &str,
        parameters: &[(&str, &str)],
    ) -> Result<T, Exit> {
        let query = Serializer::new(String::new()).extend_pairs(parameters).finish();
        let path = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| self.failed(&error))?;
        let answer = async {
            timeout(ANSWER_TIMEOUT, self.request(method, &path)).await.unwrap_or_else(|_| {
                Err(self.failed(&format!("no answer within {ANSWER_TIMEOUT:?}")))
            })
        };
        match runtime.block_on(answer)? {
            (StatusCode::OK, body) => {
                let unknown = |error| format!("the process is of another version: {error}");
                serde_json::from_slice(&body).map_err(|error| self.failed(&unknown(error)))
            }
            (status, body) => {
                let reason = serde_json::from_slice(&body);
                Err(self.failed(&reason.unwrap_or_else(|_| format!("refused: {status}"))))
            }
        }
    }

    async fn request(&self, method: &Method, path: &str) -> Result<(StatusCode, Bytes), Exit> {
        let stream = UnixStream::connect(self.socket)
            .await
            .map_err(|error| self.failed(&unreachable(self.socket, &error)))?;
        let (mut requests, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(&error))?;
        let _driver = culvert_transport::task::owned(connection);
        let request = Request::builder().method(method).uri(path).header(HOST, "operator");
        let request = request.body(Empty::<Bytes>::new()).map_err(|error| self.failed(&error))?;
        let response = requests.send_request(request).await.map_err(|error| self.broken(&error))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        Ok((status, body.map_err(|error| self.failed(&error))?.to_bytes()))
    }

    fn broken(&self, error: &hyper::Error) -> Exit {
        let cause = error.source().map_or_else(String::new, |cause| format!(": {cause}"));
        self.failed(&format!("the process does not answer: {error}{cause}"))
    }

    fn failed(&self, error: &dyn Display) -> Exit {
        failed(self.program, error)
    }
}

/// Why the socket cannot be connected to, with the remedy.
fn unreachable(socket: &Path, error: &io::Error) -> String {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => {
            "does the process have --operator-socket with that path? It is off by default"
        }
        io::ErrorKind::PermissionDenied => {
            "its owner alone may connect: run this as the user of the process, or as root"
        }
        io::ErrorKind::ConnectionRefused => {
            "no process listens there: it has ended, or is starting"
        }
        _ => "is it the --operator-socket of the process?",
    };
    format!("cannot connect to {}: {error}; {remedy}", socket.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unreachable_socket_has_a_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("operator.sock");
        let ask = || {
            let client = Client { program: "culvert-server", socket: &path };
            client.get::<String>("/agents", &[]).unwrap_err()
        };
        let missing = ask();
        assert_eq!(missing.code, 1);
        assert!(missing.text.starts_with("culvert-server: cannot connect to "), "{missing}");
        assert!(missing.text.contains("--operator-socket"), "{missing}");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(ask().text.contains("no process listens there"), "{}", ask());
        let denied = unreachable(&path, &io::ErrorKind::PermissionDenied.into());
        assert!(denied.contains("as the user of the process"), "{denied}");
    }

    #[test]
    fn only_the_names_of_commands_are_commands() {
        let code = |args: &[&str]| {
            let args: Vec<_> = args.iter().map(OsString::from).collect();
            run("sample", &args, |name, rest| {
                assert_eq!(rest[0], "sample known");
                (name == "known").then(|| Ok(format!("{}\n", rest.len())))
            })
        };
        assert_eq!(code(&["sample"]), None);
        assert_eq!(code(&["sample", "known", "--flag"]), Some(ExitCode::SUCCESS));
    }
}
