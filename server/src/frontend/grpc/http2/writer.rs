//! What is on its way to a peer. An idle connection has no buffer.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tokio::io::AsyncWrite;

use super::shared::{MAX_FRAME, State};

/// Number of bytes from which no more frames are taken, until some were written. What was taken is
/// sent even when its stream is reset.
const ENOUGH: usize = MAX_FRAME;
/// Maximum length of a payload that is copied behind its head, in bytes.
const SHORT: usize = 256;
/// Maximum number of parts of one write.
const PARTS: usize = 8;

/// Writes the frames of one connection.
#[derive(Debug, Default)]
pub(super) struct Writer {
    parts: VecDeque<Bytes>,
    length: usize,
    /// Something was written since the last flush.
    is_unflushed: bool,
}

impl Writer {
    /// Whether all was written.
    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty() && !self.is_unflushed
    }

    /// Whether it takes no more frames until some were written.
    pub(super) fn is_full(&self) -> bool {
        self.length >= ENOUGH
    }

    /// Takes what the state has to send, unless it is full.
    pub(super) fn fill(&mut self, state: &mut State) {
        if self.is_full() {
            return;
        }
        let mut small = BytesMut::new();
        small.extend_from_slice(&state.take_control());
        while self.length + small.len() < ENOUGH
            && let Some((head, data)) = state.next_data()
        {
            small.put_slice(head.bytes());
            if data.len() <= SHORT {
                small.put_slice(&data);
            } else {
                self.push(small.split().freeze());
                self.push(data);
            }
        }
        // Trailers, behind the frames of their streams.
        small.extend_from_slice(&state.take_control());
        self.push(small.freeze());
    }

    fn push(&mut self, part: Bytes) {
        if !part.is_empty() {
            self.length += part.len();
            self.parts.push_back(part);
        }
    }

    /// Writes and flushes all that was taken.
    pub(super) fn poll_write<IO: AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while let Some(first) = self.parts.front() {
            let written = if self.parts.len() > 1 && io.is_write_vectored() {
                let mut slices = [io::IoSlice::new(&[]); PARTS];
                let filled = slices.iter_mut().zip(&self.parts);
                let count = filled.map(|(slice, part)| *slice = io::IoSlice::new(part)).count();
                ready!(Pin::new(&mut *io).poll_write_vectored(cx, &slices[..count]))?
            } else {
                ready!(Pin::new(&mut *io).poll_write(cx, first))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.is_unflushed = true;
            self.wrote(written);
        }
        self.parts = VecDeque::new();
        if self.is_unflushed {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.is_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn wrote(&mut self, mut written: usize) {
        self.length -= written;
        while let Some(part) = self.parts.front_mut()
            && written > 0
        {
            let length = part.len().min(written);
            part.advance(length);
            written -= length;
            if part.is_empty() {
                self.parts.pop_front();
            }
        }
    }
}
