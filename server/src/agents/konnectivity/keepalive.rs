//! The limit of a Konnectivity agent's pings, as Konnectivity's own server enforces it.
//!
//! That server is grpc-go's with `EnforcementPolicy{MinTime: 30s, PermitWithoutStream: true}`
//! (upstream's `cmd/server/app/server.go`), whose rule is `handlePing` of grpc-go's
//! `internal/transport/http2_server.go`. hyper answers pings itself and reports none, so the
//! bytes pass through here first, unchanged.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::http2::frames::{FrameHead, HEAD_LEN, Heads, Part, flag, kind};

/// Minimum time between two pings; a ping that comes sooner is a strike: upstream's `MinTime`.
pub(super) const MIN_PING_INTERVAL: Duration = Duration::from_secs(30);
/// Maximum number of strikes: grpc-go's `maxPingStrikes`.
const MAX_STRIKES: u8 = 2;
/// Time for the rest of a frame, for the GOAWAY, and for the agent to hang up: that of grpc-go.
const GOAWAY_TIMEOUT: Duration = Duration::from_secs(1);
/// ENHANCE_YOUR_CALM (RFC 9113 §7).
const ENHANCE_YOUR_CALM: u32 = 0xb;
/// Debug data that makes grpc-go's client ping half as often (gRFC A8).
const TOO_MANY_PINGS: &[u8] = b"too_many_pings";
/// Maximum number of bytes discarded at once while the agent hangs up.
const DISCARD_LEN: usize = 4 * 1024;

/// The agent pinged too often, and its connection was ended.
#[derive(Debug, thiserror::Error)]
#[error("the agent pings more often than every {MIN_PING_INTERVAL:?}")]
pub(super) struct TooManyPings;

/// Counts the strikes of a peer. Pure.
#[derive(Debug)]
struct Strikes {
    min_interval: Duration,
    last_ping: Option<Instant>,
    count: u8,
    /// The server has sent something since the last ping, so the next one is free: it may measure
    /// how long that took, as grpc-go's estimate of the bandwidth does.
    forgiven: bool,
}

impl Strikes {
    fn new(min_interval: Duration) -> Self {
        Self { min_interval, last_ping: None, count: 0, forgiven: false }
    }

    /// Records that the server sent HEADERS or DATA.
    fn on_sent(&mut self) {
        self.forgiven = true;
    }

    /// Counts a ping that came at `now`; whether it is one too many.
    fn on_ping(&mut self, now: Instant) -> bool {
        let last = self.last_ping.replace(now);
        if std::mem::take(&mut self.forgiven) {
            self.count = 0;
        } else if last.is_some_and(|last| now.saturating_duration_since(last) < self.min_interval) {
            self.count = self.count.saturating_add(1);
        }
        self.count > MAX_STRIKES
    }
}

/// A connection whose peer may not ping too often. When it does, it is sent GOAWAY, and the
/// connection ends with [`TooManyPings`].
#[derive(Debug)]
pub(super) struct PingLimit<IO> {
    inner: IO,
    received: Heads,
    sent: Heads,
    strikes: Strikes,
    /// The newest stream that the peer has opened.
    last_stream_id: u32,
    exceeded: CancellationToken,
    ending: Option<Ending>,
}

/// The rest of a connection whose peer has pinged too often.
#[derive(Debug)]
struct Ending {
    goaway: Bytes,
    /// When it ends at the latest: the peer need not read.
    deadline: Pin<Box<Sleep>>,
}

impl<IO> PingLimit<IO> {
    /// Wraps a server's connection at its very beginning. `exceeded` is cancelled at once when the
    /// peer has pinged too often; the connection itself ends a moment later.
    pub(super) fn new(inner: IO, min_interval: Duration, exceeded: CancellationToken) -> Self {
        Self {
            inner,
            received: Heads::of_client(),
            sent: Heads::of_server(),
            strikes: Strikes::new(min_interval),
            last_stream_id: 0,
            exceeded,
            ending: None,
        }
    }

    /// Follows the bytes that the peer sent.
    fn on_received(&mut self, mut bytes: &[u8]) {
        while let Some(part) = self.received.next(&mut bytes) {
            let Part::Head(head) = part else { continue };
            match head.kind() {
                kind::HEADERS => self.last_stream_id = self.last_stream_id.max(head.stream_id()),
                kind::PING if !head.has(flag::ACK) && self.strikes.on_ping(Instant::now()) => {
                    let goaway = goaway(self.last_stream_id);
                    let deadline = Box::pin(sleep(GOAWAY_TIMEOUT));
                    self.ending = Some(Ending { goaway, deadline });
                    self.exceeded.cancel();
                    // The connection ends; nothing after this counts.
                    return;
                }
                _ => {}
            }
        }
    }

    /// Follows the bytes that were sent to the peer.
    fn on_sent(&mut self, mut bytes: &[u8]) {
        while let Some(part) = self.sent.next(&mut bytes) {
            if let Part::Head(head) = part
                && matches!(head.kind(), kind::HEADERS | kind::DATA)
            {
                self.strikes.on_sent();
            }
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> PingLimit<IO> {
    /// Maximum number of hyper's bytes that may be written: any, or after too many pings the rest
    /// of the current frame. An error once the connection has ended.
    fn poll_allowed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(ending) = &mut self.ending else { return Poll::Ready(Ok(usize::MAX)) };
        if ending.deadline.as_mut().poll(cx).is_pending() {
            match self.sent.under_way() {
                // A peer that has left ends it as well.
                0 => drop(ready!(self.poll_goaway(cx))),
                rest => return Poll::Ready(Ok(rest)),
            }
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, TooManyPings)))
    }

    /// Sends GOAWAY, ends this side of the connection, and waits for the peer to end its own. What
    /// it sends until then is read: a socket that is closed with unread bytes is reset, and the
    /// peer might lose the GOAWAY.
    fn poll_goaway(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut self.inner;
        if let Some(Ending { goaway, .. }) = &mut self.ending {
            while goaway.has_remaining() {
                match ready!(Pin::new(&mut *inner).poll_write(cx, goaway))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    written => goaway.advance(written),
                }
            }
        }
        ready!(Pin::new(&mut *inner).poll_shutdown(cx))?;
        loop {
            let mut discarded = [MaybeUninit::uninit(); DISCARD_LEN];
            let mut discarded = ReadBuf::uninit(&mut discarded);
            ready!(Pin::new(&mut *inner).poll_read(cx, &mut discarded))?;
            if discarded.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Wakes the task for the GOAWAY when hyper has just written the last byte of its frame.
    fn wake_for_goaway(&self, cx: &Context<'_>) {
        if self.ending.is_some() && self.sent.under_way() == 0 {
            cx.waker().wake_by_ref();
        }
    }
}

/// The GOAWAY for a peer that pinged too often (RFC 9113 §6.8).
fn goaway(last_stream_id: u32) -> Bytes {
    const LEN: u16 = 8 + TOO_MANY_PINGS.len() as u16;
    let mut frame = Vec::with_capacity(HEAD_LEN + usize::from(LEN));
    frame.extend_from_slice(FrameHead::new(kind::GOAWAY, 0, LEN).bytes());
    frame.extend_from_slice(&last_stream_id.to_be_bytes());
    frame.extend_from_slice(&ENHANCE_YOUR_CALM.to_be_bytes());
    frame.extend_from_slice(TOO_MANY_PINGS);
    frame.into()
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for PingLimit<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.ending.is_some() {
            // Nothing more is read from the peer; hyper only finishes its frame.
            return match ready!(this.poll_allowed(cx)) {
                Ok(_) => Poll::Pending,
                Err(over) => Poll::Ready(Err(over)),
            };
        }
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        this.on_received(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for PingLimit<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let allowed = ready!(this.poll_allowed(cx))?.min(buf.len());
        let written = ready!(Pin::new(&mut this.inner).poll_write(cx, &buf[..allowed]))?;
        this.on_sent(&buf[..written]);
        this.wake_for_goaway(cx);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.ending.is_some() {
            // The rest of a frame is small, and often ends within a slice.
            let first = bufs.iter().find(|buf| !buf.is_empty());
            return self.poll_write(cx, first.map_or(&[], |buf| buf));
        }
        let this = self.get_mut();
        let written = ready!(Pin::new(&mut this.inner).poll_write_vectored(cx, bufs))?;
        let mut left = written;
        for buf in bufs {
            let part = left.min(buf.len());
            this.on_sent(&buf[..part]);
            left -= part;
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_allowed(cx))?;
        Pin::new(&mut this.inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_allowed(cx))?;
        Pin::new(&mut this.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
