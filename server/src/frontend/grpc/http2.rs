//! HTTP/2, as far as a server of gRPC needs it (RFC 9113).
//!
//! kube-apiserver's client opens a connection for each proxied one, and most of them are idle. So an
//! idle connection has no buffer at all; the `h2` crate keeps 28 KiB for each (decision 0033).
//!
//! ```text
//! socket ──Reader──▶ frames ──Peer──▶ State ◀──halves── tasks of the streams
//! socket ◀──Writer── frames ◀──────── State
//! ```
//!
//! Not here, because no client of gRPC needs it: priorities, pushes, trailers of requests (they are
//! checked and dropped), answers to `Expect`.

mod connection;
#[cfg(any(fuzzing, test))]
mod fuzz;
mod halves;
mod hpack;
mod huffman;
mod reader;
mod request;
mod shared;
mod static_table;
mod stream;
#[cfg(test)]
mod tests;
mod window;
mod writer;

use std::{fmt, io};

pub(super) use connection::Connection;
#[cfg(fuzzing)]
pub use fuzz::fuzz;
pub(super) use halves::{RecvStream, SendStream};
pub(super) use shared::Shared;

/// Maximum number of bytes that wait for a stream's peer before its task adds no more.
const SEND_BUFFER: usize = 64 * 1024;
/// Maximum number of bytes that the streams of a connection may be ahead of their targets together.
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Maximum number of open streams of one connection; grpc-go's own server has no limit. A stream
/// that was reset counts until its task has noticed.
const MAX_STREAMS: u32 = 10_000;

/// Why a stream or a connection was ended (RFC 9113 §7).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) struct Reason(u32);

impl Reason {
    pub(super) const NO_ERROR: Self = Self(0);
    const PROTOCOL_ERROR: Self = Self(1);
    pub(super) const INTERNAL_ERROR: Self = Self(2);
    const FLOW_CONTROL_ERROR: Self = Self(3);
    const STREAM_CLOSED: Self = Self(5);
    const FRAME_SIZE_ERROR: Self = Self(6);
    const REFUSED_STREAM: Self = Self(7);
    pub(super) const CANCEL: Self = Self(8);
    const COMPRESSION_ERROR: Self = Self(9);
    pub(super) const ENHANCE_YOUR_CALM: Self = Self(11);
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
pub(super) enum Error {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Protocol(#[from] Reason),
}
