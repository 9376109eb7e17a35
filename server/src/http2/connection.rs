//! One connection: what its peer's frames mean (RFC 9113 §6), and its end.

use std::{
    collections::VecDeque,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use culvert_transport::budget::StreamMemory;
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Error, Limits, Reason,
    frames::{FrameHead, flag, kind},
    halves::{RecvStream, SendStream},
    hpack::Decoder,
    reader::{Frames, Reader},
    request::{Fields, MAX_FIELDS_LEN, Refused, content_length},
    shared::{MAX_FRAME, Shared, State},
    stream::FRAME_COST,
    writer::Writer,
};

/// Maximum length of an encoded header block, in bytes.
const MAX_BLOCK_LEN: usize = 2 * MAX_FIELDS_LEN;
/// Maximum number of frames of a header block.
const MAX_BLOCK_FRAMES: usize = 8;
/// Number of bytes of answers that wait, at which a connection is not read.
const MAX_CONTROL_LEN: usize = 16 * 1024;
/// Number of reads after which other tasks have their turn.
const READS: usize = 64;
/// Payload of the ping that precedes the last GOAWAY.
const SHUTDOWN: &[u8; 8] = b"shutdown";
/// Largest id of a stream.
const MAX_ID: u32 = (1 << 31) - 1;

/// Settings (RFC 9113 §6.5.2).
mod setting {
    pub(super) const ENABLE_PUSH: u16 = 2;
    pub(super) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(super) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(super) const MAX_FRAME_SIZE: u16 = 5;
    pub(super) const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// A connection, on the server's side. Its peer is served while [`Self::accept`] is awaited.
#[derive(Debug)]
pub(crate) struct Connection<IO> {
    io: IO,
    reader: Reader,
    writer: Writer,
    peer: Peer,
}

/// A request, and what answers it.
pub(crate) type Accepted = (Request<RecvStream>, SendStream);

/// What is known of a connection's peer.
#[derive(Debug)]
struct Peer {
    shared: Arc<Shared>,
    max_streams: usize,
    decoder: Decoder,
    /// The peer has sent its settings, which come first.
    has_begun: bool,
    /// A header block of which more is to come.
    block: Option<Block>,
    /// Id of the latest stream.
    last_id: u32,
    accepted: VecDeque<Accepted>,
    /// No more streams are taken.
    is_closing: bool,
    /// Why the connection ends.
    failed: Option<Reason>,
}

/// The encoded fields of a request or its trailers.
#[derive(Debug)]
struct Block {
    id: u32,
    ends_stream: bool,
    bytes: Vec<u8>,
    frames: usize,
    is_malformed: bool,
}

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    /// The connection cannot go on.
    Connection(Reason),
    /// The stream cannot go on.
    Stream(u32, Reason),
}

const PROTOCOL: Wrong = Wrong::Connection(Reason::PROTOCOL_ERROR);
const FRAME_SIZE: Wrong = Wrong::Connection(Reason::FRAME_SIZE_ERROR);
const FLOW_CONTROL: Wrong = Wrong::Connection(Reason::FLOW_CONTROL_ERROR);

impl<IO: AsyncRead + AsyncWrite + Unpin> Connection<IO> {
    /// A connection whose streams' bytes are held by this memory. The limits apply once the peer has
    /// read the settings; until then, HTTP/2's own do.
    pub(crate) fn new(io: IO, memory: Arc<StreamMemory>, limits: &Limits) -> Self {
        let shared = Shared::new(memory, limits);
        {
            let mut state = shared.lock();
            let settings = [
                (setting::MAX_CONCURRENT_STREAMS, limits.streams),
                (setting::INITIAL_WINDOW_SIZE, limits.stream_window),
                (setting::MAX_HEADER_LIST_SIZE, MAX_FIELDS_LEN as u32),
            ];
            push_settings(&mut state, &settings);
            state.widen(limits.connection_window);
        }
        let peer = Peer {
            shared,
            max_streams: limits.streams as usize,
            decoder: Decoder::new(),
            has_begun: false,
            block: None,
            last_id: 0,
            accepted: VecDeque::new(),
            is_closing: false,
            failed: None,
        };
        Self { io, reader: Reader::new(), writer: Writer::default(), peer }
    }

    /// The state that the streams share.
    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.peer.shared
    }

    /// Sets the window of all streams; `false` while a smaller one is on its way to the peer, or is
    /// to follow another.
    pub(crate) fn set_window(&self, window: u32) -> bool {
        let mut state = self.peer.shared.lock();
        let is_smaller = window < state.first_window;
        if state.smaller_window.is_some() || is_smaller && state.unacknowledged > 0 {
            return false;
        }
        state.unacknowledged += 1;
        push_settings(&mut state, &[(setting::INITIAL_WINDOW_SIZE, window)]);
        if is_smaller {
            state.smaller_window = Some(window);
        } else {
            state.set_window(window);
        }
        true
    }

    /// Has the peer open no more streams. The connection ends after those that are open.
    pub(crate) fn shut_down(&self) {
        let mut state = self.peer.shared.lock();
        push_goaway(&mut state, MAX_ID, Reason::NO_ERROR);
        // Streams that the peer opened before it knew arrive before the answer.
        state.push(FrameHead::new(kind::PING, 0, 8), SHUTDOWN);
    }

    /// The next request; `None` when the connection has ended in order.
    ///
    /// # Errors
    /// When the peer breaks the protocol, and the socket's.
    ///
    /// # Cancel safety
    /// Cancel safe. The peer is served only while this is awaited.
    pub(crate) async fn accept(&mut self) -> Option<Result<Accepted, Error>> {
        poll_fn(|cx| self.poll_accept(cx)).await.transpose()
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Accepted>, Error>> {
        for _ in 0..READS {
            let written = self.poll_write(cx)?;
            if let Some(accepted) = self.peer.accepted.pop_front() {
                if self.peer.accepted.is_empty() {
                    self.peer.accepted = VecDeque::new();
                }
                return Poll::Ready(Ok(Some(accepted)));
            }
            if self.peer.failed.is_some() || self.peer.is_done() {
                ready!(written);
                ready!(Pin::new(&mut self.io).poll_shutdown(cx))?;
                return Poll::Ready(match self.peer.failed {
                    Some(reason) => Err(reason.into()),
                    None => Ok(None),
                });
            }
            if self.peer.shared.lock().control_len() > MAX_CONTROL_LEN {
                // The peer does not read the answers to its frames. The writer wakes the task.
                return Poll::Pending;
            }
            match self.reader.poll_read(&mut self.io, cx, &mut self.peer)? {
                Poll::Ready(Ok(0)) => return Poll::Ready(Ok(None)),
                Poll::Ready(Ok(_)) => self.peer.shared.heard(),
                Poll::Ready(Err(reason)) => self.peer.fail(reason),
                // The socket wakes the task.
                Poll::Pending if self.writer.is_full() => return Poll::Pending,
                Poll::Pending => ready!(self.peer.shared.lock().wait(cx)),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what there is; whether all is written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            self.writer.fill(&mut self.peer.shared.lock());
            if self.writer.is_empty() {
                return Poll::Ready(Ok(()));
            }
            ready!(self.writer.poll_write(&mut self.io, cx))?;
        }
    }
}

impl<IO> Drop for Connection<IO> {
    fn drop(&mut self) {
        self.peer.shared.end();
    }
}

fn push_settings(state: &mut State, settings: &[(u16, u32)]) {
    let encode = |&(id, value): &(u16, u32)| {
        let ([a, b], [c, d, e, f]) = (id.to_be_bytes(), value.to_be_bytes());
        [a, b, c, d, e, f]
    };
    let payload: Vec<u8> = settings.iter().flat_map(encode).collect();
    let length = u16::try_from(payload.len()).unwrap_or(0);
    state.push(FrameHead::new(kind::SETTINGS, 0, length), &payload);
    state.wake();
}

fn push_goaway(state: &mut State, last_id: u32, reason: Reason) {
    let payload = [last_id.to_be_bytes(), reason.0.to_be_bytes()].concat();
    state.push(FrameHead::new(kind::GOAWAY, 0, 8), &payload);
    state.wake();
}

impl Frames for Peer {
    type Error = Reason;

    fn head(&mut self, head: FrameHead) -> Result<(), Reason> {
        if head.payload_len() > MAX_FRAME {
            return Err(Reason::FRAME_SIZE_ERROR);
        }
        let is_next = match &self.block {
            Some(block) => head.kind() == kind::CONTINUATION && head.stream_id() == block.id,
            None => head.kind() != kind::CONTINUATION,
        };
        let is_begin = head.kind() == kind::SETTINGS && !head.has(flag::ACK);
        if !is_next || !self.has_begun && !is_begin {
            return Err(Reason::PROTOCOL_ERROR);
        }
        self.has_begun = true;
        if head.kind() == kind::DATA {
            self.shared.arrives(head.stream_id(), head.payload_len());
        }
        Ok(())
    }

    fn frame(&mut self, head: FrameHead, payload: Bytes) -> Result<(), Reason> {
        let handled = match head.kind() {
            kind::DATA => self.data(head, payload),
            kind::HEADERS => self.headers(head, payload),
            kind::CONTINUATION => self.continuation(head, &payload),
            kind::PRIORITY => priority(head, &payload),
            kind::RST_STREAM => self.rst_stream(head, payload),
            kind::SETTINGS => self.settings(head, &payload),
            kind::PING => self.ping(head, &payload),
            kind::GOAWAY => self.goaway(head, &payload),
            kind::WINDOW_UPDATE => self.window_update(head, payload),
            kind::PUSH_PROMISE => Err(PROTOCOL),
            _ => Ok(()),
        };
        match handled {
            Ok(()) => Ok(()),
            Err(Wrong::Stream(id, reason)) => {
                self.shared.lock().refuse(id, reason);
                Ok(())
            }
            Err(Wrong::Connection(reason)) => Err(reason),
        }
    }

    fn not_http2(&self) -> Reason {
        Reason::PROTOCOL_ERROR
    }
}

impl Peer {
    /// Ends the connection and all of its streams.
    fn fail(&mut self, reason: Reason) {
        push_goaway(&mut self.shared.lock(), self.last_id, reason);
        self.failed = Some(reason);
        self.shared.end();
    }

    /// Whether the connection has nothing more to do.
    fn is_done(&self) -> bool {
        self.is_closing && self.shared.lock().streams.is_empty()
    }

    fn data(&self, head: FrameHead, mut payload: Bytes) -> Result<(), Wrong> {
        let (id, length) = (head.stream_id(), head.payload_len());
        let shared = self.shared.clone();
        let mut state = shared.lock();
        if id == 0 || id > self.last_id || !unpad(head, &mut payload) {
            return Err(PROTOCOL);
        }
        if !state.window.take(length) {
            return Err(FLOW_CONTROL);
        }
        let Some(stream) = state.streams.get_mut(&id) else {
            state.give_back(id, length);
            return Err(Wrong::Stream(id, Reason::STREAM_CLOSED));
        };
        if stream.has_ended || stream.reset.is_some() {
            let is_late = stream.reset.is_some() && !stream.is_reset_by_peer;
            state.give_back(id, length);
            return if is_late { Ok(()) } else { Err(Wrong::Stream(id, Reason::STREAM_CLOSED)) };
        }
        if !stream.window.take(length) {
            state.give_back(id, length);
            return Err(Wrong::Stream(id, Reason::FLOW_CONTROL_ERROR));
        }
        let ends = head.has(flag::END_STREAM);
        if let Some(left) = &mut stream.body_left {
            match left.checked_sub(payload.len() as u64) {
                Some(rest) if rest == 0 || !ends => *left = rest,
                _ => {
                    state.give_back(id, length);
                    return Err(Wrong::Stream(id, Reason::PROTOCOL_ERROR));
                }
            }
        }
        stream.has_ended = ends;
        let dropped = if stream.is_read { length - payload.len() } else { length };
        if stream.is_read && length > 0 {
            let is_empty = payload.is_empty();
            if !is_empty {
                stream.unread.push_back(payload);
            }
            let counted = dropped as u64 + if is_empty { FRAME_COST } else { 0 };
            stream.holder.give_back(counted.min(stream.holder.held()));
        }
        if let Some(reader) = stream.reader.take() {
            reader.wake();
        }
        state.give_back(id, dropped);
        Ok(())
    }

    fn headers(&mut self, head: FrameHead, mut payload: Bytes) -> Result<(), Wrong> {
        let id = head.stream_id();
        if id.is_multiple_of(2) || !unpad(head, &mut payload) {
            return Err(PROTOCOL);
        }
        let mut is_malformed = false;
        if head.has(flag::PRIORITY) {
            if payload.len() < 5 {
                return Err(FRAME_SIZE);
            }
            is_malformed = payload.get_u32() & MAX_ID == id;
            payload.advance(1);
        }
        let ends_stream = head.has(flag::END_STREAM);
        let block = Block { id, ends_stream, bytes: Vec::new(), frames: 1, is_malformed };
        if head.has(flag::END_HEADERS) {
            return self.fields(&block, &payload);
        }
        self.block = Some(Block { bytes: payload.into(), ..block });
        Ok(())
    }

    fn continuation(&mut self, head: FrameHead, payload: &[u8]) -> Result<(), Wrong> {
        let mut block = self.block.take().ok_or(PROTOCOL)?;
        block.bytes.extend_from_slice(payload);
        block.frames += 1;
        if head.has(flag::END_HEADERS) {
            let bytes = std::mem::take(&mut block.bytes);
            return self.fields(&block, &bytes);
        }
        if block.bytes.len() > MAX_BLOCK_LEN || block.frames > MAX_BLOCK_FRAMES {
            return Err(Wrong::Connection(Reason::ENHANCE_YOUR_CALM));
        }
        self.block = Some(block);
        Ok(())
    }

    /// Handles a whole header block: a new stream, or the end of one.
    fn fields(&mut self, block: &Block, bytes: &[u8]) -> Result<(), Wrong> {
        let id = block.id;
        let malformed = Err(Wrong::Stream(id, Reason::PROTOCOL_ERROR));
        let fields = Fields::decode(&mut self.decoder, bytes)
            .map_err(|_| Wrong::Connection(Reason::COMPRESSION_ERROR))?;
        let shared = self.shared.clone();
        let mut state = shared.lock();
        let is_end = block.ends_stream && fields.are_trailers() && !block.is_malformed;
        if let Some(stream) = state.streams.get_mut(&id) {
            if stream.has_ended || stream.is_reset_by_peer {
                return Err(Wrong::Stream(id, Reason::STREAM_CLOSED));
            }
            if stream.reset.is_some() {
                return Ok(());
            }
            if !is_end || stream.body_left.is_some_and(|left| left > 0) {
                return malformed;
            }
            stream.has_ended = true;
            stream.wake();
            return Ok(());
        }
        if id <= self.last_id {
            // Trailers of a stream that was left are late, at most.
            return if is_end { Ok(()) } else { Err(PROTOCOL) };
        }
        self.last_id = id;
        if self.is_closing {
            return Err(Wrong::Stream(id, Reason::REFUSED_STREAM));
        }
        let request = match fields.into_request() {
            Ok(request) if !block.is_malformed => request,
            Err(Refused::TooLong) => {
                state.too_long(id);
                return Ok(());
            }
            _ => return malformed,
        };
        let Ok(body_left) = content_length(&request) else { return malformed };
        if block.ends_stream && body_left.is_some_and(|left| left > 0) {
            return malformed;
        }
        if state.streams.len() >= self.max_streams {
            return Err(Wrong::Stream(id, Reason::REFUSED_STREAM));
        }
        drop(state);
        self.shared.open(id, body_left, block.ends_stream);
        if let Some(body) = RecvStream::new(id, self.shared.clone()) {
            let answer = SendStream::new(id, self.shared.clone());
            self.accepted.push_back((request.map(|()| body), answer));
        }
        Ok(())
    }

    fn rst_stream(&self, head: FrameHead, mut payload: Bytes) -> Result<(), Wrong> {
        if payload.len() != 4 {
            return Err(FRAME_SIZE);
        }
        let id = head.stream_id();
        if id == 0 || id > self.last_id {
            return Err(PROTOCOL);
        }
        let mut state = self.shared.lock();
        if let Some(stream) = state.streams.get_mut(&id) {
            stream.is_reset_by_peer = true;
            stream.reset(Reason(payload.get_u32()));
        }
        state.tidy(id);
        Ok(())
    }

    fn settings(&self, head: FrameHead, payload: &[u8]) -> Result<(), Wrong> {
        if head.stream_id() != 0 {
            return Err(PROTOCOL);
        }
        let mut state = self.shared.lock();
        if head.has(flag::ACK) {
            if !payload.is_empty() {
                return Err(FRAME_SIZE);
            }
            state.unacknowledged = state.unacknowledged.saturating_sub(1);
            if let Some(window) = state.smaller_window.take() {
                state.set_window(window);
            }
            return Ok(());
        }
        let (settings, rest) = payload.as_chunks::<6>();
        if !rest.is_empty() {
            return Err(FRAME_SIZE);
        }
        let mut window = None;
        for &[a, b, c, d, e, f] in settings {
            let value = u32::from_be_bytes([c, d, e, f]);
            match u16::from_be_bytes([a, b]) {
                setting::ENABLE_PUSH if value > 1 => return Err(PROTOCOL),
                setting::INITIAL_WINDOW_SIZE if value > MAX_ID => return Err(FLOW_CONTROL),
                setting::INITIAL_WINDOW_SIZE => window = Some(value),
                setting::MAX_FRAME_SIZE if !(MAX_FRAME as u32..1 << 24).contains(&value) => {
                    return Err(PROTOCOL);
                }
                _ => {}
            }
        }
        // Once for a frame, as it is work for each stream.
        if window.is_some_and(|window| !state.set_send_window(window)) {
            return Err(FLOW_CONTROL);
        }
        state.push(FrameHead::new(kind::SETTINGS, 0, 0).with_flags(flag::ACK), &[]);
        Ok(())
    }

    fn ping(&mut self, head: FrameHead, payload: &[u8]) -> Result<(), Wrong> {
        if head.stream_id() != 0 {
            return Err(PROTOCOL);
        }
        if payload.len() != SHUTDOWN.len() {
            return Err(FRAME_SIZE);
        }
        let mut state = self.shared.lock();
        if !head.has(flag::ACK) {
            state.push(FrameHead::new(kind::PING, 0, 8).with_flags(flag::ACK), payload);
        } else if payload == SHUTDOWN {
            self.is_closing = true;
            push_goaway(&mut state, self.last_id, Reason::NO_ERROR);
        } else {
            self.shared.pong.notify_waiters();
        }
        Ok(())
    }

    fn goaway(&mut self, head: FrameHead, payload: &[u8]) -> Result<(), Wrong> {
        if head.stream_id() != 0 {
            return Err(PROTOCOL);
        }
        if payload.len() < 8 {
            return Err(FRAME_SIZE);
        }
        // A client opens no stream after it. The connection ends after those that are open.
        self.is_closing = true;
        Ok(())
    }

    fn window_update(&self, head: FrameHead, mut payload: Bytes) -> Result<(), Wrong> {
        if payload.len() != 4 {
            return Err(FRAME_SIZE);
        }
        let id = head.stream_id();
        let wrong = |reason| match id {
            0 => Wrong::Connection(reason),
            id => Wrong::Stream(id, reason),
        };
        if id > self.last_id {
            return Err(PROTOCOL);
        }
        let increment = payload.get_u32() & MAX_ID;
        if increment == 0 {
            return Err(wrong(Reason::PROTOCOL_ERROR));
        }
        if !self.shared.lock().granted(id, increment) {
            return Err(wrong(Reason::FLOW_CONTROL_ERROR));
        }
        Ok(())
    }
}

/// Takes the padding off a payload; `false` when there is more than the payload.
fn unpad(head: FrameHead, payload: &mut Bytes) -> bool {
    if !head.has(flag::PADDED) {
        return true;
    }
    let Ok(padding) = payload.try_get_u8() else { return false };
    let Some(length) = payload.len().checked_sub(padding.into()) else { return false };
    payload.truncate(length);
    true
}

/// Checks a priority, which means nothing here.
fn priority(head: FrameHead, payload: &[u8]) -> Result<(), Wrong> {
    let id = head.stream_id();
    if id == 0 {
        return Err(PROTOCOL);
    }
    match *payload {
        [a, b, c, d, _] if u32::from_be_bytes([a, b, c, d]) & MAX_ID == id => {
            Err(Wrong::Stream(id, Reason::PROTOCOL_ERROR))
        }
        [_, _, _, _, _] => Ok(()),
        _ => Err(Wrong::Stream(id, Reason::FRAME_SIZE_ERROR)),
    }
}
