//! Lets kube-apiserver's gRPC client in over a Unix socket.
//!
//! grpc-go takes the socket's path for the server's name and sends `:authority: %2Frun%2Fx.sock`.
//! No authority has a `%` (RFC 3986 §3.2), and the h2 crate answers with PROTOCOL_ERROR. So the
//! bytes pass through here first: every frame as it is, except that an `:authority` in a HEADERS
//! frame is made legal. What cannot be understood is passed on, for h2 to refuse.

mod headers;

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The client's connection preface (RFC 9113 §3.4).
const PREFACE_LEN: usize = 24;
/// A frame's head (RFC 9113 §4.1).
const HEAD_LEN: usize = 9;
/// A HEADERS frame's type (RFC 9113 §6.2).
const HEADERS: u8 = 0x1;
/// Largest frame that h2 takes (RFC 9113 §4.2); longer ones are not looked into.
const MAX_FRAME_LEN: usize = 16_384;
/// Bytes read at once while frames' heads are looked for.
const READ_LEN: usize = 16 * 1024;

/// A connection whose HEADERS frames come out with a legal `:authority`.
#[derive(Debug)]
pub struct LegalAuthority<IO> {
    inner: IO,
    frames: Frames,
    /// Looked at and not handed on yet.
    output: BytesMut,
}

impl<IO> LegalAuthority<IO> {
    /// Wraps a connection at its very beginning.
    pub fn new(inner: IO) -> Self {
        Self { inner, frames: Frames::default(), output: BytesMut::new() }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for LegalAuthority<IO> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.output.has_remaining() {
                let length = this.output.len().min(buf.remaining());
                buf.put_slice(&this.output[..length]);
                this.output.advance(length);
                return Poll::Ready(Ok(()));
            }
            let straight = this.frames.straight().min(buf.remaining());
            if straight > 0 {
                // Inside a frame that passes as it is: no copy of ours.
                let mut part = ReadBuf::new(buf.initialize_unfilled_to(straight));
                ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part))?;
                let length = part.filled().len();
                buf.advance(length);
                this.frames.skip(length);
                return Poll::Ready(Ok(()));
            }
            // An idle connection keeps no buffer.
            this.output = BytesMut::new();
            let mut input = [MaybeUninit::uninit(); READ_LEN];
            let mut read = ReadBuf::uninit(&mut input);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.frames.push(read.filled(), &mut this.output);
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for LegalAuthority<IO> {
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
        bufs: &[io::IoSlice<'_>],
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

/// Where in the client's bytes we are. Pure: bytes in, bytes out.
#[derive(Debug)]
pub struct Frames(State);

impl Default for Frames {
    fn default() -> Self {
        Self(State::Straight(PREFACE_LEN))
    }
}

#[derive(Debug)]
enum State {
    /// This many bytes pass as they are.
    Straight(usize),
    /// A frame's head is being collected, or a HEADERS frame up to this length.
    Collect { frame: Vec<u8>, length: usize },
}

impl Frames {
    /// Bytes that pass as they are before anything has to be looked at.
    fn straight(&self) -> usize {
        match self.0 {
            State::Straight(left) => left,
            State::Collect { .. } => 0,
        }
    }

    /// Notes that bytes have passed as they are, at most [`Self::straight`].
    fn skip(&mut self, length: usize) {
        if let State::Straight(left) = &mut self.0 {
            *left -= length;
            if *left == 0 {
                self.0 = State::Collect { frame: Vec::new(), length: HEAD_LEN };
            }
        }
    }

    /// Takes what the client sent next, and appends what h2 is to see. At most one HEADERS frame
    /// is kept back.
    pub fn push(&mut self, mut input: &[u8], output: &mut BytesMut) {
        while !input.is_empty() {
            match &mut self.0 {
                State::Straight(left) => {
                    let (straight, rest) = input.split_at(input.len().min(*left));
                    output.extend_from_slice(straight);
                    input = rest;
                    self.skip(straight.len());
                }
                State::Collect { frame, length } => {
                    let (part, rest) = input.split_at(input.len().min(*length - frame.len()));
                    frame.extend_from_slice(part);
                    input = rest;
                    if frame.len() == *length {
                        self.0 = Self::collected(frame, output);
                    }
                }
            }
        }
    }

    /// Decides about a frame's head, or hands on a HEADERS frame.
    fn collected(frame: &mut Vec<u8>, output: &mut BytesMut) -> State {
        let next_head = State::Collect { frame: Vec::new(), length: HEAD_LEN };
        if frame.len() > HEAD_LEN {
            output.extend_from_slice(&headers::legalized(frame));
            return next_head;
        }
        let payload =
            usize::from(frame[0]) << 16 | usize::from(frame[1]) << 8 | usize::from(frame[2]);
        if frame[3] == HEADERS && (1..=MAX_FRAME_LEN).contains(&payload) {
            return State::Collect { frame: std::mem::take(frame), length: HEAD_LEN + payload };
        }
        output.extend_from_slice(frame);
        match payload {
            0 => next_head,
            payload => State::Straight(payload),
        }
    }
}

#[cfg(test)]
mod tests;
