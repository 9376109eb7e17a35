//! ServerTunnels that have not been upgraded: `AgentService/Connect`, as Konnectivity's own agent speaks it.
//!
//! The call becomes a tunnel whose server is a bridge in this process; everything on this side of the
//! tunnel goes on as with a server of ours. Until the server is upgraded, its connections still share
//! one stream with one another on the network.

mod bridge;
mod call;

use std::time::Duration;

use culvert_transport::{
    Carrier, ConnectError, Settings, TransportFault, Tunnel, memory::Pair, tcp::Connected,
};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};

/// Bytes a server may be ahead of what was read of its one stream. What is on its way delays whatever
/// comes behind it, so this is no larger than 100 Mbit/s need at 80 ms.
const WINDOW: u32 = 1024 * 1024;
/// A Konnectivity server ends connections that are pinged more often.
const LEAST_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Time for the answer to a ping; Konnectivity's value.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// Makes a tunnel of a connection on which HTTP/2 was agreed on. The call itself is made with the
/// tunnel's hello, and its answer is the welcome.
///
/// # Errors
/// When HTTP/2 is not what the server speaks.
pub(crate) async fn connect(
    connected: Connected,
    keep_alive_interval: Duration,
    settings: &Settings,
) -> Result<Tunnel, ConnectError> {
    let (stream, peer) = connected.into_parts(Carrier::Grpc);
    let keep_alive = (!keep_alive_interval.is_zero())
        .then(|| keep_alive_interval.max(LEAST_KEEP_ALIVE_INTERVAL));
    let (requests, connection) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .keep_alive_interval(keep_alive)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| TransportFault::Protocol(error.to_string()))?;
    // The server opens streams, and nobody else does.
    let one = Settings { max_streams: 1, ..*settings };
    let ends = Pair::without_idle_timeout(peer, settings, &one).await?;
    // Its fault, if it has one, is the stream's as well. It lives as long as somebody may call.
    tokio::spawn(async move { drop(connection.await) });
    tokio::spawn(bridge::run(ends.server, requests));
    Ok(ends.agent)
}
