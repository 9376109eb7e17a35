//! HTTP/2, as far as a server of gRPC needs it (RFC 9113).
//!
//! kube-apiserver's client opens a connection for each proxied one, and most of them are idle. So an
//! idle connection has no buffer at all; the `h2` crate keeps 28 KiB for each (decision 0033).
//! [`Limits`] bounds what a peer can have done, and a [`StreamMemory`] counts what it can have held.
//!
//! ```text
//! socket ──Reader──▶ frames ──Peer──▶ State ◀──halves── tasks of the streams
//! socket ◀──Writer── frames ◀──────── State
//! ```
//!
//! Not here, because no client of gRPC needs it: priorities, pushes, trailers of requests (they are
//! checked and dropped), answers to `Expect`.

pub(crate) mod answer;
mod connection;
pub(crate) mod frames;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzz;
mod halves;
mod hpack;
mod huffman;
mod keepalive;
mod reader;
mod request;
mod shared;
mod static_table;
mod stream;
#[cfg(test)]
mod tests;
mod window;
mod writer;

use std::{fmt, io, sync::Arc};

#[cfg(doc)]
use culvert_transport::budget::StreamMemory;
use culvert_transport::budget::{Held, Holder};

pub(crate) use connection::Connection;
#[cfg(fuzzing)]
pub use fuzz::fuzz;
pub(crate) use halves::{RecvStream, SendStream};

/// Maximum number of bytes that wait for a stream's peer before its task adds no more.
const SEND_BUFFER: usize = 64 * 1024;

/// What one connection's peer may have done, and have held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Maximum number of open streams. One that was reset counts until its task has noticed.
    pub(crate) streams: u32,
    /// Number of bytes that each stream may be ahead of its reader at first.
    pub(crate) stream_window: u32,
    /// The same for all streams together, at least [`DEFAULT_WINDOW`].
    pub(crate) connection_window: u32,
    /// What bytes that were not read count as.
    pub(crate) unread: Held,
}

/// Window of streams and connections before any setting, in bytes (RFC 9113 §6.9.2).
pub(crate) const DEFAULT_WINDOW: u32 = 65_535;

/// What holds the bytes of one stream that wait in HTTP/2.
#[derive(Clone, Debug)]
pub(crate) struct Holders {
    /// Those that the peer has sent and the stream has not read.
    pub(crate) unread: Arc<Holder>,
    /// Those that the peer has not taken.
    pub(crate) unsent: Arc<Holder>,
}

impl Holders {
    /// Completes when the stream is to give up what it holds.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub(crate) async fn cut(&self) {
        tokio::select! {
            () = self.unread.cut() => {}
            () = self.unsent.cut() => {}
        }
    }
}

/// Why a stream or a connection was ended (RFC 9113 §7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) struct Reason(u32);

impl Reason {
    pub(crate) const NO_ERROR: Self = Self(0);
    const PROTOCOL_ERROR: Self = Self(1);
    pub(crate) const INTERNAL_ERROR: Self = Self(2);
    const FLOW_CONTROL_ERROR: Self = Self(3);
    const STREAM_CLOSED: Self = Self(5);
    const FRAME_SIZE_ERROR: Self = Self(6);
    const REFUSED_STREAM: Self = Self(7);
    pub(crate) const CANCEL: Self = Self(8);
    const COMPRESSION_ERROR: Self = Self(9);
    pub(crate) const ENHANCE_YOUR_CALM: Self = Self(11);
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match *self {
            Self::NO_ERROR => "no error",
            Self::PROTOCOL_ERROR => "the peer broke the protocol",
            Self::INTERNAL_ERROR => "internal error",
            Self::FLOW_CONTROL_ERROR => "more was sent than the window allows",
            Self::STREAM_CLOSED => "the stream is closed",
            Self::FRAME_SIZE_ERROR => "a frame has an illegal length",
            Self::REFUSED_STREAM => "the stream was refused",
            Self::CANCEL => "cancelled",
            Self::COMPRESSION_ERROR => "the header fields cannot be decoded",
            Self::ENHANCE_YOUR_CALM => "too much work was asked for",
            Self(other) => return write!(f, "error {other} of HTTP/2"),
        };
        f.write_str(name)
    }
}

/// Why a connection ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] Reason),
    #[error("a ping was not answered in time")]
    Silent,
}
