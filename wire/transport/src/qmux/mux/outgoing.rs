//! What a connection sends, and in which order.

use bytes::BytesMut;

use super::{
    super::frame::{Frame, MAX_DATA_LEN, MAX_RECORD, Record},
    Mux,
};

/// Number of bytes that [`Mux::fill`] writes at once: an urgent frame that comes meanwhile waits
/// for no more than these.
pub(super) const BATCH: usize = 32 * 1024;
/// Maximum length of an urgent frame, in bytes. A close has the longest, with its reason.
const MAX_URGENT_LEN: usize = 1200;

impl Mux {
    /// Appends the next records: urgent frames, then those of streams in the order of priority.
    pub(in crate::qmux) fn fill(&mut self, output: &mut BytesMut) {
        let mut finished = Vec::new();
        while output.len() < BATCH && self.has_work() {
            let mut record = Record::begin(output);
            while let Some(frame) = self.next_frame(record.room(), &mut finished) {
                record.put(&frame);
            }
            if !record.end() {
                break;
            }
        }
        if !finished.is_empty() {
            // The answer to a ping proves that everything sent before it has arrived.
            self.pings += 1;
            self.fin_pings.push_back((self.pings, finished));
            let mut record = Record::begin(output);
            record.put(&Frame::Ping(self.pings));
            record.end();
        }
    }

    /// Whether there may be something to send.
    pub(in crate::qmux) fn has_work(&self) -> bool {
        !self.urgent.is_empty() || self.pong.is_some() || !self.ready.is_empty()
    }

    /// The next frame that fits into `room` bytes. Streams whose FIN goes out by it are added to
    /// `finished`.
    fn next_frame(&mut self, room: usize, finished: &mut Vec<u64>) -> Option<Frame> {
        if !self.urgent.is_empty() || self.pong.is_some() {
            return if room >= MAX_URGENT_LEN { self.next_urgent() } else { None };
        }
        let most = room.checked_sub(MAX_RECORD - MAX_DATA_LEN).filter(|most| *most > 0)?;
        loop {
            let id = self.next_ready()?;
            if let Some(frame) = self.stream_frame(id, most, finished) {
                return Some(frame);
            }
        }
    }

    fn next_urgent(&mut self) -> Option<Frame> {
        self.urgent.pop_front().or_else(|| self.pong.take().map(Frame::Pong))
    }

    /// Takes the stream whose turn it is out of its queue.
    fn next_ready(&mut self) -> Option<u64> {
        loop {
            let mut band = self.ready.last_entry()?;
            match band.get_mut().pop_front() {
                Some(id) => return Some(id),
                None => band.remove(),
            };
        }
    }

    /// The next frame of a stream, with at most `most` bytes of data; `None` when the connection's
    /// limit allows none. The stream goes behind the others of its priority.
    fn stream_frame(&mut self, id: u64, most: usize, finished: &mut Vec<u64>) -> Option<Frame> {
        let stream = self.streams.get_mut(&id)?;
        stream.send.scheduled = false;
        if !stream.send.is_ready() {
            return None;
        }
        let allowed = self.data_allowed - self.data_sent;
        let part = stream.send.next(most.min(usize::try_from(allowed).unwrap_or(most)))?;
        self.data_sent += part.data.len() as u64;
        stream.wakers.room.notify_one();
        if part.fin {
            finished.push(id);
        }
        self.schedule(id);
        Some(Frame::Stream { id, offset: part.offset, data: part.data, fin: part.fin })
    }

    /// Puts a stream behind the others of its priority, if it has something to send and may.
    pub(super) fn schedule(&mut self, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let send = &mut stream.send;
        if send.is_ready() && !send.scheduled {
            send.scheduled = true;
            self.ready.entry(send.priority).or_default().push_back(id);
        }
    }

    /// Takes a stream out of the queue of this priority.
    pub(super) fn unschedule(&mut self, id: u64, priority: i32) {
        if let Some(band) = self.ready.get_mut(&priority) {
            band.retain(|other| *other != id);
        }
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.send.scheduled = false;
        }
    }
}
