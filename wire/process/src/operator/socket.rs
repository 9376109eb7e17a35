//! The process's side of the operator's socket.

use std::{
    collections::VecDeque,
    convert::Infallible,
    fmt, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Method, Response, StatusCode,
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::{
    net::{UnixListener, UnixStream},
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tracing::debug;

use crate::{
    accept::Acceptor,
    unix_socket::{self, SocketFile},
};

/// The owner alone may connect: what is done here ends tunnels.
const SOCKET_MODE: u32 = 0o600;
/// Maximum number of open connections; one more ends the oldest that has asked for nothing.
const MAX_CONNECTIONS: usize = 16;
/// Time for an operator to send a request. The commands send it with the connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum time of a connection.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum size of a request's head, in bytes.
const MAX_HEAD: usize = 16 << 10;

/// A request of an operator.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Path, such as `/agents`.
    pub path: &'a str,
    /// Whether it may change something: POST, not GET.
    pub changes: bool,
    query: &'a str,
}

impl<'a> Request<'a> {
    /// The request for a path with a query, such as `/evict?agent=a`.
    pub fn new(path_and_query: &'a str, changes: bool) -> Self {
        let (path, query) = path_and_query.split_once('?').unwrap_or((path_and_query, ""));
        Self { path, changes, query }
    }

    /// A parameter of the query.
    pub fn parameter(&self, name: &str) -> Option<String> {
        form_urlencoded::parse(self.query.as_bytes())
            .find_map(|(key, value)| (key == name).then(|| value.into_owned()))
    }
}

/// Why a request is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The path is unknown, or what a parameter names.
    NotFound(&'static str),
    /// A parameter is missing or malformed.
    Invalid(&'static str),
    /// The request changes something and came by GET, or the other way round.
    OtherMethod,
}

impl Refusal {
    /// The refusal of a path that the process does not know.
    pub const NO_SUCH_PATH: Self = Self::NotFound(
        "no such path; is this the socket of the other program, or of another version?",
    );

    fn status(&self) -> StatusCode {
        match self {
            Self::NotFound(_) => StatusCode::NOT_FOUND,
            Self::Invalid(_) => StatusCode::BAD_REQUEST,
            Self::OtherMethod => StatusCode::METHOD_NOT_ALLOWED,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound(text) | Self::Invalid(text) => text,
            Self::OtherMethod => "another method",
        })
    }
}

/// A JSON text, or why there is none.
pub type Answer = Result<Vec<u8>, Refusal>;

/// Answers requests, at once.
pub type Answers = Arc<dyn Fn(&Request<'_>) -> Answer + Send + Sync>;

/// The answer that `value` is.
///
/// # Errors
/// None; it is for the end of a function that answers.
pub fn json<T: Serialize + ?Sized>(value: &T) -> Answer {
    Ok(serde_json::to_vec(value).unwrap_or_default())
}

/// Serves operators on a Unix socket, which is removed when this is dropped.
#[derive(Debug)]
pub struct OperatorSocket {
    acceptor: Acceptor<UnixListener>,
    _file: SocketFile,
}

impl OperatorSocket {
    /// Listens at this path. A socket that a crash left behind is replaced. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let (listener, file) = unix_socket::bind(path, true, SOCKET_MODE)?;
        Ok(Self { acceptor: Acceptor::new("operator", listener), _file: file })
    }

    /// Serves operators until the future is dropped.
    pub async fn run(mut self, answers: Answers) {
        let mut connections = JoinSet::new();
        let mut by_age = VecDeque::new();
        loop {
            let (socket, _) = self.acceptor.accept().await;
            while connections.try_join_next().is_some() {}
            make_room(&mut by_age);
            let has_asked = Arc::<AtomicBool>::default();
            let serving = serve(socket, answers.clone(), has_asked.clone());
            let task = connections.spawn(async move {
                if timeout(CONNECTION_TIMEOUT, serving).await.is_err() {
                    debug!("an operator's connection took too long");
                }
            });
            by_age.push_back(Open { task, has_asked });
        }
    }
}

/// An open connection.
struct Open {
    task: AbortHandle,
    has_asked: Arc<AtomicBool>,
}

/// Removes connections that ended and, if there are still too many, ends the oldest of those that
/// have asked for nothing, or else the oldest of all.
fn make_room(by_age: &mut VecDeque<Open>) {
    by_age.retain(|connection| !connection.task.is_finished());
    if by_age.len() >= MAX_CONNECTIONS {
        let silent = by_age.iter().position(|connection| !connection.has_asked.load(Relaxed));
        if let Some(connection) = by_age.remove(silent.unwrap_or(0)) {
            debug!("an operator's connection gives way to a newer one");
            connection.task.abort();
        }
    }
}

async fn serve(socket: UnixStream, answers: Answers, has_asked: Arc<AtomicBool>) {
    let service = service_fn(move |request: hyper::Request<_>| {
        has_asked.store(true, Relaxed);
        let path = request.uri().path_and_query().map_or("", |path| path.as_str());
        let answer = match *request.method() {
            Method::GET => answers(&Request::new(path, false)),
            Method::POST => answers(&Request::new(path, true)),
            _ => Err(Refusal::OtherMethod),
        };
        async move { Ok::<_, Infallible>(response(answer)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(socket), service)
        .await;
    if let Err(error) = served {
        debug!(%error, "an operator's connection failed");
    }
}

fn response(answer: Answer) -> Response<Full<Bytes>> {
    let (status, body) = match answer {
        Ok(body) => (StatusCode::OK, body),
        Err(refusal) => {
            let body = serde_json::to_vec(&refusal.to_string()).unwrap_or_default();
            (refusal.status(), body)
        }
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        time::Instant,
    };

    use super::*;

    const REQUEST: &[u8] = b"GET /agents HTTP/1.1\r\nHost: operator\r\n\r\n";

    #[test]
    fn a_request_has_a_path_and_parameters() {
        let request = Request::new("/evict?agent=a%2Fb+c&agent=d&empty=", true);
        assert_eq!((request.path, request.changes), ("/evict", true));
        assert_eq!(request.parameter("agent").unwrap(), "a/b c");
        assert_eq!(request.parameter("empty").unwrap(), "");
        assert_eq!(request.parameter("other"), None);
        assert_eq!(Request::new("/agents", false).parameter("agent"), None);
    }

    #[tokio::test]
    async fn the_socket_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("operator.sock");
        let socket = OperatorSocket::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn silent_connections_do_not_keep_an_operator_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("operator.sock");
        let socket = OperatorSocket::bind(&path).unwrap();
        let answers: Answers = Arc::new(|_| json("yes"));
        let _serving = culvert_transport::task::owned(socket.run(answers));
        // One that has asked and does not read its answer is not the one to go.
        let mut asks = UnixStream::connect(&path).await.unwrap();
        asks.write_all(REQUEST).await.unwrap();
        asks.readable().await.unwrap();
        let begun = Instant::now();
        let mut silent = Vec::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            silent.push(UnixStream::connect(&path).await.unwrap());
        }
        let mut operator = UnixStream::connect(&path).await.unwrap();
        operator.write_all(REQUEST).await.unwrap();
        for mut socket in [operator, asks] {
            let mut answer = Vec::new();
            socket.read_to_end(&mut answer).await.unwrap();
            assert!(answer.starts_with(b"HTTP/1.1 200 OK"), "{answer:?}");
        }
        assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
        // The last one has a few seconds, and no more.
        silent.pop().unwrap().read_to_end(&mut Vec::new()).await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), HEAD_TIMEOUT.as_secs());
    }
}
