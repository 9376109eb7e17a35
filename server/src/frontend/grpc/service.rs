//! The service of the gRPC frontend: HTTP/2 requests become `Proxy` streams.

use std::{future::Ready, sync::Arc};

use culvert_konnectivity::{PROXY, Partial, codec::MAX_PACKET_LEN, packet::Packet};
use http::{Request, Response};
use tokio::sync::{SetOnce, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    body::Body,
    server::{Grpc, StreamingService},
};

use super::{
    super::{FrontendContext, hints::RequestHints},
    ProxyStream,
    counted::Counted,
    proxy,
    received::Received,
};
use crate::http2::Holders;

/// Maximum number of packets that wait for HTTP/2: one is sent while the next is made.
const OUTBOUND_PACKETS: usize = 2;

/// Answers the requests of one connection.
#[derive(Clone, Debug)]
pub(super) struct ProxyService {
    context: Arc<FrontendContext>,
    has_dialed: Arc<SetOnce<()>>,
}

impl ProxyService {
    /// Sets `has_dialed` at the first dial.
    pub(super) fn new(context: Arc<FrontendContext>, has_dialed: Arc<SetOnce<()>>) -> Self {
        Self { context, has_dialed }
    }
}

impl ProxyService {
    /// Answers one request.
    pub(super) async fn call(self, request: Request<Received>) -> Response<Body> {
        let path = request.uri().path();
        if path != PROXY {
            return Status::unimplemented(format!("unknown method {path}")).into_http();
        }
        let codec = Counted(self.context.metrics.clone());
        let mut grpc = Grpc::new(codec).max_decoding_message_size(MAX_PACKET_LEN);
        let memory = self.context.memory.clone();
        let request = request.map(|body| Partial::new(body, memory));
        grpc.streaming(Proxy(self), request).await
    }
}

/// Handler of the method, in the form that tonic requires.
struct Proxy(ProxyService);

impl StreamingService<Packet> for Proxy {
    type Response = Packet;
    type ResponseStream = ReceiverStream<Result<Packet, Status>>;
    type Future = Ready<Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Packet>>) -> Self::Future {
        let (outbound, packets) = mpsc::channel(OUTBOUND_PACKETS);
        let ProxyService { context, has_dialed } = self.0.clone();
        let tasks = context.tasks.clone();
        let metadata = request.metadata();
        let hints = RequestHints::read(|name| metadata.get(name)?.to_str().ok());
        let holders = request.extensions().get::<Holders>().expect("each stream has them");
        let holders = holders.clone();
        let stream = ProxyStream { inbound: request.into_inner(), outbound, holders };
        tasks.spawn(proxy::serve(context, hints, has_dialed, stream));
        std::future::ready(Ok(tonic::Response::new(ReceiverStream::new(packets))))
    }
}
