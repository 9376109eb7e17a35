//! The HTTP CONNECT frontend, whose answers are those of Konnectivity, byte for byte.
//!
//! ```text
//! CONNECT host:port HTTP/1.1          the target is the request-target; headers are hints at most
//! HTTP/1.1 200 Connection Established no headers, written alone, before any byte of the target
//! ```

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use culvert_transport::splice::until_hung_up;
use culvert_wire::{Target, dial::Network};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use tracing::debug;

use super::{FrontendContext, hints::RequestHints, socket::FrontendSocket};
use crate::{
    dial::{DialError, DialParameters, Dialed},
    metrics::FrontendRefusal,
};

/// Maximum length of a request's head, in bytes.
const MAX_HEAD_LEN: usize = 16 * 1024;
/// Maximum number of headers of a request.
const MAX_HEADERS: usize = 64;
/// Maximum number of bytes read from a frontend while its dial is pending.
const MAX_READ_AHEAD: usize = 64 * 1024;
/// Time for a refusal to be written.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(5);

/// A valid request.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    address: String,
    hints: RequestHints,
}

/// Why a request is invalid.
#[derive(Debug, PartialEq, Eq)]
enum BadRequest {
    /// The bytes are no HTTP request, or its head is too long.
    Malformed,
    /// The method is not CONNECT.
    OtherMethod,
}

/// Serves one connection: reads its request, dials, answers, splices.
pub(super) async fn serve<S: FrontendSocket>(mut socket: S, context: &FrontendContext) {
    let mut buffer = BytesMut::new();
    let head = timeout(context.header_timeout, read_head(&mut socket, &mut buffer)).await;
    let request = match head {
        Ok(Ok(Some(length))) => parse(&buffer.split_to(length)),
        Ok(Ok(None)) => Err(BadRequest::Malformed),
        Ok(Err(error)) => return debug!(%error, "a frontend left before it asked"),
        Err(_) => {
            context.metrics.frontend_refused(FrontendRefusal::TimedOut);
            return debug!("a frontend did not ask in time");
        }
    };
    let answer = match request {
        Ok(request) => match Box::pin(dial(&mut socket, &mut buffer, request, context)).await {
            Some(Ok(dialed)) => {
                return establish(socket, buffer.freeze(), dialed, context).await;
            }
            Some(Err(error)) => {
                return context.metrics.flow.timed(refuse(socket, &refusal(&error))).await;
            }
            None => return debug!("a frontend left while its dial was pending"),
        },
        Err(bad) => bad.answer(),
    };
    refuse(socket, &answer).await;
}

/// Reads up to the end of the request's head; its length, or `None` if it is too long.
async fn read_head<S: FrontendSocket>(
    socket: &mut S,
    buffer: &mut BytesMut,
) -> io::Result<Option<usize>> {
    loop {
        if let Some(length) = head_len(buffer) {
            return Ok(Some(length));
        }
        if buffer.len() >= MAX_HEAD_LEN {
            return Ok(None);
        }
        if socket.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

fn head_len(buffer: &[u8]) -> Option<usize> {
    buffer.windows(4).position(|end| end == b"\r\n\r\n").map(|position| position + 4)
}

fn parse(head: &[u8]) -> Result<Request, BadRequest> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    request.parse(head).map_err(|_| BadRequest::Malformed)?;
    let (Some(method), Some(path)) = (request.method, request.path) else {
        return Err(BadRequest::Malformed);
    };
    if method != "CONNECT" {
        return Err(BadRequest::OtherMethod);
    }
    let header = |name: &str| {
        let header = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        header.and_then(|header| std::str::from_utf8(header.value).ok())
    };
    Ok(Request { address: path.to_owned(), hints: RequestHints::read(header) })
}

/// Parses a head, for the fuzzer.
#[cfg(fuzzing)]
pub fn fuzz_parse(head: &[u8]) {
    let _ = parse(head);
}

/// Dials the target; `None` if the frontend leaves meanwhile.
async fn dial<S: FrontendSocket>(
    socket: &mut S,
    buffer: &mut BytesMut,
    request: Request,
    context: &FrontendContext,
) -> Option<Result<Box<Dialed>, DialError>> {
    let target: Target = match request.address.parse() {
        Ok(target) => target,
        Err(error) => {
            let error = DialError::Address(error);
            context.metrics.dial_failed(&error);
            return Some(Err(error));
        }
    };
    let RequestHints { kind, trace } = request.hints;
    let parameters = DialParameters { network: Network::Tcp, target, kind, trace };
    tokio::select! {
        result = context.dialer.dial(parameters) => Some(result.map(Box::new)),
        () = gone(socket, buffer) => {
            context.metrics.dial_given_up();
            None
        }
    }
}

/// Completes when the frontend has left. What it sends early is kept in `buffer`.
async fn gone<S: FrontendSocket>(socket: &mut S, buffer: &mut BytesMut) {
    while buffer.len() < MAX_READ_AHEAD {
        match socket.read_buf(buffer).await {
            Ok(0) => break,
            Ok(_) => {}
            Err(_) => return,
        }
    }
    until_hung_up(move || socket.is_hung_up()).await;
}

/// Writes the success answer, alone and before any byte of the target, and splices.
async fn establish<S: FrontendSocket>(
    mut socket: S,
    read_ahead: Bytes,
    dialed: Box<Dialed>,
    context: &FrontendContext,
) {
    let established = b"HTTP/1.1 200 Connection Established\r\n\r\n";
    let written = async {
        socket.write_all(established).await?;
        socket.flush().await
    };
    if let Err(error) = context.metrics.flow.timed(written).await {
        return debug!(%error, "a frontend left before it was answered");
    }
    // The end was counted and logged.
    let _ = context.carry(socket.into_local(read_ahead), dialed).await;
}

/// Writes an answer and ends the connection.
async fn refuse<S: FrontendSocket>(mut socket: S, answer: &str) {
    let written = async {
        socket.write_all(answer.as_bytes()).await?;
        socket.shutdown().await
    };
    if let Ok(Err(error)) = timeout(REFUSAL_TIMEOUT, written).await {
        debug!(%error, "a frontend left before it was refused");
    }
}

impl BadRequest {
    fn answer(&self) -> String {
        match self {
            Self::Malformed => "HTTP/1.1 400 Bad Request\r\n\
                 Content-Type: text/plain; charset=utf-8\r\n\
                 Connection: close\r\n\r\n400 Bad Request"
                .into(),
            Self::OtherMethod => {
                let body = "this proxy only supports CONNECT passthrough\n";
                format!(
                    "HTTP/1.1 405 Method Not Allowed\r\n\
                     Content-Type: text/plain; charset=utf-8\r\n\
                     X-Content-Type-Options: nosniff\r\n\
                     Connection: close\r\n\
                     Content-Length: {}\r\n\r\n{body}",
                    body.len()
                )
            }
        }
    }
}

/// The answer to a dial that failed.
fn refusal(error: &DialError) -> String {
    match error {
        DialError::NoAgent(_) => format!(
            "HTTP/1.1 500 Internal Server Error\r\n\
             Content-Type: text/plain\r\n\r\n\
             currently no tunnels available: {error}"
        ),
        error => {
            let body = match error {
                DialError::TimedOut(_) => format!("Backend dial timeout: {error}\r\n"),
                DialError::Lost { .. } => format!("Backend context error: {error}\r\n"),
                error => error.to_string(),
            };
            format!(
                "HTTP/1.1 {}\r\nConnection: close\r\n\
                 Content-Type: text/plain; charset=utf-8\r\n\r\n{body}",
                status(&body)
            )
        }
    }
}

/// The status for an error's text: Konnectivity's mapping, which clients and alerts know.
fn status(text: &str) -> &'static str {
    let text = text.to_lowercase();
    if text.contains("timeout") || text.contains("deadline exceeded") {
        "504 Gateway Timeout"
    } else if text.contains("too many open files") {
        "503 Service Unavailable"
    } else {
        "502 Bad Gateway"
    }
}

#[cfg(test)]
mod tests {
    use culvert_wire::dial::{DialErrorKind, DialFailure, StreamKind};

    use super::*;
    use crate::backends::{Backends, Strategy};

    #[test]
    fn the_target_is_the_request_target_and_headers_do_not_matter() {
        for head in [
            "CONNECT 10.0.0.1:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            "CONNECT 10.0.0.1:10250 HTTP/1.0\r\n\r\n",
            "CONNECT 10.0.0.1:10250 HTTP/1.1\r\n\r\n",
        ] {
            let request = parse(head.as_bytes()).unwrap();
            assert_eq!(request.address, "10.0.0.1:10250");
            assert_eq!(request.hints, RequestHints::default());
        }
    }

    #[test]
    fn headers_may_hint_at_kind_and_trace() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let head = format!(
            "CONNECT [fd00::1]:443 HTTP/1.1\r\nCulvert-Kind: logs\r\nTraceparent: {parent}\r\n\r\n"
        );
        let request = parse(head.as_bytes()).unwrap();
        assert_eq!(request.address, "[fd00::1]:443");
        assert_eq!(request.hints.kind, StreamKind::LOGS);
        assert_eq!(request.hints.trace.unwrap().traceparent.as_str(), parent);
    }

    #[test]
    fn anything_else_is_refused() {
        assert_eq!(parse(b"GET / HTTP/1.1\r\n\r\n"), Err(BadRequest::OtherMethod));
        assert_eq!(parse(b"\x16\x03\x01\x02\r\n\r\n"), Err(BadRequest::Malformed));
    }

    #[test]
    fn the_text_of_an_error_selects_the_status() {
        let failed =
            |text: &str| refusal(&DialError::Failed(DialFailure::new(DialErrorKind::OTHER, text)));
        for (text, status) in [
            ("dial tcp 10.0.0.1:1: i/o timeout", "504 Gateway Timeout"),
            ("Context Deadline Exceeded", "504 Gateway Timeout"),
            ("socket: too many open files", "503 Service Unavailable"),
            ("dial tcp 10.0.0.1:1: connect: connection refused", "502 Bad Gateway"),
            ("dial tcp: lookup x: no such host", "502 Bad Gateway"),
        ] {
            assert_eq!(
                failed(text),
                format!(
                    "HTTP/1.1 {status}\r\nConnection: close\r\n\
                     Content-Type: text/plain; charset=utf-8\r\n\r\n{text}"
                )
            );
        }
        let backends = Backends::new(&[Strategy::DestHost]);
        let absence = backends.absence(&"node-1:80".parse().unwrap());
        let no_agent = DialError::NoAgent(absence);
        assert_eq!(
            refusal(&no_agent),
            format!(
                "HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\n\
                 currently no tunnels available: {no_agent}"
            )
        );
        assert!(refusal(&DialError::TimedOut(None)).contains(
            "504 Gateway Timeout\r\nConnection: close\r\n\
             Content-Type: text/plain; charset=utf-8\r\n\r\n\
             Backend dial timeout: timed out waiting for backend dial\r\n"
        ));
    }

    #[test]
    fn the_head_ends_at_the_blank_line_and_not_before() {
        assert_eq!(head_len(b"CONNECT a:1 HTTP/1.1\r\n\r\nearly"), Some(24));
        assert_eq!(head_len(b"CONNECT a:1 HTTP/1.1\r\n\r"), None);
    }
}
