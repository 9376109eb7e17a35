//! Bounds of kube-apiserver's answers, and the status of those that are errors.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use culvert_wire::bounded::Escaped;
use http_body_util::BodyExt as _;
use hyper::{
    Request, Response, StatusCode,
    body::{Body as HttpBody, Frame},
};
use kube::{
    client::{Body, DynBody},
    core::Status,
};
use tower::{BoxError, Service};

/// Maximum size of an answer, and of one event of a watch, in bytes. A review takes a few
/// kilobytes, and a list of a thousand Leases fits.
const LIMIT: usize = 1 << 20;
/// Maximum length of kube-apiserver's message in an error, in bytes.
const MESSAGE_LIMIT: usize = 1024;

/// An answer is larger than its limit.
#[derive(Debug, thiserror::Error)]
#[error("kube-apiserver's answer is larger than {LIMIT} bytes")]
struct TooLarge;

/// kube-apiserver did not answer.
#[derive(Debug, thiserror::Error)]
#[error("kube-apiserver at {address} did not answer")]
struct Unanswered {
    address: Arc<str>,
    source: BoxError,
}

/// A client's service whose answers are bounded. Errors of kube-apiserver always have their HTTP
/// status, whether or not their body is a `Status` object, and others have its address.
#[derive(Clone, Debug)]
pub(super) struct Answers<S> {
    service: S,
    address: Arc<str>,
}

impl<S> Answers<S> {
    /// The answers of a service that asks kube-apiserver at this address, which is for texts alone.
    pub(super) fn new(service: S, address: Arc<str>) -> Self {
        Self { service, address }
    }
}

impl<S> Service<Request<Body>> for Answers<S>
where
    S: Service<Request<Body>, Response = Response<Box<DynBody>>, Error = BoxError>,
    S::Future: Send + 'static,
{
    type Response = Response<Bounded>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let is_watch = is_watch(&request);
        let answer = self.service.call(request);
        let address = self.address.clone();
        Box::pin(async move {
            let answer = answer.await.map_err(|source| match source.is::<kube::Error>() {
                // A program or file that should have given a credential: no request was sent.
                true => source,
                false => Unanswered { address, source }.into(),
            })?;
            let status = answer.status();
            let is_error = status.is_client_error() || status.is_server_error();
            let by_event = is_watch && !is_error;
            let answer = answer.map(|inner| Bounded { inner, by_event, left: LIMIT });
            match is_error {
                true => Err(error(status, answer.into_body()).await?.into()),
                false => Ok(answer),
            }
        })
    }
}

fn is_watch(request: &Request<Body>) -> bool {
    let query = request.uri().query().unwrap_or_default();
    query.split('&').any(|pair| matches!(pair, "watch=true" | "watch=1"))
}

/// The error that an answer is.
async fn error(code: StatusCode, body: Bounded) -> Result<kube::Error, BoxError> {
    let body = body.collect().await?.to_bytes();
    let mut status: Status = serde_json::from_slice(&body).unwrap_or_else(|_| {
        let text = String::from_utf8_lossy(&body);
        Status { message: text.trim().to_owned(), ..Status::default() }
    });
    if status.code == 0 {
        status.code = code.as_u16();
    }
    if status.reason.is_empty() {
        status.reason = code.canonical_reason().unwrap_or_default().replace(' ', "");
    }
    Ok(kube::Error::Api(status.boxed()))
}

/// Code, reason and message of an answer that is an error, in one line.
pub fn status_text(status: &Status) -> String {
    let Status { code, reason, message, .. } = status;
    let message = &message[..message.floor_char_boundary(MESSAGE_LIMIT)];
    let mut text = format!("kube-apiserver answered {code}");
    for (separator, part) in [(" ", reason.as_str()), (": ", message)] {
        if !part.is_empty() {
            text = format!("{text}{separator}{}", Escaped(part));
        }
    }
    text
}

/// A body that fails at its limit.
pub(super) struct Bounded {
    inner: Box<DynBody>,
    /// Whether each line has the limit of its own.
    by_event: bool,
    /// Bytes that are allowed before the end, or before the next line.
    left: usize,
}

impl Bounded {
    fn take(&mut self, data: &[u8]) -> Result<(), TooLarge> {
        let last_line = data.iter().rposition(|byte| *byte == b'\n').filter(|_| self.by_event);
        let (before, counted) = match last_line {
            Some(end) => (LIMIT, data.len() - end - 1),
            None => (self.left, data.len()),
        };
        self.left = before.checked_sub(counted).ok_or(TooLarge)?;
        Ok(())
    }
}

impl HttpBody for Bounded {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = match ready!(Pin::new(&mut self.inner).poll_frame(context)) {
            Some(Ok(frame)) => frame,
            other => return Poll::Ready(other),
        };
        if let Some(data) = frame.data_ref()
            && let Err(error) = self.take(data)
        {
            return Poll::Ready(Some(Err(error.into())));
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::{Full, StreamBody};
    use kube::Client;
    use tokio_stream::{StreamExt as _, iter};
    use tower::service_fn;

    use super::*;

    /// A client of a kube-apiserver that gives this answer to every request.
    fn client(code: u16, body: impl Fn() -> Box<DynBody> + Send + Sync + 'static) -> Client {
        let answer = move |_| {
            let answer = Response::builder().status(code).body(body()).unwrap();
            async { Ok::<_, BoxError>(answer) }
        };
        Client::new(Answers::new(service_fn(answer), "192.0.2.1".into()), "default")
    }

    fn text(text: &'static str) -> Box<DynBody> {
        Box::new(Full::new(Bytes::from(text)).map_err(BoxError::from))
    }

    /// This chunk, for ever.
    fn endless(chunk: &'static [u8]) -> Box<DynBody> {
        let chunk = Frame::data(Bytes::from_static(chunk));
        let frames = iter(std::iter::repeat_with(move || {
            Ok::<_, Infallible>(Frame::data(chunk.data_ref().unwrap().clone()))
        }));
        Box::new(StreamBody::new(frames).map_err(BoxError::from))
    }

    fn get(path: &str) -> Request<Vec<u8>> {
        Request::get(path).body(Vec::new()).unwrap()
    }

    #[tokio::test]
    async fn an_error_has_its_status_whatever_its_body_is() {
        let status = r#"{"kind":"Status","code":403,"reason":"Forbidden","message":"not you"}"#;
        for (code, body, expected) in [
            (401, "", "401 Unauthorized"),
            (401, "{}", "401 Unauthorized"),
            (500, "err\n", "500 InternalServerError: err"),
            (503, "a\u{1b}[2Jb", "503 ServiceUnavailable: a\\u{1b}[2Jb"),
            (403, status, "403 Forbidden: not you"),
        ] {
            let error = client(code, move || text(body)).request_text(get("/")).await.unwrap_err();
            let reason = super::super::reason(&error);
            assert_eq!(reason, format!("kube-apiserver answered {expected}"));
        }
    }

    #[tokio::test]
    async fn a_request_without_an_answer_names_the_address_once() {
        let refuse = |_: Request<Body>| async {
            Err::<Response<Box<DynBody>>, _>(BoxError::from("connection refused"))
        };
        let client = Client::new(Answers::new(service_fn(refuse), "192.0.2.1:6443".into()), "x");
        let error = client.request_text(get("/")).await.unwrap_err();
        let expected = "kube-apiserver at 192.0.2.1:6443 did not answer: connection refused";
        assert_eq!(super::super::reason(&error), expected);
    }

    #[tokio::test]
    async fn an_endless_answer_fails_at_its_limit() {
        for code in [200, 500] {
            let client = client(code, || endless(b"{\n"));
            let error = client.request_text(get("/")).await.unwrap_err();
            let reason = super::super::reason(&error);
            assert!(reason.contains("answer is larger than 1048576 bytes"), "{reason}");
        }
    }

    #[tokio::test]
    async fn an_event_of_a_watch_has_a_limit_and_the_watch_has_none() {
        let (limit, line) = (LIMIT, 1 + LIMIT / 64);
        let take = |chunk: &'static [u8], count| async move {
            let body = Bounded { inner: endless(chunk), by_event: true, left: limit };
            let mut chunks = body.into_data_stream().take(count);
            let mut taken = 0;
            while let Some(chunk) = chunks.next().await {
                taken += chunk?.len();
            }
            Ok::<_, BoxError>(taken)
        };
        let events: &[u8] = Vec::leak([vec![b' '; line], b"\n".to_vec()].concat());
        assert_eq!(take(events, 1000).await.unwrap(), 1000 * (line + 1));
        let endless_event: &[u8] = Vec::leak(vec![b' '; line]);
        assert!(take(endless_event, 63).await.is_ok());
        assert!(take(endless_event, 64).await.unwrap_err().is::<TooLarge>());
    }

    #[test]
    fn a_watch_is_known_by_its_request() {
        let request = |path| Request::get(path).body(Body::empty()).unwrap();
        assert!(is_watch(&request("/leases?watch=true&labelSelector=a")));
        assert!(is_watch(&request("/leases?&watch=1")));
        assert!(!is_watch(&request("/leases?labelSelector=watch%3Dtrue")));
        assert!(!is_watch(&request("/leases")));
    }

    #[test]
    fn a_long_message_is_cut() {
        let message = "a".repeat(2000);
        let status = Status { code: 500, message, ..Status::default() };
        assert_eq!(status_text(&status).len(), "kube-apiserver answered 500: ".len() + 1024);
    }
}
