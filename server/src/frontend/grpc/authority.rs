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
use tokio::io::{AsyncRead, ReadBuf};

use crate::{
    filtered::{Filtered, ReadFilter},
    http2_frames::{FrameHead, Heads, Part, kind},
};

/// Maximum length of a frame's payload that h2 accepts, in bytes (RFC 9113 §4.2). Longer frames
/// are not parsed.
const MAX_FRAME_LEN: usize = 16_384;
/// Maximum number of bytes read at once while heads of frames are expected: enough for frames of
/// keystrokes and of HTTP/2 itself. The rest of a longer frame is read where h2 keeps it, up to its
/// end, so that what h2 allocates for the frame has no part of the next one.
const READ_LEN: usize = 256;

/// Has the HEADERS frames of a connection come out with a legal `:authority`. Call it at the very
/// beginning of the connection.
pub(super) fn legalized<IO>(io: IO) -> Filtered<IO, LegalAuthority> {
    Filtered::new(io, LegalAuthority::default())
}

/// The filter of such a connection.
#[derive(Debug, Default)]
pub(super) struct LegalAuthority {
    frames: Frames,
    /// Bytes that have passed and were not read yet.
    output: BytesMut,
}

impl ReadFilter for LegalAuthority {
    fn poll_read<IO: AsyncRead + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            if self.output.has_remaining() {
                let length = self.output.len().min(buf.remaining());
                buf.put_slice(&self.output[..length]);
                self.output.advance(length);
                return Poll::Ready(Ok(()));
            }
            let straight = self.frames.straight().min(buf.remaining());
            if straight > 0 {
                // Inside a frame that passes unchanged: read without a copy.
                let mut part = ReadBuf::new(buf.initialize_unfilled_to(straight));
                ready!(Pin::new(&mut *io).poll_read(cx, &mut part))?;
                self.frames.passed(part.filled());
                let length = part.filled().len();
                buf.advance(length);
                return Poll::Ready(Ok(()));
            }
            // An idle connection has no buffer.
            self.output = BytesMut::new();
            let mut input = [MaybeUninit::uninit(); READ_LEN];
            let mut read = ReadBuf::uninit(&mut input);
            ready!(Pin::new(&mut *io).poll_read(cx, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            self.frames.push(read.filled(), &mut self.output);
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
