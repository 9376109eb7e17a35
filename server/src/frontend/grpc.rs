//! The gRPC frontend: `/ProxyService/Proxy`, as kube-apiserver's client library speaks it.
//!
//! Each `Proxy` stream carries one proxied connection; a connection of kube-apiserver may carry
//! many `Proxy` streams. There is no half-close: CLOSE_REQ and CLOSE_RSP end both directions, and
//! everything that was sent before them is still delivered.

mod connection;
mod counted;
mod proxy;
mod received;
mod service;

use std::{pin::pin, sync::Arc, time::Duration};

use culvert_konnectivity::packet::Packet;
use culvert_transport::budget::Held;
use http::Request;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{SetOnce, mpsc},
    time::timeout,
};
use tonic::{Status, Streaming};
use tracing::debug;

use super::FrontendContext;
use crate::{
    http2::{self, Connection, Holders, Limits, SendStream, answer},
    metrics::FrontendRefusal,
};
use received::{FIRST_WINDOW, Received, StreamWindow};
use service::ProxyService;

/// Sends the packets of a `Proxy` stream to the frontend. An error ends the stream.
type Outbound = mpsc::Sender<Result<Packet, Status>>;

/// A `Proxy` stream.
struct ProxyStream {
    inbound: Streaming<Packet>,
    outbound: Outbound,
    holders: Holders,
}

/// Time for the answer to a ping.
const PONG_TIMEOUT: Duration = Duration::from_secs(20);

/// What a frontend may have HTTP/2 do and hold. grpc-go's own server has no limit of streams.
const LIMITS: Limits = Limits {
    streams: 10_000,
    stream_window: FIRST_WINDOW,
    connection_window: 4 * 1024 * 1024,
    unread: Held::Send,
};

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
) -> Result<(), http2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let window = StreamWindow::new();
    let mut connection = Connection::new(socket, context.memory.clone(), &LIMITS);
    let shared = connection.shared().clone();
    let interval = Some(context.keep_alive_interval).filter(|interval| !interval.is_zero());
    let mut dead = pin!(shared.until_dead(interval, PONG_TIMEOUT));
    let service = ProxyService::new(context.clone(), has_dialed.clone());
    let mut is_stopping = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted.transpose()? {
                Some((request, answer)) => {
                    let request = request.map(|stream| Received::new(stream, window.clone()));
                    serve_stream(request, answer, service.clone(), context);
                }
                None => return Ok(()),
            },
            () = window.changed() => {
                // Refused while another setting is on its way: a later read tries again.
                if let Some(wanted) = window.wanted()
                    && !connection.set_window(wanted)
                {
                    window.not_set();
                }
            }
            () = context.stopping.cancelled(), if !is_stopping => {
                is_stopping = true;
                connection.shut_down();
            }
            () = &mut dead => return Err(http2::Error::Silent),
        }
    }
}

/// Answers the request of one stream.
fn serve_stream(
    mut request: Request<Received>,
    stream: SendStream,
    service: ProxyService,
    context: &FrontendContext,
) {
    let unread = request.body().holder().clone();
    let unsent = context.memory.holder(Held::Receive);
    request.extensions_mut().insert(Holders { unread, unsent: unsent.clone() });
    context.tasks.spawn(async move {
        let response = Box::pin(service.call(request)).await;
        let cut = unsent.clone();
        answer::send(response, stream, unsent, cut.cut()).await;
    });
}

/// The answer to a dial on a stream that carries another connection.
fn second_dial_refused(random: i64) -> Packet {
    Packet::dial_response(random, Err("this stream carries another connection".into()))
}
