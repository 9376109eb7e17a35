//! gRPC, packet by packet, for tests that need more control than Konnectivity's client gives.

use std::io;

use bytes::Bytes;
use culvert_konnectivity::packet::{CloseRequest, Data, DialRequest, Packet, PacketType, Payload};
use http::uri::PathAndQuery;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Streaming, body::Body, client::Grpc};
use tonic_prost::ProstCodec;

use super::connect::{ConnectError, Refused};

/// Number of bytes that the server may be ahead of a stream's reader: that of grpc-go at first.
const WINDOW: u32 = 64 * 1024;

/// A connection to the gRPC frontend that can carry many `Proxy` streams.
#[derive(Debug)]
pub struct Client {
    requests: http2::SendRequest<Body>,
    _driver: AbortOnDrop,
}

#[derive(Debug)]
struct AbortOnDrop(AbortOnDropHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// Starts HTTP/2 on a connected socket.
    ///
    /// # Errors
    /// When the frontend does not speak HTTP/2.
    pub async fn connect<S>(socket: S) -> io::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (requests, driver) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(WINDOW)
            // The library ends connections whose unread small frames add up to half of it.
            .initial_connection_window_size(16 * 1024 * 1024)
            .handshake(TokioIo::new(socket))
            .await
            .map_err(io::Error::other)?;
        let driver = culvert_transport::task::owned(async move { drop(driver.await) });
        Ok(Self { requests, _driver: AbortOnDrop(driver) })
    }

    /// Begins a `Proxy` stream.
    ///
    /// # Errors
    /// When the frontend refuses it.
    pub async fn proxy(&self) -> io::Result<ProxyStream> {
        self.call("/ProxyService/Proxy").await
    }

    /// Begins a stream of packets to some method.
    ///
    /// # Errors
    /// When the frontend refuses it.
    pub async fn call(&self, method: &'static str) -> io::Result<ProxyStream> {
        self.begin(method, None).await
    }

    /// Begins a `Proxy` stream with this packet: a Konnectivity server answers nothing, not even
    /// the call, before it has a packet to send.
    async fn proxy_with(&self, first: Packet) -> io::Result<ProxyStream> {
        self.begin("/ProxyService/Proxy", Some(first)).await
    }

    async fn begin(&self, method: &'static str, first: Option<Packet>) -> io::Result<ProxyStream> {
        let origin = http::Uri::from_static("http://localhost");
        let service = Requests(self.requests.clone());
        let mut grpc =
            Grpc::with_origin(service, origin).max_decoding_message_size(8 * 1024 * 1024);
        grpc.ready().await.map_err(io::Error::other)?;
        let (outbound, packets) = mpsc::channel(4);
        if let Some(first) = first {
            outbound.send(first).await.map_err(io::Error::other)?;
        }
        let request = tonic::Request::new(ReceiverStream::new(packets));
        let path = PathAndQuery::from_static(method);
        let response = grpc.streaming(request, path, ProstCodec::default()).await;
        let inbound = response.map_err(io::Error::other)?.into_inner();
        Ok(ProxyStream { outbound, inbound })
    }
}

/// Hyper's request sender as the service that tonic needs.
#[derive(Clone, Debug)]
struct Requests(http2::SendRequest<Body>);

impl tower_service::Service<http::Request<Body>> for Requests {
    type Response = http::Response<hyper::body::Incoming>;
    type Error = hyper::Error;
    type Future =
        std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(
        &mut self,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// One `Proxy` stream. Dropping it cancels it.
#[derive(Debug)]
pub struct ProxyStream {
    outbound: mpsc::Sender<Packet>,
    inbound: Streaming<Packet>,
}

impl ProxyStream {
    /// Sends a packet.
    ///
    /// # Errors
    /// When the stream is over.
    pub async fn send(&self, packet: Packet) -> io::Result<()> {
        self.outbound.send(packet).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// The frontend's next packet; `None` when it ended the stream with OK.
    ///
    /// # Errors
    /// When it ended the stream with another status.
    pub async fn next(&mut self) -> io::Result<Option<Packet>> {
        self.inbound.message().await.map_err(|status| io::Error::other(status.to_string()))
    }

    /// Ends this side of the stream; the packets until the frontend ends the other.
    ///
    /// # Errors
    /// When it ends with another status than OK.
    pub async fn half_close(self) -> io::Result<Vec<Packet>> {
        let Self { outbound, mut inbound } = self;
        drop(outbound);
        let mut packets = Vec::new();
        while let Some(packet) =
            inbound.message().await.map_err(|status| io::Error::other(status.to_string()))?
        {
            packets.push(packet);
        }
        Ok(packets)
    }
}

/// A packet that dials a target.
pub fn dial_request(random: i64, target: &str) -> Packet {
    let request = DialRequest { protocol: "tcp".into(), address: target.into(), random };
    Packet { r#type: PacketType::DialReq.into(), payload: Some(Payload::DialRequest(request)) }
}

/// A packet with bytes of a connection.
pub fn data(connect_id: i64, data: impl Into<Bytes>) -> Packet {
    let data = Data { connect_id, error: String::new(), data: data.into() };
    Packet { r#type: PacketType::Data.into(), payload: Some(Payload::Data(data)) }
}

/// A packet that closes a connection.
pub fn close_request(connect_id: i64) -> Packet {
    let request = CloseRequest { connect_id };
    Packet { r#type: PacketType::CloseReq.into(), payload: Some(Payload::CloseRequest(request)) }
}

/// One proxied connection on a `Proxy` stream and a socket of its own, as the Konnectivity client
/// has it.
#[derive(Debug)]
pub struct ProxyConnection {
    stream: ProxyStream,
    connect_id: i64,
    closed: bool,
    _client: Client,
}

impl ProxyConnection {
    /// Dials `target` on a fresh socket.
    ///
    /// # Errors
    /// When the frontend cannot be reached, or refuses the dial.
    pub async fn dial<S>(socket: S, target: &str) -> Result<Self, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let client = Client::connect(socket).await?;
        let random = fastrand::i64(1..);
        let mut stream = client.proxy_with(dial_request(random, target)).await?;
        let answer = stream.next().await?.and_then(|packet| packet.payload);
        let Some(Payload::DialResponse(response)) = answer else {
            return Err(io::Error::other(format!("no answer to a dial: {answer:?}")).into());
        };
        if response.random != random {
            return Err(io::Error::other("the answer is for another dial").into());
        }
        if !response.error.is_empty() {
            return Err(Refused { answer: response.error }.into());
        }
        let connect_id = response.connect_id;
        Ok(Self { stream, connect_id, closed: false, _client: client })
    }

    pub(super) async fn write(&self, bytes: &[u8]) -> io::Result<()> {
        for chunk in bytes.chunks(64 * 1024) {
            let packet = data(self.connect_id, Bytes::copy_from_slice(chunk));
            self.stream.send(packet).await?;
        }
        Ok(())
    }

    pub(super) async fn read(&mut self, bytes: &mut Vec<u8>) -> io::Result<usize> {
        if self.closed {
            return Ok(0);
        }
        match self.stream.next().await?.and_then(|packet| packet.payload) {
            Some(Payload::Data(data)) => {
                bytes.extend_from_slice(&data.data);
                Ok(data.data.len())
            }
            Some(Payload::CloseResponse(response)) if response.error.is_empty() => {
                self.closed = true;
                Ok(0)
            }
            Some(Payload::CloseResponse(response)) => {
                self.closed = true;
                Err(io::Error::new(io::ErrorKind::ConnectionReset, response.error))
            }
            other => Err(io::Error::other(format!("unexpected {other:?}"))),
        }
    }

    pub(super) async fn close(mut self) -> io::Result<()> {
        self.stream.send(close_request(self.connect_id)).await?;
        // As in Konnectivity's client, later data is not read.
        let mut ignored = Vec::new();
        while self.read(&mut ignored).await? > 0 {
            ignored.clear();
        }
        Ok(())
    }

    pub(super) fn cancel(self) {
        drop(self);
    }
}
