//! How a splice ended, and how many bytes it carried.

use std::{
    error::Error,
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use culvert_wire::code::StreamCode;

use super::LocalFault;
use crate::{ReadError, TunnelLost};

/// What many splices have carried, added up.
#[derive(Debug, Default)]
pub struct Meter {
    pub(super) to_tunnel: Carried,
    pub(super) from_tunnel: Carried,
}

/// What one direction has carried.
#[derive(Debug, Default)]
pub(super) struct Carried {
    bytes: AtomicU64,
    writes: AtomicU64,
}

impl Carried {
    /// Adds one write of this many bytes.
    pub(super) fn add(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.writes.fetch_add(1, Ordering::Relaxed);
    }
}

impl Meter {
    /// Number of bytes read from local connections and written to streams.
    pub fn to_tunnel(&self) -> u64 {
        self.to_tunnel.bytes.load(Ordering::Relaxed)
    }

    /// Number of writes to streams, each of what was read from a local connection at once.
    pub fn writes_to_tunnel(&self) -> u64 {
        self.to_tunnel.writes.load(Ordering::Relaxed)
    }

    /// Number of bytes read from streams and written to local connections.
    pub fn from_tunnel(&self) -> u64 {
        self.from_tunnel.bytes.load(Ordering::Relaxed)
    }

    /// Number of writes to local connections, each of what was read from a stream at once.
    pub fn writes_from_tunnel(&self) -> u64 {
        self.from_tunnel.writes.load(Ordering::Relaxed)
    }
}

/// Result of a splice.
#[derive(Debug)]
pub struct Outcome {
    /// Number of bytes from the local side to the tunnel.
    pub to_tunnel: u64,
    /// Number of bytes from the tunnel to the local side.
    pub from_tunnel: u64,
    /// How both directions ended, first towards the tunnel, then from it; or what cut them off.
    pub end: Result<(HalfEnd, HalfEnd), Cut>,
}

/// How one direction ended without a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HalfEnd {
    /// Everything up to the clean end was delivered.
    Finished,
    /// The reader closed first; the rest was not delivered.
    Stopped(StreamCode),
}

impl fmt::Display for HalfEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::Stopped(code) => write!(f, "stopped: {code}"),
        }
    }
}

/// Why a splice was cut off.
#[derive(Debug, thiserror::Error)]
pub enum Cut {
    /// The local connection failed.
    #[error("local connection: {0}")]
    Local(#[from] LocalFault),
    /// The other side of the tunnel reset the stream.
    #[error("reset from the other side: {0}")]
    Reset(StreamCode),
    /// The other side has closed, and the local peer does not read what it was sent before.
    #[error("the other side has closed and the local peer does not read what it was sent")]
    Stuck,
    /// The process has no more memory for its peers, and this stream holds most.
    #[error("the memory for peers is used up, and this stream holds most of it")]
    Memory,
    /// What preceded the stream's bytes refused the splice.
    #[error("{reason}")]
    Preamble {
        /// The code that both sides receive.
        code: StreamCode,
        /// The cause, as the [`Preamble`](super::Preamble) reports it.
        reason: Box<dyn Error + Send + Sync>,
    },
    /// The tunnel is lost.
    #[error("tunnel lost: {0}")]
    Lost(#[from] TunnelLost),
}

impl Cut {
    /// The code that stands for the cut, for the other side and for metric labels.
    pub fn code(&self) -> StreamCode {
        match self {
            Self::Local(fault) => fault.code,
            Self::Reset(code) | Self::Preamble { code, .. } => *code,
            Self::Stuck => StreamCode::IO_ERROR,
            Self::Memory => StreamCode::OVERLOADED,
            Self::Lost(_) => StreamCode::TUNNEL_LOST,
        }
    }
}

impl From<ReadError> for Cut {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(code) => Self::Reset(code),
            ReadError::Lost(lost) => Self::Lost(lost),
            ReadError::Ended => Self::Reset(StreamCode::ABANDONED),
        }
    }
}
