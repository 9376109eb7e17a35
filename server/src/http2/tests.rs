//! The connection against another implementation, against frames of all kinds, and idle.

mod hostile;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use culvert_transport::{
    budget::{Held, MemoryBudget, StreamMemory},
    task::owned,
};
use h2::client;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::timeout,
};
use tokio_util::task::AbortOnDropHandle;

use super::frames::{FrameHead, HEAD_LEN, flag, kind};
use super::{
    fuzz::{LIMITS, PREFACE},
    *,
};

/// Fields of a legal request, from the static table: POST, http, `/`.
const FIELDS: &[u8] = &[0x83, 0x86, 0x84];
/// Serves a connection: each stream is answered with what it sends, and then with trailers.
struct Server {
    budget: Arc<MemoryBudget>,
    task: AbortOnDropHandle<Result<(), Error>>,
}

fn serve(io: DuplexStream) -> Server {
    let budget = MemoryBudget::new(0);
    let memory = StreamMemory::of(&budget);
    let task = owned(async move {
        let mut connection = Connection::new(io, memory, &LIMITS);
        let mut streams = tokio::task::JoinSet::new();
        while let Some(accepted) = connection.accept().await {
            let (request, answer) = accepted?;
            streams.spawn(echo(request.into_body(), answer));
        }
        Ok(())
    });
    Server { budget, task }
}

async fn echo(body: RecvStream, answer: SendStream) {
    answer.respond(&Response::new(()), false);
    loop {
        match std::future::poll_fn(|cx| body.poll_data(cx)).await {
            Some(Ok(bytes)) => {
                if answer.room().await.is_err() {
                    return;
                }
                answer.send(bytes);
            }
            None => break,
            Some(Err(reason)) => return answer.send_reset(reason),
        }
    }
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    answer.finish(Some(&trailers));
}

/// Sends these pieces on a stream of another implementation; what comes back.
async fn echoed(
    mut requests: client::SendRequest<Bytes>,
    pieces: Vec<usize>,
) -> Result<(usize, HeaderMap), h2::Error> {
    let request = Request::post("http://localhost/").body(()).unwrap();
    let (response, mut send) = requests.send_request(request, false)?;
    let sending = async {
        for piece in pieces {
            let mut rest = Bytes::from(vec![7; piece]);
            while !rest.is_empty() {
                send.reserve_capacity(rest.len());
                let room = std::future::poll_fn(|cx| send.poll_capacity(cx)).await.unwrap()?;
                send.send_data(rest.split_to(room.min(rest.len())), false)?;
            }
        }
        send.send_data(Bytes::new(), true)
    };
    let receiving = async {
        let response = response.await?;
        assert_eq!(response.status(), StatusCode::OK);
        let (mut body, mut length) = (response.into_body(), 0);
        while let Some(data) = body.data().await {
            let data = data?;
            assert!(data.iter().all(|byte| *byte == 7));
            length += data.len();
            body.flow_control().release_capacity(data.len())?;
        }
        Ok((length, body.trailers().await?.unwrap()))
    };
    tokio::try_join!(sending, receiving).map(|(_, received)| received)
}

async fn all_echoed(streams: Vec<Vec<usize>>, buffer: usize) {
    let (near, far) = duplex(buffer);
    let server = serve(near);
    let (requests, connection) = client::handshake(far).await.unwrap();
    let driven = owned(connection);
    let mut echoes = tokio::task::JoinSet::new();
    for pieces in streams {
        let expected: usize = pieces.iter().sum();
        let requests = requests.clone();
        echoes.spawn(async move {
            let (length, trailers) = echoed(requests, pieces).await.unwrap();
            assert_eq!((length, trailers["grpc-status"].as_bytes()), (expected, &b"0"[..]));
        });
    }
    echoes.join_all().await;
    drop(requests);
    driven.await.unwrap().unwrap();
    server.task.await.unwrap().unwrap();
    assert_eq!(server.budget.held(Held::Send), 0);
}

#[tokio::test]
async fn streams_of_another_implementation_are_served() {
    all_echoed(vec![vec![300_000; 4], vec![], vec![1; 100], vec![70_000]], 4096).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_byte_comes_back_on_every_stream(
        streams in prop::collection::vec(prop::collection::vec(0_usize..100_000, 0..6), 1..6),
        buffer in 1_usize..100_000,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(all_echoed(streams, buffer));
    }

    /// The answers do not depend on how the bytes are cut.
    #[test]
    fn any_bytes_are_answered_however_they_are_cut(
        bytes in prop::collection::vec(prop_oneof![0_u8..12, any::<u8>()], 0..200),
        cut in 1_usize..100,
    ) {
        let bytes = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &bytes].concat();
        let whole = fuzz::fuzz(usize::MAX, &bytes);
        let last = |bytes: &[u8]| bytes.last_chunk::<8>().copied();
        prop_assert_eq!(last(&fuzz::fuzz(cut, &bytes)), last(&whole));
    }

    /// Whatever a peer sends, the connection ends or goes on, and holds nothing in the end.
    #[test]
    fn any_frames_are_answered_or_refused(
        frames in prop::collection::vec(
            (0_u8..11, any::<u8>(), 0_u32..8, prop::collection::vec(any::<u8>(), 0..40), any::<bool>()),
            0..40),
    ) {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let (near, far) = duplex(1 << 20);
            let server = serve(near);
            let mut peer = Peer(far);
            peer.begin().await;
            for (kind, flags, id, payload, is_request) in frames {
                let sent = if is_request {
                    peer.send(kind::HEADERS, flags & 0x5, id, FIELDS).await
                } else {
                    peer.send(kind, flags, id, &payload).await
                };
                if sent.is_err() {
                    break;
                }
            }
            drop(peer);
            let ended = timeout(Duration::from_secs(5), server.task).await;
            assert!(ended.is_ok(), "the connection outlives its peer");
            assert_eq!(server.budget.held(Held::Send), 0);
        });
    }
}

/// A peer that speaks frame by frame.
struct Peer(DuplexStream);

impl Peer {
    async fn begin(&mut self) {
        self.0.write_all(PREFACE).await.unwrap();
        self.send(kind::SETTINGS, 0, 0, &[]).await.unwrap();
    }

    async fn send(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) -> io::Result<()> {
        let head = FrameHead::new(kind, id, payload.len().try_into().unwrap()).with_flags(flags);
        self.0.write_all(&[&head.bytes()[..], payload].concat()).await
    }

    /// The next frame; `None` at the end.
    async fn next(&mut self) -> Option<(FrameHead, Vec<u8>)> {
        let mut head = [0; HEAD_LEN];
        self.0.read_exact(&mut head).await.ok()?;
        let head = FrameHead::from_bytes(head);
        let mut payload = vec![0; head.payload_len()];
        self.0.read_exact(&mut payload).await.ok()?;
        Some((head, payload))
    }

    /// The payload of the next frame of a kind.
    async fn next_of(&mut self, kind: u8) -> Option<Vec<u8>> {
        loop {
            let (head, payload) = self.next().await?;
            if head.kind() == kind {
                return Some(payload);
            }
        }
    }
}

async fn peer() -> (Peer, Server) {
    let (near, far) = duplex(1 << 20);
    let server = serve(near);
    let mut peer = Peer(far);
    peer.begin().await;
    (peer, server)
}

/// A frame that breaks the protocol: what it is, kind, flags, stream, payload, and the reason.
type Case<'a> = (&'a str, u8, u8, u32, &'a [u8], Reason);
/// A request that breaks the protocol: fields, flags, data that follow, and the reason.
type Asked<'a> = (&'a [u8], u8, Option<&'a [u8]>, Reason);

fn code(payload: &[u8]) -> u32 {
    u32::from_be_bytes(*payload.last_chunk().unwrap())
}

#[tokio::test(start_paused = true)]
async fn what_breaks_the_protocol_ends_the_connection_with_its_reason() {
    let many_fields = [&[0x83, 0x86][..], &[0x00, 0x01, b'x', 0x00].repeat(100)].concat();
    let cases: [Case<'_>; 14] = [
        ("data of no stream", kind::DATA, 0, 1, b"x", Reason::PROTOCOL_ERROR),
        ("fields of stream 0", kind::HEADERS, 5, 0, FIELDS, Reason::PROTOCOL_ERROR),
        ("an even stream", kind::HEADERS, 5, 2, FIELDS, Reason::PROTOCOL_ERROR),
        ("no fields", kind::HEADERS, 5, 1, &[0x80], Reason::COMPRESSION_ERROR),
        ("padding", kind::HEADERS, 0xd, 1, &[9, 0x83], Reason::PROTOCOL_ERROR),
        ("the middle of fields", kind::CONTINUATION, 4, 1, FIELDS, Reason::PROTOCOL_ERROR),
        ("a push", kind::PUSH_PROMISE, 4, 1, &[0; 4], Reason::PROTOCOL_ERROR),
        ("a short ping", kind::PING, 0, 0, &[0; 7], Reason::FRAME_SIZE_ERROR),
        ("a stream's ping", kind::PING, 0, 1, &[0; 8], Reason::PROTOCOL_ERROR),
        ("half a setting", kind::SETTINGS, 0, 0, &[0; 5], Reason::FRAME_SIZE_ERROR),
        ("a huge window", kind::SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0], Reason::FLOW_CONTROL_ERROR),
        ("a grant of nothing", kind::WINDOW_UPDATE, 0, 0, &[0; 4], Reason::PROTOCOL_ERROR),
        ("a reset of no stream", kind::RST_STREAM, 0, 1, &[0; 4], Reason::PROTOCOL_ERROR),
        ("a long frame", 0x77, 0, 0, &[0; MAX + 1], Reason::FRAME_SIZE_ERROR),
    ];
    const MAX: usize = 16_384;
    for (case, kind, flags, id, payload, reason) in cases {
        let (mut peer, server) = peer().await;
        peer.send(kind, flags, id, payload).await.unwrap();
        let goaway = peer.next_of(kind::GOAWAY).await.expect(case);
        assert_eq!(code(&goaway), reason.0, "{case}");
        assert!(peer.next().await.is_none(), "{case}");
        let ended = server.task.await.unwrap();
        assert!(matches!(ended, Err(Error::Protocol(found)) if found == reason), "{case}");
    }
    // Fields without an end.
    let (mut peer, _server) = peer().await;
    peer.send(kind::HEADERS, 0, 1, &many_fields).await.unwrap();
    for _ in 0..8 {
        peer.send(kind::CONTINUATION, 0, 1, &[]).await.unwrap();
    }
    let goaway = peer.next_of(kind::GOAWAY).await.unwrap();
    assert_eq!(code(&goaway), Reason::ENHANCE_YOUR_CALM.0);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_begin_with_settings_is_refused() {
    let (near, far) = duplex(1024);
    let _server = serve(near);
    let mut peer = Peer(far);
    peer.0.write_all(PREFACE).await.unwrap();
    peer.send(kind::PING, 0, 0, &[0; 8]).await.unwrap();
    assert_eq!(code(&peer.next_of(kind::GOAWAY).await.unwrap()), Reason::PROTOCOL_ERROR.0);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_the_protocol_is_reset_alone() {
    let (mut peer, server) = peer().await;
    let cases: [Asked<'_>; 5] = [
        (&[0x83, 0x86], 4, None, Reason::PROTOCOL_ERROR),
        (&[0x83, 0x86, 0x84, 0x84], 4, None, Reason::PROTOCOL_ERROR),
        // content-length: 3
        (b"\x83\x86\x84\x0f\x0d\x013", 4, Some(b"four"), Reason::PROTOCOL_ERROR),
        (b"\x83\x86\x84\x0f\x0d\x013", 5, None, Reason::PROTOCOL_ERROR),
        (FIELDS, 5, Some(b"late"), Reason::STREAM_CLOSED),
    ];
    let mut id = 1;
    for (fields, flags, data, reason) in cases {
        peer.send(kind::HEADERS, flags, id, fields).await.unwrap();
        if let Some(data) = data {
            peer.send(kind::DATA, flag::END_STREAM, id, data).await.unwrap();
        }
        let reset = peer.next_of(kind::RST_STREAM).await.unwrap();
        assert_eq!(code(&reset), reason.0, "{fields:x?}");
        id += 2;
    }
    // The connection goes on.
    peer.send(kind::HEADERS, 5, id, FIELDS).await.unwrap();
    let (mut saw, mut ended) = (0, false);
    while !ended {
        let (head, _) = peer.next().await.unwrap();
        saw += usize::from(head.kind() == kind::HEADERS && head.stream_id() == id);
        ended = head.kind() == kind::HEADERS && head.has(flag::END_STREAM);
    }
    assert_eq!(saw, 2, "a head and trailers");
    drop(peer);
    server.task.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn more_than_the_window_resets_the_stream() {
    let (mut peer, _server) = peer().await;
    peer.send(kind::SETTINGS, flag::ACK, 0, &[]).await.unwrap();
    // It sends no head of an answer's body before there is a window for it, so nothing is read.
    peer.send(kind::SETTINGS, 0, 0, &[0, 4, 0, 0, 0, 0]).await.unwrap();
    peer.send(kind::HEADERS, 4, 1, FIELDS).await.unwrap();
    for _ in 0..3 {
        peer.send(kind::DATA, 0, 1, &vec![7; 16_384]).await.unwrap();
    }
    let reset = peer.next_of(kind::RST_STREAM).await.unwrap();
    assert_eq!(code(&reset), Reason::FLOW_CONTROL_ERROR.0);
}

#[tokio::test(start_paused = true)]
async fn windows_are_widened_before_the_peer_has_acknowledged_the_first() {
    const WINDOW: u32 = 1 << 20;
    let (near, far) = duplex(1 << 20);
    let memory = StreamMemory::of(&MemoryBudget::new(0));
    let limits =
        Limits { stream_window: DEFAULT_WINDOW, connection_window: DEFAULT_WINDOW, ..LIMITS };
    let mut connection = Connection::new(near, memory, &limits);
    assert!(connection.set_window(WINDOW));
    connection.shared().lock().widen(WINDOW);
    let _served = owned(async move {
        let mut open = Vec::new();
        while let Some(Ok(accepted)) = connection.accept().await {
            open.push(accepted);
        }
    });
    let mut client = client::Builder::new();
    let client = client.max_send_buffer_size(2 * WINDOW as usize).handshake::<_, Bytes>(far);
    let (mut requests, client) = client.await.unwrap();
    let _driven = owned(client);
    let request = Request::post("http://localhost/").body(()).unwrap();
    let (_response, mut send) = requests.send_request(request, false).unwrap();
    send.reserve_capacity(2 * WINDOW as usize);
    let mut capacity = 0;
    while capacity < WINDOW as usize {
        capacity = std::future::poll_fn(|cx| send.poll_capacity(cx)).await.unwrap().unwrap();
    }
    assert_eq!(capacity, WINDOW as usize);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_shut_down_ends_after_its_streams() {
    let (near, far) = duplex(1 << 20);
    let memory = StreamMemory::of(&MemoryBudget::new(0));
    let (requests, client) = {
        let mut connection = Connection::new(near, memory, &LIMITS);
        let handshake = client::handshake(far);
        let (accepted, handshake) =
            tokio::join!(timeout(Duration::from_millis(1), connection.accept()), handshake);
        assert!(accepted.is_err());
        let (mut requests, client) = handshake.unwrap();
        let client = owned(client);
        let request = Request::post("http://localhost/").body(()).unwrap();
        let (response, send) = requests.send_request(request, false).unwrap();
        let (request, answer) = connection.accept().await.unwrap().unwrap();
        connection.shut_down();
        let echo = owned(echo(request.into_body(), answer));
        let ended = owned(async move { connection.accept().await.is_none() });
        let mut body = response.await.unwrap().into_body();
        let mut send = send;
        send.send_data(Bytes::from_static(b"still"), true).unwrap();
        assert_eq!(body.data().await.unwrap().unwrap(), "still");
        assert!(body.data().await.is_none());
        echo.await.unwrap();
        assert!(ended.await.unwrap());
        (requests, client)
    };
    client.await.unwrap().unwrap();
    drop(requests);
}

#[tokio::test(start_paused = true)]
async fn a_ping_is_answered_or_waits() {
    let (near, far) = duplex(1024);
    let memory = StreamMemory::of(&MemoryBudget::new(0));
    let mut connection = Connection::new(near, memory, &LIMITS);
    let shared = connection.shared().clone();
    let served = owned(async move { while connection.accept().await.is_some() {} });
    let mut peer = Peer(far);
    peer.begin().await;
    let asked = owned(async move { shared.ping().await });
    let payload = peer.next_of(kind::PING).await.unwrap();
    assert!(!asked.is_finished());
    peer.send(kind::PING, flag::ACK, 0, &payload).await.unwrap();
    asked.await.unwrap();
    drop((peer, served));
}
