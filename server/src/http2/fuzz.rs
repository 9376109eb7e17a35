//! Any bytes of a peer, for the fuzzer and the tests.

use std::{
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
};

use culvert_transport::budget::{Held, MemoryBudget, StreamMemory};
use http::Request;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{Connection, Limits, RecvStream, SendStream};

/// Limits as those of a frontend, with few streams.
pub(crate) const LIMITS: Limits = Limits {
    streams: 100,
    stream_window: 32 * 1024,
    connection_window: 4 * 1024 * 1024,
    unread: Held::Send,
};
/// What a peer begins with.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A socket that yields bytes, so many at once, and takes all.
pub(crate) struct Socket<'a> {
    pub(crate) input: &'a [u8],
    pub(crate) cut: usize,
    pub(crate) output: Vec<u8>,
}

impl AsyncRead for &mut Socket<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let length = self.input.len().min(self.cut).min(buf.remaining());
        let (part, rest) = self.input.split_at(length);
        buf.put_slice(part);
        self.input = rest;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for &mut Socket<'_> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.output.extend_from_slice(buf);
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Serves a connection until it ends. What is left of its requests is dropped then.
pub(crate) fn serve<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    memory: Arc<StreamMemory>,
    limits: &Limits,
    mut answer: impl FnMut(Request<RecvStream>, SendStream),
) {
    let mut connection = Connection::new(io, memory, limits);
    let cx = &mut Context::from_waker(Waker::noop());
    loop {
        match pin!(connection.accept()).poll(cx) {
            Poll::Ready(Some(Ok((request, stream)))) => answer(request, stream),
            Poll::Ready(_) => return,
            // Other tasks have their turn.
            Poll::Pending => {}
        }
    }
}

/// Serves a peer that sends these bytes behind the preface, in pieces; what it is sent.
///
/// # Panics
/// When the connection holds bytes in the end, or does not end.
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "a fuzz target uses it"))]
pub fn fuzz(cut: usize, bytes: &[u8]) -> Vec<u8> {
    let budget = MemoryBudget::new(0);
    let input = [PREFACE, bytes].concat();
    let mut socket = Socket { input: &input, cut: cut.max(1), output: Vec::new() };
    serve(&mut socket, StreamMemory::of(&budget), &LIMITS, |_, _| {});
    assert_eq!(budget.held(Held::Send), 0);
    socket.output
}
