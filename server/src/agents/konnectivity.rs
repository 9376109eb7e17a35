//! Konnectivity agents: `AgentService/Connect`, as Konnectivity's own server speaks it.
//!
//! Each call becomes a tunnel whose agent's end is a bridge within this process; behind the tunnel
//! everything works as with an agent of ours. On the network the connections of such an agent
//! still share one stream with one another.

mod bridge;
mod hello;
mod keepalive;

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use culvert_konnectivity::{
    self as konnectivity, CONNECT, Outbound, Packets, Partial,
    codec::{MAX_PACKET_LEN, SmallBuffers},
    header,
    packet::Packet,
};
use culvert_process::rate_limited;
use culvert_transport::{budget::StreamMemory, qmux::Peer};
use culvert_wire::{control::Hello, identifiers::MAX_IDENTIFIERS};
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{net::TcpStream, time::sleep};
use tokio_rustls::server::TlsStream;
use tokio_stream::{StreamExt as _, adapters::Map};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status, Streaming,
    body::Body,
    metadata::{MetadataMap, MetadataValue},
    server::{Grpc, StreamingService},
};
use tracing::debug;

use super::{
    AgentContext,
    admission::{Authenticated, Proof, Refusal},
    join::{self, JoinError},
    unadmitted::{Attempt, Limited, Source},
};
use bridge::Bridge;
use keepalive::{MIN_PING_INTERVAL, PingLimit, TooManyPings};

/// Maximum number of bytes that an agent may be ahead of what was read of its one stream. Bytes in
/// flight delay all that follow, so this is no larger than 100 Mbit/s need at 80 ms.
const WINDOW: u32 = 1024 * 1024;
/// Maximum number of bytes that wait in the HTTP/2 library for a peer that does not read, before it
/// takes no more. They are not counted in the process's memory.
const SEND_BUFFER: usize = 64 * 1024;
/// Maximum number of `Connect` calls on one connection at once, and in all before one was admitted:
/// Konnectivity makes one.
const MAX_CALLS: u32 = 4;

/// Time for which an agent that is connected already waits when it connects again. One that looks
/// for another server leaves before: it recognizes this one by its name.
const REJOIN_DELAY: Duration = Duration::from_secs(1);

/// Serves one connection of a Konnectivity agent until it is closed or the server stops. The agent
/// has to be admitted within the attempt's time.
pub(super) async fn serve(
    stream: Limited<TlsStream<TcpStream>>,
    peer: Peer,
    attempt: Attempt,
    context: Arc<AgentContext>,
) {
    let remote = peer.address;
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_send_buf_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_CALLS)
        // A Konnectivity agent answers pings and sends none for an hour.
        .keep_alive_interval(context.konnectivity_keep_alive_interval)
        .keep_alive_timeout(context.settings.idle_timeout);
    let closing = context.closing.clone();
    let (attempt, too_many_pings) = (Arc::new(attempt), CancellationToken::new());
    let io = TokioIo::new(PingLimit::new(stream, MIN_PING_INTERVAL, too_many_pings.clone()));
    let connect = Connect {
        peer,
        context: context.clone(),
        attempt: attempt.clone(),
        calls: Arc::default(),
        too_many_pings: too_many_pings.clone(),
    };
    let service = service_fn(move |request| answer(request, connect.clone()));
    let mut connection = std::pin::pin!(http.serve_connection(io, service));
    let until_closed = async {
        tokio::select! {
            biased;
            ended = &mut connection => ended,
            () = closing.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        }
    };
    let ended = tokio::select! {
        biased;
        error = attempt.failed() => Err(error),
        ended = until_closed => Ok(ended),
    };
    match ended {
        Err(error) => join::record_failure(remote, &error, &context),
        Ok(_) if too_many_pings.is_cancelled() => log_too_many_pings(remote),
        Ok(Err(error)) => debug!(%remote, %error, "a Konnectivity agent's connection ended"),
        Ok(Ok(())) => {}
    }
}

fn log_too_many_pings(remote: SocketAddr) {
    rate_limited!(
        Duration::from_secs(1), per source = Source::of(remote.ip()), at most 32 in all, WARN,
        %remote, reason = %TooManyPings,
        "a Konnectivity agent was sent away"
    );
}

fn log_left_out(hello: &Hello, left_out: usize) {
    rate_limited!(
        Duration::from_secs(10), per agent_id = hello.agent_id, at most 32 in all, WARN,
        left_out, most = MAX_IDENTIFIERS,
        "a Konnectivity agent announces more identifiers, or longer ones, than are kept"
    );
}

async fn answer(
    request: Request<Incoming>,
    connect: Connect,
) -> Result<Response<Body>, Infallible> {
    if request.uri().path() != CONNECT {
        let status = Status::unimplemented(format!("unknown method {}", request.uri().path()));
        return Ok(status.into_http());
    }
    let mut grpc = Grpc::new(SmallBuffers).max_decoding_message_size(MAX_PACKET_LEN);
    let memory = StreamMemory::of(&connect.context.memory);
    let request = request.map(|body| Partial::new(body, memory));
    Ok(grpc.streaming(connect, request).await)
}

/// Handler of the method, in the form that tonic requires.
#[derive(Clone)]
struct Connect {
    peer: Peer,
    context: Arc<AgentContext>,
    attempt: Arc<Attempt>,
    /// Number of calls before one was admitted.
    calls: Arc<AtomicU32>,
    /// Cancelled when the connection ends because of too many pings.
    too_many_pings: CancellationToken,
}

type PacketResults = Map<Packets, fn(Packet) -> Result<Packet, Status>>;

impl StreamingService<Packet> for Connect {
    type Response = Packet;
    type ResponseStream = PacketResults;
    type Future =
        Pin<Box<dyn Future<Output = Result<tonic::Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: tonic::Request<Streaming<Packet>>) -> Self::Future {
        let Self { peer, context, attempt, calls, too_many_pings } = self.clone();
        Box::pin(async move {
            if !attempt.is_admitted() && calls.fetch_add(1, Ordering::Relaxed) >= MAX_CALLS {
                attempt.exceed();
                return Err(Status::resource_exhausted("too many calls"));
            }
            let (metadata, _, inbound) = request.into_parts();
            let (hello, left_out) = hello::read(&metadata).map_err(|fault| {
                join::record_failure(peer.address, &JoinError::Metadata(fault.clone()), &context);
                Status::unknown(fault)
            })?;
            let authenticated = admit(&metadata, &peer, &context).await?;
            if left_out > 0 {
                log_left_out(&hello, left_out);
            }
            attempt.admit();
            // The headers are out before any packet: packets are polled from the response.
            let (outbound, packets) = konnectivity::outbound();
            let response = response(packets, &context)?;
            let stream = AgentStream { inbound, outbound, too_many_pings };
            if context.backends.is_here(&hello.agent_id) {
                let tasks = context.tasks.clone();
                tasks.spawn(join_again(hello, authenticated, peer, context, stream));
            } else {
                let joined = Bridge::join(hello, authenticated, peer, &context).await;
                let bridge = joined.map_err(|error| Status::unknown(error.to_string()))?;
                context.tasks.spawn(bridge.run(stream));
            }
            Ok(response)
        })
    }
}

/// Checks the agent's token, where one is required, before any packet is sent.
async fn admit(
    metadata: &MetadataMap,
    peer: &Peer,
    context: &AgentContext,
) -> Result<Authenticated, Status> {
    let authenticated = async {
        let token = match context.authenticator.needs_tokens() {
            true => hello::token(metadata).map_err(Refusal::NotAToken)?,
            false => None,
        };
        let proof = Proof {
            certificates: peer.certificates.as_deref(),
            token: token.as_ref(),
            remote: peer.address.ip(),
            is_admitted: false,
        };
        context.authenticator.admit(proof).await
    };
    authenticated.await.map_err(|refusal: Refusal| {
        let status = Status::unknown(public_message(&refusal));
        join::record_failure(peer.address, &refusal.into(), context);
        status
    })
}

/// Konnectivity's text for this case, without what kube-apiserver answered and without the names of
/// accounts: those are in this server's log alone.
fn public_message(refusal: &Refusal) -> String {
    const FIXED: [&str; 3] = [
        "service account jwt not valid",
        "unexpected username format",
        "username returned is not a service account",
    ];
    const FAILED: &str = "Failed to validate authentication token, err:";
    match refusal {
        Refusal::NotReviewed(_) | Refusal::NoTurn(_) | Refusal::NodeUnknown(_) => {
            format!("{FAILED}Failed to authenticate request")
        }
        Refusal::Invalid(reason) | Refusal::Refused(reason)
            if !FIXED.contains(&reason.as_str()) =>
        {
            format!("{FAILED}lookup failed")
        }
        _ => refusal.konnectivity_message(),
    }
}

/// Both directions of one agent's call.
#[derive(Debug)]
struct AgentStream {
    inbound: Streaming<Packet>,
    outbound: Outbound,
    /// Cancelled when the agent's connection ends because of too many pings.
    too_many_pings: CancellationToken,
}

/// The response to a call: metadata about this server, and then packets.
fn response(
    packets: Packets,
    context: &AgentContext,
) -> Result<tonic::Response<PacketResults>, Status> {
    let packets: PacketResults = packets.map(Ok);
    let mut response = tonic::Response::new(packets);
    let metadata = response.metadata_mut();
    let server_id = MetadataValue::try_from(context.server_id.as_str())
        .map_err(|_| Status::unknown("the server's name is no header value"))?;
    metadata.insert(header::SERVER_ID, server_id);
    metadata.insert(header::SERVER_COUNT, context.server_count.into());
    Ok(response)
}

/// Serves an agent that is connected already, unless it leaves as soon as it has seen this server's
/// name. Dials would go to its newest tunnel, and be lost with it.
async fn join_again(
    hello: Hello,
    authenticated: Authenticated,
    peer: Peer,
    context: Arc<AgentContext>,
    stream: AgentStream,
) {
    tokio::select! {
        () = stream.outbound.closed() => return,
        () = context.closing.cancelled() => return,
        () = context.backends.until_left(&hello.agent_id) => {}
        () = sleep(REJOIN_DELAY) => {}
    }
    match Bridge::join(hello, authenticated, peer, &context).await {
        Ok(bridge) => bridge.run(stream).await,
        Err(error) => debug!(%error, "a Konnectivity agent did not join again"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_agent_is_sent_konnectivitys_words_and_nothing_of_kube_apiserver() {
        let message = |refusal: Refusal| public_message(&refusal);
        let failed = |end: &str| format!("Failed to validate authentication token, err:{end}");
        let cases = [
            (Refusal::NoToken, "Authentication context was not found in metadata".into()),
            (
                Refusal::Refused("service account jwt not valid".into()),
                failed("lookup failed: service account jwt not valid"),
            ),
            (Refusal::Refused("incoming request from \"a\"".into()), failed("lookup failed")),
            (
                Refusal::NotReviewed("tokenreviews is forbidden".into()),
                failed("Failed to authenticate request"),
            ),
        ];
        for (refusal, expected) in cases {
            assert_eq!(message(refusal), expected);
        }
    }
}
