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

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::{
        super::{
            super::frame::{Parameters, split_record},
            Role,
        },
        *,
    };

    /// A connection whose peer allows plenty, with its own parameters sent.
    fn mux() -> Mux {
        let mut mux = Mux::new(Role::Server, 1024, 10, 30_000);
        let parameters = Parameters {
            max_data: 1 << 20,
            max_stream_data_remote: 1 << 20,
            max_streams: 10,
            ..Parameters::default()
        };
        mux.receive(Frame::Parameters(parameters)).unwrap();
        mux.fill(&mut BytesMut::new());
        mux
    }

    fn write(mux: &mut Mux, length: usize) -> u64 {
        let (id, _) = mux.open().unwrap();
        mux.write(id, &mut Bytes::from(vec![7; length]));
        id
    }

    /// Streams and lengths of the STREAM frames in each record of one fill.
    fn records(mux: &mut Mux) -> Vec<Vec<(u64, usize)>> {
        let mut output = BytesMut::new();
        mux.fill(&mut output);
        let mut records = Vec::new();
        while let Some(mut record) = split_record(&mut output).unwrap() {
            let mut frames = Vec::new();
            while !record.is_empty() {
                if let Frame::Stream { id, data, .. } = Frame::decode(&mut record).unwrap() {
                    frames.push((id, data.len()));
                }
            }
            records.push(frames);
        }
        records
    }

    #[test]
    fn a_stream_for_which_a_record_has_no_room_keeps_its_turn() {
        // Around the length that leaves room for a frame's head and no data.
        for length in 16_350..16_365 {
            let mut mux = mux();
            let (first, second) = (write(&mut mux, length), write(&mut mux, 100));
            let sent = records(&mut mux).concat();
            let of = |id| sent.iter().filter(|(of, _)| *of == id).map(|(_, n)| n).sum::<usize>();
            assert_eq!((of(first), of(second)), (length, 100), "{sent:?}");
        }
    }

    #[test]
    fn streams_of_one_priority_take_turns_and_a_higher_one_goes_first() {
        let mut mux = mux();
        let [low, other, high] = [300_000; 3].map(|length| write(&mut mux, length));
        mux.set_priority(high, 1);
        let first = |mux: &mut Mux| records(mux).concat()[0].0;
        for _ in 0..3 {
            assert_eq!(first(&mut mux), high);
        }
        mux.set_priority(high, -1);
        let turns = records(&mut mux).concat().into_iter().map(|(id, _)| id).collect::<Vec<_>>();
        assert_eq!(turns[..2], [low, other]);
    }

    #[test]
    fn urgent_frames_go_before_all_streams_and_a_fill_is_bounded() {
        let mut mux = mux();
        write(&mut mux, 100_000);
        mux.ping();
        let mut output = BytesMut::new();
        mux.fill(&mut output);
        assert!((BATCH..BATCH + MAX_RECORD + 2).contains(&output.len()), "{}", output.len());
        let mut record = split_record(&mut output).unwrap().unwrap();
        assert_eq!(Frame::decode(&mut record), Ok(Frame::Ping(1)));
    }
}
