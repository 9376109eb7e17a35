//! What a connection does with the frames that arrive: one function per frame.

use bytes::Bytes;
use culvert_wire::{bounded::PeerText, code::StreamCode};

use super::{
    super::{
        fault::Fault,
        frame::{Frame, Parameters},
        stream::SendState,
    },
    Mux,
};

/// Maximum number of urgent frames that wait for a peer which does not read what it causes.
pub(super) const MAX_URGENT: usize = 16_384;

/// What a frame meant beyond its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::qmux) enum Received {
    /// Nothing.
    Nothing,
    /// The peer has opened a stream, or allows this side to.
    Streams,
    /// The peer closed the connection.
    Closed { application: bool, code: u64, reason: PeerText },
}

impl Mux {
    /// Takes a frame that arrived.
    ///
    /// # Errors
    /// When the peer breaks the protocol, which ends the connection.
    pub(in crate::qmux) fn receive(&mut self, frame: Frame) -> Result<Received, Fault> {
        if self.peer.is_none() != matches!(frame, Frame::Parameters(_)) {
            return Err(Fault::Parameters);
        }
        if self.urgent.len() > MAX_URGENT {
            return Err(Fault::Flood);
        }
        match frame {
            Frame::Parameters(parameters) => return Ok(self.on_parameters(parameters)),
            Frame::Stream { id, offset, data, fin } => {
                return self.on_stream(id, offset, &data, fin);
            }
            Frame::ResetStream { id, code, final_size } => {
                return self.on_reset_stream(id, StreamCode::from_wire(code), final_size);
            }
            Frame::StopSending { id, code } => return self.on_stop_sending(id, code),
            Frame::MaxStreamData { id, limit } => return self.on_max_stream_data(id, limit),
            Frame::MaxStreams(limit) => return Ok(self.on_max_streams(limit)),
            Frame::Close { application, code, reason } => {
                return Ok(Received::Closed { application, code, reason });
            }
            Frame::MaxData(limit) => self.on_max_data(limit),
            Frame::Ping(sequence) => self.on_ping(sequence),
            Frame::Pong(sequence) => self.on_pong(sequence),
            Frame::Nothing => {}
        }
        Ok(Received::Nothing)
    }

    fn on_parameters(&mut self, parameters: Parameters) -> Received {
        self.peer = Some(parameters);
        self.local_allowed = parameters.max_streams;
        self.data_allowed = parameters.max_data;
        Received::Streams
    }

    fn on_stream(
        &mut self,
        id: u64,
        offset: u64,
        data: &Bytes,
        fin: bool,
    ) -> Result<Received, Fault> {
        let received = self.open_remote(id)?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.recv.receive(offset, data, fin)?;
            stream.wakers.arrived.notify_one();
            self.forget_closed(id);
        }
        Ok(received)
    }

    fn on_reset_stream(
        &mut self,
        id: u64,
        code: StreamCode,
        final_size: u64,
    ) -> Result<Received, Fault> {
        let received = self.open_remote(id)?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.recv.receive_reset(code, final_size)?;
            stream.wakers.arrived.notify_waiters();
            stream.wakers.arrived.notify_one();
            self.forget_closed(id);
        }
        Ok(received)
    }

    /// The peer stops reading: the half is reset with the peer's code. One whose FIN is sent is not
    /// reset, but it ended with the code too, for the peer sent it before it had the FIN.
    fn on_stop_sending(&mut self, id: u64, code: u64) -> Result<Received, Fault> {
        let received = self.open_remote(id)?;
        if let Some(stream) = self.streams.get_mut(&id)
            && stream.send.state() != SendState::Settled
        {
            let _ = stream.wakers.end.set(Some(StreamCode::from_wire(code)));
            stream.wakers.room.notify_one();
            self.reset(id, code);
        }
        Ok(received)
    }

    fn on_max_stream_data(&mut self, id: u64, limit: u64) -> Result<Received, Fault> {
        let received = self.open_remote(id)?;
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.send.raise_limit(limit);
            self.schedule(id);
        }
        Ok(received)
    }

    fn on_max_streams(&mut self, limit: u64) -> Received {
        self.local_allowed = self.local_allowed.max(limit);
        Received::Streams
    }

    fn on_max_data(&mut self, limit: u64) {
        let was_blocked = self.data_sent == self.data_allowed;
        self.data_allowed = self.data_allowed.max(limit);
        if was_blocked && self.data_sent < self.data_allowed {
            self.schedule_all();
        }
    }

    /// Schedules the streams that waited for the connection's limit. It looks at all of them, so a
    /// peer must not be able to cause it with every few bytes: only when the limit was reached.
    fn schedule_all(&mut self) {
        #[cfg(test)]
        tests::SCHEDULED_ALL.set(tests::SCHEDULED_ALL.get() + 1);
        let ids: Vec<_> = self.streams.keys().copied().collect();
        ids.into_iter().for_each(|id| self.schedule(id));
    }

    /// Remembers the largest: what was sent before it has arrived too, so one answer is enough.
    fn on_ping(&mut self, sequence: u64) {
        self.pong = self.pong.max(Some(sequence));
    }

    fn on_pong(&mut self, sequence: u64) {
        self.answered = self.answered.max(sequence.min(self.pings));
        while self.fin_pings.front().is_some_and(|(ping, _)| *ping <= sequence) {
            for id in self.fin_pings.pop_front().into_iter().flat_map(|(_, ids)| ids) {
                if let Some(stream) = self.streams.get_mut(&id) {
                    // A stop that arrived before counts.
                    let _ = stream.wakers.end.set(None);
                    stream.send.settle();
                    self.forget_closed(id);
                }
            }
        }
    }

    /// Checks that a stream can exist, and opens it if the peer has just done so.
    fn open_remote(&mut self, id: u64) -> Result<Received, Fault> {
        let (index, initiator) = (id >> 2, id & 1);
        if id & 2 != 0 {
            return Err(Fault::StreamId);
        }
        if initiator == self.role.bit() {
            let opened = index < self.local_opened;
            return if opened { Ok(Received::Nothing) } else { Err(Fault::StreamId) };
        }
        if index >= self.remote_granted {
            return Err(Fault::Limit);
        }
        if index < self.remote_opened {
            return Ok(Received::Nothing);
        }
        // A stream opens those below it (RFC 9000 §3.2).
        let limit = self.peer.unwrap_or_default().max_stream_data_local;
        for index in self.remote_opened..=index {
            let id = index << 2 | initiator;
            self.insert(id, limit);
            self.unaccepted.push_back(id);
        }
        self.remote_opened = index + 1;
        Ok(Received::Streams)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::{
        super::{Found, Role},
        *,
    };

    thread_local! {
        /// Number of times that all streams of a connection were looked at, in this test.
        pub(super) static SCHEDULED_ALL: Cell<u32> = const { Cell::new(0) };
    }

    /// A server with a peer that grants one byte of data and has opened 4096 streams.
    fn mux_with_many_streams() -> Mux {
        let mut mux = Mux::new(Role::Server, 1024, 4096, 30_000);
        let parameters = Parameters { max_data: 1, ..Parameters::default() };
        mux.receive(Frame::Parameters(parameters)).unwrap();
        let last = Frame::Stream { id: 4095 << 2, offset: 0, data: Bytes::new(), fin: false };
        mux.receive(last).unwrap();
        mux
    }

    /// A peer that is not admitted yet has the control stream alone, which is read frame by frame.
    #[test]
    fn frames_of_one_byte_are_joined_on_the_control_stream_and_on_others() {
        let mut mux = mux_with_many_streams();
        for id in [0, 4 << 2] {
            for offset in 0..1000 {
                let data = Bytes::from_static(b"x");
                mux.receive(Frame::Stream { id, offset, data, fin: false }).unwrap();
            }
            let mut chunks = [const { Bytes::new() }; 32];
            assert_eq!(mux.read(id, &mut chunks), Found::Chunks(1), "stream {id}");
            assert_eq!(chunks[0].len(), 1000, "stream {id}");
        }
    }

    #[test]
    fn limits_that_no_stream_waits_for_cause_no_scan_of_all_streams() {
        let mut mux = mux_with_many_streams();
        for limit in 0..1000 {
            mux.receive(Frame::MaxData(limit)).unwrap();
        }
        assert_eq!(SCHEDULED_ALL.get(), 0);
    }

    #[test]
    fn a_limit_that_streams_wait_for_lets_them_go_on() {
        let mut mux = mux_with_many_streams();
        mux.receive(Frame::MaxStreamData { id: 0, limit: 100 }).unwrap();
        mux.write(0, &mut Bytes::from_static(b"ab"));
        mux.fill(&mut bytes::BytesMut::new());
        assert!(!mux.has_work(), "the connection allows one byte, which is sent");
        for limit in [0, 1] {
            mux.receive(Frame::MaxData(limit)).unwrap();
            assert!(!mux.has_work(), "a limit of {limit} is no news");
        }
        mux.receive(Frame::MaxData(2)).unwrap();
        assert!(mux.has_work());
        assert_eq!(SCHEDULED_ALL.get(), 1);
    }
}
