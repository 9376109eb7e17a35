//! Bridges to a Konnectivity server within this process, in paused time.

use std::{convert::Infallible, future::Ready, sync::Arc};

use bytes::Bytes;
use culvert_konnectivity::{
    codec::SmallBuffers,
    header,
    packet::{Packet, PacketMessage},
};
use culvert_transport::{RecvHalf, SendHalf, TunnelLost, control::ControlStream};
use culvert_wire::{
    CloseCode, InstanceId,
    bounded::Text,
    control::{ControlMessage, Hello, Welcome},
    dial::{DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message as _},
    identifiers::Identifiers,
    version::{Features, REVISION},
};
use http::{Request, Response};
use hyper::{body::Incoming, server::conn::http2 as server, service::service_fn};
use hyper_util::rt::TokioExecutor;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    sync::{Notify, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{
    Status, Streaming,
    body::Body,
    metadata::MetadataMap,
    server::{Grpc, StreamingService},
};

use super::*;

/// The call of an agent, as its server sees it.
struct AgentCall {
    metadata: MetadataMap,
    inbound: Streaming<Packet>,
    outbound: mpsc::Sender<Result<Packet, Status>>,
}

/// Handler of the method, in the form that tonic requires.
#[derive(Clone)]
struct Connect(mpsc::UnboundedSender<AgentCall>);

impl StreamingService<Packet> for Connect {
    type Response = Packet;
    type ResponseStream = ReceiverStream<Result<Packet, Status>>;
    type Future = Ready<Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Packet>>) -> Self::Future {
        let (outbound, packets) = mpsc::channel(4);
        let (metadata, _, inbound) = request.into_parts();
        self.0.send(AgentCall { metadata, inbound, outbound }).unwrap();
        let mut response = tonic::Response::new(ReceiverStream::new(packets));
        response.metadata_mut().insert(header::SERVER_ID, "server-0".parse().unwrap());
        response.metadata_mut().insert(header::SERVER_COUNT, 3.into());
        std::future::ready(Ok(response))
    }
}

async fn answer(
    request: Request<Incoming>,
    connect: Connect,
) -> Result<Response<Body>, Infallible> {
    Ok(Grpc::new(SmallBuffers).streaming(connect, request).await)
}

/// Serves a connection until `frozen` is notified. Then it stays open and is neither read nor
/// written.
async fn serve(io: DuplexStream, connect: Connect, frozen: Arc<Notify>) {
    let service = service_fn(move |request| answer(request, connect.clone()));
    let http = server::Builder::new(TokioExecutor::new());
    let mut connection = pin!(http.serve_connection(TokioIo::new(io), service));
    tokio::select! {
        _ = &mut connection => {}
        () = frozen.notified() => std::future::pending().await,
    }
}

/// The agent's end of a tunnel to a Konnectivity server, and the other end of its connection.
async fn connected(keep_alive_interval: Duration) -> (Tunnel, DuplexStream, TaskTracker) {
    let (near, far) = duplex(64 * 1024);
    let bridges = TaskTracker::new();
    let peer = Peer::local(Carrier::Grpc);
    let settings = Settings::default();
    let tunnel = bridge(near, peer, keep_alive_interval, &settings, &bridges).await.unwrap();
    (tunnel, far, bridges)
}

/// An agent that a Konnectivity server has welcomed.
struct Joined {
    tunnel: Tunnel,
    _control: ControlStream,
    welcome: Welcome,
    call: AgentCall,
    bridges: TaskTracker,
    frozen: Arc<Notify>,
    _server: AbortOnDropHandle<()>,
}

async fn hello(tunnel: &Tunnel) -> ControlStream {
    let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await.unwrap());
    let hello = Hello {
        revision: REVISION,
        features: Features::supported(),
        agent_id: "node-1".parse().unwrap(),
        instance: InstanceId([7; 16]),
        identifiers: Identifiers::default(),
        token: None,
        software: Text::truncated("test".into()),
        extensions: Extensions::default(),
    };
    control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
    control
}

async fn joined(keep_alive_interval: Duration) -> Joined {
    let (tunnel, far, bridges) = connected(keep_alive_interval).await;
    let (calls, mut called) = mpsc::unbounded_channel();
    let frozen = Arc::new(Notify::new());
    let server = culvert_transport::task::owned(serve(far, Connect(calls), frozen.clone()));
    let mut control = hello(&tunnel).await;
    let ControlMessage::Welcome(welcome) = control.next().await.unwrap() else { panic!() };
    let call = called.recv().await.unwrap();
    let (welcome, _server) = (*welcome, server);
    Joined { tunnel, _control: control, welcome, call, bridges, frozen, _server }
}

impl Joined {
    async fn send(&self, packet: Packet) {
        self.call.outbound.send(Ok(packet)).await.unwrap();
    }

    async fn packet(&mut self) -> PacketMessage {
        self.call.inbound.message().await.unwrap().expect("the call goes on").into()
    }
}

async fn read((_, recv): &mut (SendHalf, RecvHalf)) -> Bytes {
    let mut chunks = [Bytes::new()];
    assert_eq!(recv.read_chunks(&mut chunks).await, Ok(Some(1)));
    let [chunk] = chunks;
    chunk
}

#[tokio::test(start_paused = true)]
async fn the_call_has_the_agents_name_and_its_answer_becomes_the_welcome() {
    let joined = joined(Duration::ZERO).await;
    assert_eq!(joined.tunnel.carrier(), Carrier::Grpc);
    assert_eq!(joined.call.metadata.get(header::AGENT_ID).unwrap(), "node-1");
    let Welcome { server_id, server_count, features, .. } = &joined.welcome;
    assert_eq!((server_id.as_str(), *server_count), ("server-0", 3));
    assert_eq!(*features, Features::default(), "Konnectivity has none of them");
}

#[tokio::test(start_paused = true)]
async fn a_dial_becomes_a_stream_of_the_tunnel_and_its_bytes_pass_both_ways() {
    let mut joined = joined(Duration::ZERO).await;
    joined.send(Packet::dial_request(7, "tcp", "10.0.0.9:80".into())).await;
    let mut stream = joined.tunnel.accept().await.unwrap();
    let frame = stream.1.read_frame(DialRequest::MAX_LEN).await.unwrap();
    let request: DialRequest = frame.message().unwrap();
    assert_eq!(request.target.to_string(), "10.0.0.9:80");
    let (timing, extensions) = (DialTiming::default(), Extensions::default());
    let reply = DialReply { outcome: Ok(()), timing, extensions };
    stream.0.write_chunk(frame::encode(&reply).unwrap()).await.unwrap();
    let PacketMessage::Dialed(dialed) = joined.packet().await else { panic!("an answer") };
    assert_eq!((dialed.random, &*dialed.error), (7, ""));

    joined.send(Packet::data(dialed.connect_id, Bytes::from_static(b"question"))).await;
    assert_eq!(read(&mut stream).await, "question");
    stream.0.write_chunk(Bytes::from_static(b"reply")).await.unwrap();
    let PacketMessage::Data(data) = joined.packet().await else { panic!("bytes") };
    assert_eq!((data.connect_id, data.data), (dialed.connect_id, Bytes::from_static(b"reply")));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_the_agent_closes_ends_the_call_and_every_task() {
    let mut joined = joined(Duration::ZERO).await;
    joined.tunnel.close(CloseCode::DONE, "");
    assert!(joined.call.inbound.message().await.unwrap().is_none());
    drop(joined.call);
    joined.bridges.close();
    let closed = Instant::now();
    joined.bridges.wait().await;
    assert!(closed.elapsed() <= CLOSE_TIMEOUT * 3, "{:?}", closed.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_the_server_ends_closes_the_tunnel() {
    let joined = joined(Duration::ZERO).await;
    let AgentCall { outbound, inbound: _inbound, .. } = joined.call;
    drop(outbound);
    let TunnelLost::ClosedByPeer { code, .. } = joined.tunnel.closed().await else { panic!() };
    assert_eq!(code, CloseCode::SHUTDOWN);
}

#[tokio::test(start_paused = true)]
async fn a_status_of_the_server_cannot_pretend_to_be_another_line() {
    let joined = joined(Duration::ZERO).await;
    let AgentCall { outbound, inbound: _inbound, .. } = joined.call;
    let forged = Err(Status::internal(format!("\nINFO \u{2028}\u{202e}{}", "x".repeat(500))));
    outbound.send(forged).await.unwrap();
    let lost = joined.tunnel.closed().await;
    let TunnelLost::ClosedByPeer { reason, .. } = lost else { panic!("{lost:?}") };
    let start = "the server's stream failed: \\nINFO \\u{2028}\\u{202e}xxx";
    assert!(reason.as_str().starts_with(start), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_speak_http2_closes_the_tunnel_at_once() {
    let (tunnel, mut far, _bridges) = connected(Duration::ZERO).await;
    let begun = Instant::now();
    let _control = hello(&tunnel).await;
    far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    let lost = tunnel.closed().await;
    assert!(matches!(lost, TunnelLost::ClosedByPeer { .. }), "{lost:?}");
    assert_eq!(begun.elapsed(), Duration::ZERO);
    // The connection is closed too, once what was sent on it is read.
    far.read_to_end(&mut Vec::new()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_pinged_no_more_often_than_it_allows_and_then_lost() {
    for (interval, pinged_after) in [(1, 30), (45, 45)] {
        let joined = joined(Duration::from_secs(interval)).await;
        joined.frozen.notify_one();
        let begun = Instant::now();
        joined.tunnel.closed().await;
        let expected = Duration::from_secs(pinged_after) + KEEP_ALIVE_TIMEOUT;
        let late = begun.elapsed().abs_diff(expected);
        assert!(late < Duration::from_secs(1), "{:?}, not {expected:?}", begun.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn without_an_interval_no_server_is_pinged() {
    let joined = joined(Duration::ZERO).await;
    joined.frozen.notify_one();
    let day = Duration::from_secs(24 * 3600);
    assert!(timeout(day, joined.tunnel.closed()).await.is_err());
}
