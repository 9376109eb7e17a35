//! One stream's state, and what the connection's peer and the stream's task do to it.

use std::{collections::VecDeque, sync::Arc, task::Waker};

use bytes::Bytes;
use culvert_transport::budget::Holder;

use super::{Reason, window::ReceiveWindow};

/// Memory that a frame costs beside its bytes while it waits: a place in a queue that may be half
/// full, and the least that an allocation takes.
pub(super) const FRAME_COST: u64 = 96;

/// What ends the sending half.
#[derive(Debug)]
pub(super) enum End {
    Data,
    /// An encoded header block.
    Trailers(Vec<u8>),
}

/// A stream, from its request until its task has left it and all is sent.
#[derive(Debug)]
pub(super) struct Stream {
    /// Bytes that have arrived and were not read.
    pub(super) unread: VecDeque<Bytes>,
    pub(super) window: ReceiveWindow,
    /// What holds the bytes that were not read.
    pub(super) holder: Arc<Holder>,
    /// Number of bytes that the request's body still has, if it says so.
    pub(super) body_left: Option<u64>,
    /// The peer has ended its half.
    pub(super) has_ended: bool,
    /// The task still reads; otherwise, what arrives is dropped.
    pub(super) is_read: bool,
    pub(super) reader: Option<Waker>,

    /// Bytes that wait for the windows or the socket.
    pub(super) unsent: VecDeque<Bytes>,
    pub(super) unsent_len: usize,
    /// Number of bytes that the peer takes.
    pub(super) send_window: i64,
    /// What follows `unsent`.
    pub(super) end: Option<End>,
    pub(super) has_sent_end: bool,
    /// It is in the queue of streams that have something to send.
    pub(super) is_queued: bool,
    /// The task may still send.
    pub(super) is_written: bool,
    pub(super) writer: Option<Waker>,

    /// Why it was reset, by either side.
    pub(super) reset: Option<Reason>,
    /// It was the peer.
    pub(super) is_reset_by_peer: bool,
}

impl Stream {
    pub(super) fn new(
        window: u32,
        send_window: i64,
        holder: Arc<Holder>,
        body_left: Option<u64>,
    ) -> Self {
        Self {
            unread: VecDeque::new(),
            window: ReceiveWindow::new(window),
            holder,
            body_left,
            has_ended: false,
            is_read: true,
            reader: None,
            unsent: VecDeque::new(),
            unsent_len: 0,
            send_window,
            end: None,
            has_sent_end: false,
            is_queued: false,
            is_written: true,
            writer: None,
            reset: None,
            is_reset_by_peer: false,
        }
    }

    /// Wakes the tasks of both halves.
    pub(super) fn wake(&mut self) {
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }

    /// Ends both halves. What has arrived can still be read.
    pub(super) fn reset(&mut self, reason: Reason) {
        if self.reset.is_none() {
            self.reset = Some(reason);
        }
        (self.unsent, self.unsent_len, self.end) = (VecDeque::new(), 0, None);
        self.wake();
    }

    /// Whether a frame can be sent, as far as the stream's own window goes.
    pub(super) fn has_frame(&self) -> bool {
        if self.unsent.is_empty() { self.end.is_some() } else { self.send_window > 0 }
    }

    /// Takes at most so many bytes for a DATA frame.
    pub(super) fn take(&mut self, most: usize) -> Option<Bytes> {
        let window = usize::try_from(self.send_window).unwrap_or(0);
        let first = self.unsent.front_mut()?;
        let part = first.split_to(first.len().min(most).min(window));
        if first.is_empty() {
            self.unsent.pop_front();
        }
        if self.unsent.is_empty() {
            // An idle stream has no buffer.
            self.unsent = VecDeque::new();
        }
        self.unsent_len -= part.len();
        self.send_window -= part.len() as i64;
        Some(part)
    }

    /// Whether nothing of the stream remains to be done, or known.
    pub(super) fn is_over(&self) -> bool {
        let is_sent = self.reset.is_some() || self.has_sent_end || self.end.is_none();
        !self.is_read && !self.is_written && is_sent
    }
}
