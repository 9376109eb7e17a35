//! The limit of what a peer may send on an HTTP/2 connection before it is admitted.
//!
//! HTTP/2 keeps what arrives on a stream that is not read, as far as its windows go, and the windows
//! of a Konnectivity agent are large. What a call needs is little: the preface, settings, and
//! headers with a token.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::CancellationToken;

use crate::agents::unadmitted::Attempt;

/// Maximum number of bytes that a peer may send before it is admitted.
const MAX_BYTES: usize = 64 * 1024;

/// A connection on which a peer may send a little until it is admitted, and then anything.
#[derive(Debug)]
pub(super) struct Allowance<IO> {
    inner: IO,
    attempt: Arc<Attempt>,
    /// Number of bytes that were read before the peer was admitted.
    read: usize,
    exceeded: CancellationToken,
}

impl<IO> Allowance<IO> {
    /// Wraps a connection at its beginning. `exceeded` is cancelled when the peer has sent more than
    /// it may; what it sent beyond is lost.
    pub(super) fn new(inner: IO, attempt: Arc<Attempt>, exceeded: CancellationToken) -> Self {
        Self { inner, attempt, read: 0, exceeded }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Allowance<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
        if this.attempt.is_admitted() {
            return Poll::Ready(Ok(()));
        }
        this.read += buf.filled().len() - before;
        if this.read <= MAX_BYTES {
            return Poll::Ready(Ok(()));
        }
        this.exceeded.cancel();
        buf.set_filled(before);
        Poll::Ready(Err(io::ErrorKind::QuotaExceeded.into()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Allowance<IO> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_may_send_a_little_before_it_is_admitted_and_then_anything() {
        for admitted in [false, true] {
            let (mut peer, io) = duplex(4 * MAX_BYTES);
            let (attempt, exceeded) = (Arc::new(Attempt::of_admitted()), CancellationToken::new());
            let mut io = Allowance::new(io, attempt.clone(), exceeded.clone());
            let mut read = vec![0; MAX_BYTES];
            peer.write_all(&read).await.unwrap();
            io.read_exact(&mut read).await.unwrap();
            assert!(!exceeded.is_cancelled());
            if admitted {
                attempt.admit();
            }
            peer.write_all(&read).await.unwrap();
            assert_eq!(io.read_exact(&mut read).await.is_ok(), admitted);
            assert_eq!(exceeded.is_cancelled(), !admitted);
        }
    }
}
