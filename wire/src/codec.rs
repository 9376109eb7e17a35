//! One message to bytes and back: the only module that knows which codec is used.
//!
//! The codec is serde over bincode 2.0.1, configured as `standard()`: integers little-endian with
//! variable length, lengths before lists. bincode is frozen upstream; the golden bytes of the tests
//! fix what it does to our messages, and another codec would replace it here.

use serde::{Serialize, de::DeserializeOwned};

/// Maximum length of a message's body, in bytes, whatever its kind.
///
/// It bounds what a peer can make this side allocate for one message. The largest honest message is
/// a hello with a service-account token (about 2 KiB) and 64 identifiers.
//= docs/protocol.md#3-frames
pub const MAX_BODY_LEN: usize = 16 * 1024;

/// Maximum cost of reading one body, in bytes, as bincode counts: an integer counts at its full
/// width, however short it is on the wire. Twice the body is enough for every message, and bounds
/// what a false length can make this side allocate.
const READ_LIMIT: usize = 2 * MAX_BODY_LEN;

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<READ_LIMIT>,
> = bincode::config::standard().with_limit::<READ_LIMIT>();

/// A body could not be read as the message that its frame announced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes are not an encoding of the message, or a field broke its limit.
    #[error("malformed body: {0}")]
    Malformed(String),
    /// The body is longer than [`MAX_BODY_LEN`].
    #[error("{0} bytes, at most {MAX_BODY_LEN} are allowed")]
    TooLong(usize),
    /// The message ended before its frame did.
    #[error("{0} bytes after the end of the message")]
    TrailingBytes(usize),
}

/// A message was larger than [`MAX_BODY_LEN`] when encoded; the fault is ours.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("message does not fit its frame: {0}")]
pub struct EncodeError(String);

impl EncodeError {
    pub(crate) fn too_long(length: usize, limit: usize) -> Self {
        Self(format!("{length} bytes, at most {limit} are allowed"))
    }
}

/// Appends the message's encoding to `out`.
///
/// # Errors
/// When the encoding is longer than [`MAX_BODY_LEN`]; `out` may then hold part of it.
pub fn encode<M: Serialize>(message: &M, out: &mut Vec<u8>) -> Result<(), EncodeError> {
    let body = bincode::serde::encode_to_vec(message, CONFIG)
        .map_err(|error| EncodeError(error.to_string()))?;
    if body.len() > MAX_BODY_LEN {
        return Err(EncodeError::too_long(body.len(), MAX_BODY_LEN));
    }
    out.extend_from_slice(&body);
    Ok(())
}

/// Reads a message that takes up the whole of `body`.
///
/// # Errors
/// When the bytes are not such a message, more bytes follow it, or they are too many.
pub fn decode<M: DeserializeOwned>(body: &[u8]) -> Result<M, DecodeError> {
    if body.len() > MAX_BODY_LEN {
        return Err(DecodeError::TooLong(body.len()));
    }
    let (message, used) = bincode::serde::decode_from_slice(body, CONFIG)
        .map_err(|error| DecodeError::Malformed(error.to_string()))?;
    match body.len() - used {
        0 => Ok(message),
        trailing => Err(DecodeError::TrailingBytes(trailing)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_bytes_are_refused() {
        assert_eq!(decode::<u8>(&[7]), Ok(7));
        assert_eq!(decode::<u8>(&[7, 0, 0]), Err(DecodeError::TrailingBytes(2)));
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_allocated() {
        // 0xfd: a u64 follows; it claims 2^40 bytes of string.
        let claim = [&[0xfd][..], &(1_u64 << 40).to_le_bytes()].concat();
        assert!(matches!(decode::<String>(&claim), Err(DecodeError::Malformed(_))));
    }

    #[test]
    fn a_message_up_to_the_limit_and_no_longer_is_written_and_read() {
        // A length of this size takes three bytes.
        let longest = "x".repeat(MAX_BODY_LEN - 3);
        let mut body = Vec::new();
        encode(&longest, &mut body).unwrap();
        assert_eq!(body.len(), MAX_BODY_LEN);
        assert_eq!(decode::<String>(&body), Ok(longest));
        assert!(encode(&"x".repeat(MAX_BODY_LEN - 2), &mut Vec::new()).is_err());
        assert!(encode(&"x".repeat(MAX_BODY_LEN), &mut Vec::new()).is_err());
        let too_long = vec![0; MAX_BODY_LEN + 1];
        assert_eq!(decode::<String>(&too_long), Err(DecodeError::TooLong(MAX_BODY_LEN + 1)));
    }
}
