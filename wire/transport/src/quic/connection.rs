//! One established QUIC connection and its streams.

use std::{
    net::SocketAddr,
    pin::pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use culvert_wire::{
    code::{CloseCode, StreamCode},
    version::ALPN,
};
use quinn::VarInt;
use rustls_pki_types::CertificateDer;
use tokio::{select, time::sleep};

use super::{
    close_reason::{CloseReason, stream_code},
    icmp::{IcmpRouter, Reachability},
    inspection::{Inbound, Negotiated},
    receive_window::{ReceiveWindow, Widened},
    repair::Repair,
};
use crate::{
    ReadError, TunnelLost, TunnelStats, Unreachable, WriteError,
    budget::MemoryBudget,
    canonical,
    congestion::{self, KnownPath},
};

/// How often a stream with unread bytes is checked for a reset by the peer: soon enough for the
/// client at the other end, seldom enough for a thousand stalled streams.
const RESET_INTERVAL: Duration = Duration::from_millis(50);

/// An established QUIC connection: make a [`Tunnel`](crate::Tunnel) of it.
#[derive(Clone, Debug)]
pub struct Connection {
    connection: quinn::Connection,
    endpoint: quinn::Endpoint,
    close_reason: CloseReason,
    /// Copies and repair shards of short writes, once both sides have agreed on them.
    repair: Arc<OnceLock<Repair>>,
    reachability: Arc<Reachability>,
    window: Arc<ReceiveWindow>,
    inbound: Arc<Inbound>,
    /// Keeps the socket's error queue read for as long as a connection uses it.
    _icmp_router: Arc<IcmpRouter>,
}

impl Connection {
    /// The connection whose handshake is complete; `None`, and closed, if it did not agree on the
    /// protocol.
    pub(super) fn established(
        connection: quinn::Connection,
        endpoint: quinn::Endpoint,
        icmp_router: Arc<IcmpRouter>,
        window: Option<u64>,
    ) -> Option<Self> {
        let inbound = match Negotiated::of(&connection) {
            Some((Some(protocol), inbound)) if protocol == ALPN => inbound,
            _ => {
                connection.close(CloseCode::INCOMPATIBLE.as_u32().into(), b"no protocol agreed on");
                return None;
            }
        };
        let reachability = icmp_router.add(canonical(connection.remote_address()));
        let window = ReceiveWindow::new(connection.clone(), window, inbound.clone());
        Some(Self {
            connection,
            endpoint,
            close_reason: CloseReason::new(inbound.clone()),
            repair: Arc::default(),
            reachability,
            window,
            inbound,
            _icmp_router: icmp_router,
        })
    }

    pub(crate) async fn open(&self) -> Result<(SendStream, RecvStream), TunnelLost> {
        let opened = self.connection.open_bi().await;
        opened.map(|stream| self.halves(stream)).map_err(|error| self.close_reason.lost(error))
    }

    pub(crate) async fn accept(&self) -> Result<(SendStream, RecvStream), TunnelLost> {
        let accepted = self.connection.accept_bi().await;
        accepted.map(|stream| self.halves(stream)).map_err(|error| self.close_reason.lost(error))
    }

    fn halves(
        &self,
        (send, recv): (quinn::SendStream, quinn::RecvStream),
    ) -> (SendStream, RecvStream) {
        let (close_reason, repair) = (self.close_reason.clone(), self.repair.clone());
        let connection = self.connection.clone();
        let send = SendStream { stream: send, connection, close_reason, repair, written: 0 };
        let (connection, close_reason) = (self.connection.clone(), self.close_reason.clone());
        let (window, inbound) = (self.window.clone(), self.inbound.clone());
        inbound.begin(number(recv.id()));
        (send, RecvStream { stream: recv, connection, close_reason, window, inbound })
    }

    pub(crate) fn hedge(&self, rate: u32, repairs: bool) {
        self.repair.get_or_init(|| {
            let (connection, close_reason) = (self.connection.clone(), self.close_reason.clone());
            Repair::begin(connection, close_reason, &self.inbound, rate, repairs)
        });
    }

    /// Lets the congestion controller of this path begin with what is known of it. A path to which
    /// the connection migrates later is not this one.
    pub(crate) fn resume(&self, path: KnownPath) {
        if let Some(memory) = congestion::memory(self.connection.congestion_state()) {
            memory.set(path);
        }
    }

    pub(crate) fn close(&self, code: CloseCode, reason: &str) {
        self.close_reason.close(&self.connection, code, reason);
    }

    pub(crate) async fn closed(&self) -> TunnelLost {
        let error = select! {
            error = self.connection.closed() => error,
            () = self.cut() => {
                self.close(CloseCode::OVERLOADED, "too much has arrived that waits for lost packets");
                self.connection.closed().await
            }
        };
        self.close_reason.lost(error)
    }

    /// Completes when the process is to hold no more of what has arrived.
    async fn cut(&self) {
        match self.inbound.unread() {
            Some(unread) => unread.cut().await,
            None => std::future::pending().await,
        }
    }

    /// Counts in this budget what arrives and is not read.
    pub(crate) fn set_memory(&self, budget: &Arc<MemoryBudget>) {
        if budget.limit().is_some() {
            self.inbound.count(budget.count_unread());
        }
    }

    pub(crate) async fn flushed(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.endpoint.wait_idle()).await;
    }

    pub(crate) async fn unreachable(&self) -> Unreachable {
        self.reachability.unreachable().await
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn report_unreachable(&self, why: Unreachable) {
        self.reachability.report(why);
    }

    pub(crate) fn set_max_streams(&self, count: u32) {
        self.connection.set_max_concurrent_bi_streams(VarInt::from_u32(count));
    }

    pub(crate) async fn unexpected_datagram(&self) {
        if self.connection.read_datagram().await.is_err() {
            std::future::pending().await
        }
    }

    pub(crate) fn admit(&self) {
        self.inbound.admit();
        self.window.open();
    }

    pub(crate) fn remote_address(&self) -> SocketAddr {
        canonical(self.connection.remote_address())
    }

    pub(crate) fn peer_certificates(&self) -> Option<Vec<CertificateDer<'static>>> {
        let chain = self.connection.peer_identity()?.downcast().ok()?;
        Some(*chain)
    }

    pub(crate) fn stats(&self) -> TunnelStats {
        let stats = self.connection.stats();
        let repair = self.repair.get().map(Repair::counts).unwrap_or_default();
        TunnelStats {
            rtt: stats.path.rtt,
            cwnd: stats.path.cwnd,
            mtu: stats.path.current_mtu,
            sent_packets: stats.path.sent_packets,
            lost_packets: stats.path.lost_packets,
            lost_bytes: stats.path.lost_bytes,
            congestion_events: stats.path.congestion_events,
            black_holes: stats.path.black_holes_detected,
            sent_bytes: stats.udp_tx.bytes,
            received_bytes: stats.udp_rx.bytes,
            eliciting_frames: eliciting_frames(&stats.frame_tx),
            copies_sent: repair.copies_sent,
            copies_used: repair.copies_used,
            repairs_sent: repair.repairs_sent,
            bursts_rebuilt: repair.bursts_rebuilt,
        }
    }
}

/// The half of a stream that this side writes.
pub(crate) struct SendStream {
    stream: quinn::SendStream,
    connection: quinn::Connection,
    close_reason: CloseReason,
    repair: Arc<OnceLock<Repair>>,
    /// Bytes written, which is the offset of the next one.
    written: u64,
}

impl SendStream {
    /// Writes the chunk. If its loss is not to delay the reader and the path loses packets, it is
    /// sent twice, or repair shards of it are.
    pub(crate) async fn write_chunk(
        &mut self,
        chunk: Bytes,
        is_urgent: bool,
    ) -> Result<(), WriteError> {
        let repair = self.repair.get().filter(|_| is_urgent);
        let kept = repair.and_then(|repair| Some((repair, repair.keep(&chunk)?)));
        let offset = self.written;
        self.written += chunk.len() as u64;
        self.stream.write_chunk(chunk).await.map_err(|error| match error {
            quinn::WriteError::Stopped(code) => WriteError::Stopped(stream_code(code)),
            quinn::WriteError::ConnectionLost(error) => {
                WriteError::Lost(self.close_reason.lost(error))
            }
            // 0-RTT is never used.
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => {
                WriteError::Ended
            }
        })?;
        if let Some((repair, chunk)) = kept {
            repair.written(number(self.stream.id()), offset, chunk);
        }
        Ok(())
    }

    pub(crate) fn finish(&mut self) {
        // Fails only on a stream that has ended, which SendHalf excludes, or that was stopped.
        if self.stream.finish().is_ok()
            && let Some(repair) = self.repair.get()
        {
            repair.finished(number(self.stream.id()), self.written);
        }
    }

    pub(crate) fn reset(&mut self, code: StreamCode) {
        if let Some(repair) = self.repair.get() {
            repair.forget(number(self.stream.id()));
        }
        let _ = self.stream.reset(code.as_u32().into());
    }

    pub(crate) fn stopped(
        &self,
    ) -> impl Future<Output = Result<Option<StreamCode>, TunnelLost>> + Send + Sync + 'static {
        let stopped = self.stream.stopped();
        let close_reason = self.close_reason.clone();
        async move {
            match stopped.await {
                Ok(code) => Ok(code.map(stream_code)),
                Err(quinn::StoppedError::ConnectionLost(error)) => Err(close_reason.lost(error)),
                Err(quinn::StoppedError::ZeroRttRejected) => Ok(None),
            }
        }
    }

    /// Bytes per second that the path carries, as the congestion window says, which does not shrink
    /// while there is little to send.
    pub(crate) fn path_rate(&self) -> Option<u64> {
        let path = self.connection.stats().path;
        let micros = u64::try_from(path.rtt.as_micros()).ok().filter(|micros| *micros > 0)?;
        Some(path.cwnd.saturating_mul(1_000_000) / micros)
    }

    pub(crate) fn set_priority(&self, priority: i32) {
        let _ = self.stream.set_priority(priority);
    }
}

/// The half of a stream that this side reads.
pub(crate) struct RecvStream {
    stream: quinn::RecvStream,
    connection: quinn::Connection,
    close_reason: CloseReason,
    window: Arc<ReceiveWindow>,
    inbound: Arc<Inbound>,
}

impl RecvStream {
    pub(crate) async fn read_chunks(
        &mut self,
        chunks: &mut [Bytes],
    ) -> Result<Option<usize>, ReadError> {
        let read = self.stream.read_chunks(chunks).await;
        let count = read.map_err(|error| self.close_reason.read_error(error))?;
        self.note_read(&chunks[..count.unwrap_or(0)]);
        Ok(count)
    }

    fn note_read(&self, chunks: &[Bytes]) {
        let bytes = chunks.iter().map(Bytes::len).sum::<usize>();
        self.inbound.read(number(self.stream.id()), bytes as u64);
    }

    /// Widens the connection's window until the result is dropped: `bytes` of the stream are counted
    /// elsewhere.
    pub(crate) fn widen(&self, bytes: u64) -> Widened {
        self.window.widen(bytes)
    }

    pub(crate) fn stop(&mut self, code: StreamCode) {
        self.shorten();
        // Fails only on a stream that has ended, which has nothing left to stop.
        let _ = self.stream.stop(code.as_u32().into());
    }

    /// Drops what waits, so that quinn's list of it is short from now on.
    ///
    /// quinn keeps the list of a stream that was stopped, as long as it was, until the peer resets the
    /// stream, and then for another one. It makes a list of the length that is needed when a stream
    /// is read out of order for the first time. So all is read but for the last byte, and then that.
    fn shorten(&mut self) {
        let waits = self.inbound.unread_of(number(self.stream.id()));
        let Some(mut rest) = usize::try_from(waits).unwrap_or(usize::MAX).checked_sub(1) else {
            return;
        };
        while rest > 0 {
            // Nothing to read is there while bytes wait behind a gap.
            let Some(read) = self.read_now(rest, true) else { return };
            rest = rest.saturating_sub(read);
        }
        self.read_now(usize::MAX, false);
    }

    /// Reads at most `most` bytes without waiting; how many, or `None` if there are none.
    fn read_now(&mut self, most: usize, in_order: bool) -> Option<usize> {
        let read = {
            let mut read = pin!(self.stream.read_chunk(most, in_order));
            // Without a waker: the stream is stopped next, which forgets it.
            read.as_mut().poll(&mut Context::from_waker(Waker::noop()))
        };
        let Poll::Ready(Ok(Some(chunk))) = read else { return None };
        let chunk = [chunk.bytes];
        self.note_read(&chunk);
        Some(chunk[0].len()).filter(|length| *length > 0)
    }

    /// Completes when the stream was reset or the connection is lost. It polls for a reset while
    /// bytes are unread, by reading none of them.
    ///
    /// quinn's `received_reset` would need no polling, but it leaves the waker in the connection
    /// when the future is dropped and the rest of the stream has arrived already: a leak, and a
    /// panic in debug builds. Reading nothing waits only where more has to arrive, which clears the
    /// waker.
    pub(crate) async fn failed(&mut self) -> ReadError {
        let mut closed = pin!(self.connection.closed());
        loop {
            select! {
                biased;
                read = self.stream.read_chunk(0, true) => match read {
                    Ok(Some(_)) => {}
                    Ok(None) => std::future::pending().await,
                    Err(error) => return self.close_reason.read_error(error),
                },
                error = &mut closed => return ReadError::Lost(self.close_reason.lost(error)),
            }
            select! {
                () = sleep(RESET_INTERVAL) => {}
                error = &mut closed => return ReadError::Lost(self.close_reason.lost(error)),
            }
        }
    }
}

impl Drop for RecvStream {
    fn drop(&mut self) {
        self.inbound.end(number(self.stream.id()));
    }
}

/// The frames that make a packet ack-eliciting (RFC 9002 §2) and that a tunnel sends in its life.
fn eliciting_frames(sent: &quinn::FrameStats) -> u64 {
    sent.stream
        + sent.ping
        + sent.datagram
        + sent.reset_stream
        + sent.stop_sending
        + sent.max_data
        + sent.max_stream_data
        + sent.max_streams_bidi
}

fn number(stream: quinn::StreamId) -> u64 {
    VarInt::from(stream).into_inner()
}
