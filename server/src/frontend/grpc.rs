//! The gRPC frontend: `/ProxyService/Proxy`, as kube-apiserver's client library speaks it.
//!
//! Each `Proxy` stream carries one proxied connection; a connection of kube-apiserver may carry
//! many `Proxy` streams. There is no half-close: CLOSE_REQ and CLOSE_RSP end both directions, and
//! everything that was sent before them is still delivered.

mod answer;
pub(super) mod authority;
mod connection;
mod counted;
mod proxy;
mod received;
mod service;
mod unread;

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use culvert_konnectivity::packet::Packet;
use culvert_transport::budget::{Held, Holder};
use h2::{Ping, PingPong, server::SendResponse};
use http::Request;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{SetOnce, mpsc},
    time::{sleep, timeout},
};
use tonic::{Status, Streaming};
use tracing::debug;

use super::FrontendContext;
use crate::metrics::FrontendRefusal;
use received::{FIRST_WINDOW, Received, StreamWindow};
use service::ProxyService;
use unread::Unread;

/// Sends the packets of a `Proxy` stream to the frontend. An error ends the stream.
type Outbound = mpsc::Sender<Result<Packet, Status>>;

/// What holds the bytes of a `Proxy` stream that wait in HTTP/2.
#[derive(Clone, Debug)]
struct StreamHolders {
    /// Those that the frontend has sent and the stream has not read.
    unread: Arc<Holder>,
    /// Those that the frontend has not taken.
    unsent: Arc<Holder>,
}

impl StreamHolders {
    /// Completes when the stream is to give up what it holds.
    ///
    /// # Cancel safety
    /// Cancel safe.
    async fn cut(&self) {
        tokio::select! {
            () = self.unread.cut() => {}
            () = self.unsent.cut() => {}
        }
    }
}

/// A `Proxy` stream.
struct ProxyStream {
    inbound: Streaming<Packet>,
    outbound: Outbound,
    holders: StreamHolders,
}

/// Maximum number of bytes that wait in the HTTP/2 library for a `Proxy` stream's frontend before it
/// takes no more.
const SEND_BUFFER: usize = 64 * 1024;
/// Maximum number of bytes that all `Proxy` streams of a connection may be ahead of their targets.
/// The HTTP/2 library ends connections whose unread small frames add up to half of it.
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Maximum number of open `Proxy` streams of one connection; grpc-go's own server has no limit.
const MAX_STREAMS: u32 = 10_000;
/// Maximum length of a request's header fields, in bytes.
const MAX_HEADERS_LEN: u32 = 16 * 1024;
/// Time for the answer to a ping.
const PONG_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a connection of kube-apiserver ended early.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Http(#[from] h2::Error),
    #[error("a ping was not answered within {PONG_TIMEOUT:?}")]
    Silent,
}

/// Serves one connection of kube-apiserver until it is closed. One that does not begin a dial in
/// time is closed. Once the server stops, it takes no more streams.
pub(super) async fn serve<S>(socket: S, context: Arc<FrontendContext>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let has_dialed = Arc::new(SetOnce::new());
    let silent = async {
        if timeout(context.header_timeout, has_dialed.wait()).await.is_ok() {
            std::future::pending().await
        }
    };
    tokio::select! {
        ended = serve_streams(socket, &context, &has_dialed) => if let Err(error) = ended {
            debug!(%error, "a gRPC frontend's connection ended");
        },
        () = silent => {
            context.metrics.frontend_refused(FrontendRefusal::TimedOut);
            debug!("a gRPC frontend did not ask in time");
        }
    }
}

/// Serves the streams of a connection, each in tasks of its own.
async fn serve_streams<S>(
    socket: S,
    context: &Arc<FrontendContext>,
    has_dialed: &Arc<SetOnce<()>>,
) -> Result<(), Ended>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (unread, window) = (Unread::new(context.memory.clone()), StreamWindow::new());
    let io = unread::counted(authority::legalized(socket), unread.clone());
    let mut connection = h2::server::Builder::new()
        .initial_window_size(FIRST_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS_LEN)
        .handshake(io)
        .await?;
    let pings = connection.ping_pong().expect("it is taken once");
    let mut dead = pin!(until_dead(pings, context.keep_alive_interval, &unread));
    let service = ProxyService::new(context.clone(), has_dialed.clone());
    let mut is_stopping = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted.transpose()? {
                Some((request, respond)) => {
                    let request = request
                        .map(|stream| Received::new(stream, unread.clone(), window.clone()));
                    serve_stream(request, respond, service.clone(), context);
                }
                None => return Ok(()),
            },
            () = window.changed() => {
                // Refused while another setting is on its way: a later read tries again.
                if let Some(wanted) = window.wanted()
                    && connection.set_initial_window_size(wanted).is_err()
                {
                    window.not_set();
                }
            }
            () = context.stopping.cancelled(), if !is_stopping => {
                is_stopping = true;
                connection.graceful_shutdown();
            }
            () = &mut dead => return Err(Ended::Silent),
        }
    }
}

/// Answers the request of one stream.
fn serve_stream(
    mut request: Request<Received>,
    respond: SendResponse<Bytes>,
    service: ProxyService,
    context: &FrontendContext,
) {
    let unread = request.body().holder().clone();
    let unsent = context.memory.holder(Held::Receive);
    request.extensions_mut().insert(StreamHolders { unread, unsent: unsent.clone() });
    context.tasks.spawn(async move {
        let response = Box::pin(service.call(request)).await;
        answer::send(response, respond, unsent).await;
    });
}

/// Completes when the peer of an idle connection does not answer a ping.
async fn until_dead(mut pings: PingPong, interval: Duration, unread: &Unread) {
    if interval.is_zero() {
        return std::future::pending().await;
    }
    loop {
        match interval.checked_sub(unread.silent_for()) {
            Some(left) if !left.is_zero() => sleep(left).await,
            _ => match timeout(PONG_TIMEOUT, pings.ping(Ping::opaque())).await {
                Ok(Ok(_)) => {}
                // The connection has ended.
                Ok(Err(_)) => std::future::pending().await,
                Err(_) => return,
            },
        }
    }
}

/// The answer to a dial on a stream that carries another connection.
fn second_dial_refused(random: i64) -> Packet {
    Packet::dial_response(random, Err("this stream carries another connection".into()))
}
