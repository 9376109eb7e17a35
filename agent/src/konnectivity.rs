//! Konnectivity servers: `AgentService/Connect`, as Konnectivity's own agent speaks it.
//!
//! The call becomes a tunnel whose other end is a bridge in this process, and the agent serves that
//! tunnel like any other. Until the server is upgraded, its connections still share one gRPC stream
//! on the network.

mod bridge;
mod call;

use std::{pin::pin, time::Duration};

use culvert_transport::{
    Carrier, ConnectError, Settings, TransportFault, Tunnel,
    memory::{self, Ends},
    qmux::Peer,
    tcp::Connected,
};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::task::TaskTracker;
use tracing::debug;

/// Flow-control window of the gRPC stream, in bytes. What is in flight delays all that follows, so
/// this is no larger than 100 Mbit/s need at 80 ms.
const WINDOW: u32 = 1024 * 1024;
/// Maximum number of bytes that wait in the HTTP/2 library for a peer that does not read, before it
/// takes no more. They are not counted in the process's memory.
const SEND_BUFFER: usize = 64 * 1024;
/// Minimum interval of pings: a Konnectivity server ends connections that are pinged more often.
const LEAST_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// Time for the answer to a ping; Konnectivity's value.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Time for an HTTP/2 connection to close in order once its bridge has ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Makes a tunnel of a connection on which HTTP/2 was agreed. The call is made with the tunnel's
/// hello, and its answer becomes the welcome.
///
/// All tasks of the connection run in `bridges` and end within seconds of the tunnel.
///
/// # Errors
/// When the connection fails at once. That the server does not speak HTTP/2 is found out by the
/// call, which closes the tunnel.
///
/// # Cancel safety
/// Cancel safe: dropping the future closes the connection.
pub(crate) async fn connect(
    connected: Connected,
    keep_alive_interval: Duration,
    settings: &Settings,
    bridges: &TaskTracker,
) -> Result<Tunnel, ConnectError> {
    let (stream, peer) = connected.into_parts(Carrier::Grpc);
    bridge(stream, peer, keep_alive_interval, settings, bridges).await
}

/// Makes the tunnel on the byte stream to `peer`.
async fn bridge<IO>(
    stream: IO,
    peer: Peer,
    keep_alive_interval: Duration,
    settings: &Settings,
    bridges: &TaskTracker,
) -> Result<Tunnel, ConnectError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let keep_alive = (!keep_alive_interval.is_zero())
        .then(|| keep_alive_interval.max(LEAST_KEEP_ALIVE_INTERVAL));
    let (requests, connection) = http2::Builder::new(Spawner(bridges.clone()))
        .timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(keep_alive)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|error| TransportFault::Protocol(error.to_string()))?;
    // The agent opens the control stream; only the server opens others.
    let control_only = Settings { max_streams: 1, ..*settings };
    let remote = peer.address;
    let Ends { agent, server } = memory::connect(peer, settings, &control_only).await?;
    bridges.spawn(async move {
        let mut connection = Box::pin(connection);
        let mut bridge = pin!(bridge::run(server, requests));
        tokio::select! {
            () = &mut bridge => {
                // The bridge has dropped the last request handle, so the connection closes by
                // itself.
                let _ = timeout(CLOSE_TIMEOUT, connection).await;
            }
            ended = &mut connection => {
                if let Err(error) = ended {
                    debug!(%remote, %error, "a Konnectivity server's connection failed");
                }
                // A call that waits for the connection fails only now. A call that was sent has
                // failed already.
                drop(connection);
                bridge.await;
            }
        }
    });
    Ok(agent)
}

/// Spawns the tasks of an HTTP/2 connection where its bridge runs.
#[derive(Clone, Debug)]
struct Spawner(TaskTracker);

impl<F: Future<Output: Send> + Send + 'static> hyper::rt::Executor<F> for Spawner {
    fn execute(&self, task: F) {
        self.0.spawn(task);
    }
}

#[cfg(test)]
mod tests;
