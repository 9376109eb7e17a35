//! The frames of a peer, whole. Between frames there is no buffer, and the buffer of a frame is as
//! long as the frame.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::frames::{FrameHead, HEAD_LEN};

/// What a client begins with (RFC 9113 §3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Maximum number of bytes read at once while heads of frames are expected: enough for frames of
/// keystrokes and of HTTP/2 itself. The rest of a longer frame is read where it stays.
const READ_LEN: usize = 256;

/// What becomes of frames.
pub(super) trait Frames {
    /// Why a connection cannot go on.
    type Error;

    /// Takes the head of a frame whose payload follows. After an error there are no more frames.
    fn head(&mut self, head: FrameHead) -> Result<(), Self::Error>;

    /// Takes a frame. After an error there are no more frames.
    fn frame(&mut self, head: FrameHead, payload: Bytes) -> Result<(), Self::Error>;

    /// The error of a peer that does not begin as it must.
    fn not_http2(&self) -> Self::Error;
}

/// Reads the frames of one peer.
#[derive(Debug)]
pub(super) enum Reader {
    /// The preface, of which so many bytes have come.
    Preface(usize),
    /// A head, of which so many bytes have come.
    Head([u8; HEAD_LEN], usize),
    /// A frame, and the part of its payload that has come.
    Payload(FrameHead, BytesMut),
}

impl Reader {
    pub(super) fn new() -> Self {
        Self::Preface(0)
    }

    /// Reads once; the number of bytes, 0 at the end, or why there are no more frames.
    pub(super) fn poll_read<IO: AsyncRead + Unpin, F: Frames>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
        frames: &mut F,
    ) -> Poll<io::Result<Result<usize, F::Error>>> {
        if let Self::Payload(head, payload) = self {
            let left = head.payload_len() - payload.len();
            let read = ready!(poll_read_buf(Pin::new(io), cx, &mut payload.limit(left)))?;
            if read == left {
                let (head, payload) = (*head, std::mem::take(payload));
                *self = Self::between();
                return Poll::Ready(Ok(frames.frame(head, payload.freeze()).map(|()| read)));
            }
            return Poll::Ready(Ok(Ok(read)));
        }
        let mut input = [MaybeUninit::uninit(); READ_LEN];
        let mut input = ReadBuf::uninit(&mut input);
        ready!(Pin::new(io).poll_read(cx, &mut input))?;
        Poll::Ready(Ok(self.take(input.filled(), frames).map(|()| input.filled().len())))
    }

    fn between() -> Self {
        Self::Head([0; HEAD_LEN], 0)
    }

    /// Takes bytes of the peer.
    fn take<F: Frames>(&mut self, mut bytes: &[u8], frames: &mut F) -> Result<(), F::Error> {
        while !bytes.is_empty() {
            match self {
                Self::Preface(seen) => {
                    let expected = &PREFACE[*seen..];
                    let length = expected.len().min(bytes.len());
                    if bytes[..length] != expected[..length] {
                        return Err(frames.not_http2());
                    }
                    bytes = &bytes[length..];
                    *self = match *seen + length {
                        all if all == PREFACE.len() => Self::between(),
                        seen => Self::Preface(seen),
                    };
                }
                Self::Head(head, seen) => {
                    let (part, rest) = bytes.split_at(bytes.len().min(HEAD_LEN - *seen));
                    head[*seen..*seen + part.len()].copy_from_slice(part);
                    *seen += part.len();
                    bytes = rest;
                    if *seen == HEAD_LEN {
                        let head = FrameHead::from_bytes(*head);
                        frames.head(head)?;
                        if head.payload_len() == 0 {
                            *self = Self::between();
                            frames.frame(head, Bytes::new())?;
                        } else {
                            *self =
                                Self::Payload(head, BytesMut::with_capacity(head.payload_len()));
                        }
                    }
                }
                Self::Payload(head, payload) => {
                    let left = head.payload_len() - payload.len();
                    let (part, rest) = bytes.split_at(bytes.len().min(left));
                    payload.extend_from_slice(part);
                    bytes = rest;
                    if part.len() == left {
                        let (head, payload) = (*head, std::mem::take(payload));
                        *self = Self::between();
                        frames.frame(head, payload.freeze())?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::http2::frames::kind;

    #[derive(Debug, Default, PartialEq)]
    struct Seen {
        heads: usize,
        frames: Vec<(FrameHead, Bytes)>,
    }

    #[derive(Debug, PartialEq)]
    struct NotHttp2;

    impl Frames for Seen {
        type Error = NotHttp2;

        fn head(&mut self, _: FrameHead) -> Result<(), NotHttp2> {
            self.heads += 1;
            Ok(())
        }

        fn frame(&mut self, head: FrameHead, payload: Bytes) -> Result<(), NotHttp2> {
            self.frames.push((head, payload));
            Ok(())
        }

        fn not_http2(&self) -> NotHttp2 {
            NotHttp2
        }
    }

    /// Yields what is given, at most so many bytes at a time.
    struct Cut<'a>(&'a [u8], usize);

    impl AsyncRead for Cut<'_> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let length = self.0.len().min(self.1).min(buf.remaining());
            let (part, rest) = self.0.split_at(length);
            buf.put_slice(part);
            self.0 = rest;
            Poll::Ready(Ok(()))
        }
    }

    fn read(bytes: &[u8], cut: usize) -> Result<Seen, NotHttp2> {
        let (mut reader, mut seen, mut io) = (Reader::new(), Seen::default(), Cut(bytes, cut));
        let cx = &mut Context::from_waker(std::task::Waker::noop());
        while let Poll::Ready(read) = reader.poll_read(&mut io, cx, &mut seen) {
            if read.unwrap()? == 0 {
                break;
            }
        }
        Ok(seen)
    }

    #[test]
    fn another_protocol_is_noticed_at_its_first_byte() {
        for (bytes, is_refused) in [(&b"P"[..], false), (b"G", true), (b"PRI * HTTP/1", true)] {
            assert_eq!(read(bytes, 100).is_err(), is_refused);
        }
    }

    proptest! {
        #[test]
        fn frames_are_whole_wherever_the_bytes_are_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..2000), 0..10),
            cut in 1_usize..3000,
        ) {
            let mut bytes = PREFACE.to_vec();
            let mut expected = Seen::default();
            for payload in payloads {
                let head = FrameHead::new(kind::DATA, 1, payload.len() as u16);
                bytes.extend(head.bytes());
                bytes.extend(&payload);
                expected.heads += 1;
                expected.frames.push((head, payload.into()));
            }
            prop_assert_eq!(read(&bytes, cut), Ok(expected));
        }
    }
}
