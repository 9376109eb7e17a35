//! Why a dial failed.

use std::{fmt, time::Duration};

use culvert_transport::{ReadFrameError, TunnelLost, WriteError};
use culvert_wire::{
    AgentId, StreamCode, bounded::Text, codec::EncodeError, dial::DialFailure,
    extension::UnknownExtension, frame::FrameError, target::InvalidTarget,
};

/// Why a dial failed. The texts of what Konnectivity knows too are its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// No strategy found a backend.
    #[error("No agent available")]
    NoAgent,
    /// The target's address is invalid; no agent was asked. Konnectivity's agent says the same.
    #[error("dial tcp: {0}")]
    Address(#[from] InvalidTarget),
    /// The network is not supported.
    #[error("dial {0}: unknown network {0}")]
    Network(Text<32>),
    /// The agent could not reach the target; the text is the agent's.
    #[error(transparent)]
    Failed(#[from] DialFailure),
    /// The agent did not answer before the deadline.
    #[error("timed out waiting for backend dial")]
    TimedOut,
    /// The tunnel was lost before the agent answered, and no other one took its place in time.
    #[error("agent {agent_id} was lost while dialing: {source}{}", Waited(*waited))]
    Lost {
        /// Agent of the tunnel.
        agent_id: AgentId,
        /// Why the tunnel was lost.
        source: TunnelLost,
        /// Time for which the dial then waited for another tunnel.
        waited: Duration,
    },
    /// The agent carries as many streams as it may.
    #[error("agent {0} has too many open streams")]
    Overloaded(AgentId),
    /// The agent refused the stream without a reply.
    #[error("agent {agent_id} refused the dial: {code}")]
    Refused {
        /// Agent that refused.
        agent_id: AgentId,
        /// Code with which it ended the stream.
        code: StreamCode,
    },
    /// The agent's reply breaks the protocol.
    #[error("agent {agent_id} gave a malformed answer: {source}")]
    Malformed {
        /// Agent that replied.
        agent_id: AgentId,
        /// What is wrong with the reply.
        source: MalformedReply,
    },
    /// The request cannot be sent; the fault is ours.
    #[error(transparent)]
    Request(#[from] RequestError),
}

/// What is wrong with a reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MalformedReply {
    /// The stream holds no frame.
    #[error(transparent)]
    Stream(#[from] ReadFrameError),
    /// The frame holds no reply.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The reply has an extension that must be understood, and is not.
    #[error(transparent)]
    Extension(#[from] UnknownExtension),
}

/// Why a request cannot be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// It does not fit its frame.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Its stream takes no bytes.
    #[error(transparent)]
    Stream(WriteError),
}

/// Minimum time that a text names: a shorter one, as when the deadline was about to end, would read
/// as no time at all.
const NAMED_WAIT: Duration = Duration::from_millis(50);

/// What a text adds about a wait for another tunnel.
struct Waited(Duration);

impl fmt::Display for Waited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < NAMED_WAIT {
            return Ok(());
        }
        write!(f, "; no other tunnel within {:.1}s", self.0.as_secs_f64())
    }
}

impl DialError {
    /// Every value of the label.
    pub(crate) const REASONS: [&str; 8] = [
        "no_agent",
        "error_response",
        "backend_dial_timeout",
        "backend_close",
        "overloaded",
        "refused",
        "unrecognized_response",
        "send_rsp",
    ];

    /// The value of the `reason` label of Konnectivity's `dial_failure_count` metric, or one of our
    /// own where Konnectivity has none.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::NoAgent => "no_agent",
            Self::Address(_) | Self::Network(_) | Self::Failed(_) => "error_response",
            Self::TimedOut => "backend_dial_timeout",
            Self::Lost { .. } => "backend_close",
            Self::Overloaded(_) => "overloaded",
            Self::Refused { .. } => "refused",
            Self::Malformed { .. } => "unrecognized_response",
            Self::Request(_) => "send_rsp",
        }
    }
}
