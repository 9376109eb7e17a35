//! The state of one QMux connection: its streams, their credit, and what is to be sent next.
//!
//! Pure: no I/O, no clock and no task. Frames that arrived go in by [`Mux::receive`], frames to be
//! sent come out by [`Mux::fill`]. From tokio there are only the wakers of a stream ([`Wakers`]),
//! which need no runtime.
//!
//! ```text
//!  halves ── open, write, read, stop, … ──▶ mux ── fill ──▶ outgoing records
//!                                            ▲
//!  incoming frames ──────── receive ─────────┘
//! ```

#[cfg(any(test, fuzzing))]
mod exercise;
mod incoming;
mod outgoing;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;
use culvert_wire::{bounded::PeerText, code::StreamCode};

#[cfg(fuzzing)]
pub(super) use self::exercise::exercise;
pub(super) use self::incoming::Received;
use super::{
    Role,
    frame::{Frame, Parameters},
    stream::{Found, Recv, Room, Send, SendState, Stream, Wakers},
};

/// Maximum number of bytes of a stream that wait here to be sent, before the chunk that exceeds it;
/// what is beyond waits with its writer.
const SEND_BUFFER: usize = 128 * 1024;

/// The state of one connection.
///
/// Counts of streams are totals since the connection began, as in MAX_STREAMS (RFC 9000 §4.6).
#[derive(Debug)]
pub(super) struct Mux {
    role: Role,
    /// Number of bytes that may arrive on a stream before they are read.
    window: u64,
    /// The peer's parameters, once they have arrived.
    peer: Option<Parameters>,
    streams: HashMap<u64, Stream>,

    /// Streams that have something to send and credit for it, by priority, in the order of turns.
    ready: BTreeMap<i32, VecDeque<u64>>,
    /// Frames that go before those of all streams.
    urgent: VecDeque<Frame>,
    /// The peer's latest ping that has not been answered.
    pong: Option<u64>,

    /// Pings sent behind the FINs of these streams: the answer proves that the FINs have arrived.
    fin_pings: VecDeque<(u64, Vec<u64>)>,
    /// Sequence number of the last ping sent.
    pings: u64,
    /// Sequence number of the last ping answered.
    answered: u64,

    /// Number of streams that this side has opened.
    local_opened: u64,
    /// Number of streams that the peer allows this side to open.
    local_allowed: u64,

    /// Number of streams that the peer has opened.
    remote_opened: u64,
    /// Number of streams that the peer may open.
    remote_granted: u64,
    /// The last value of `remote_granted` that was sent to the peer.
    remote_announced: u64,
    /// Number of the peer's streams that are closed.
    remote_closed: u64,
    /// Growth of `remote_granted` that is worth a frame.
    announce_step: u64,
    /// Streams that the peer has opened and this side has not accepted.
    unaccepted: VecDeque<u64>,

    /// Number of bytes sent on all streams.
    data_sent: u64,
    /// Number of bytes that the peer allows on all streams (MAX_DATA).
    data_allowed: u64,
}

/// Number of streams that close before the peer is allowed to open as many again, where it may have
/// `max_streams` open.
fn announce_step(max_streams: u32) -> u64 {
    u64::from(max_streams / 8).clamp(1, 16)
}

impl Mux {
    /// A connection whose peer may send `window` bytes on each stream before they are read, and may
    /// have `max_streams` streams open.
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
            fin_pings: VecDeque::new(),
            pings: 0,
            answered: 0,
            local_opened: 0,
            local_allowed: 0,
            remote_opened: 0,
            remote_granted: streams,
            remote_announced: streams,
            remote_closed: 0,
            announce_step: announce_step(max_streams),
            unaccepted: VecDeque::new(),
            data_sent: 0,
            data_allowed: 0,
        }
    }

    /// The peer's parameters, once they have arrived.
    pub(super) fn peer(&self) -> Option<Parameters> {
        self.peer
    }

    /// Opens a stream, if the peer allows one more.
    pub(super) fn open(&mut self) -> Option<(u64, Arc<Wakers>)> {
        let peer = self.peer?;
        if self.local_opened >= self.local_allowed {
            return None;
        }
        let id = self.local_opened << 2 | self.role.bit();
        self.local_opened += 1;
        Some((id, self.insert(id, peer.max_stream_data_remote)))
    }

    /// The next stream that the peer opened.
    pub(super) fn accept(&mut self) -> Option<(u64, Arc<Wakers>)> {
        let id = self.unaccepted.pop_front()?;
        let wakers = self.streams.get(&id).map(|stream| stream.wakers.clone());
        // A stream that was closed meanwhile still gets its halves.
        Some((id, wakers.unwrap_or_default()))
    }

    fn insert(&mut self, id: u64, send_limit: u64) -> Arc<Wakers> {
        let wakers = Arc::<Wakers>::default();
        let (send, recv) = (Send::new(send_limit), Recv::new(self.window));
        self.streams.insert(id, Stream { wakers: wakers.clone(), send, recv });
        wakers
    }

    /// Takes a chunk to be sent, if there is room for it. It is taken whole.
    pub(super) fn write(&mut self, id: u64, chunk: &mut Bytes) -> Room {
        let Some(stream) = self.streams.get_mut(&id) else { return Room::Ended };
        if let Some(Some(code)) = stream.wakers.end.get() {
            return Room::Stopped(*code);
        }
        if stream.send.state() != SendState::Open {
            return Room::Ended;
        }
        if stream.send.queued() >= SEND_BUFFER {
            return Room::None;
        }
        stream.send.push(std::mem::take(chunk));
        self.schedule(id);
        Room::Taken
    }

    /// Sends a FIN behind what was written.
    pub(super) fn finish(&mut self, id: u64) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.send.finish();
            self.schedule(id);
        }
    }

    /// Discards what has not been sent, and sends a reset, unless the FIN is sent already.
    pub(super) fn reset(&mut self, id: u64, code: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if let Some(final_size) = stream.send.reset() {
            self.urgent.push_back(Frame::ResetStream { id, code, final_size });
            self.forget_closed(id);
        }
    }

    /// Sets the priority: streams of a higher one send first. It takes effect at once.
    pub(super) fn set_priority(&mut self, id: u64, priority: i32) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let before = std::mem::replace(&mut stream.send.priority, priority);
        if stream.send.scheduled && before != priority {
            self.unschedule(id, before);
            self.schedule(id);
        }
    }

    /// Fills the front of `chunks` with what has arrived.
    pub(super) fn read(&mut self, id: u64, chunks: &mut [Bytes]) -> Found {
        let Some(stream) = self.streams.get_mut(&id) else { return Found::End };
        let found = stream.recv.read(chunks);
        if let Some(limit) = stream.recv.grant(self.window) {
            self.urgent.push_back(Frame::MaxStreamData { id, limit });
        }
        self.forget_closed(id);
        found
    }

    /// The code of the peer's reset, if one has arrived that was not reported before.
    pub(super) fn reset_of(&mut self, id: u64) -> Option<StreamCode> {
        let code = self.streams.get_mut(&id)?.recv.take_reset()?;
        self.forget_closed(id);
        Some(code)
    }

    /// Reads no more of a stream, and asks the peer to stop if it has not ended the stream.
    pub(super) fn stop(&mut self, id: u64, code: u64) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        if stream.recv.stop() {
            self.urgent.push_back(Frame::StopSending { id, code });
        }
        self.forget_closed(id);
    }

    /// Allows the peer to have `count` streams open. A grant cannot be taken back, so a lower count
    /// than before takes effect as streams close.
    pub(super) fn set_max_streams(&mut self, count: u32) {
        self.announce_step = announce_step(count);
        self.remote_granted =
            self.remote_granted.max(self.remote_closed.saturating_add(count.into()));
        self.announce_streams(1);
    }

    /// Sends a close, which is the last frame of the connection.
    pub(super) fn close(&mut self, application: bool, code: u64, reason: &str) {
        self.urgent.push_back(Frame::Close {
            application,
            code,
            reason: PeerText::truncated(reason.to_owned()),
        });
    }

    /// Sends a ping; its sequence number.
    pub(super) fn ping(&mut self) -> u64 {
        self.pings += 1;
        self.urgent.push_back(Frame::Ping(self.pings));
        self.pings
    }

    /// Sequence number of the last ping that was answered.
    pub(super) fn answered(&self) -> u64 {
        self.answered
    }

    /// Forgets a stream once it is closed, and grants the peer another for one of its own.
    fn forget_closed(&mut self, id: u64) {
        if !self.streams.get(&id).is_some_and(Stream::is_closed) {
            return;
        }
        self.streams.remove(&id);
        if id & 1 != self.role.bit() {
            self.remote_closed += 1;
            self.remote_granted += 1;
            self.announce_streams(self.announce_step);
        }
    }

    /// Sends how many streams the peer may open, once that has grown by `step`.
    fn announce_streams(&mut self, step: u64) {
        if self.remote_granted >= self.remote_announced + step {
            self.remote_announced = self.remote_granted;
            self.urgent.push_back(Frame::MaxStreams(self.remote_granted));
        }
    }
}
