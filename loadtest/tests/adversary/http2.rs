//! A peer that speaks HTTP/2 frame by frame, as a Konnectivity agent does (RFC 9113).

use std::convert::Infallible;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper::{body::Frame, client::conn::http2::SendRequest};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    io::{self, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::client::TlsStream;
use tokio_stream::wrappers::UnboundedReceiverStream;

use crate::{qmux::tls, victim::Victim};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const END_HEADERS: u8 = 4;
/// The call of a Konnectivity agent.
const CONNECT: &str = "/AgentService/Connect";

pub(crate) struct Peer {
    socket: TlsStream<TcpStream>,
}

impl Peer {
    /// Connects, and sends the preface and settings.
    pub(crate) async fn connect(victim: &Victim) -> Self {
        let mut peer = Self { socket: tls(victim, b"h2").await };
        peer.socket.write_all(PREFACE).await.unwrap();
        peer.send(SETTINGS, 0, 0, &[]).await.unwrap();
        peer
    }

    async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let frame = [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat();
        self.socket.write_all(&frame).await?;
        self.socket.flush().await
    }

    /// Makes the call of an agent with this token, on this stream.
    pub(crate) async fn call(&mut self, stream: u32, token: &str) -> io::Result<()> {
        // POST and https of HPACK's static table (RFC 7541 appendix A), then names and values.
        let mut fields = vec![0x83, 0x87];
        let bearer = format!("Bearer {token}");
        let named = [
            (":path", CONNECT),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("agentid", "stranger"),
            ("authorization", &bearer),
        ];
        for (name, value) in named {
            fields.push(0x10);
            text(&mut fields, name);
            text(&mut fields, value);
        }
        self.send(HEADERS, END_HEADERS, stream, &fields).await
    }

    /// Gives up a call.
    pub(crate) async fn reset(&mut self, stream: u32) -> io::Result<()> {
        const CANCEL: u32 = 8;
        self.send(RST_STREAM, 0, stream, &CANCEL.to_be_bytes()).await
    }

    /// Reads and ignores everything until the server closes the connection.
    pub(crate) async fn until_closed(mut self) {
        let mut buffer = [0; 4096];
        while self.socket.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    }
}

/// Makes the call of an agent, and sends these bytes once it is admitted, but not the end of the
/// call, which the result keeps.
pub(crate) async fn incomplete_call(
    sender: &mut SendRequest<Body>,
    agent: &str,
    token: &str,
    bytes: Bytes,
) -> impl Sized + use<> {
    let (frames, body) = mpsc::unbounded_channel();
    let body = StreamBody::new(UnboundedReceiverStream::new(body)).boxed_unsync();
    let request = Request::post(format!("https://localhost{CONNECT}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("agentid", agent)
        .header("authorization", format!("Bearer {token}"))
        .body(body)
        .unwrap();
    sender.ready().await.unwrap();
    let response = sender.send_request(request).await.unwrap();
    frames.send(Ok(Frame::data(bytes))).unwrap();
    (response, frames)
}

pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A connection of HTTP/2 with a window, whose task ends with the result.
pub(crate) async fn client(victim: &Victim) -> (SendRequest<Body>, JoinSet<()>) {
    let socket = TokioIo::new(tls(victim, b"h2").await);
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), socket).await.unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { drop(connection.await) });
    (sender, tasks)
}

/// A string literal without Huffman code (RFC 7541 §5.2).
fn text(fields: &mut Vec<u8>, text: &str) {
    match u8::try_from(text.len()) {
        Ok(length) if length < 127 => fields.push(length),
        _ => {
            fields.push(127);
            let mut rest = text.len() - 127;
            while rest >= 128 {
                fields.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            fields.push(rest as u8);
        }
    }
    fields.extend_from_slice(text.as_bytes());
}
