//! The head of a data stream: which target the server asks the agent to dial, and the answer.
//!
//! The request is the first frame on the server's half, the reply the first on the agent's. After
//! each comes the proxied connection's bytes, raw, until finish or reset.
//= docs/protocol.md#6-data-streams

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{bounded::Text, extension::Extensions, frame::Message, ids::DialId, target::Target};

/// The network of a target. Only TCP is carried; the variants differ in address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Network {
    /// TCP over IPv4 or IPv6.
    Tcp,
    /// TCP over IPv4 alone.
    Tcp4,
    /// TCP over IPv6 alone.
    Tcp6,
}

impl Network {
    /// The name that Go's `net.Dial` and the Konnectivity protocol give it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tcp4 => "tcp4",
            Self::Tcp6 => "tcp6",
        }
    }

    /// The network with this name; `None` for one that is not carried.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Tcp, Self::Tcp4, Self::Tcp6].into_iter().find(|network| network.name() == name)
    }
}

/// What a connection is for, as the frontend's client says. It is for logs alone: it changes
/// neither how a stream is scheduled nor how it is counted.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StreamKind(u8);

impl StreamKind {
    /// The names of the kinds, at the position of their number.
    const NAMES: [&str; 8] =
        ["unknown", "exec", "attach", "logs", "port-forward", "metrics", "health", "webhook"];

    /// The client did not say; kube-apiserver never does.
    pub const UNKNOWN: Self = Self(0);
    /// An interactive command.
    pub const EXEC: Self = Self(1);
    /// A terminal attached to a running container.
    pub const ATTACH: Self = Self(2);
    /// A log tail.
    pub const LOGS: Self = Self(3);
    /// A forwarded port.
    pub const PORT_FORWARD: Self = Self(4);
    /// A metrics scrape.
    pub const METRICS: Self = Self(5);
    /// A health check.
    pub const HEALTH: Self = Self(6);
    /// An admission webhook or an aggregated API.
    pub const WEBHOOK: Self = Self(7);

    /// The kind's name; `unknown` for a number this build has no name for.
    pub fn name(self) -> &'static str {
        Self::NAMES.get(usize::from(self.0)).copied().unwrap_or("unknown")
    }

    /// The kind with this name; [`Self::UNKNOWN`] when there is none.
    pub fn from_name(name: &str) -> Self {
        let position = Self::NAMES.iter().position(|known| *known == name).unwrap_or(0);
        Self(u8::try_from(position).unwrap_or(0))
    }
}

impl fmt::Debug for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The position of a request in a distributed trace (W3C Trace Context §3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// The `traceparent` header's value; 55 characters in version 00.
    pub traceparent: Text<128>,
    /// The `tracestate` header's value, possibly empty.
    pub tracestate: Text<512>,
}

/// The `traceparent`, and the `tracestate` behind a space if there is one, for logs. Control
/// characters are escaped.
impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { traceparent, tracestate } = self;
        write!(f, "{traceparent}")?;
        if tracestate.is_empty() {
            return Ok(());
        }
        write!(f, " {tracestate}")
    }
}

/// Asks the agent to connect to a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialRequest {
    /// Names this dial in both sides' logs.
    pub id: DialId,
    /// The network of the target.
    pub network: Network,
    /// The target to connect to.
    pub target: Target,
    /// What the connection is for, as a hint.
    pub kind: StreamKind,
    /// How long the server will wait for the reply, in milliseconds; 0 is without limit.
    pub timeout_millis: u32,
    /// The request's position in a trace, if the frontend's client sent one. For logs alone.
    pub trace: Option<TraceContext>,
    /// Additions of later revisions.
    pub extensions: Extensions,
}

impl Message for DialRequest {
    const KIND: u8 = 0x10;
    const MAX_LEN: usize = 4 * 1024;
}

/// Why a dial failed, for programs; the text beside it is for people.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DialErrorKind(u8);

impl DialErrorKind {
    /// The names of the reasons, at the position of their number.
    pub const NAMES: [&str; 10] = [
        "other",
        "refused",
        "timeout",
        "unresolvable",
        "unreachable",
        "reset",
        "forbidden",
        "overloaded",
        "draining",
        "unsupported",
    ];

    /// None of the reasons below.
    pub const OTHER: Self = Self(0);
    /// The target refused the connection.
    pub const REFUSED: Self = Self(1);
    /// The target did not answer in time.
    pub const TIMEOUT: Self = Self(2);
    /// The host name has no address.
    pub const UNRESOLVABLE: Self = Self(3);
    /// There is no route to the target's address.
    pub const UNREACHABLE: Self = Self(4);
    /// The target reset the connection while it was being made.
    pub const RESET: Self = Self(5);
    /// The agent's egress policy does not allow the target's address or port.
    pub const FORBIDDEN: Self = Self(6);
    /// A limit of the agent is reached: streams or file descriptors.
    pub const OVERLOADED: Self = Self(7);
    /// The agent takes no new dials.
    pub const DRAINING: Self = Self(8);
    /// The request has an extension that must be understood and that the agent does not know.
    pub const UNSUPPORTED: Self = Self(9);

    /// The reason's name; `other` for a number this build has no name for.
    pub fn name(self) -> &'static str {
        Self::NAMES.get(usize::from(self.0)).copied().unwrap_or("other")
    }
}

impl fmt::Debug for DialErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a dial failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{text}")]
pub struct DialFailure {
    /// The reason, for programs.
    pub kind: DialErrorKind,
    /// The reason in the words users know from Go, such as
    /// `dial tcp 10.0.0.9:10250: connect: connection refused`.
    pub text: Text<1024>,
}

impl DialFailure {
    /// The failure of this kind; a text that is too long is cut.
    pub fn new(kind: DialErrorKind, text: impl Into<String>) -> Self {
        Self { kind, text: Text::truncated(text.into()) }
    }
}

/// How long the stages of a dial took at the agent, in microseconds each.
///
/// A stage that was not reached is 0; one longer than 71 minutes is `u32::MAX`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialTiming {
    /// Reading the request, from the stream's arrival on.
    pub header_micros: u32,
    /// The look-up of the host's name.
    pub resolve_micros: u32,
    /// The TCP handshake, over all addresses tried.
    pub connect_micros: u32,
}

impl DialTiming {
    /// A duration as it is written in a timing.
    pub fn micros(duration: Duration) -> u32 {
        u32::try_from(duration.as_micros()).unwrap_or(u32::MAX)
    }

    /// The sum of all stages.
    pub fn total(self) -> Duration {
        [self.header_micros, self.resolve_micros, self.connect_micros]
            .into_iter()
            .map(|micros| Duration::from_micros(micros.into()))
            .sum()
    }
}

/// The agent's answer to a dial.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DialReply {
    /// Whether the target's bytes follow, or why the dial failed.
    pub outcome: Result<(), DialFailure>,
    /// How long the stages took.
    pub timing: DialTiming,
    /// Additions of later revisions.
    pub extensions: Extensions,
}

impl Message for DialReply {
    const KIND: u8 = 0x11;
    const MAX_LEN: usize = 4 * 1024;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_found_by_their_names() {
        for network in [Network::Tcp, Network::Tcp4, Network::Tcp6] {
            assert_eq!(Network::from_name(network.name()), Some(network));
        }
        assert_eq!([Network::Tcp4.name(), Network::Tcp6.name()], ["tcp4", "tcp6"]);
        assert_eq!(Network::from_name("udp"), None);
    }

    #[test]
    fn a_trace_is_shown_with_its_control_characters_escaped() {
        let trace = |parent: &str, state: &str| TraceContext {
            traceparent: parent.try_into().unwrap(),
            tracestate: state.try_into().unwrap(),
        };
        assert_eq!(trace("00-1", "").to_string(), "00-1");
        assert_eq!(trace("00-1\n", "a=\u{1b}[1m").to_string(), "00-1\\n a=\\u{1b}[1m");
    }

    #[test]
    fn stream_kinds_are_found_by_their_names() {
        for kind in [StreamKind::UNKNOWN, StreamKind::EXEC, StreamKind::WEBHOOK] {
            assert_eq!(StreamKind::from_name(kind.name()), kind);
        }
        assert_eq!(StreamKind::from_name("later"), StreamKind::UNKNOWN);
        assert_eq!(format!("{:?} {:?}", StreamKind::LOGS, DialErrorKind::RESET), "logs reset");
    }

    #[test]
    fn a_timing_is_the_sum_of_its_stages_and_a_stage_has_a_longest_value() {
        let timing = DialTiming { header_micros: 1, resolve_micros: 20, connect_micros: 300 };
        assert_eq!(timing.total(), Duration::from_micros(321));
        assert_eq!(DialTiming::micros(Duration::from_millis(7)), 7000);
        assert_eq!(DialTiming::micros(Duration::from_secs(72 * 60)), u32::MAX);
    }

    #[test]
    fn the_text_of_a_failure_is_cut_to_its_limit() {
        let failure = DialFailure::new(DialErrorKind::OTHER, "x".repeat(2000));
        assert_eq!(failure.to_string(), "x".repeat(1024));
    }
}
