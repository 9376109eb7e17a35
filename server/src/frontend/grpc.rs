//! The gRPC frontend: `/ProxyService/Proxy`, as kube-apiserver's client library speaks it.
//!
//! Each `Proxy` stream carries one proxied connection; a connection of kube-apiserver may carry
//! many `Proxy` streams. There is no half-close: CLOSE_REQ and CLOSE_RSP end both directions, and
//! everything that was sent before them is still delivered.

mod answer;
mod connection;
mod counted;
pub(super) mod http2;
mod proxy;
mod received;
mod service;

use std::{pin::pin, sync::Arc, time::Duration};

use culvert_konnectivity::packet::Packet;
use culvert_transport::budget::{Held, Holder};
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
use http2::{Connection, SendStream, Shared};
use received::{FIRST_WINDOW, Received, StreamWindow};
use service::ProxyService;

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

/// Time for the answer to a ping.
const PONG_TIMEOUT: Duration = Duration::from_secs(20);

/// Why a connection of kube-apiserver ended early.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Http(#[from] http2::Error),
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
    let window = StreamWindow::new();
    let mut connection = Connection::new(socket, context.memory.clone(), FIRST_WINDOW);
    let shared = connection.shared().clone();
    let mut dead = pin!(until_dead(&shared, context.keep_alive_interval));
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
            () = &mut dead => return Err(Ended::Silent),
        }
    }
}

/// Answers the request of one stream.
fn serve_stream(
    mut request: Request<Received>,
    answer: SendStream,
    service: ProxyService,
    context: &FrontendContext,
) {
    let unread = request.body().holder().clone();
    let unsent = context.memory.holder(Held::Receive);
    request.extensions_mut().insert(StreamHolders { unread, unsent: unsent.clone() });
    context.tasks.spawn(async move {
        let response = Box::pin(service.call(request)).await;
        answer::send(response, answer, unsent).await;
    });
}

/// Completes when the peer of an idle connection does not answer a ping.
async fn until_dead(connection: &Shared, interval: Duration) {
    if interval.is_zero() {
        return std::future::pending().await;
    }
    loop {
        match interval.checked_sub(connection.silent_for()) {
            Some(left) if !left.is_zero() => sleep(left).await,
            _ => {
                if timeout(PONG_TIMEOUT, connection.ping()).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The answer to a dial on a stream that carries another connection.
fn second_dial_refused(random: i64) -> Packet {
    Packet::dial_response(random, Err("this stream carries another connection".into()))
}
