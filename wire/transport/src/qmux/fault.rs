//! What a peer can do wrong.

use super::frame::FrameFault;

/// A breach of the protocol. It ends the connection (RFC 9000 §11.1); the text goes to the peer and
/// into this side's log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Frame(#[from] FrameFault),
    #[error("transport parameters are missing at the start, or came twice")]
    Parameters,
    #[error("more bytes or streams than were granted")]
    Limit,
    #[error("a stream with an id that cannot exist")]
    StreamId,
    #[error("the bytes of a stream are not in order")]
    Offset,
    #[error("bytes after the end of a stream")]
    AfterEnd,
    #[error("a stream is reset before bytes that have already arrived")]
    FinalSize,
    #[error("the peer causes frames and does not read them")]
    Flood,
}
