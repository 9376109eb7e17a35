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

/// Number of bytes from which no more frames are taken, until all were written and flushed: TLS keeps
/// what its socket does not take. What was taken is sent even when its stream is reset.
const ENOUGH: usize = MAX_FRAME;
/// Maximum length of a payload that is copied behind its head, in bytes.
const SHORT: usize = 256;
/// Maximum number of parts of one write.
const PARTS: usize = 8;

/// Writes the frames of one connection.
#[derive(Debug, Default)]
pub(super) struct Writer {
    parts: VecDeque<Bytes>,
    /// Number of bytes that were taken and not flushed.
    length: usize,
}

impl Writer {
    /// Whether all was written and flushed.
    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether it takes no more frames until all were flushed.
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
            self.wrote(written);
        }
        self.parts = VecDeque::new();
        if self.length > 0 {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.length = 0;
        }
        Poll::Ready(Ok(()))
    }

    fn wrote(&mut self, mut written: usize) {
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

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use culvert_transport::budget::{MemoryBudget, StreamMemory};

    use super::{
        super::{SendStream, fuzz::LIMITS, shared::Shared},
        *,
    };

    /// A socket that takes anything, and keeps it while it cannot be flushed: TLS over another one.
    #[derive(Default)]
    struct Keeping {
        kept: usize,
        flushes: bool,
    }

    impl AsyncWrite for Keeping {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.kept += buf.len();
            Poll::Ready(Ok(buf.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            if self.flushes { Poll::Ready(Ok(())) } else { Poll::Pending }
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[test]
    fn no_more_is_taken_before_all_was_flushed() {
        const LENGTH: usize = 1 << 20;
        let shared = Shared::new(StreamMemory::of(&MemoryBudget::new(0)), &LIMITS);
        shared.open(1, None, true);
        for id in [0, 1] {
            assert!(shared.lock().granted(id, LENGTH as u32));
        }
        let stream = SendStream::new(1, shared.clone());
        stream.send(Bytes::from(vec![7; LENGTH]));
        let (mut writer, mut io) = (Writer::default(), Keeping::default());
        let cx = &mut Context::from_waker(Waker::noop());
        let mut step = |io: &mut Keeping| {
            writer.fill(&mut shared.lock());
            let is_pending = writer.poll_write(io, cx).is_pending();
            (is_pending, writer.is_full())
        };
        for _ in 0..100 {
            assert_eq!(step(&mut io), (true, true));
            assert!((ENOUGH..2 * ENOUGH).contains(&io.kept), "{}", io.kept);
        }
        io.flushes = true;
        while io.kept < LENGTH {
            assert_eq!(step(&mut io), (false, false));
        }
    }
}
