//! A byte stream whose bytes are filtered as they are read, and written as they are.
//!
//! One value has both directions, as the stream itself: halves that are split and joined again would
//! take a lock for each read and each write.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What happens to the bytes that are read.
pub(crate) trait ReadFilter {
    /// Reads from the stream what comes out of the filter, as
    /// [`AsyncRead::poll_read`] does.
    ///
    /// # Errors
    /// Those of the stream.
    fn poll_read<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>>;
}

/// A byte stream behind a filter.
#[derive(Debug)]
pub(crate) struct Filtered<IO, F> {
    io: IO,
    filter: F,
}

impl<IO, F> Filtered<IO, F> {
    /// Filters what is read from now on.
    pub(crate) fn new(io: IO, filter: F) -> Self {
        Self { io, filter }
    }
}

impl<IO: AsyncRead + Unpin, F: ReadFilter + Unpin> AsyncRead for Filtered<IO, F> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { io, filter } = self.get_mut();
        filter.poll_read(io, cx, buf)
    }
}

impl<IO: AsyncWrite + Unpin, F: Unpin> AsyncWrite for Filtered<IO, F> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}
