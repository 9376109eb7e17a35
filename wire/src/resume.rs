//! What resumes the streams of a lost tunnel on another tunnel of the same session.
//!
//! On the control stream each side reports what it has received ([`Received`]), the agent says
//! which tunnel it has given up ([`TunnelLost`]), and the server names the streams that continue
//! ([`Resumed`]). On a data stream [`ResumeRequest`] and [`ResumeReply`] take the place of the dial
//! request and the dial reply; raw bytes follow both.
//!
//! An offset counts the raw bytes of one half from 0 on. The frame that heads the half is not
//! counted, on the first tunnel and on every later one.
//!
//! [`Features::RESUME`](crate::version::Features::RESUME) must have been agreed.
//= docs/protocol.md#14-resumption

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{
    bounded::List,
    extension::Extensions,
    frame::Message,
    ids::{DialId, InstanceId},
};

/// The server's half of the name of a session, and this tunnel's number in it.
///
/// Tunnels belong to one session if the server's instance and the agent's id, instance and
/// identity are the same. A welcome carries it as extension [`crate::extension::SESSION`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// The server process.
    pub instance: InstanceId,
    /// The number of the tunnel. A server process uses none twice.
    pub tunnel: u64,
}

/// How much of one stream the sender of the report has received.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceivedOffset {
    /// The stream's dial.
    pub id: DialId,
    /// Number of raw bytes taken from the half, in order.
    pub offset: u64,
    /// Whether the half's end was taken as well.
    pub ended: bool,
}

/// Reports how much of some streams the sender has received. The peer keeps these bytes no longer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// The streams of which more was taken than the last report said, at most 256.
    pub streams: List<ReceivedOffset, 256>,
}

impl Message for Received {
    const KIND: u8 = 0x09;
}

/// The agent has given up a tunnel of the same session. Only agents send it; the server resumes
/// the streams of that tunnel on one that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelLost {
    /// The lost tunnel's [`SessionInfo::tunnel`].
    pub tunnel: u64,
}

impl Message for TunnelLost {
    const KIND: u8 = 0x0a;
}

/// Names streams of a lost tunnel that the server has begun to resume. Only servers send it.
///
/// A stream of that tunnel that none of the messages up to the one without `more` names has ended
/// at the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The lost tunnel's [`SessionInfo::tunnel`].
    pub tunnel: u64,
    /// The dials of the streams, at most 1024.
    pub streams: List<DialId, 1024>,
    /// Whether another such message about the same tunnel follows.
    pub more: bool,
}

impl Message for Resumed {
    const KIND: u8 = 0x0b;
}

/// Asks the agent to continue a stream: the first frame on a data stream, instead of a dial request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeRequest {
    /// The stream's dial.
    pub id: DialId,
    /// Number of the agent's raw bytes that the server has taken. The agent sends from there on.
    pub received: u64,
    /// Additions of later revisions.
    pub extensions: Extensions,
}

impl Message for ResumeRequest {
    const KIND: u8 = 0x12;
    const MAX_LEN: usize = 512;
}

/// The agent's answer to a resume request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeReply {
    /// Number of the server's raw bytes that the agent has taken, from which the server sends, or
    /// why the stream does not continue.
    pub outcome: Result<u64, ResumeErrorKind>,
    /// The code with which the agent has reset its half, a [`crate::StreamCode`]. It then finishes
    /// the new half: a reset of that could overtake the reply.
    pub reset: Option<u32>,
    /// Additions of later revisions.
    pub extensions: Extensions,
}

impl Message for ResumeReply {
    const KIND: u8 = 0x13;
    const MAX_LEN: usize = 512;
}

/// Why a stream does not continue.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ResumeErrorKind(u8);

impl ResumeErrorKind {
    /// The names of the reasons, at the position of their number.
    pub const NAMES: [&str; 3] = ["unknown_stream", "ended", "lost_bytes"];

    /// The peer has no stream of this dial, or gives a reason that this build does not know.
    pub const UNKNOWN_STREAM: Self = Self(0);
    /// Both halves of the stream have ended at the peer, or the stream was cut.
    pub const ENDED: Self = Self(1);
    /// Bytes from the requested offset on are no longer kept.
    pub const LOST_BYTES: Self = Self(2);

    /// The reason's name; `unknown_stream` for a number this build has no name for.
    pub fn name(self) -> &'static str {
        Self::NAMES.get(usize::from(self.0)).copied().unwrap_or(Self::NAMES[0])
    }
}

impl fmt::Display for ResumeErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for ResumeErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
