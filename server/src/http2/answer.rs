//! The answer of a call: its head, then what its peer is sent. What waits for the peer is counted.

use std::sync::Arc;

use culvert_transport::budget::Holder;
use http::{HeaderMap, Response};
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tonic::body::Body;
use tracing::debug;

use super::{Reason, SendStream};

/// Why an answer ended early.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    #[error("the stream was reset: {0}")]
    Reset(#[from] Reason),
    #[error("the answer failed: {0}")]
    Failed(tonic::Status),
    #[error("the process has no more memory for what the peer does not read")]
    Memory,
}

impl Unanswered {
    /// The reason that the peer gets.
    fn reason(&self) -> Reason {
        match self {
            Self::Reset(reason) => *reason,
            Self::Failed(_) => Reason::INTERNAL_ERROR,
            Self::Memory => Reason::ENHANCE_YOUR_CALM,
        }
    }
}

/// Sends an answer until its body or the stream ends. What waits for the peer is held by `unsent`. When
/// `cut` completes, the stream is reset.
///
/// # Cancel safety
/// Dropping the future resets the stream.
pub(crate) async fn send(
    response: Response<Body>,
    stream: SendStream,
    unsent: Arc<Holder>,
    cut: impl Future<Output = ()>,
) {
    let (head, body) = response.into_parts();
    let is_all = body.is_end_stream();
    stream.respond(&Response::from_parts(head, ()), is_all);
    if is_all {
        return;
    }
    let sent = tokio::select! {
        biased;
        () = cut => Err(Unanswered::Memory),
        sent = pipe(body, &stream, &unsent) => sent,
    };
    match sent {
        Ok(trailers) => stream.finish(trailers.as_ref()),
        Err(error) => {
            debug!(%error, "a stream of gRPC ended early");
            // Drops what waits for the stream.
            stream.send_reset(error.reason());
        }
    }
}

/// Sends the bytes of a body; its trailers.
async fn pipe(
    mut body: Body,
    stream: &SendStream,
    unsent: &Arc<Holder>,
) -> Result<Option<HeaderMap>, Unanswered> {
    loop {
        let frame = tokio::select! {
            biased;
            reason = stream.reset() => return Err(reason.into()),
            frame = body.frame() => frame,
        };
        let Some(frame) = frame else { return Ok(None) };
        match frame.map_err(Unanswered::Failed)?.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) => {
                // Held before it waits, until it was written.
                let data = unsent.hold_bytes(data);
                unsent.relieve();
                stream.room().await?;
                stream.send(data);
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    return Ok(Some(trailers));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use bytes::Bytes;
    use culvert_transport::{
        budget::{Held, MemoryBudget, StreamMemory},
        task::owned,
    };
    use h2::{RecvStream, client};
    use http::Request;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use tokio::{
        io::duplex,
        time::{Duration, sleep, timeout},
    };
    use tokio_util::task::AbortOnDropHandle;

    use super::{
        super::{Connection, fuzz::LIMITS},
        *,
    };

    const CHUNK: usize = 64 * 1024;
    const CHUNKS: usize = 4;

    /// An answer to a peer that has not read any of it.
    struct Answered {
        body: RecvStream,
        budget: Arc<MemoryBudget>,
        sending: AbortOnDropHandle<()>,
        _driven: [AbortOnDropHandle<()>; 2],
    }

    impl Answered {
        fn held(&self) -> u64 {
            self.budget.held(Held::Receive)
        }
    }

    async fn answered(limit: u64) -> Answered {
        let (near, far) = duplex(1024);
        let called = async {
            let (mut requests, connection) = client::handshake(far).await.unwrap();
            let driven = owned(async move { connection.await.unwrap() });
            let request = Request::post("http://localhost/").body(()).unwrap();
            let (response, _) = requests.send_request(request, false).unwrap();
            (response, driven, requests)
        };
        let budget = MemoryBudget::new(limit);
        let memory = StreamMemory::of(&budget);
        let mut served = Connection::new(near, memory.clone(), &LIMITS);
        let (accepted, (response, client, _requests)) = tokio::join!(served.accept(), called);
        let (_request, respond) = accepted.unwrap().unwrap();
        let server = owned(async move { while served.accept().await.is_some() {} });
        let unsent = memory.holder(Held::Receive);
        let chunk = |_| Ok::<_, Infallible>(Frame::data(Bytes::from(vec![7; CHUNK])));
        let body = Body::new(StreamBody::new(tokio_stream::iter((0..CHUNKS).map(chunk))));
        let cut = unsent.clone();
        let sending =
            owned(async move { send(Response::new(body), respond, unsent, cut.cut()).await });
        let body = response.await.unwrap().into_body();
        Answered { body, budget, sending, _driven: [client, server] }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_peer_has_not_taken_is_held() {
        let mut answered = answered(0).await;
        // Its window takes one chunk but for a byte, and the next one waits.
        while answered.held() < 2 * CHUNK as u64 {
            tokio::task::yield_now().await;
        }
        let mut length = 0;
        while let Some(data) = answered.body.data().await {
            length += data.unwrap().len();
            let taken = answered.body.flow_control().used_capacity();
            answered.body.flow_control().release_capacity(taken).unwrap();
        }
        assert_eq!(length, CHUNKS * CHUNK);
        (&mut answered.sending).await.unwrap();
        assert_eq!(answered.held(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_limit_the_stream_is_reset_and_holds_nothing() {
        let mut answered = answered(3 * CHUNK as u64).await;
        (&mut answered.sending).await.unwrap();
        assert_eq!(answered.budget.cuts(), 1);
        let written = async {
            // One frame was on its way.
            while answered.held() > 0 {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(1), written).await.unwrap();
        while let Some(data) = answered.body.data().await {
            match data {
                Ok(data) => answered.body.flow_control().release_capacity(data.len()).unwrap(),
                Err(error) => {
                    return assert_eq!(error.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM));
                }
            }
        }
        panic!("the stream ended in order");
    }
}
