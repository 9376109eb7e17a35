//! The state of a connection, which its task and those of its streams share.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, atomic::AtomicU64},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use culvert_transport::budget::{Held, StreamMemory};
use http::{HeaderMap, StatusCode};
use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::Notify, time::Instant};

use super::frames::{FrameHead, flag, kind};
use super::{
    DEFAULT_WINDOW, Limits, Reason, SEND_BUFFER, hpack,
    stream::{End, FRAME_COST, Stream},
    window::ReceiveWindow,
};

/// Largest window (RFC 9113 §6.9.1).
const MAX_WINDOW: i64 = (1 << 31) - 1;
/// Maximum length of a frame's payload that a peer accepts before any setting, in bytes. No longer
/// frames are sent: they would save nothing, and delay the other streams.
pub(super) const MAX_FRAME: usize = 16_384;

/// A connection, as its streams know it.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    memory: Arc<StreamMemory>,
    /// What bytes that were not read count as.
    unread: Held,
    pub(super) begun: Instant,
    /// When the peer was last heard, in milliseconds after `begun`.
    pub(super) heard: AtomicU64,
    /// Notified of each answer to a ping.
    pub(super) pong: Notify,
}

/// What the lock protects.
#[derive(Debug)]
pub(super) struct State {
    pub(super) streams: HashMap<u32, Box<Stream>>,
    /// Streams that may have a frame to send.
    queue: VecDeque<u32>,
    /// Encoded frames that no window applies to.
    control: Vec<u8>,
    send_window: i64,
    /// Window of each new stream for what it is sent.
    first_send_window: i64,
    pub(super) window: ReceiveWindow,
    /// Window of each new stream for what it receives.
    pub(super) first_window: u32,
    /// Number of settings that the peer has not acknowledged.
    pub(super) unacknowledged: usize,
    /// A smaller window, which applies once the peer has acknowledged it.
    pub(super) smaller_window: Option<u32>,
    /// The connection's task, when it waits.
    connection: Option<Waker>,
    /// There may be more to send than when frames were last taken.
    has_more: bool,
    pub(super) is_over: bool,
}

impl Shared {
    pub(super) fn new(memory: Arc<StreamMemory>, limits: &Limits) -> Arc<Self> {
        let state = State {
            streams: HashMap::new(),
            queue: VecDeque::new(),
            control: Vec::new(),
            send_window: DEFAULT_WINDOW.into(),
            first_send_window: DEFAULT_WINDOW.into(),
            window: ReceiveWindow::new(DEFAULT_WINDOW),
            // A peer that has not read the settings knows the default.
            first_window: limits.stream_window.max(DEFAULT_WINDOW),
            unacknowledged: 1,
            smaller_window: Some(limits.stream_window).filter(|window| *window < DEFAULT_WINDOW),
            connection: None,
            has_more: true,
            is_over: false,
        };
        Arc::new(Self {
            state: Mutex::new(state),
            memory,
            unread: limits.unread,
            begun: Instant::now(),
            heard: AtomicU64::new(0),
            pong: Notify::new(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Enters a new stream.
    pub(super) fn open(&self, id: u32, body_left: Option<u64>, has_ended: bool) {
        let holder = self.memory.holder(self.unread);
        let mut state = self.lock();
        let mut stream =
            Stream::new(state.first_window, state.first_send_window, holder, body_left);
        stream.has_ended = has_ended;
        state.streams.insert(id, Box::new(stream));
    }

    /// Counts a frame whose head has arrived, in the memory of its stream.
    pub(super) fn arrives(&self, id: u32, length: usize) {
        let holder = {
            let state = self.lock();
            let stream = state.streams.get(&id).filter(|stream| stream.is_read);
            stream.map(|stream| stream.holder.clone())
        };
        if let Some(holder) = holder.filter(|_| length > 0) {
            holder.add(length as u64 + FRAME_COST);
            holder.relieve();
        }
    }

    /// Ends all streams when the connection has ended.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.is_over = true;
        state.streams.values_mut().for_each(|stream| stream.reset(Reason::CANCEL));
    }
}

impl State {
    /// Has the connection's task wait, unless there is more to send already.
    pub(super) fn wait(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.has_more {
            return Poll::Ready(());
        }
        wait(&mut self.connection, cx)
    }

    /// Wakes the connection's task.
    pub(super) fn wake(&mut self) {
        self.has_more = true;
        if let Some(waker) = self.connection.take() {
            waker.wake();
        }
    }

    /// Queues a frame that no window applies to.
    pub(super) fn push(&mut self, head: FrameHead, payload: &[u8]) {
        self.control.extend_from_slice(head.bytes());
        self.control.extend_from_slice(payload);
    }

    /// Number of bytes of frames that no window applies to.
    pub(super) fn control_len(&self) -> usize {
        self.control.len()
    }

    /// Takes the encoded frames, each whole.
    pub(super) fn take_control(&mut self) -> Vec<u8> {
        self.has_more = false;
        std::mem::take(&mut self.control)
    }

    /// Queues a grant of more bytes.
    pub(super) fn grant(&mut self, id: u32, increment: Option<u32>) {
        if let Some(increment) = increment {
            self.push(FrameHead::new(kind::WINDOW_UPDATE, id, 4), &increment.to_be_bytes());
        }
    }

    /// Widens the window of the connection to at least so many bytes.
    pub(super) fn widen(&mut self, window: u32) {
        let increment = self.window.widen(window);
        self.grant(0, increment);
    }

    /// Queues a header block, in as many frames as it takes.
    fn push_fields(&mut self, id: u32, block: &[u8], flags: u8) {
        let mut chunks = block.chunks(MAX_FRAME).peekable();
        let (mut kind, mut flags) = (kind::HEADERS, flags);
        loop {
            let chunk = chunks.next().unwrap_or_default();
            if chunks.peek().is_none() {
                flags |= flag::END_HEADERS;
            }
            let length = u16::try_from(chunk.len()).unwrap_or(0);
            self.push(FrameHead::new(kind, id, length).with_flags(flags), chunk);
            if flags & flag::END_HEADERS != 0 {
                return;
            }
            (kind, flags) = (kind::CONTINUATION, 0);
        }
    }

    /// Queues the head of an answer.
    pub(super) fn respond(&mut self, id: u32, status: StatusCode, fields: &HeaderMap, ends: bool) {
        let block = hpack::encode(Some(status), fields);
        self.push_fields(id, &block, if ends { flag::END_STREAM } else { 0 });
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.has_sent_end = ends;
        }
        self.wake();
    }

    /// Resets a stream, whether or not it is known.
    pub(super) fn reset(&mut self, id: u32, reason: Reason) {
        if let Some(stream) = self.streams.get_mut(&id) {
            if stream.reset.is_some() {
                return;
            }
            stream.reset(reason);
        }
        self.push(FrameHead::new(kind::RST_STREAM, id, 4), &reason.0.to_be_bytes());
        self.wake();
    }

    /// Answers a frame that a stream may not have.
    pub(super) fn refuse(&mut self, id: u32, reason: Reason) {
        match self.streams.get(&id) {
            Some(stream) if stream.reset.is_none() => self.reset(id, reason),
            _ => {
                self.push(FrameHead::new(kind::RST_STREAM, id, 4), &reason.0.to_be_bytes());
            }
        }
    }

    /// Answers a request whose fields are too long.
    pub(super) fn too_long(&mut self, id: u32) {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        self.respond(id, status, &HeaderMap::new(), true);
        self.refuse(id, Reason::NO_ERROR);
    }

    /// Forgets a stream that nothing remains of. One that the peer has not ended is reset.
    pub(super) fn tidy(&mut self, id: u32) {
        let Some(stream) = self.streams.get(&id).filter(|stream| stream.is_over()) else { return };
        if !(self.is_over || stream.has_ended && stream.has_sent_end) {
            let is_answered = stream.has_sent_end;
            self.reset(id, if is_answered { Reason::NO_ERROR } else { Reason::CANCEL });
        }
        self.streams.remove(&id);
        self.wake();
    }

    /// Has a stream send, if it has a frame.
    pub(super) fn queue(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.has_frame()
            && !std::mem::replace(&mut stream.is_queued, true)
        {
            self.queue.push_back(id);
            self.wake();
        }
    }

    /// The next DATA frame that the windows allow, of each stream in turn. Trailers are queued as
    /// soon as their stream's bytes were taken.
    pub(super) fn next_data(&mut self) -> Option<(FrameHead, Bytes)> {
        let mut blocked = VecDeque::new();
        let mut found = None;
        while let Some(id) = self.queue.pop_front() {
            let connection_window = usize::try_from(self.send_window).unwrap_or(0);
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            if !stream.has_frame() {
                stream.is_queued = false;
                continue;
            }
            if connection_window == 0 && !stream.unsent.is_empty() {
                blocked.push_back(id);
                continue;
            }
            let was_full = stream.unsent_len >= SEND_BUFFER;
            let data = stream.take(MAX_FRAME.min(connection_window));
            if was_full
                && stream.unsent_len < SEND_BUFFER
                && let Some(writer) = stream.writer.take()
            {
                writer.wake();
            }
            // Trailers follow the last frame.
            let ends = stream.unsent.is_empty()
                && (data.is_none() || matches!(stream.end, Some(End::Data)));
            let end = if ends { stream.end.take() } else { None };
            stream.has_sent_end |= end.is_some();
            stream.is_queued = stream.has_frame();
            if stream.is_queued {
                self.queue.push_back(id);
            }
            let length = data.as_ref().map_or(0, Bytes::len);
            self.send_window -= length as i64;
            let mut head = FrameHead::new(kind::DATA, id, u16::try_from(length).unwrap_or(0));
            match end {
                None => {}
                Some(End::Data) => head = head.with_flags(flag::END_STREAM),
                Some(End::Trailers(block)) => {
                    self.push_fields(id, &block, flag::END_STREAM);
                    self.tidy(id);
                    continue;
                }
            }
            self.tidy(id);
            found = Some((head, data.unwrap_or_default()));
            break;
        }
        blocked.append(&mut self.queue);
        self.queue = blocked;
        found
    }

    /// Adds to the window for what is sent; whether that is legal.
    pub(super) fn granted(&mut self, id: u32, increment: u32) -> bool {
        let increment = i64::from(increment);
        if id == 0 {
            self.send_window += increment;
            return self.send_window <= MAX_WINDOW;
        }
        let Some(stream) = self.streams.get_mut(&id) else { return true };
        stream.send_window += increment;
        let is_legal = stream.send_window <= MAX_WINDOW;
        if let Some(writer) = stream.writer.take() {
            writer.wake();
        }
        self.queue(id);
        is_legal
    }

    /// Changes the window of all streams for what they are sent; whether that is legal.
    pub(super) fn set_send_window(&mut self, window: u32) -> bool {
        let change = i64::from(window) - self.first_send_window;
        self.first_send_window = window.into();
        let ids: Vec<u32> = self.streams.keys().copied().collect();
        for id in ids {
            if let Some(stream) = self.streams.get_mut(&id) {
                stream.send_window += change;
                if stream.send_window > MAX_WINDOW {
                    return false;
                }
                if let Some(writer) = stream.writer.take() {
                    writer.wake();
                }
            }
            self.queue(id);
        }
        true
    }

    /// Changes the window of all streams for what they receive.
    pub(super) fn set_window(&mut self, window: u32) {
        self.first_window = window;
        let ids: Vec<u32> = self.streams.keys().copied().collect();
        for id in ids {
            let increment = self.streams.get_mut(&id).and_then(|it| it.window.resize(window));
            self.grant(id, increment);
        }
    }

    /// Gives back what was read of a stream, or dropped, to both windows.
    pub(super) fn give_back(&mut self, id: u32, length: usize) {
        let increment = self.window.give_back(length);
        self.grant(0, increment);
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.reset.is_none()
            && !stream.has_ended
        {
            let increment = stream.window.give_back(length);
            self.grant(id, increment);
        }
        if self.control_len() > 0 {
            self.wake();
        }
    }
}

/// Registers a task for a half of a stream.
pub(super) fn wait<T>(waker: &mut Option<Waker>, cx: &Context<'_>) -> Poll<T> {
    if !waker.as_ref().is_some_and(|known| known.will_wake(cx.waker())) {
        *waker = Some(cx.waker().clone());
    }
    Poll::Pending
}
