//! Why a stream was not resumed.

use culvert_wire::resume::ResumeErrorKind;

use crate::{ReadError, ReadFrameError, TunnelLost, WriteError};

/// Why a stream was not resumed over a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResumeFault {
    /// The tunnel was lost. The stream waits for another one.
    #[error(transparent)]
    Lost(#[from] TunnelLost),
    /// The stream has left the tunnel for a newer one meanwhile, or was given up.
    #[error("the stream has left the tunnel")]
    Left,
    /// The peer does not resume the stream.
    #[error("the peer does not resume the stream: {0}")]
    Refused(ResumeErrorKind),
    /// The peer asks for bytes that it has reported as received.
    #[error("the peer asks for bytes that are not kept")]
    LostBytes,
    /// The peer asks for bytes that it was never sent.
    #[error("the peer asks for bytes that it was never sent")]
    NeverSent,
    /// The peer's frame cannot be read.
    #[error("the peer's frame: {0}")]
    Frame(ReadFrameError),
    /// The peer ended the new stream.
    #[error("the peer ended the new stream")]
    Ended,
}

impl From<ReadFrameError> for ResumeFault {
    fn from(error: ReadFrameError) -> Self {
        match error {
            ReadFrameError::Read(ReadError::Lost(lost)) => Self::Lost(lost),
            ReadFrameError::Read(_) => Self::Ended,
            error => Self::Frame(error),
        }
    }
}

impl From<WriteError> for ResumeFault {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::Lost(lost) => Self::Lost(lost),
            WriteError::Stopped(_) | WriteError::Ended => Self::Ended,
        }
    }
}
