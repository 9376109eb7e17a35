//! The two halves of a stream, as its task has them.

use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use culvert_transport::budget::Holder;
use http::{HeaderMap, Response};
use http_body::{Body, Frame};

use super::{
    Reason, SEND_BUFFER,
    shared::{Shared, wait},
    stream::{End, FRAME_COST},
};

/// What a peer sends on one stream. Dropping it drops what is still to come.
pub(crate) struct RecvStream {
    id: u32,
    shared: Arc<Shared>,
    holder: Arc<Holder>,
}

impl RecvStream {
    pub(super) fn new(id: u32, shared: Arc<Shared>) -> Option<Self> {
        let holder = shared.lock().streams.get(&id)?.holder.clone();
        Some(Self { id, shared, holder })
    }

    /// What holds the bytes that have arrived and were not read.
    pub(crate) fn holder(&self) -> &Arc<Holder> {
        &self.holder
    }

    /// The next bytes; `None` at the end. Reading grants the peer as many again.
    ///
    /// # Errors
    /// The reason of a reset, after what arrived before it.
    pub(super) fn poll_data(&self, cx: &Context<'_>) -> Poll<Option<Result<Bytes, Reason>>> {
        let mut state = self.shared.lock();
        let Some(stream) = state.streams.get_mut(&self.id) else {
            return Poll::Ready(Some(Err(Reason::CANCEL)));
        };
        let Some(bytes) = stream.unread.pop_front() else {
            return match stream.reset {
                Some(reason) => Poll::Ready(Some(Err(reason))),
                None if stream.has_ended => Poll::Ready(None),
                None => wait(&mut stream.reader, cx),
            };
        };
        if stream.unread.is_empty() {
            // An idle stream has no buffer.
            stream.unread = Default::default();
        }
        state.give_back(self.id, bytes.len());
        drop(state);
        self.holder.give_back((bytes.len() as u64 + FRAME_COST).min(self.holder.held()));
        Poll::Ready(Some(Ok(bytes)))
    }
}

impl Body for RecvStream {
    type Data = Bytes;
    type Error = Reason;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Reason>>> {
        Poll::Ready(match ready!(self.poll_data(cx)) {
            Some(Ok(bytes)) => Some(Ok(Frame::data(bytes))),
            // A reset without an error is an early end (RFC 9113 §8.1).
            None | Some(Err(Reason::NO_ERROR)) => None,
            Some(Err(reason)) => Some(Err(reason)),
        })
    }

    fn is_end_stream(&self) -> bool {
        let state = self.shared.lock();
        let stream = state.streams.get(&self.id);
        stream.is_some_and(|stream| {
            stream.has_ended && stream.unread.is_empty() && stream.reset.is_none()
        })
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let Some(stream) = state.streams.get_mut(&self.id) {
            stream.is_read = false;
            stream.reader = None;
            let unread: usize = std::mem::take(&mut stream.unread).iter().map(Bytes::len).sum();
            state.give_back(self.id, unread);
            state.tidy(self.id);
        }
        drop(state);
        self.holder.give_back(self.holder.held());
    }
}

impl fmt::Debug for RecvStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvStream").field("id", &self.id).finish_non_exhaustive()
    }
}

/// What a peer is sent on one stream. Dropping it before its end resets the stream.
pub(crate) struct SendStream {
    id: u32,
    shared: Arc<Shared>,
}

impl SendStream {
    pub(super) fn new(id: u32, shared: Arc<Shared>) -> Self {
        Self { id, shared }
    }

    /// Sends the head of the answer, which is all of it if it `ends` the stream.
    pub(crate) fn respond(&self, head: &Response<()>, ends: bool) {
        self.shared.lock().respond(self.id, head.status(), head.headers(), ends);
    }

    /// Waits until the peer takes bytes, and few wait for it.
    ///
    /// # Errors
    /// The reason of a reset.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn room(&self) -> Result<(), Reason> {
        poll_fn(|cx| {
            let mut state = self.shared.lock();
            let Some(stream) = state.streams.get_mut(&self.id) else {
                return Poll::Ready(Err(Reason::CANCEL));
            };
            match stream.reset {
                Some(reason) => Poll::Ready(Err(reason)),
                None if stream.unsent_len < SEND_BUFFER && stream.send_window > 0 => {
                    Poll::Ready(Ok(()))
                }
                None => wait(&mut stream.writer, cx),
            }
        })
        .await
    }

    /// Completes when the stream was reset.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn reset(&self) -> Reason {
        poll_fn(|cx| {
            let mut state = self.shared.lock();
            let Some(stream) = state.streams.get_mut(&self.id) else {
                return Poll::Ready(Reason::CANCEL);
            };
            match stream.reset {
                Some(reason) => Poll::Ready(reason),
                None => wait(&mut stream.writer, cx),
            }
        })
        .await
    }

    /// Queues bytes, however many wait.
    pub(crate) fn send(&self, bytes: Bytes) {
        let mut state = self.shared.lock();
        if let Some(stream) = state.streams.get_mut(&self.id)
            && stream.reset.is_none()
            && !bytes.is_empty()
        {
            stream.unsent_len += bytes.len();
            stream.unsent.push_back(bytes);
            state.queue(self.id);
        }
    }

    /// Ends the stream, with trailers if there are any.
    pub(crate) fn finish(self, trailers: Option<&HeaderMap>) {
        let end = match trailers {
            None => End::Data,
            Some(fields) => End::Trailers(super::hpack::encode(None, fields)),
        };
        let mut state = self.shared.lock();
        if let Some(stream) = state.streams.get_mut(&self.id)
            && stream.reset.is_none()
        {
            stream.end = Some(end);
            state.queue(self.id);
        }
    }

    /// Resets the stream, and drops what waits for the peer.
    pub(crate) fn send_reset(self, reason: Reason) {
        self.shared.lock().reset(self.id, reason);
    }
}

impl Drop for SendStream {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let Some(stream) = state.streams.get_mut(&self.id) {
            stream.is_written = false;
            stream.writer = None;
            if stream.end.is_none() && !stream.has_sent_end && stream.reset.is_none() {
                state.reset(self.id, Reason::CANCEL);
            }
            state.tidy(self.id);
        }
    }
}

impl fmt::Debug for SendStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendStream").field("id", &self.id).finish_non_exhaustive()
    }
}
