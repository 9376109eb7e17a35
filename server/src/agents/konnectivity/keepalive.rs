//! How often a Konnectivity agent may ping, as Konnectivity's own server enforces it.
//!
//! That server is grpc-go's with `EnforcementPolicy{MinTime: 30s, PermitWithoutStream: true}`
//! (upstream's `cmd/server/app/server.go`), whose rule is `handlePing` of grpc-go's
//! `internal/transport/http2_server.go`. hyper answers pings itself and tells nobody, so the bytes
//! pass through here first, and are only looked at.

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

use crate::http2_frames::{HEAD_LEN, Head, Heads, Part, flag, kind};

/// A ping that comes sooner than this after the last one is a strike: upstream's `MinTime`.
pub(super) const MIN_PING_INTERVAL: Duration = Duration::from_secs(30);
/// Strikes that are borne: grpc-go's `maxPingStrikes`.
const MAX_STRIKES: u8 = 2;
/// Time for what is under way, for the GOAWAY, and for the agent to hang up: that of grpc-go.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);
/// ENHANCE_YOUR_CALM (RFC 9113 §7).
const ENHANCE_YOUR_CALM: u32 = 0xb;
/// What grpc-go's client takes for a reason to ping half as often (gRFC A8).
const TOO_MANY_PINGS: &[u8] = b"too_many_pings";
/// Bytes thrown away at once while the agent hangs up.
const DISCARD_LEN: usize = 4 * 1024;

/// The agent pinged too often, and its connection was ended.
#[derive(Debug, thiserror::Error)]
#[error("the agent pings more often than every {MIN_PING_INTERVAL:?}")]
pub(super) struct TooManyPings;

/// A peer's pings, judged. Pure.
#[derive(Debug)]
struct Strikes {
    min_interval: Duration,
    last_ping: Option<Instant>,
    count: u8,
    /// The server has said something since the last ping, so the next one is free: it may well ask
    /// how long that took, as grpc-go's estimate of the bandwidth does.
    forgiven: bool,
}

impl Strikes {
    fn new(min_interval: Duration) -> Self {
        Self { min_interval, last_ping: None, count: 0, forgiven: false }
    }

    /// Notes that the server sent HEADERS or DATA.
    fn on_sent(&mut self) {
        self.forgiven = true;
    }

    /// Judges a ping that came at `now`; whether it is one too many.
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
    farewell: Option<Farewell>,
}

/// What is left to do before the connection ends.
#[derive(Debug)]
struct Farewell {
    goaway: Bytes,
    /// When it ends all the same: a peer need not read.
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
            farewell: None,
        }
    }

    /// Looks at what the peer sent.
    fn on_received(&mut self, mut bytes: &[u8]) {
        while let Some(part) = self.received.next(&mut bytes) {
            let Part::Head(head) = part else { continue };
            match head.kind() {
                kind::HEADERS => self.last_stream_id = self.last_stream_id.max(head.stream_id()),
                kind::PING if !head.has(flag::ACK) && self.strikes.on_ping(Instant::now()) => {
                    let goaway = goaway(self.last_stream_id);
                    let deadline = Box::pin(sleep(FAREWELL_TIMEOUT));
                    self.farewell = Some(Farewell { goaway, deadline });
                    self.exceeded.cancel();
                    // The connection is over; nothing behind this counts.
                    return;
                }
                _ => {}
            }
        }
    }

    /// Looks at what was sent to the peer.
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
    /// How many bytes of hyper's may be written: any number, or after too many pings those of a
    /// frame that is under way. An error once the connection is over.
    fn poll_allowed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(farewell) = &mut self.farewell else { return Poll::Ready(Ok(usize::MAX)) };
        if farewell.deadline.as_mut().poll(cx).is_pending() {
            match self.sent.under_way() {
                // A peer that is gone already ends it as well.
                0 => drop(ready!(self.poll_farewell(cx))),
                rest => return Poll::Ready(Ok(rest)),
            }
        }
        Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, TooManyPings)))
    }

    /// Says why the connection ends, ends this side of it, and waits for the peer to end its own.
    /// What it sends until then is read: a socket closed over unread bytes is reset, and the peer
    /// might lose what it was told.
    fn poll_farewell(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let inner = &mut self.inner;
        if let Some(Farewell { goaway, .. }) = &mut self.farewell {
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

    /// Asks for another look at the farewell when hyper has just written the last of its frame.
    fn wake_for_farewell(&self, cx: &Context<'_>) {
        if self.farewell.is_some() && self.sent.under_way() == 0 {
            cx.waker().wake_by_ref();
        }
    }
}

/// The frame that says what the peer did (RFC 9113 §6.8).
fn goaway(last_stream_id: u32) -> Bytes {
    const LEN: u16 = 8 + TOO_MANY_PINGS.len() as u16;
    let mut frame = Vec::with_capacity(HEAD_LEN + usize::from(LEN));
    frame.extend_from_slice(Head::new(kind::GOAWAY, 0, LEN).bytes());
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
        if this.farewell.is_some() {
            // Nothing more is heard of the peer; hyper only finishes its frame.
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
        this.wake_for_farewell(cx);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.farewell.is_some() {
            // What may still go out is small, and often ends within a slice.
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
