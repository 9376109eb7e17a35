//! Makes the requests of kube-apiserver's gRPC client over a Unix socket legal.
//!
//! grpc-go takes the socket's path for the server's name and sends `:authority: %2Frun%2Fx.sock`.
//! The h2 crate accepts no `%` in an authority and answers with PROTOCOL_ERROR. So the bytes pass
//! through here first: every frame unchanged, except that an `:authority` in a HEADERS frame is
//! made legal. What cannot be parsed is passed on, for h2 to refuse.

mod headers;

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, Join, ReadBuf, ReadHalf, WriteHalf, join, split};

use crate::http2_frames::{FrameHead, Heads, Part, kind};

/// Maximum length of a frame's payload that h2 accepts, in bytes (RFC 9113 §4.2). Longer frames
/// are not parsed.
const MAX_FRAME_LEN: usize = 16_384;
/// Maximum number of bytes read at once while heads of frames are expected.
const READ_LEN: usize = 16 * 1024;

/// Has the HEADERS frames of a connection come out with a legal `:authority`. Call it at the very
/// beginning of the connection.
pub(super) fn legalized<IO>(io: IO) -> Join<LegalAuthority<ReadHalf<IO>>, WriteHalf<IO>>
where
    IO: AsyncRead + AsyncWrite,
{
    let (reader, writer) = split(io);
    join(LegalAuthority::new(reader), writer)
}

/// The reader of such a connection.
#[derive(Debug)]
pub(super) struct LegalAuthority<R> {
    inner: R,
    frames: Frames,
    /// Bytes that have passed and were not read yet.
    output: BytesMut,
}

impl<R> LegalAuthority<R> {
    fn new(inner: R) -> Self {
        Self { inner, frames: Frames::default(), output: BytesMut::new() }
    }
}

impl<R: AsyncRead + Unpin> AsyncRead for LegalAuthority<R> {
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
                // Inside a frame that passes unchanged: read without a copy.
                let mut part = ReadBuf::new(buf.initialize_unfilled_to(straight));
                ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part))?;
                this.frames.passed(part.filled());
                let length = part.filled().len();
                buf.advance(length);
                return Poll::Ready(Ok(()));
            }
            // An idle connection has no buffer.
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

/// Rewrites the frames of one direction. Pure: bytes in, bytes out.
#[derive(Debug)]
#[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "a fuzz target uses it"))]
pub struct Frames {
    heads: Heads,
    /// The part of a HEADERS frame that has come; empty between HEADERS frames.
    kept: Vec<u8>,
}

impl Default for Frames {
    fn default() -> Self {
        Self { heads: Heads::of_client(), kept: Vec::new() }
    }
}

impl Frames {
    /// Number of bytes that pass unchanged before the next head.
    fn straight(&self) -> usize {
        if self.kept.is_empty() { self.heads.payload_left() } else { 0 }
    }

    /// Follows bytes that have passed unchanged, at most [`Self::straight`].
    fn passed(&mut self, mut bytes: &[u8]) {
        self.heads.next(&mut bytes);
    }

    /// Takes the client's next bytes, and appends those that h2 is to read. At most one HEADERS
    /// frame is kept back.
    #[cfg_attr(not(fuzzing), expect(unreachable_pub, reason = "a fuzz target uses it"))]
    pub fn push(&mut self, mut input: &[u8], output: &mut BytesMut) {
        while let Some(part) = self.heads.next(&mut input) {
            match part {
                Part::Head(head) if is_looked_into(head) => self.kept.extend(head.bytes()),
                Part::Head(head) => output.extend_from_slice(head.bytes()),
                Part::Payload(payload) if self.kept.is_empty() => output.extend_from_slice(payload),
                Part::Payload(payload) => {
                    self.kept.extend_from_slice(payload);
                    if self.heads.payload_left() == 0 {
                        output.extend_from_slice(&headers::legalized(&self.kept));
                        self.kept = Vec::new();
                    }
                }
            }
        }
    }
}

/// Whether a frame may have an `:authority`, and is not too long for h2.
fn is_looked_into(head: FrameHead) -> bool {
    head.kind() == kind::HEADERS && (1..=MAX_FRAME_LEN).contains(&head.payload_len())
}

#[cfg(test)]
mod tests;
