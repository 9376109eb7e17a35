//! The tunnel and its streams, whichever carrier they are on.
//!
//! Two guards live here because forgetting them loses data in silence:
//! - a half that is dropped before it ended is reset (or stopped), never finished, so that a task
//!   that crashed cannot look like a clean end;
//! - a frame is read exactly, so the bytes behind it stay in the stream.

use std::{
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use culvert_wire::{
    code::{CloseCode, StreamCode},
    frame::{Frame, FrameError, HEAD_LEN, Head},
};
use rustls_pki_types::CertificateDer;

use crate::{
    carrier,
    priority::{AttainedService, Class, PriorityBudget},
    quic::udp::Unreachable,
};

/// One authenticated connection between one agent and one server.
///
/// Clones are handles to the same tunnel. It lives until one side closes it or the path dies;
/// dropping every handle closes it with [`CloseCode::DONE`].
#[derive(Clone)]
pub struct Tunnel {
    carrier: carrier::Connection,
}

impl Tunnel {
    pub(crate) fn over(carrier: impl Into<carrier::Connection>) -> Self {
        Self { carrier: carrier.into() }
    }

    /// Opens a data stream. Nothing is sent until the first write.
    ///
    /// Waits while the peer's limit of open streams is reached.
    ///
    /// # Errors
    /// When the tunnel is lost.
    ///
    /// # Cancel safety
    /// Dropping the future opens nothing.
    pub async fn open(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        self.carrier.open().await
    }

    /// The next stream that the peer opened, in the order in which it opened them.
    ///
    /// # Errors
    /// When the tunnel is lost.
    ///
    /// # Cancel safety
    /// Dropping the future loses no stream.
    pub async fn accept(&self) -> Result<(SendHalf, RecvHalf), TunnelLost> {
        self.carrier.accept().await
    }

    /// Closes the tunnel at once; whatever is on its way on any stream is lost.
    pub fn close(&self, code: CloseCode, reason: &str) {
        self.carrier.close(code, reason);
    }

    /// Why the tunnel ended, once it has.
    pub async fn closed(&self) -> TunnelLost {
        self.carrier.closed().await
    }

    /// Waits until a closed tunnel's last packets are out, at most `limit`.
    pub async fn flushed(&self, limit: Duration) {
        self.carrier.flushed(limit).await;
    }

    /// Completes each time the network says that the peer cannot be reached, or not any more; for one
    /// waiter.
    ///
    /// It is a hint and can be forged by whoever sees the packets: ask the peer before believing.
    pub async fn unreachable(&self) -> Unreachable {
        self.carrier.unreachable().await
    }

    /// Sends thin writes of interactive streams twice while the path loses packets, at most `rate`
    /// bytes per second, so that a loss does not delay them; and uses the peer's copies.
    ///
    /// To be called once both sides have offered [`culvert_wire::version::Features::HEDGE`], before the
    /// first stream it is to apply to. A carrier that needs none of it ignores it.
    pub fn hedge(&self, rate: u32) {
        self.carrier.hedge(rate);
    }

    /// How many streams the peer may have open at once; takes effect within a round trip.
    pub fn set_max_streams(&self, count: u32) {
        self.carrier.set_max_streams(count);
    }

    /// Where the peer's packets come from now; it changes when the peer's address does.
    pub fn remote_address(&self) -> SocketAddr {
        self.carrier.remote_address()
    }

    /// The peer's certificate chain, leaf first, if it presented one.
    pub fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        self.carrier.peer_certificates()
    }

    /// What the carrier measured so far. Takes the tunnel's lock: sample, do not poll.
    pub fn stats(&self) -> TunnelStats {
        self.carrier.stats()
    }

    /// The carrier's name for logs and metric labels: `quic`, `tcp`, or `grpc` to a Konnectivity peer.
    pub fn transport(&self) -> &'static str {
        self.carrier.name()
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel").field("remote", &self.remote_address()).finish_non_exhaustive()
    }
}

/// A tunnel's path as the carrier sees it. Counters run from the tunnel's start.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct TunnelStats {
    /// Smoothed round-trip time.
    pub rtt: Duration,
    /// Congestion window in bytes.
    pub cwnd: u64,
    /// Largest UDP payload the path is known to carry, in bytes.
    pub mtu: u16,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets declared lost.
    pub lost_packets: u64,
    /// Bytes in the packets declared lost.
    pub lost_bytes: u64,
    /// Times the congestion window was cut.
    pub congestion_events: u64,
    /// Times the path was found to swallow large packets.
    pub black_holes: u64,
    /// UDP payload bytes sent.
    pub sent_bytes: u64,
    /// UDP payload bytes received.
    pub received_bytes: u64,
    /// Frames sent that the peer must acknowledge; 0 where the carrier does not count them.
    pub eliciting_frames: u64,
    /// Thin writes that were sent a second time.
    pub copies_sent: u64,
    /// Second copies that came before the first.
    pub copies_used: u64,
}

/// Why a tunnel ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelLost {
    /// The peer closed it and said why.
    #[error("closed by the peer: {code}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    ClosedByPeer {
        /// The peer's code.
        code: CloseCode,
        /// The peer's words, possibly none.
        reason: String,
    },
    /// This side closed it and knows why.
    #[error("closed by this side: {code}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    ClosedHere {
        /// This side's code.
        code: CloseCode,
        /// This side's words, possibly none.
        reason: String,
    },
    /// Nothing came for the whole idle time-out.
    #[error("nothing came within the idle time-out")]
    TimedOut,
    /// The peer does not know the tunnel any more: its process started anew.
    #[error("the peer has restarted and forgot the tunnel")]
    PeerRestarted,
    /// The peer refused the handshake or broke the carrier's protocol.
    #[error("{0}")]
    Transport(String),
}

impl TunnelLost {
    /// A short word for metric labels.
    pub fn label(&self) -> &'static str {
        match self {
            Self::ClosedByPeer { code, .. } | Self::ClosedHere { code, .. } => code.name(),
            Self::TimedOut => "timed_out",
            Self::PeerRestarted => "peer_restarted",
            Self::Transport(_) => "transport",
        }
    }
}

/// Why nothing more can be written to a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The peer stopped the stream: nobody reads it any more.
    #[error("stopped by the peer: {0}")]
    Stopped(StreamCode),
    /// The tunnel is lost.
    #[error("tunnel lost: {0}")]
    Lost(#[from] TunnelLost),
    /// This side has ended the stream already; the fault is ours.
    #[error("stream has ended already")]
    Ended,
}

/// Why nothing more can be read from a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The peer reset the stream: what it had sent is incomplete.
    #[error("reset by the peer: {0}")]
    Reset(StreamCode),
    /// The tunnel is lost.
    #[error("tunnel lost: {0}")]
    Lost(#[from] TunnelLost),
    /// This side has stopped the stream already; the fault is ours.
    #[error("stream has been stopped already")]
    Ended,
}

/// Why a frame could not be read from a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadFrameError {
    /// The stream ended between frames.
    #[error("the stream ended")]
    End,
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The frame breaks the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// The half of a stream that this side writes.
///
/// Dropping it before [`finish`](Self::finish) or [`reset`](Self::reset) resets it with
/// [`StreamCode::ABANDONED`].
pub struct SendHalf {
    carrier: carrier::SendStream,
    ended: bool,
    /// What the stream has had, unless its priority was set.
    attained: Option<AttainedService>,
    class: Class,
}

impl SendHalf {
    pub(crate) fn new(
        carrier: impl Into<carrier::SendStream>,
        tunnel: Arc<PriorityBudget>,
    ) -> Self {
        let attained = Some(AttainedService::new(tunnel, now()));
        let carrier = carrier.into();
        let half = Self { carrier, ended: false, attained, class: Class::Interactive };
        half.carrier.set_priority(half.class.priority());
        half
    }

    /// Queues the whole chunk without copying it, waiting while the windows are full.
    ///
    /// # Errors
    /// When the peer stopped the stream or the tunnel is lost.
    ///
    /// # Cancel safety
    /// Not cancel safe: an unknown part of the chunk may have been queued. Reset the half then.
    pub async fn write_chunk(&mut self, chunk: Bytes) -> Result<(), WriteError> {
        if let Some(attained) = &mut self.attained {
            let class = attained.on_write(now(), chunk.len() as u64);
            if class != self.class {
                self.class = class;
                self.carrier.set_priority(class.priority());
            }
        }
        // What says itself how urgent it is, is never alone on its way.
        let interactive = self.attained.is_some() && self.class == Class::Interactive;
        let written = self.carrier.write_chunk(chunk, interactive).await;
        if let Some(attained) = &mut self.attained {
            attained.on_written(now());
        }
        written
    }

    /// Ends the stream cleanly behind everything written. Returns at once; delivery goes on.
    pub fn finish(&mut self) {
        if !self.ended {
            self.ended = true;
            self.carrier.finish();
        }
    }

    /// Abandons the stream: unsent bytes are dropped, and the peer sees `code`, never an end.
    pub fn reset(&mut self, code: StreamCode) {
        if !self.ended {
            self.ended = true;
            self.carrier.reset(code);
        }
    }

    /// Completes when the peer is done with the stream: with a code when it stopped it, with
    /// `None` when it has everything up to the finish.
    ///
    /// The future does not borrow the half, so it can be watched while writing.
    pub fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<StreamCode>, TunnelLost>> + Send + Sync + 'static {
        self.carrier.stopped()
    }

    /// Says for good how urgent the stream is among the tunnel's others; higher goes first. Streams
    /// of which it is not said go first while they send little, between −10 and 10.
    pub fn set_priority(&mut self, priority: i32) {
        self.attained = None;
        self.carrier.set_priority(priority);
    }
}

/// An IPv4 peer of a dual-stack socket, without the IPv6 mapping.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The time that tokio's timers go by.
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

impl Drop for SendHalf {
    fn drop(&mut self) {
        self.reset(StreamCode::ABANDONED);
    }
}

impl fmt::Debug for SendHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SendHalf").field("ended", &self.ended).finish_non_exhaustive()
    }
}

/// The half of a stream that this side reads.
///
/// Dropping it before its end stops it with [`StreamCode::ABANDONED`].
pub struct RecvHalf {
    carrier: carrier::RecvStream,
    ended: bool,
    /// What ended it, unless that was the clean end or this side.
    fault: Option<ReadError>,
}

impl RecvHalf {
    pub(crate) fn new(carrier: impl Into<carrier::RecvStream>) -> Self {
        Self { carrier: carrier.into(), ended: false, fault: None }
    }

    /// Fills the front of `chunks` with what has arrived, in order and without copying, waiting
    /// for the first. `None` is the clean end.
    ///
    /// # Errors
    /// When the peer reset the stream or the tunnel is lost.
    ///
    /// # Cancel safety
    /// Cancel safe: nothing is taken before the future completes.
    pub async fn read_chunks(&mut self, chunks: &mut [Bytes]) -> Result<Option<usize>, ReadError> {
        self.check()?;
        let result = self.carrier.read_chunks(chunks).await;
        self.note(result)
    }

    /// The next frame, if its body has at most `limit` bytes. Bytes behind it stay in the stream.
    ///
    /// # Errors
    /// When the stream ends, fails, or announces more than `limit`.
    ///
    /// # Cancel safety
    /// Not cancel safe: part of a frame may have been taken. Stop the half then.
    pub async fn read_frame(&mut self, limit: usize) -> Result<Frame, ReadFrameError> {
        let mut head = [0; HEAD_LEN];
        match self.read_full(&mut head).await? {
            0 => return Err(ReadFrameError::End),
            HEAD_LEN => {}
            _ => return Err(ReadFrameError::Truncated),
        }
        let Head { kind, length } = Head::decode(head);
        if length > limit {
            return Err(FrameError::Oversized { kind, length, limit }.into());
        }
        let mut body = vec![0; length];
        if self.read_full(&mut body).await? < length {
            return Err(ReadFrameError::Truncated);
        }
        Ok(Frame { kind, body: body.into() })
    }

    /// Fills `buf` unless the stream ends first; how far it came.
    async fn read_full(&mut self, buf: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        while filled < buf.len() {
            self.check()?;
            let result = self.carrier.read(&mut buf[filled..]).await;
            match self.note(result)? {
                Some(count) => filled += count,
                None => break,
            }
        }
        Ok(filled)
    }

    /// Fails once the half has failed: a carrier may tell a fault once and a clean end after it.
    fn check(&self) -> Result<(), ReadError> {
        self.fault.clone().map_or(Ok(()), Err)
    }

    /// Remembers how the half ended, if this is its end.
    fn note(&mut self, read: Result<Option<usize>, ReadError>) -> Result<Option<usize>, ReadError> {
        self.ended |= !matches!(read, Ok(Some(_)));
        self.fault = read.as_ref().err().cloned();
        read
    }

    /// Refuses the rest of the stream: what has arrived is dropped and the peer sees `code`.
    pub fn stop(&mut self, code: StreamCode) {
        if !self.ended {
            self.ended = true;
            self.carrier.stop(code);
        }
    }

    /// Completes when the peer resets the stream or the tunnel is lost, and never on a clean end:
    /// for whoever holds bytes back and still must notice.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn failed(&mut self) -> ReadError {
        if let Some(fault) = &self.fault {
            return fault.clone();
        }
        let fault = self.carrier.failed().await;
        self.ended = true;
        self.fault.insert(fault).clone()
    }
}

impl Drop for RecvHalf {
    fn drop(&mut self) {
        self.stop(StreamCode::ABANDONED);
    }
}

impl fmt::Debug for RecvHalf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecvHalf").field("ended", &self.ended).finish_non_exhaustive()
    }
}
