//! The gRPC frontend: `/ProxyService/Proxy`, as kube-apiserver's client library speaks it.
//!
//! Each `Proxy` stream carries one proxied connection; a connection of kube-apiserver may carry
//! many `Proxy` streams. There is no half-close: CLOSE_REQ and CLOSE_RSP end both directions, and
//! everything that was sent before them is still delivered.

pub(super) mod authority;
mod connection;
mod counted;
mod proxy;
mod service;

use std::sync::Arc;

use culvert_konnectivity::packet::Packet;
use hyper::server::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{SetOnce, mpsc},
    time::timeout,
};
use tonic::Status;
use tracing::debug;

use super::FrontendContext;
use crate::metrics::FrontendRefusal;
use service::ProxyService;

/// Sends the packets of a `Proxy` stream to the frontend. An error ends the stream.
type Outbound = mpsc::Sender<Result<Packet, Status>>;

/// Maximum number of bytes that a `Proxy` stream may be ahead of its target. They wait in the HTTP/2
/// library and are not counted, so they are few. Not fewer, because what a frontend has written and
/// the window holds back is lost when its target ends first. Mostly kube-apiserver has
/// a connection for each stream.
const STREAM_WINDOW: u32 = 512 * 1024;
/// Maximum number of bytes that wait in the HTTP/2 library for a `Proxy` stream's frontend.
const SEND_BUFFER: usize = 64 * 1024;
/// Maximum number of bytes that all `Proxy` streams of a connection may be ahead of their targets.
/// The HTTP/2 library ends connections whose unread small frames add up to half of it.
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Maximum number of open `Proxy` streams of one connection; grpc-go's own server has no limit.
const MAX_STREAMS: u32 = 10_000;

/// Serves one connection of kube-apiserver until it is closed. One that does not begin a dial in
/// time is closed. Once the server stops, it takes no more streams.
pub(super) async fn serve<S>(socket: S, context: Arc<FrontendContext>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS);
    if !context.keep_alive_interval.is_zero() {
        http.keep_alive_interval(context.keep_alive_interval);
    }
    let (stopping, has_dialed) = (context.stopping.clone(), Arc::new(SetOnce::new()));
    let io = TokioIo::new(authority::legalized(socket));
    let service = ProxyService::new(context.clone(), has_dialed.clone());
    let mut connection = std::pin::pin!(http.serve_connection(io, service));
    let silent = async {
        if timeout(context.header_timeout, has_dialed.wait()).await.is_ok() {
            std::future::pending().await
        }
    };
    let ended = tokio::select! {
        ended = &mut connection => ended,
        () = silent => {
            context.metrics.frontend_refused(FrontendRefusal::TimedOut);
            return debug!("a gRPC frontend did not ask in time");
        }
        () = stopping.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!(%error, "a gRPC frontend's connection ended");
    }
}

/// The answer to a dial on a stream that carries another connection.
fn second_dial_refused(random: i64) -> Packet {
    Packet::dial_response(random, Err("this stream carries another connection".into()))
}
