//! The HTTP servers for liveness, readiness and metrics.
//!
//! Their ports may be open to a whole network, and a liveness probe without an answer restarts the
//! process. So everything that a client can hold is bounded, and a new connection ends the oldest
//! one when too many are open: a client that opens many cannot keep the kubelet out.

mod profiling;
mod rendering;

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
use metrics::Gauge;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use self::rendering::Rendering;
use crate::{
    accept::Acceptor,
    listen::{self, ListenFlags},
    metrics::Metrics,
};

/// Time for a client to send the head of a request, and between two requests; Konnectivity's value.
const HEADER_READ_TIMEOUT: Duration = Duration::from_secs(60);
/// The same while the process has no descriptors to spare.
const SHORT_HEADER_READ_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum time of the one exchange of a connection while the process has no descriptors to spare.
const SHORT_EXCHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum size of a request's head, in bytes. Probes and scrapers send a few hundred.
const MAX_HEADER_BYTES: usize = 64 << 10;
/// Maximum number of open connections; one more ends the oldest.
const MAX_CONNECTIONS: usize = 256;
/// Time for unfinished responses when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);
/// First and last interval between attempts to listen on a port that is not available.
const BIND_INTERVALS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// The profiles that there are.
const PROFILES: &str = "In the format of pprof:\n\
    /debug/pprof/profile?seconds=30: processor time\n\
    /debug/pprof/heap: memory in use, in builds with --features heap-profiles\n\
    Profiles of Go's goroutines and locks do not exist here, nor do allocs.\n";

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
    pub body: Bytes,
}

impl AdminResponse {
    /// A response of plain text.
    pub fn text(status: StatusCode, body: impl Into<Bytes>) -> Self {
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

enum Handler {
    /// Answers at once.
    Answer(Box<dyn Fn(AdminRequest<'_>) -> AdminResponse + Send + Sync>),
    /// Metrics, which cost time.
    Metrics(Rendering, Metrics),
    /// Profiles of the processor.
    CpuProfile,
    /// Profiles of the memory.
    HeapProfile,
}

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
        self.table.push((path, Handler::Answer(Box::new(handler))));
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

    /// Adds `/metrics` with the text of `render`, in Prometheus' text format. It takes
    /// at most a tenth of one thread: a request waits for the text that is being rendered, and
    /// requests that wait share it. The requests are counted in `metrics`.
    pub fn metrics(
        mut self,
        metrics: &Metrics,
        render: impl Fn() -> String + Send + Sync + 'static,
    ) -> Self {
        let handler = Handler::Metrics(Rendering::new(render), metrics.clone());
        self.table.push(("/metrics", handler));
        self
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

    /// Adds the profiles of `--enable-profiling`, if it is set: `/debug/pprof/profile` and
    /// `/debug/pprof/heap`, of which one each is taken at a time.
    pub fn profiling(mut self, is_enabled: bool) -> Self {
        if !is_enabled {
            return self;
        }
        self.table.push(("/debug/pprof/profile", Handler::CpuProfile));
        self.table.push(("/debug/pprof/heap", Handler::HeapProfile));
        let index = "/debug/pprof/";
        self.on("/debug/pprof", |_| AdminResponse::redirect("/debug/pprof/".to_owned()))
            .on(index, |_| AdminResponse::text(StatusCode::OK, PROFILES))
    }

    async fn answer<B>(&self, request: Request<B>) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        let handler = self.table.iter().find(|(known, _)| *known == path);
        match handler.map(|(_, handler)| handler) {
            Some(Handler::Answer(answer)) => {
                let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
                let host = host.unwrap_or_default();
                answer(AdminRequest { query: query(&request), host }).into_response()
            }
            Some(Handler::Metrics(rendering, metrics)) => AdminResponse {
                content_type: "text/plain; version=0.0.4; charset=utf-8",
                ..AdminResponse::text(StatusCode::OK, scrape(rendering, metrics).await)
            }
            .into_response(),
            Some(Handler::CpuProfile) => profiling::cpu(query(&request)).await.into_response(),
            Some(Handler::HeapProfile) => profiling::heap(query(&request)).await.into_response(),
            None => {
                AdminResponse::text(StatusCode::NOT_FOUND, "404 page not found\n").into_response()
            }
        }
    }
}

fn query<B>(request: &Request<B>) -> &str {
    request.uri().query().unwrap_or_default()
}

/// The metrics of now. The request counts as in flight until it is answered or given up.
async fn scrape(rendering: &Rendering, metrics: &Metrics) -> Bytes {
    let in_flight = metrics.scrapes_in_flight();
    in_flight.increment(1.0);
    let _ended = scopeguard::guard((), |()| in_flight.decrement(1.0));
    let text = rendering.text().await;
    metrics.scrapes().increment(1);
    text
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
    /// The flag to change, without its hyphens.
    pub flag: &'static str,
    /// Address that was to be bound.
    pub address: SocketAddr,
    /// Error of the kernel.
    pub source: io::Error,
}

/// Which of a process's admin ports a server is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name in log lines and metrics.
    pub listener: &'static str,
    /// The flags that choose it.
    pub flags: ListenFlags,
    /// Address to listen on; port 0 is any free port.
    pub address: SocketAddr,
}

impl Port {
    fn fault(self, source: io::Error) -> BindError {
        BindError { flag: self.flags.at_fault(&source), address: self.address, source }
    }

    /// # Errors
    /// If the address cannot be bound. The error names the flag.
    fn bind(self) -> Result<TcpListener, BindError> {
        listen::tcp(self.address).map_err(|source| self.fault(source))
    }
}

/// A running server. It owns its task and its connections; dropping it ends them.
#[derive(Debug)]
pub struct AdminServer {
    local_address: SocketAddr,
    stop: watch::Sender<bool>,
    task: AbortOnDropHandle<()>,
}

impl AdminServer {
    /// Serves `routes` on a port. While the port cannot be bound, because another process has it,
    /// that is logged and part of `metrics`, and tried again. Panics outside a tokio runtime.
    pub fn start(port: Port, routes: Routes, metrics: &Metrics) -> Self {
        let unavailable = metrics.listener_unavailable(port.listener);
        let bound = port.bind();
        let bound = bound.and_then(|listener| match listener.local_addr() {
            Ok(local_address) => Ok((listener, local_address)),
            Err(source) => Err(port.fault(source)),
        });
        let (listener, local_address) = match bound {
            Ok((listener, local_address)) => (Some(listener), local_address),
            Err(error) => {
                let listener = port.listener;
                warn!(listener, %error, "a port is not available, will try again");
                unavailable.set(1.0);
                (None, port.address)
            }
        };
        let (stop, stopping) = watch::channel(false);
        let task = culvert_transport::task::owned(run(
            port,
            listener,
            unavailable,
            Arc::new(routes),
            stopping,
        ));
        Self { local_address, stop, task }
    }

    /// Address in use, with the port that the kernel chose for port 0. The address of the
    /// configuration if the port was not available at the start.
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// The server's task, to be supervised.
    pub fn task(&mut self) -> &mut AbortOnDropHandle<()> {
        &mut self.task
    }

    /// Takes no new connections, waits at most 1 s for unfinished responses, and ends.
    ///
    /// # Cancel safety
    /// Dropping the future ends all connections at once.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        let _ = timeout(STOP_TIMEOUT, &mut self.task).await;
    }
}

/// Completes when the server stops, or was dropped.
async fn stopping(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn run(
    port: Port,
    listener: Option<TcpListener>,
    unavailable: Gauge,
    routes: Arc<Routes>,
    mut stop: watch::Receiver<bool>,
) {
    let listener = match listener {
        Some(listener) => listener,
        None => tokio::select! {
            listener = bind_again(port) => listener,
            () = stopping(&mut stop) => return,
        },
    };
    unavailable.set(0.0);
    let mut acceptor = Acceptor::with_reserve(port.listener, listener);
    let mut connections = JoinSet::new();
    let mut by_age = VecDeque::new();
    loop {
        tokio::select! {
            (socket, _) = acceptor.accept() => {
                make_room(&mut by_age);
                let is_short = acceptor.is_short();
                let serving = serve(socket, is_short, Arc::clone(&routes), stop.clone());
                let limit = if is_short { SHORT_EXCHANGE_TIMEOUT } else { Duration::MAX };
                by_age.push_back(connections.spawn(async move {
                    if timeout(limit, serving).await.is_err() {
                        debug!("admin connection cut off: descriptors are short");
                    }
                }));
            }
            Some(_) = connections.join_next() => {
                // The descriptor that has become free.
                acceptor.is_short();
            }
            () = stopping(&mut stop) => break,
        }
    }
    drop(acceptor);
    while connections.join_next().await.is_some() {}
}

/// A listener on a port that was not available, once it is.
async fn bind_again(port: Port) -> TcpListener {
    let [mut interval, last] = BIND_INTERVALS;
    loop {
        sleep(interval).await;
        match port.bind() {
            Ok(bound) => {
                let Port { listener, address, .. } = port;
                info!(listener, %address, "a port is available again");
                return bound;
            }
            Err(error) => {
                debug!(listener = port.listener, %error, "a port is still not available");
                interval = last.min(interval * 2);
            }
        }
    }
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

/// Serves one connection; one request if descriptors are short.
async fn serve(
    stream: TcpStream,
    is_short: bool,
    routes: Arc<Routes>,
    mut stop: watch::Receiver<bool>,
) {
    let service = service_fn(move |request| {
        let routes = Arc::clone(&routes);
        async move { Ok::<_, Infallible>(routes.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(if is_short { SHORT_HEADER_READ_TIMEOUT } else { HEADER_READ_TIMEOUT })
        .keep_alive(!is_short)
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
        debug!(%error, "admin connection ended");
    }
}

#[cfg(test)]
mod tests;
