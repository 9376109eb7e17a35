//! The state of one QMux stream: two halves, which end independently (RFC 9000 §3).

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use culvert_wire::code::StreamCode;
use tokio::sync::{Notify, SetOnce};

use super::fault::Fault;
use crate::arrived::Arrived;

/// The wakers and the end of one stream, shared with its handles.
#[derive(Debug, Default)]
pub(super) struct Wakers {
    /// Wakes the writer: there may be room in the queue.
    pub(super) room: Notify,
    /// Wakes the reader: bytes, the end or a reset may have arrived.
    pub(super) arrived: Notify,
    /// How the sending half ended: with the peer's stop code, or `None` when all was delivered.
    pub(super) end: SetOnce<Option<StreamCode>>,
}

/// A stream, both halves.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) wakers: Arc<Wakers>,
    pub(super) send: Send,
    pub(super) recv: Recv,
}

impl Stream {
    /// Whether both halves are over on both sides, so that the stream can be forgotten.
    pub(super) fn is_closed(&self) -> bool {
        self.send.state == SendState::Settled && self.recv.state == RecvState::Closed
    }
}

/// State of a sending half (RFC 9000 §3.1).
///
/// ```text
///  ┌──────┐ finish() ┌───────────┐ FIN is sent ┌───────┐ answer to the ping ┌─────────┐
///  │ Open │─────────▶│ Finishing │────────────▶│ Ended │───────────────────▶│ Settled │
///  └──────┘          └───────────┘             └───────┘  behind the FIN    └─────────┘
///      │                   │                                                     ▲
///      └───────────────────┴── reset(), or STOP_SENDING: RESET_STREAM is queued ─┘
/// ```
///
/// A byte stream acknowledges nothing, so a ping is sent behind each FIN: its answer proves that
/// the peer has everything before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SendState {
    /// Takes bytes.
    Open,
    /// Takes no more bytes; what is queued, and the FIN behind it, have still to be sent.
    Finishing,
    /// The FIN is sent, and it is not known yet whether it has arrived.
    Ended,
    /// The peer has everything, or the half was reset.
    Settled,
}

/// The half of a stream that this side writes.
#[derive(Debug)]
pub(super) struct Send {
    state: SendState,
    /// Streams of a higher priority send first.
    pub(super) priority: i32,
    /// Whether the stream is in the queue of its priority.
    pub(super) scheduled: bool,
    /// Bytes that have not been sent, in the order in which they were written.
    queue: VecDeque<Bytes>,
    /// Number of bytes in `queue`.
    queued: usize,
    /// Number of bytes sent.
    offset: u64,
    /// Number of bytes that the peer has allowed this side to send (MAX_STREAM_DATA).
    limit: u64,
}

/// Bytes of a stream that go into one STREAM frame.
pub(super) struct Part {
    pub(super) offset: u64,
    pub(super) data: Bytes,
    pub(super) fin: bool,
}

impl Send {
    /// An open half that may send `limit` bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            state: SendState::Open,
            priority: 0,
            scheduled: false,
            queue: VecDeque::new(),
            queued: 0,
            offset: 0,
            limit,
        }
    }

    pub(super) fn state(&self) -> SendState {
        self.state
    }

    /// Number of bytes that wait to be sent.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// Number of bytes that the peer's limit still allows.
    pub(super) fn credit(&self) -> u64 {
        self.limit - self.offset
    }

    /// Raises the limit; a lower one changes nothing (RFC 9000 §4.1).
    pub(super) fn raise_limit(&mut self, limit: u64) {
        self.limit = self.limit.max(limit);
    }

    /// Queues bytes of an open half.
    pub(super) fn push(&mut self, chunk: Bytes) {
        self.queued += chunk.len();
        self.queue.push_back(chunk);
    }

    /// Takes no more bytes; the FIN follows what is queued. Nothing happens if the half has ended.
    pub(super) fn finish(&mut self) {
        if self.state == SendState::Open {
            self.state = SendState::Finishing;
        }
    }

    /// Discards what is queued; the final size for RESET_STREAM. `None` if the half has ended, when
    /// there is nothing left to reset.
    pub(super) fn reset(&mut self) -> Option<u64> {
        if matches!(self.state, SendState::Ended | SendState::Settled) {
            return None;
        }
        self.state = SendState::Settled;
        self.queue.clear();
        self.queued = 0;
        Some(self.offset)
    }

    /// The peer has everything before the FIN.
    pub(super) fn settle(&mut self) {
        self.state = SendState::Settled;
    }

    /// Whether there is something to send that the stream's own limit allows.
    pub(super) fn is_ready(&self) -> bool {
        match (self.state, self.queue.is_empty()) {
            (SendState::Open, true) | (SendState::Ended | SendState::Settled, _) => false,
            (SendState::Finishing, true) => true,
            (SendState::Open | SendState::Finishing, false) => self.credit() > 0,
        }
    }

    /// Takes the next part of at most `most` bytes, and the FIN if it is the last one. `None` when
    /// bytes wait and none of them may be sent.
    pub(super) fn next(&mut self, most: usize) -> Option<Part> {
        let most = most.min(usize::try_from(self.credit()).unwrap_or(most));
        let mut data = Bytes::new();
        if let Some(front) = self.queue.front_mut() {
            let length = front.len().min(most);
            if length == 0 && !front.is_empty() {
                return None;
            }
            data = front.split_to(length);
            if front.is_empty() {
                self.queue.pop_front();
            }
        }
        let offset = self.offset;
        self.offset += data.len() as u64;
        self.queued -= data.len();
        let fin = self.state == SendState::Finishing && self.queue.is_empty();
        if fin {
            self.state = SendState::Ended;
        }
        Some(Part { offset, data, fin })
    }

    /// Checks what holds at any time.
    #[cfg(any(test, fuzzing))]
    pub(super) fn check(&self) {
        assert!(self.offset <= self.limit, "sent beyond the limit: {self:?}");
        assert_eq!(self.queue.iter().map(Bytes::len).sum::<usize>(), self.queued, "{self:?}");
        let over = matches!(self.state, SendState::Ended | SendState::Settled);
        assert!(!over || self.queue.is_empty(), "bytes wait behind the end: {self:?}");
    }
}

/// State of a receiving half (RFC 9000 §3.2).
///
/// ```text
///              ┌──────┐ FIN        ┌──────────┐ all is read, or stop()
///          ┌──▶│ Open │───────────▶│ Finished │──────────────────┐
///          │   └──────┘            └──────────┘                  ▼
///  data ───┘    │    │ RESET_STREAM ┌───────┐ reported,     ┌────────┐
///               │    └─────────────▶│ Reset │──────────────▶│ Closed │
///               │ stop()            └───────┘ or stop()     └────────┘
///               │                  ┌─────────┐ FIN, RESET_STREAM ▲
///               └─────────────────▶│ Stopped │───────────────────┘
///                                  └─────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecvState {
    /// The peer may send more.
    Open,
    /// The FIN has arrived; bytes before it may still wait for the reader.
    Finished,
    /// A reset has arrived, which the reader does not know yet.
    Reset(StreamCode),
    /// This side reads no more; the peer's end has not arrived, and its bytes are discarded.
    Stopped,
    /// The peer's end has arrived, and the reader knows it or does not care.
    Closed,
}

/// The half of a stream that this side reads.
#[derive(Debug)]
pub(super) struct Recv {
    state: RecvState,
    arrived: Arrived,
    /// Number of bytes that have arrived.
    offset: u64,
    /// Number of bytes that have been read.
    read: u64,
    /// Number of bytes that the peer may send.
    limit: u64,
}

impl Recv {
    /// An open half on which `limit` bytes may arrive.
    pub(super) fn new(limit: u64) -> Self {
        Self { state: RecvState::Open, arrived: Arrived::default(), offset: 0, read: 0, limit }
    }

    /// Takes the contents of a STREAM frame.
    pub(super) fn receive(&mut self, offset: u64, data: &Bytes, fin: bool) -> Result<(), Fault> {
        let ended = match self.state {
            RecvState::Open => RecvState::Finished,
            RecvState::Stopped => RecvState::Closed,
            RecvState::Finished | RecvState::Reset(_) | RecvState::Closed => {
                return Err(Fault::AfterEnd);
            }
        };
        // A byte stream keeps the order, so nothing is missing and nothing comes twice.
        if offset != self.offset {
            return Err(Fault::Offset);
        }
        self.offset += data.len() as u64;
        if self.offset > self.limit {
            return Err(Fault::Limit);
        }
        if self.state == RecvState::Open {
            self.arrived.push(data);
        }
        if fin {
            self.state = ended;
        }
        Ok(())
    }

    /// Takes a RESET_STREAM frame: what has not been read is discarded. After a FIN it changes
    /// nothing, for everything has arrived already.
    pub(super) fn receive_reset(&mut self, code: StreamCode, final_size: u64) -> Result<(), Fault> {
        if final_size < self.offset {
            return Err(Fault::FinalSize);
        }
        match self.state {
            RecvState::Open => {
                self.state = RecvState::Reset(code);
                self.arrived.clear();
            }
            RecvState::Stopped => self.state = RecvState::Closed,
            RecvState::Finished | RecvState::Reset(_) | RecvState::Closed => {}
        }
        Ok(())
    }

    /// Fills the front of `chunks` with what has arrived.
    pub(super) fn read(&mut self, chunks: &mut [Bytes]) -> Found {
        let count = match self.state {
            RecvState::Stopped | RecvState::Closed => return Found::Stopped,
            RecvState::Reset(code) => {
                self.state = RecvState::Closed;
                return Found::Reset(code);
            }
            RecvState::Open | RecvState::Finished => self.take_chunks(chunks),
        };
        match (count, self.state) {
            (0, RecvState::Finished) => {
                self.state = RecvState::Closed;
                Found::End
            }
            (0, _) => Found::Nothing,
            (count, _) => Found::Chunks(count),
        }
    }

    fn take_chunks(&mut self, chunks: &mut [Bytes]) -> usize {
        let waiting = self.arrived.len();
        let count = self.arrived.take(chunks);
        self.read += (waiting - self.arrived.len()) as u64;
        count
    }

    /// Raises the limit to `window` bytes beyond what was read; the new limit, if it is worth a
    /// frame. An eighth of the window at a time: the peer need not wait, and frames are few.
    pub(super) fn grant(&mut self, window: u64) -> Option<u64> {
        if self.state != RecvState::Open || self.read + window < self.limit + window / 8 {
            return None;
        }
        self.limit = self.read + window;
        Some(self.limit)
    }

    /// The code of a reset that has arrived and has not been reported.
    pub(super) fn take_reset(&mut self) -> Option<StreamCode> {
        let RecvState::Reset(code) = self.state else { return None };
        self.state = RecvState::Closed;
        Some(code)
    }

    /// Reads no more; whether the peer must be asked to stop (STOP_SENDING).
    pub(super) fn stop(&mut self) -> bool {
        self.arrived.clear();
        let stops = self.state == RecvState::Open;
        self.state = match self.state {
            RecvState::Open | RecvState::Stopped => RecvState::Stopped,
            RecvState::Finished | RecvState::Reset(_) | RecvState::Closed => RecvState::Closed,
        };
        stops
    }

    /// Number of bytes that have arrived and have not been read.
    #[cfg(any(test, fuzzing))]
    pub(super) fn waiting(&self) -> usize {
        self.arrived.len()
    }

    /// Checks what holds at any time.
    #[cfg(any(test, fuzzing))]
    pub(super) fn check(&self) {
        assert!(self.offset <= self.limit, "arrived beyond the limit: {self:?}");
        let waiting = self.waiting() as u64;
        match self.state {
            RecvState::Open | RecvState::Finished => {
                assert_eq!(waiting, self.offset - self.read, "{self:?}");
            }
            RecvState::Reset(_) | RecvState::Stopped | RecvState::Closed => {
                assert_eq!(waiting, 0, "bytes are kept that will not be read: {self:?}");
            }
        }
    }
}

/// What a reader finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// This number of chunks.
    Chunks(usize),
    /// The clean end.
    End,
    /// The peer's reset.
    Reset(StreamCode),
    /// This side has stopped the half, or its end was reported before.
    Stopped,
    /// Nothing yet.
    Nothing,
}

/// What a writer finds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// The bytes are taken.
    Taken,
    /// The peer refuses them.
    Stopped(StreamCode),
    /// The half has ended here.
    Ended,
    /// No room yet.
    None,
}

#[cfg(test)]
mod tests;
