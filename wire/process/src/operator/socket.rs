//! The server's side of the operator's socket.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_process::accept::Acceptor;
use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
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
use tracing::{debug, info};

use super::agents;
use crate::{
    backends::Backends,
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

/// The answer to an eviction.
#[derive(Debug, Serialize)]
struct Evicted {
    /// Number of tunnels that end.
    tunnels: usize,
}

/// Serves operators on a Unix socket, which is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct OperatorSocket {
    acceptor: Acceptor<UnixListener>,
    _file: SocketFile,
}

impl OperatorSocket {
    /// Listens at this path. A socket that a crash left behind is replaced.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let (listener, file) = unix_socket::bind(path, true, SOCKET_MODE)?;
        Ok(Self { acceptor: Acceptor::new("operator", listener), _file: file })
    }

    /// Serves operators until the future is dropped.
    pub(crate) async fn run(mut self, backends: Backends) {
        let mut connections = JoinSet::new();
        let mut by_age = VecDeque::new();
        loop {
            let (socket, _) = self.acceptor.accept().await;
            while connections.try_join_next().is_some() {}
            make_room(&mut by_age);
            let has_asked = Arc::<AtomicBool>::default();
            let serving = serve(socket, backends.clone(), has_asked.clone());
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

async fn serve(socket: UnixStream, backends: Backends, has_asked: Arc<AtomicBool>) {
    let service = service_fn(move |request| {
        has_asked.store(true, Relaxed);
        let response = answer(&request, &backends);
        async move { Ok::<_, Infallible>(response) }
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

fn answer(request: &Request<Incoming>, backends: &Backends) -> Response<Full<Bytes>> {
    let query = request.uri().query().unwrap_or_default();
    respond(request.method(), request.uri().path(), query, backends)
}

fn respond(method: &Method, path: &str, query: &str, backends: &Backends) -> Response<Full<Bytes>> {
    match (method, path) {
        (&Method::GET, "/agents") => json(StatusCode::OK, &agents::list(backends)),
        (&Method::POST, "/evict") => {
            let agent = form_urlencoded::parse(query.as_bytes())
                .find_map(|(key, value)| (key == "agent").then_some(value));
            let agent = agent.and_then(|name| name.parse().ok());
            let Some(agent_id) = agent else {
                return json(StatusCode::BAD_REQUEST, "?agent= must name an agent");
            };
            match backends.evict(&agent_id) {
                0 => json(StatusCode::NOT_FOUND, "no such agent is connected"),
                tunnels => {
                    info!(%agent_id, tunnels, "an operator evicts an agent");
                    json(StatusCode::OK, &Evicted { tunnels })
                }
            }
        }
        (_, "/agents" | "/evict") => json(StatusCode::METHOD_NOT_ALLOWED, "another method"),
        _ => json(StatusCode::NOT_FOUND, "no such path"),
    }
}

fn json<T: Serialize + ?Sized>(status: StatusCode, body: &T) -> Response<Full<Bytes>> {
    let body = serde_json::to_vec(body).unwrap_or_default();
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
    use crate::{
        backends::{Dismissal, Strategy},
        testing::TestAgent,
    };

    const REQUEST: &[u8] = b"GET /agents HTTP/1.1\r\nHost: operator\r\n\r\n";

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
        let _serving =
            culvert_transport::task::owned(socket.run(Backends::new(&[Strategy::Default])));
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

    #[tokio::test(start_paused = true)]
    async fn an_eviction_dismisses_every_tunnel_of_the_agent_and_no_other() {
        let backends = Backends::new(&[Strategy::Default]);
        let one = TestAgent::join(&backends, "a/b c").await;
        let two = TestAgent::join(&backends, "a/b c").await;
        let other = TestAgent::join(&backends, "other").await;
        let evict = |method: &Method, query: &str| {
            respond(method, "/evict", query, &backends).status().as_u16()
        };
        assert_eq!(evict(&Method::GET, "agent=other"), 405);
        assert_eq!(evict(&Method::POST, ""), 400);
        assert_eq!(evict(&Method::POST, "agent=%0a"), 400);
        assert_eq!(evict(&Method::POST, "agent=nobody"), 404);
        assert_eq!(evict(&Method::POST, "agent=a%2Fb+c"), 200);
        for agent in [&one, &two] {
            assert_eq!(agent.backend.dismissed().await, Dismissal::Evicted);
        }
        let dismissed = timeout(Duration::from_secs(1), other.backend.dismissed()).await;
        assert!(dismissed.is_err());
    }
}
