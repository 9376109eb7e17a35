//! The HTTP servers for liveness, readiness and metrics.
//!
//! Their ports may be open to a whole network, and a liveness probe without an answer restarts the
//! process. So everything that a client can hold is bounded, and a new connection ends the oldest
//! one when too many are open: a client that opens many cannot keep the kubelet out.

use std::{
    collections::VecDeque, convert::Infallible, fmt, io, net::SocketAddr, sync::Arc, time::Duration,
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Response, StatusCode,
    header::{CONTENT_TYPE, HOST, HeaderValue, LOCATION},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{AbortHandle, JoinHandle, JoinSet},
};

use crate::{accept::Acceptor, listen};

/// Time for a client to send the head of a request, and between two requests; Konnectivity's value.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum size of a request's head, in bytes. Probes and scrapers send a few hundred.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Maximum number of open connections; one more ends the oldest.
const MAX_CONNECTIONS: usize = 256;
/// Time for unfinished responses when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// A response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminResponse {
    /// Status line.
    pub status: StatusCode,
    /// Media type of the body.
    pub content_type: &'static str,
    /// Location of a redirect.
    pub location: Option<String>,
    /// Body.
    pub body: String,
}

impl AdminResponse {
    /// A response of plain text.
    pub fn text(status: StatusCode, body: impl Into<String>) -> Self {
        let content_type = "text/plain; charset=utf-8";
        Self { status, content_type, location: None, body: body.into() }
    }

    fn redirect(location: String) -> Self {
        let body = format!("moved to {location}\n");
        Self { location: Some(location), ..Self::text(StatusCode::MOVED_PERMANENTLY, body) }
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::from(self.body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        if let Some(location) = self.location.and_then(|to| HeaderValue::try_from(to).ok()) {
            headers.insert(LOCATION, location);
        }
        response
    }
}

/// The parts of a request that handlers read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AdminRequest<'a> {
    /// Query without its question mark, as sent.
    pub query: &'a str,
    /// Host header, with its port if it has one.
    pub host: &'a str,
}

impl AdminRequest<'_> {
    /// Whether the query has `verbose`, with or without a value.
    pub fn is_verbose(&self) -> bool {
        self.query.split('&').any(|pair| pair.split('=').next() == Some("verbose"))
    }
}

type Handler = Box<dyn Fn(AdminRequest<'_>) -> AdminResponse + Send + Sync>;

/// Paths and their handlers; every other path is a 404.
#[derive(Default)]
pub struct Routes {
    table: Vec<(&'static str, Handler)>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.table.iter().map(|(path, _)| path)).finish()
    }
}

impl Routes {
    /// Without paths.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a path. Its handler runs on the runtime and must not block.
    pub fn on(
        mut self,
        path: &'static str,
        handler: impl Fn(AdminRequest<'_>) -> AdminResponse + Send + Sync + 'static,
    ) -> Self {
        self.table.push((path, Box::new(handler)));
        self
    }

    /// Adds `/healthz`, which is always 200 `ok`.
    pub fn healthz(self) -> Self {
        self.on("/healthz", |_| AdminResponse::text(StatusCode::OK, "ok"))
    }

    /// Adds `/readyz` and its old name `/ready`.
    pub fn readyz(
        self,
        ready: impl Fn(AdminRequest<'_>) -> AdminResponse + Send + Sync + 'static,
    ) -> Self {
        let ready = Arc::new(ready);
        let same = Arc::clone(&ready);
        self.on("/readyz", move |request| ready(request)).on("/ready", move |request| same(request))
    }

    /// Adds `/metrics` with the text of `render`, in Prometheus' text format.
    pub fn metrics(self, render: impl Fn() -> String + Send + Sync + 'static) -> Self {
        self.on("/metrics", move |_| AdminResponse {
            content_type: "text/plain; version=0.0.4; charset=utf-8",
            ..AdminResponse::text(StatusCode::OK, render())
        })
    }

    /// Adds `/metrics` as a redirect (301) to the same path on another port of the same host, as on
    /// the admin port of a Konnectivity agent.
    pub fn metrics_on_port(self, port: u16) -> Self {
        self.on("/metrics", move |request| {
            let host = host_without_port(request.host);
            let mark = if request.query.is_empty() { "" } else { "?" };
            AdminResponse::redirect(format!("//{host}:{port}/metrics{mark}{}", request.query))
        })
    }

    fn answer<B>(&self, request: &Request<B>) -> AdminResponse {
        let path = request.uri().path();
        let Some((_, handler)) = self.table.iter().find(|(known, _)| *known == path) else {
            return AdminResponse::text(StatusCode::NOT_FOUND, "404 page not found\n");
        };
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        handler(AdminRequest {
            query: request.uri().query().unwrap_or_default(),
            host: host.unwrap_or_default(),
        })
    }
}

/// The host without its port. IPv6 addresses have brackets when a port follows.
fn host_without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, _)) if !name.contains(':') || name.ends_with(']') => name,
        _ => host,
    }
}

/// The process cannot listen on a port.
#[derive(Debug, thiserror::Error)]
#[error("--{flag}: cannot listen on {address}: {source}")]
pub struct BindError {
    /// The flag that chose the port, without its hyphens.
    pub flag: &'static str,
    /// Address that was to be bound.
    pub address: SocketAddr,
    /// Error of the kernel.
    pub source: io::Error,
}

/// A running server. It owns its task and its connections; dropping it ends them.
#[derive(Debug)]
pub struct AdminServer {
    local_address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl AdminServer {
    /// Serves `routes` on `address`, where port 0 is any free port. Panics outside a tokio runtime.
    ///
    /// # Errors
    /// If the address cannot be bound. The error names `flag`.
    pub fn bind(
        flag: &'static str,
        address: SocketAddr,
        routes: Routes,
    ) -> Result<Self, BindError> {
        let bind_error = |source| BindError { flag, address, source };
        let listener = listen::tcp(address).map_err(bind_error)?;
        let local_address = listener.local_addr().map_err(bind_error)?;
        let (stop, stopping) = watch::channel(false);
        let acceptor = Acceptor::new("admin", listener);
        let task = tokio::spawn(run(acceptor, Arc::new(routes), stopping));
        Ok(Self { local_address, stop, task })
    }

    /// Address in use, with the port that the kernel chose for port 0.
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Takes no new connections, waits at most 1 s for unfinished responses, and ends.
    ///
    /// # Cancel safety
    /// Dropping the future ends all connections at once.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let _ = tokio::time::timeout(STOP_TIMEOUT, &mut self.task).await;
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        self.task.abort(); // drops the set of connections with it
    }
}

/// Completes when the server stops, or was dropped.
async fn stopping(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn run(
    mut acceptor: Acceptor<TcpListener>,
    routes: Arc<Routes>,
    mut stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let mut by_age = VecDeque::new();
    loop {
        tokio::select! {
            (socket, _) = acceptor.accept() => {
                make_room(&mut by_age);
                let serving = serve(socket, Arc::clone(&routes), stop.clone());
                by_age.push_back(connections.spawn(serving));
            }
            Some(_) = connections.join_next() => {}
            () = stopping(&mut stop) => break,
        }
    }
    drop(acceptor);
    while connections.join_next().await.is_some() {}
}

/// Removes connections that ended and, if there are still too many, ends the oldest.
fn make_room(by_age: &mut VecDeque<AbortHandle>) {
    if by_age.len() < MAX_CONNECTIONS {
        return;
    }
    by_age.retain(|connection| !connection.is_finished());
    if by_age.len() >= MAX_CONNECTIONS
        && let Some(oldest) = by_age.pop_front()
    {
        oldest.abort();
    }
}

async fn serve(stream: TcpStream, routes: Arc<Routes>, mut stop: watch::Receiver<bool>) {
    let service = service_fn(move |request| {
        let response = routes.answer(&request).into_response();
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_READ_TIMEOUT)
        .max_buf_size(MAX_HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = stopping(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "admin connection ended");
    }
}

#[cfg(test)]
mod tests;
