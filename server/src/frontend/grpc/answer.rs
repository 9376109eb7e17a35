//! The answer of a call: its head, then what its frontend is sent. What waits for the frontend is
//! counted.

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Poll, ready},
};

use bytes::Bytes;
use culvert_transport::budget::Holder;
use h2::{Reason, SendStream, server::SendResponse};
use http::Response;
use http_body::Body as _;
use http_body_util::BodyExt as _;
use tonic::body::Body;
use tracing::debug;

/// Why an answer ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unanswered {
    #[error("the frontend reset its stream: {0}")]
    Reset(Reason),
    #[error(transparent)]
    Http(#[from] h2::Error),
    #[error("the answer failed: {0}")]
    Failed(tonic::Status),
    #[error("the stream is closed")]
    Closed,
    #[error("the process has no more memory for what the frontend does not read")]
    Memory,
}

/// Sends an answer until its body or the stream ends. What the HTTP/2 library keeps for the frontend
/// is held by `unsent`.
///
/// # Cancel safety
/// Dropping the future resets the stream.
pub(super) async fn send(
    response: Response<Body>,
    mut respond: SendResponse<Bytes>,
    unsent: Arc<Holder>,
) {
    let (head, body) = response.into_parts();
    let has_body = !body.is_end_stream();
    let sent = match respond.send_response(Response::from_parts(head, ()), !has_body) {
        Ok(mut stream) if has_body => tokio::select! {
            biased;
            () = unsent.cut() => {
                // Drops what the library keeps for the stream.
                stream.send_reset(Reason::ENHANCE_YOUR_CALM);
                Err(Unanswered::Memory)
            }
            sent = pipe(body, &mut stream, &unsent) => sent,
        },
        Ok(_) => Ok(()),
        Err(error) => {
            respond.send_reset(Reason::INTERNAL_ERROR);
            Err(error.into())
        }
    };
    if let Err(error) = sent {
        debug!(%error, "a gRPC frontend's stream ended early");
    }
}

async fn pipe(
    mut body: Body,
    stream: &mut SendStream<Bytes>,
    unsent: &Arc<Holder>,
) -> Result<(), Unanswered> {
    loop {
        let frame = tokio::select! {
            biased;
            reset = poll_fn(|cx| stream.poll_reset(cx)) => return Err(Unanswered::Reset(reset?)),
            frame = body.frame() => frame,
        };
        let frame = match frame {
            None => return Ok(stream.send_data(Bytes::new(), true)?),
            Some(Ok(frame)) => frame,
            Some(Err(status)) => {
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Err(Unanswered::Failed(status));
            }
        };
        match frame.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) => {
                // Held before it waits, until the library has written it.
                let data = unsent.hold_bytes(data);
                unsent.relieve();
                capacity(stream).await?;
                stream.send_data(data, false)?;
            }
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    stream.reserve_capacity(0);
                    return Ok(stream.send_trailers(trailers)?);
                }
            }
        }
    }
}

/// Waits until the frontend takes bytes. A little is asked for: more would be kept from the other
/// streams of the connection.
async fn capacity(stream: &mut SendStream<Bytes>) -> Result<(), Unanswered> {
    stream.reserve_capacity(1);
    poll_fn(|cx| {
        while stream.capacity() == 0 {
            if let Poll::Ready(reset) = stream.poll_reset(cx) {
                return Poll::Ready(Err(Unanswered::Reset(reset?)));
            }
            if ready!(stream.poll_capacity(cx)).transpose()?.is_none() {
                return Poll::Ready(Err(Unanswered::Closed));
            }
        }
        Poll::Ready(Ok(()))
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use culvert_transport::{
        budget::{Held, MemoryBudget, StreamMemory},
        task::owned,
    };
    use h2::{RecvStream, client, server};
    use http::Request;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use tokio::io::duplex;
    use tokio_util::task::AbortOnDropHandle;

    use super::*;

    const CHUNK: usize = 64 * 1024;
    const CHUNKS: usize = 4;

    /// An answer to a frontend that has not read any of it.
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
        let served = async { server::handshake(near).await.unwrap() };
        let called = async {
            let (mut requests, connection) = client::handshake(far).await.unwrap();
            let driven = owned(async move { connection.await.unwrap() });
            let request = Request::post("http://localhost/").body(()).unwrap();
            let (response, _) = requests.send_request(request, false).unwrap();
            (response, driven, requests)
        };
        let (mut served, (response, client, _requests)) = tokio::join!(served, called);
        let (_request, respond) = served.accept().await.unwrap().unwrap();
        let server = owned(async move { while served.accept().await.is_some() {} });
        let budget = MemoryBudget::new(limit);
        let unsent = StreamMemory::of(&budget).holder(Held::Receive);
        let chunk = |_| Ok::<_, Infallible>(Frame::data(Bytes::from(vec![7; CHUNK])));
        let body = Body::new(StreamBody::new(tokio_stream::iter((0..CHUNKS).map(chunk))));
        let sending = owned(async move { send(Response::new(body), respond, unsent).await });
        let body = response.await.unwrap().into_body();
        Answered { body, budget, sending, _driven: [client, server] }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_frontend_has_not_taken_is_held() {
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
        assert_eq!((answered.held(), answered.budget.cuts()), (0, 1));
        while let Some(data) = answered.body.data().await {
            match data {
                Ok(data) => answered.body.flow_control().release_capacity(data.len()).unwrap(),
                Err(error) => {
                    return assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
                }
            }
        }
        panic!("the stream ended in order");
    }
}
