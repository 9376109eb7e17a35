//! What one QMux connection knows: its streams, their credit, and what is to be sent next.
//!
//! No input or output happens here. Frames that came go in by [`Mux::take`], frames to be sent come
//! out by [`Mux::fill`], and whoever waits for something has a bell that is rung.

#[cfg(any(test, fuzzing))]
mod exercise;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use bytes::{Buf, Bytes, BytesMut};
use culvert_wire::code::StreamCode;

#[cfg(fuzzing)]
pub(super) use self::exercise::exercise;
use super::{
    Role,
    frame::{Frame, FrameFault, MAX_DATA_LEN, MAX_RECORD, Parameters, Record},
    stream::{Found, Recv, Room, Send, Stream, Wakers},
};

/// Bytes of a stream that wait here for their turn; what is beyond waits with its writer.
const SEND_BUFFER: usize = 128 * 1024;
/// Bytes sent in one go: what comes meanwhile and goes first waits for no more than this.
const BATCH: usize = 32 * 1024;
/// Frames that may wait for a peer that does not read what it causes.
const MAX_URGENT: usize = 16_384;
/// A chunk shorter than this is copied, lest it keep all that it was read with.
const COPY_BELOW: usize = 1024;

/// What a peer did that ends the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Frame(#[from] FrameFault),
    #[error("frames before the transport parameters, or these twice")]
    Order,
    #[error("more than was granted")]
    Limit,
    #[error("a stream that cannot be")]
    Stream,
    #[error("a stream's bytes are not in order")]
    Offset,
    #[error("causes frames and does not read them")]
    Flood,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Mux {
    role: Role,
    window: u64,
    /// The peer's parameters, once they have come.
    peer: Option<Parameters>,
    streams: HashMap<u64, Stream>,
    /// Streams that have something to send and credit for it, by priority.
    ready: BTreeMap<i32, VecDeque<u64>>,
    /// What goes before all streams.
    urgent: VecDeque<Frame>,
    /// The peer's ping that has not been answered.
    pong: Option<u64>,
    /// Ends that are out, and the ping whose answer will show that they have arrived.
    marks: VecDeque<(u64, Vec<u64>)>,
    pings: u64,
    answered: u64,
    /// Streams this side opened, and may have opened.
    opened: u64,
    may_open: u64,
    /// Streams the peer opened, may have opened, has been told that it may, and that are over.
    accepted: u64,
    granted: u64,
    told: u64,
    retired: u64,
    grant_step: u64,
    waiting: VecDeque<u64>,
    sent: u64,
    may_send: u64,
}

/// Streams that have ended before the peer is told that it may open as many anew, where it may have
/// this many.
fn grant_step(max_streams: u32) -> u64 {
    u64::from(max_streams / 8).clamp(1, 16)
}

impl Mux {
    pub(super) fn new(role: Role, window: u32, max_streams: u32, idle_timeout_millis: u64) -> Self {
        let (window, streams) = (u64::from(window), u64::from(max_streams));
        let parameters = Parameters {
            max_idle_timeout: idle_timeout_millis,
            // Without a limit: a finite one would let stalled streams hold back the others.
            max_data: (1 << 62) - 1,
            max_stream_data_local: window,
            max_stream_data_remote: window,
            max_streams: streams,
        };
        Self {
            role,
            window,
            peer: None,
            streams: HashMap::new(),
            ready: BTreeMap::new(),
            urgent: VecDeque::from([Frame::Parameters(parameters)]),
            pong: None,
            marks: VecDeque::new(),
            pings: 0,
            answered: 0,
            opened: 0,
            may_open: 0,
            accepted: 0,
            granted: streams,
            told: streams,
            retired: 0,
            grant_step: grant_step(max_streams),
            waiting: VecDeque::new(),
            sent: 0,
            may_send: 0,
        }
    }

    /// The peer's parameters, once they have come.
    pub(super) fn peer(&self) -> Option<Parameters> {
        self.peer
    }

    // ---- Streams, from this side ----

    /// Opens a stream, if the peer allows one more.
    pub(super) fn open(&mut self) -> Option<(u64, Arc<Wakers>)> {
        let peer = self.peer?;
        if self.opened >= self.may_open {
            return None;
        }
        let id = self.opened << 2 | self.role.bit();
        self.opened += 1;
        Some((id, self.insert(id, peer.max_stream_data_remote)))
    }

    /// The next stream that the peer opened.
    pub(super) fn accept(&mut self) -> Option<(u64, Arc<Wakers>)> {
        let id = self.waiting.pop_front()?;
        let wakers = self.streams.get(&id).map(|stream| stream.wakers.clone());
        // A stream that is over already still has its halves.
        Some((id, wakers.unwrap_or_default()))
    }

    fn insert(&mut self, id: u64, limit: u64) -> Arc<Wakers> {
        let wakers = Arc::<Wakers>::default();
        let (send, recv) = (Send::new(limit), Recv::new(self.window));
        self.streams.insert(id, Stream { wakers: wakers.clone(), send, recv });
        wakers
    }

    /// Takes a chunk to be sent, if there is room for it.
    pub(super) fn write(&mut self, id: u64, chunk: &mut Bytes) -> Room {
        let Some(stream) = self.streams.get_mut(&id) else { return Room::Ended };
        if let Some(Some(code)) = stream.wakers.end.get() {
            return Room::Stopped(*code);
        }
        if stream.send.over || stream.send.finished {
            return Room::Ended;
        }
        if stream.send.queued >= SEND_BUFFER {
            return Room::None;
        }
        stream.send.queued += chunk.len();
        stream.send.queue.push_back(std::mem::take(chunk));
        self.schedule(id);
        Room::Taken
    }

    pub(super) fn finish(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id)
            && !stream.send.over
        {
            stream.send.finished = true;
            self.schedule(id);
        }
    }

    pub(super) fn reset(&mut self, id: u64, code: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.send.over {
            return;
        }
        (stream.send.over, stream.send.settled) = (true, true);
        stream.send.queue.clear();
        self.urgent.push_back(Frame::ResetStream { id, code, final_size: stream.send.offset });
        self.retire(id);
    }

    pub(super) fn set_priority(&mut self, id: u64, priority: i32) {
        if let Some(stream) = self.streams.get_mut(&id) {
            // Takes effect with the stream's next turn, or its first.
            let scheduled = stream.send.scheduled;
            let before = std::mem::replace(&mut stream.send.priority, priority);
            if scheduled && before != priority {
                self.unschedule(id, before);
                self.schedule(id);
            }
        }
    }

    /// Fills the front of `chunks` with what has arrived.
    pub(super) fn read(&mut self, id: u64, chunks: &mut [Bytes]) -> Found {
        let window = self.window;
        let Some(stream) = self.streams.get_mut(&id) else { return Found::End };
        let recv = &mut stream.recv;
        if recv.stopped {
            return Found::Stopped;
        }
        let count = chunks.len().min(recv.queue.len());
        for (chunk, arrived) in chunks.iter_mut().zip(recv.queue.drain(..count)) {
            recv.read += arrived.len() as u64;
            *chunk = arrived;
        }
        if count == 0 {
            let found = match (recv.reset, recv.finished) {
                (Some(code), _) => Found::Reset(code),
                (None, true) => Found::End,
                (None, false) => return Found::Nothing,
            };
            recv.stopped = true;
            self.retire(id);
            return found;
        }
        // An eighth at a time, so that a sender need not wait and grants are few.
        if !recv.is_over() && recv.read + window >= recv.limit + window / 8 {
            recv.limit = recv.read + window;
            self.urgent.push_back(Frame::MaxStreamData { id, limit: recv.limit });
        }
        Found::Chunks(count)
    }

    /// The peer's reset, if it has come, whatever has not been read before it.
    pub(super) fn reset_of(&mut self, id: u64) -> Option<StreamCode> {
        let recv = &mut self.streams.get_mut(&id)?.recv;
        let code = recv.reset?;
        recv.stopped = true;
        self.retire(id);
        Some(code)
    }

    pub(super) fn stop(&mut self, id: u64, code: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if !stream.recv.stopped {
            stream.recv.stopped = true;
            stream.recv.queue.clear();
            if !stream.recv.is_over() {
                self.urgent.push_back(Frame::StopSending { id, code });
            }
            self.retire(id);
        }
    }

    /// Lets the peer have this many streams open.
    pub(super) fn set_max_streams(&mut self, count: u32) {
        self.grant_step = grant_step(count);
        self.granted = self.granted.max(self.retired + u64::from(count));
        self.tell_streams(1);
    }

    pub(super) fn close(&mut self, application: bool, code: u64, reason: &str) {
        self.urgent.push_back(Frame::Close { application, code, reason: reason.to_owned() });
    }

    /// Asks the peer for a sign of life; the number of the question.
    pub(super) fn ping(&mut self) -> u64 {
        self.pings += 1;
        self.urgent.push_back(Frame::Ping(self.pings));
        self.pings
    }

    /// The number of the last question that was answered.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }

    // ---- What is sent ----

    /// The next records: what is urgent, then the streams' in the order of their priority.
    pub(super) fn fill(&mut self, output: &mut BytesMut) {
        let mut ends = Vec::new();
        while output.len() < BATCH && self.has_work() {
            let mut record = Record::begin(output);
            while let Some(frame) = self.next_frame(record.room(), &mut ends) {
                record.put(&frame);
            }
            if !record.end() {
                break;
            }
        }
        if !ends.is_empty() {
            // What was sent before a ping has arrived when it is answered.
            self.pings += 1;
            self.marks.push_back((self.pings, ends));
            let mut record = Record::begin(output);
            record.put(&Frame::Ping(self.pings));
            record.end();
        }
    }

    /// Whether there may be something to send.
    pub(super) fn has_work(&self) -> bool {
        !self.urgent.is_empty() || self.pong.is_some() || !self.ready.is_empty()
    }

    /// The next frame, if it fits into so many bytes.
    fn next_frame(&mut self, room: usize, ends: &mut Vec<u64>) -> Option<Frame> {
        /// No urgent frame is longer, but for a close.
        const URGENT_LEN: usize = 1200;
        if !self.urgent.is_empty() || self.pong.is_some() {
            if room < URGENT_LEN {
                return None;
            }
            return self.urgent.pop_front().or_else(|| self.pong.take().map(Frame::Pong));
        }
        let most = room.checked_sub(MAX_RECORD - MAX_DATA_LEN)?;
        loop {
            let mut band = self.ready.last_entry()?;
            let Some(id) = band.get_mut().pop_front() else {
                band.remove();
                continue;
            };
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            stream.send.scheduled = false;
            let send = &mut stream.send;
            if send.over {
                continue;
            }
            let credit = (send.limit - send.offset).min(self.may_send - self.sent);
            let front = send.queue.front_mut();
            let wanted = front.as_ref().map_or(0, |front| front.len());
            let length = wanted.min(most).min(usize::try_from(credit).unwrap_or(usize::MAX));
            if length == 0 && wanted > 0 {
                if most == 0 {
                    self.schedule(id);
                    return None;
                }
                continue;
            }
            let data = front.map_or_else(Bytes::new, |front| front.split_to(length));
            if send.queue.front().is_some_and(Bytes::is_empty) {
                send.queue.pop_front();
            }
            let offset = send.offset;
            send.offset += length as u64;
            send.queued -= length;
            self.sent += length as u64;
            let fin = send.finished && send.queue.is_empty();
            if fin {
                send.over = true;
                ends.push(id);
            }
            stream.wakers.room.notify_one();
            self.schedule(id);
            return Some(Frame::Stream { id, offset, data, fin });
        }
    }

    /// Lets a stream wait for its turn, if it has something to send and may.
    fn schedule(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let send = &mut stream.send;
        let has = match send.queue.is_empty() {
            true => send.finished,
            false => send.offset < send.limit,
        };
        if has && !send.over && !send.scheduled {
            send.scheduled = true;
            self.ready.entry(send.priority).or_default().push_back(id);
        }
    }

    fn unschedule(&mut self, id: u64, priority: i32) {
        if let Some(band) = self.ready.get_mut(&priority) {
            band.retain(|other| *other != id);
        }
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.send.scheduled = false;
        }
    }

    // ---- What came ----

    /// Takes a frame; whether a stream was opened by it.
    pub(super) fn take(&mut self, frame: Frame) -> Result<Taken, Fault> {
        if self.peer.is_none() != matches!(frame, Frame::Parameters(_)) {
            return Err(Fault::Order);
        }
        if self.urgent.len() > MAX_URGENT {
            return Err(Fault::Flood);
        }
        match frame {
            Frame::Parameters(parameters) => {
                self.peer = Some(parameters);
                (self.may_open, self.may_send) = (parameters.max_streams, parameters.max_data);
                return Ok(Taken::Opened);
            }
            Frame::Stream { id, offset, data, fin } => {
                return self.take_data(id, offset, data, fin);
            }
            Frame::ResetStream { id, code, final_size } => {
                let taken = self.known(id)?;
                if let Some(stream) = self.streams.get_mut(&id) {
                    if final_size < stream.recv.offset {
                        return Err(Fault::Offset);
                    }
                    if !stream.recv.finished {
                        stream.recv.reset = Some(StreamCode::from_wire(code));
                        stream.recv.queue.clear();
                    }
                    stream.wakers.arrived.notify_waiters();
                    stream.wakers.arrived.notify_one();
                    self.retire(id);
                }
                return Ok(taken);
            }
            Frame::StopSending { id, code } => {
                let taken = self.known(id)?;
                // It comes before the answer to the mark behind an end that it had not got.
                if let Some(stream) = self.streams.get_mut(&id)
                    && !stream.send.settled
                {
                    let _ = stream.wakers.end.set(Some(StreamCode::from_wire(code)));
                    stream.wakers.room.notify_one();
                    self.reset(id, code);
                }
                return Ok(taken);
            }
            Frame::MaxStreamData { id, limit } => {
                let taken = self.known(id)?;
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.send.limit = stream.send.limit.max(limit);
                    self.schedule(id);
                }
                return Ok(taken);
            }
            Frame::MaxData(limit) => {
                // Only then does any stream wait for it: a peer cannot have all of them looked
                // through with every few bytes.
                let was_blocked = self.sent == self.may_send;
                self.may_send = self.may_send.max(limit);
                if was_blocked && self.sent < self.may_send {
                    let blocked: Vec<_> = self.streams.keys().copied().collect();
                    blocked.into_iter().for_each(|id| self.schedule(id));
                }
            }
            Frame::MaxStreams(limit) => {
                self.may_open = self.may_open.max(limit);
                return Ok(Taken::Opened);
            }
            Frame::Close { application, code, reason } => {
                return Ok(Taken::Closed { application, code, reason });
            }
            // Everything before the largest has come too, so one answer does for all.
            Frame::Ping(sequence) => self.pong = self.pong.max(Some(sequence)),
            Frame::Pong(sequence) => self.take_pong(sequence),
            Frame::Nothing => {}
        }
        Ok(Taken::Nothing)
    }

    fn take_data(&mut self, id: u64, offset: u64, data: Bytes, fin: bool) -> Result<Taken, Fault> {
        let taken = self.known(id)?;
        let Some(stream) = self.streams.get_mut(&id) else { return Ok(taken) };
        let recv = &mut stream.recv;
        if recv.is_over() || offset != recv.offset {
            return Err(Fault::Offset);
        }
        recv.offset += data.len() as u64;
        if recv.offset > recv.limit {
            return Err(Fault::Limit);
        }
        recv.finished = fin;
        if !recv.stopped && data.has_remaining() {
            let short = data.len() < COPY_BELOW;
            recv.queue.push_back(if short { Bytes::copy_from_slice(&data) } else { data });
        }
        stream.wakers.arrived.notify_one();
        self.retire(id);
        Ok(taken)
    }

    /// Checks that a stream can be, and makes it if the peer has just opened it.
    fn known(&mut self, id: u64) -> Result<Taken, Fault> {
        let (index, initiator) = (id >> 2, id & 1);
        if id & 2 != 0 {
            return Err(Fault::Stream);
        }
        if initiator == self.role.bit() {
            return if index < self.opened { Ok(Taken::Nothing) } else { Err(Fault::Stream) };
        }
        if index >= self.granted {
            return Err(Fault::Limit);
        }
        if index < self.accepted {
            return Ok(Taken::Nothing);
        }
        // A stream opens those below it (RFC 9000 §3.2).
        let limit = self.peer.unwrap_or_default().max_stream_data_local;
        for index in self.accepted..=index {
            let id = index << 2 | initiator;
            self.insert(id, limit);
            self.waiting.push_back(id);
        }
        self.accepted = index + 1;
        Ok(Taken::Opened)
    }

    fn take_pong(&mut self, sequence: u64) {
        self.answered = self.answered.max(sequence.min(self.pings));
        while self.marks.front().is_some_and(|(mark, _)| *mark <= sequence) {
            for id in self.marks.pop_front().into_iter().flat_map(|(_, ends)| ends) {
                if let Some(stream) = self.streams.get_mut(&id) {
                    // A code that came before counts.
                    let _ = stream.wakers.end.set(None);
                    stream.send.settled = true;
                    self.retire(id);
                }
            }
        }
    }

    /// Forgets a stream that is over in both directions and read to its end.
    fn retire(&mut self, id: u64) {
        let over =
            |stream: &Stream| stream.send.settled && stream.recv.is_over() && stream.recv.stopped;
        if !self.streams.get(&id).is_some_and(over) {
            return;
        }
        self.streams.remove(&id);
        if id & 1 != self.role.bit() {
            self.retired += 1;
            self.granted += 1;
            self.tell_streams(self.grant_step);
        }
    }

    /// Tells the peer that it may open more streams, once they are at least `step`.
    fn tell_streams(&mut self, step: u64) {
        if self.granted >= self.told + step {
            self.told = self.granted;
            self.urgent.push_back(Frame::MaxStreams(self.granted));
        }
    }
}

/// What a frame meant beyond its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// Nothing.
    Nothing,
    /// A stream was opened, or may be.
    Opened,
    /// The peer closed the connection.
    Closed { application: bool, code: u64, reason: String },
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn grants_that_nobody_waits_for_cost_the_peer_more_than_this_side() {
        let mut mux = Mux::new(Role::Server, 1024, 4096, 30_000);
        mux.take(Frame::Parameters(Parameters { max_data: 1, ..Parameters::default() })).unwrap();
        let last = Frame::Stream { id: 4095 << 2, offset: 0, data: Bytes::new(), fin: false };
        mux.take(last).unwrap();
        // One read's worth of frames: well below a millisecond, and a minute if each one has all
        // 4096 streams looked through.
        let began = Instant::now();
        for limit in 0..60_000 {
            mux.take(Frame::MaxData(limit)).unwrap();
        }
        assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    }
}
