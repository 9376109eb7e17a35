//! How a message is cut out of a stream: one byte of kind, two of length, then the body.
//!
//! ```text
//!  0       1               3
//!  +-------+---------------+----------------
//!  | kind  | length (BE)   | body (length bytes)
//!  +-------+---------------+----------------
//! ```
//= docs/protocol.md#3-frames

use bytes::{Buf, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

use crate::codec::{self, DecodeError, EncodeError, MAX_BODY_LEN};

/// Bytes before a frame's body.
pub const HEAD_LEN: usize = 3;

/// A message that a frame carries. Its number is never given a second meaning.
pub trait Message: Serialize + DeserializeOwned {
    /// The frame's first byte.
    const KIND: u8;
    /// Maximum length of the body, in bytes; at most [`MAX_BODY_LEN`].
    const MAX_LEN: usize = MAX_BODY_LEN;
}

/// The first three bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    /// The number of the message that follows.
    pub kind: u8,
    /// Length of the body, in bytes.
    pub length: usize,
}

impl FrameHead {
    /// The head that these bytes encode; every three bytes encode one.
    pub const fn decode([kind, high, low]: [u8; HEAD_LEN]) -> Self {
        Self { kind, length: u16::from_be_bytes([high, low]) as usize }
    }
}

/// A frame whose body has arrived and was not decoded yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The number of the message that the body encodes.
    pub kind: u8,
    /// The encoded message.
    pub body: Bytes,
}

/// A peer's bytes are not a frame that is allowed where they arrived.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The announced body is longer than the reader allows.
    #[error("frame of kind {kind:#04x} announces {length} bytes, at most {limit} are allowed")]
    Oversized {
        /// The frame's first byte.
        kind: u8,
        /// Length that the head announced, in bytes.
        length: usize,
        /// Maximum length that the reader allows, in bytes.
        limit: usize,
    },
    /// Another message was expected.
    #[error("frame of kind {found:#04x} where {expected:#04x} was due")]
    UnexpectedKind {
        /// The kind that arrived.
        found: u8,
        /// The kind that was expected.
        expected: u8,
    },
    /// The body is not an encoding of the message that its kind names.
    #[error("frame of kind {kind:#04x}: {source}")]
    Body {
        /// The frame's first byte.
        kind: u8,
        /// The fault of the body.
        source: DecodeError,
    },
}

impl Frame {
    /// Takes the first frame off the front of `buffer`; `None`, and nothing taken, while part of it
    /// is missing.
    ///
    /// # Errors
    /// When the head announces a body of more than `limit` bytes, whether or not it has arrived.
    pub fn split(buffer: &mut BytesMut, limit: usize) -> Result<Option<Self>, FrameError> {
        let Some(head) = buffer.first_chunk::<HEAD_LEN>() else { return Ok(None) };
        let FrameHead { kind, length } = FrameHead::decode(*head);
        if length > limit {
            return Err(FrameError::Oversized { kind, length, limit });
        }
        if buffer.len() < HEAD_LEN + length {
            return Ok(None);
        }
        buffer.advance(HEAD_LEN);
        Ok(Some(Self { kind, body: buffer.split_to(length).freeze() }))
    }

    /// Reads the body as an `M`.
    ///
    /// # Errors
    /// When the frame is of another kind, or its body is not an `M`.
    pub fn message<M: Message>(&self) -> Result<M, FrameError> {
        if self.kind != M::KIND {
            return Err(FrameError::UnexpectedKind { found: self.kind, expected: M::KIND });
        }
        if self.body.len() > M::MAX_LEN {
            return Err(FrameError::Oversized {
                kind: self.kind,
                length: self.body.len(),
                limit: M::MAX_LEN,
            });
        }
        codec::decode(&self.body).map_err(|source| FrameError::Body { kind: self.kind, source })
    }
}

/// The whole frame that carries `message`.
///
/// # Errors
/// When the message is longer than its kind allows; the fault is ours.
pub fn encode<M: Message>(message: &M) -> Result<Bytes, EncodeError> {
    let mut out = vec![M::KIND, 0, 0];
    codec::encode(message, &mut out)?;
    let length = out.len() - HEAD_LEN;
    if length > M::MAX_LEN {
        return Err(EncodeError::too_long(length, M::MAX_LEN));
    }
    // MAX_LEN is at most MAX_BODY_LEN, which fits in 16 bits.
    let length = u16::try_from(length).unwrap_or(u16::MAX);
    out[1..HEAD_LEN].copy_from_slice(&length.to_be_bytes());
    Ok(out.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, serde::Deserialize)]
    struct Word(String);

    impl Message for Word {
        const KIND: u8 = 0x7f;
        const MAX_LEN: usize = 8;
    }

    #[test]
    fn a_frame_is_kind_length_body() {
        let bytes = encode(&Word("hi".into())).unwrap();
        assert_eq!(&bytes[..], [0x7f, 0, 3, 2, b'h', b'i']);
        assert_eq!(FrameHead::decode([0x7f, 0, 3]), FrameHead { kind: 0x7f, length: 3 });
    }

    #[test]
    fn each_kind_has_its_own_limit() {
        assert!(encode(&Word("12345678".into())).is_err());
        let longest = encode(&Word("1234567".into())).unwrap();
        let frame = Frame { kind: Word::KIND, body: longest.slice(HEAD_LEN..) };
        assert_eq!(frame.message(), Ok(Word("1234567".into())));
        let frame = Frame { kind: Word::KIND, body: vec![0; 9].into() };
        assert!(matches!(frame.message::<Word>(), Err(FrameError::Oversized { limit: 8, .. })));
    }

    #[test]
    fn another_kind_is_not_read() {
        let frame = Frame { kind: 1, body: Bytes::new() };
        assert_eq!(
            frame.message::<Word>(),
            Err(FrameError::UnexpectedKind { found: 1, expected: 0x7f })
        );
    }

    #[test]
    fn frames_are_split_wherever_the_bytes_were_cut() {
        let stream = [0x03, 0, 1, 7, 0x04, 0, 0, 0x05, 0, 2, 1];
        for cut in 0..stream.len() {
            let mut buffer = BytesMut::new();
            let mut frames = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                buffer.extend_from_slice(part);
                while let Some(Frame { kind, body }) = Frame::split(&mut buffer, 2).unwrap() {
                    frames.push((kind, body.to_vec()));
                }
            }
            assert_eq!(frames, [(3, vec![7]), (4, vec![])], "cut at {cut}");
            assert_eq!(&buffer[..], [5, 0, 2, 1]);
        }
    }

    #[test]
    fn a_frame_is_split_as_soon_as_its_last_byte_is_there() {
        let mut buffer = BytesMut::from(&[0x03, 0, 1][..]);
        assert_eq!(Frame::split(&mut buffer, 2), Ok(None));
        buffer.extend_from_slice(&[7]);
        let frame = Frame { kind: 3, body: Bytes::from_static(&[7]) };
        assert_eq!(Frame::split(&mut buffer, 2), Ok(Some(frame)));
        assert!(buffer.is_empty());
    }

    #[test]
    fn an_oversized_frame_is_refused_by_its_head() {
        let split = |limit| Frame::split(&mut BytesMut::from(&[0x01, 0x01, 0x00][..]), limit);
        assert_eq!(split(256), Ok(None));
        let oversized = FrameError::Oversized { kind: 1, length: 256, limit: 255 };
        assert_eq!(split(255), Err(oversized));
    }
}
