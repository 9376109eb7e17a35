//! The state of one QMux stream: two halves, which end independently (RFC 9000 §3).

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use culvert_wire::code::StreamCode;
use tokio::sync::{Notify, SetOnce};

use super::fault::Fault;

/// Data shorter than this is copied out of its record, so that it does not keep the memory of the
/// whole read alive.
const COPY_BELOW: usize = 1024;

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
    /// Bytes that have arrived and have not been read.
    queue: VecDeque<Bytes>,
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
        Self { state: RecvState::Open, queue: VecDeque::new(), offset: 0, read: 0, limit }
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
        if self.state == RecvState::Open && !data.is_empty() {
            let short = data.len() < COPY_BELOW;
            self.queue.push_back(match short {
                true => Bytes::copy_from_slice(data),
                false => data.clone(),
            });
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
                self.queue.clear();
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
        let count = chunks.len().min(self.queue.len());
        for (chunk, arrived) in chunks.iter_mut().zip(self.queue.drain(..count)) {
            self.read += arrived.len() as u64;
            *chunk = arrived;
        }
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
        self.queue.clear();
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
        self.queue.iter().map(Bytes::len).sum()
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
mod tests {
    use super::*;

    const CODE: StreamCode = StreamCode::PEER_RESET;
    const STATES: [RecvState; 5] = [
        RecvState::Open,
        RecvState::Finished,
        RecvState::Reset(CODE),
        RecvState::Stopped,
        RecvState::Closed,
    ];

    /// A half in this state on which 3 bytes have arrived; they wait where the state allows it.
    fn recv(state: RecvState) -> Recv {
        let mut recv = Recv::new(10);
        recv.receive(0, &Bytes::from_static(b"abc"), false).unwrap();
        match state {
            RecvState::Open => {}
            RecvState::Finished => recv.receive(3, &Bytes::new(), true).unwrap(),
            RecvState::Reset(code) => recv.receive_reset(code, 3).unwrap(),
            RecvState::Stopped => assert!(recv.stop()),
            RecvState::Closed => {
                recv.stop();
                recv.receive(3, &Bytes::new(), true).unwrap();
            }
        }
        assert_eq!(recv.state, state);
        recv.check();
        recv
    }

    /// The state after `event`, for each of [`STATES`].
    fn after<T>(event: impl Fn(&mut Recv) -> T) -> [(T, RecvState); 5] {
        STATES.map(|state| {
            let mut recv = recv(state);
            let result = event(&mut recv);
            // After a fault the connection ends, and its state means nothing.
            (result, recv.state)
        })
    }

    #[test]
    fn data_is_taken_until_the_end_of_the_stream() {
        use RecvState::{Closed, Finished, Open, Reset, Stopped};
        let data = Bytes::from_static(b"def");
        assert_eq!(
            after(|recv| recv.receive(3, &data, false)),
            [
                (Ok(()), Open),
                (Err(Fault::AfterEnd), Finished),
                (Err(Fault::AfterEnd), Reset(CODE)),
                (Ok(()), Stopped),
                (Err(Fault::AfterEnd), Closed),
            ]
        );
        let ends = after(|recv| recv.receive(3, &data, true).is_ok());
        assert_eq!(
            ends,
            [
                (true, Finished),
                (false, Finished),
                (false, Reset(CODE)),
                (true, Closed),
                (false, Closed)
            ]
        );
    }

    #[test]
    fn data_out_of_order_or_beyond_the_limit_is_a_fault() {
        let receive = |offset, length| {
            let data = Bytes::from(vec![7; length]);
            recv(RecvState::Open).receive(offset, &data, false)
        };
        assert_eq!(receive(2, 1), Err(Fault::Offset));
        assert_eq!(receive(4, 1), Err(Fault::Offset));
        assert_eq!(receive(3, 7), Ok(()));
        assert_eq!(receive(3, 8), Err(Fault::Limit));
    }

    #[test]
    fn a_reset_counts_until_the_end_of_the_stream() {
        use RecvState::{Closed, Finished, Reset};
        let other = StreamCode::BROKEN_PIPE;
        assert_eq!(
            after(|recv| recv.receive_reset(other, 3).is_ok()),
            [
                (true, Reset(other)),
                (true, Finished),
                (true, Reset(CODE)),
                (true, Closed),
                (true, Closed)
            ]
        );
        for state in STATES {
            assert_eq!(recv(state).receive_reset(other, 2), Err(Fault::FinalSize), "{state:?}");
        }
    }

    #[test]
    fn a_stop_is_sent_only_while_the_peer_may_send() {
        use RecvState::{Closed, Stopped};
        assert_eq!(
            after(Recv::stop),
            [(true, Stopped), (false, Closed), (false, Closed), (false, Stopped), (false, Closed)]
        );
    }

    #[test]
    fn a_reader_gets_all_bytes_and_then_the_end_once() {
        let mut chunks = [Bytes::new()];
        for (state, end, again) in [
            (RecvState::Open, Found::Nothing, Found::Nothing),
            (RecvState::Finished, Found::End, Found::Stopped),
        ] {
            let mut recv = Recv::new(10);
            recv.receive(0, &Bytes::from_static(b"ab"), false).unwrap();
            recv.receive(2, &Bytes::from_static(b"c"), state == RecvState::Finished).unwrap();
            for expected in ["ab", "c"] {
                assert_eq!(recv.read(&mut chunks), Found::Chunks(1));
                assert_eq!(chunks[0], expected);
            }
            assert_eq!(recv.read(&mut chunks), end);
            assert_eq!(recv.read(&mut chunks), again);
        }
        let mut reset = recv(RecvState::Reset(CODE));
        assert_eq!(reset.read(&mut chunks), Found::Reset(CODE));
        assert_eq!(reset.read(&mut chunks), Found::Stopped);
        assert_eq!(reset.take_reset(), None, "it is reported once");
        for state in [RecvState::Stopped, RecvState::Closed] {
            assert_eq!(recv(state).read(&mut chunks), Found::Stopped);
        }
    }

    #[test]
    fn a_limit_is_raised_an_eighth_of_the_window_at_a_time() {
        let mut recv = Recv::new(80);
        for (offset, length) in [(0, 9), (9, 1), (10, 30)] {
            recv.receive(offset, &Bytes::from(vec![7; length]), false).unwrap();
        }
        let mut chunks = [Bytes::new()];
        recv.read(&mut chunks);
        assert_eq!(recv.grant(80), None);
        recv.read(&mut chunks);
        assert_eq!(recv.grant(80), Some(90));
        assert_eq!(recv.grant(80), None);
        recv.receive(40, &Bytes::new(), true).unwrap();
        recv.read(&mut chunks);
        assert_eq!(recv.grant(80), None, "nothing more will arrive");
    }

    #[test]
    fn a_sender_sends_what_its_limit_allows_and_then_the_fin() {
        let mut send = Send::new(4);
        assert!(!send.is_ready());
        send.push(Bytes::from_static(b"abc"));
        send.push(Bytes::from_static(b"de"));
        send.finish();
        let sent = |send: &mut Send, most| {
            let part = send.next(most)?;
            send.check();
            Some((part.offset, part.data, part.fin))
        };
        assert_eq!(sent(&mut send, 2), Some((0, "ab".into(), false)));
        assert_eq!(sent(&mut send, 9), Some((2, "c".into(), false)));
        assert_eq!(sent(&mut send, 9), Some((3, "d".into(), false)));
        assert!(!send.is_ready(), "the limit is reached");
        assert!(sent(&mut send, 9).is_none());
        send.raise_limit(3);
        assert!(!send.is_ready(), "a limit is never lowered, and this is no raise");
        send.raise_limit(5);
        assert_eq!(sent(&mut send, 9), Some((4, "e".into(), true)));
        assert_eq!(send.state(), SendState::Ended);
        assert!(!send.is_ready());
        assert_eq!(send.reset(), None, "the FIN is sent");
        send.settle();
        assert_eq!(send.reset(), None);
    }

    #[test]
    fn a_fin_needs_no_limit_and_a_reset_discards_what_waits() {
        let mut finished = Send::new(0);
        finished.finish();
        assert!(finished.is_ready());
        assert!(finished.next(0).is_some_and(|part| part.fin && part.data.is_empty()));

        for finishes in [false, true] {
            let mut reset = Send::new(2);
            reset.push(Bytes::from_static(b"abc"));
            reset.next(9);
            if finishes {
                reset.finish();
            }
            assert_eq!(reset.reset(), Some(2), "the final size is what was sent");
            assert_eq!((reset.queued(), reset.state()), (0, SendState::Settled));
            assert!(!reset.is_ready());
            reset.finish();
            assert_eq!(reset.state(), SendState::Settled);
        }
    }
}
