//! Why a dial failed.

use std::{fmt, time::Duration};

use culvert_transport::{Carrier, ReadFrameError, TunnelLost, WriteError};
use culvert_wire::{
    AgentId, StreamCode,
    bounded::Text,
    codec::EncodeError,
    dial::{DialErrorKind, DialFailure},
    extension::UnknownExtension,
    frame::FrameError,
    target::InvalidTarget,
};

use tokio::time::Instant;

use crate::backends::{Absence, Backend, registry::Candidate};

/// Why a dial failed. The texts of what Konnectivity knows too are its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// No strategy found a backend.
    #[error("No agent available: {0}")]
    NoAgent(Absence),
    /// The target's address is invalid; no agent was asked. Konnectivity's agent says the same.
    #[error("dial tcp: {0}")]
    Address(#[from] InvalidTarget),
    /// The network is not supported.
    #[error("dial {0}: unknown network {0}")]
    Network(Text<32>),
    /// The agent could not reach the target; the text is the agent's.
    #[error(transparent)]
    Failed(#[from] DialFailure),
    /// The agent did not reply before the deadline.
    #[error("timed out waiting for backend dial{}", Unanswered(.0.as_ref()))]
    TimedOut(Option<NoReply>),
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
    /// What open streams cost is half of the server's memory limit.
    #[error("the server has too many open streams for its memory limit")]
    Memory,
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

/// What is known of an agent that did not reply to a dial in time.
#[derive(Clone, Debug)]
pub(crate) struct NoReply {
    /// Agent that was asked.
    pub(crate) agent_id: AgentId,
    /// Carrier of its tunnel.
    pub(crate) carrier: Carrier,
    /// Whether anything came from the agent after it was asked; `None` where that is not known.
    pub(crate) is_heard: Option<bool>,
    /// Share of the packets to it that were lost in the last minute, in percent; `None` where that is
    /// not known.
    pub(crate) loss_percent: Option<u8>,
}

/// Time after which something comes from an agent that lives: it is suspected by then, and that
/// makes it answer.
const LIFE_SIGN: Duration = Duration::from_secs(2);

impl NoReply {
    /// What is known of this agent, which was asked then, when so many bytes had come from it.
    pub(super) fn of(backend: &Backend, asked: Instant, received_before: u64) -> Self {
        let carrier = backend.tunnel.carrier();
        let is_heard = backend.tunnel.stats().received_bytes > received_before;
        let is_known = carrier != Carrier::Grpc && (is_heard || asked.elapsed() >= LIFE_SIGN);
        Self {
            agent_id: backend.agent_id().clone(),
            carrier,
            is_heard: is_known.then_some(is_heard),
            loss_percent: backend.loss_percent(),
        }
    }
}

/// What a text adds about an agent that did not reply.
struct Unanswered<'a>(Option<&'a NoReply>);

impl fmt::Display for Unanswered<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(NoReply { agent_id, carrier, is_heard, loss_percent }) = self.0 else {
            return Ok(());
        };
        let carrier = carrier.name();
        match is_heard {
            None => write!(f, ": {agent_id} sent no reply over {carrier}")?,
            Some(true) => write!(f, ": {agent_id} answers over {carrier}, but sent no reply")?,
            Some(false) => write!(f, ": nothing came from {agent_id} over {carrier} meanwhile")?,
        }
        if let Some(percent) = loss_percent.filter(|percent| *percent > 0) {
            write!(f, " ({percent} % loss in the last minute)")?;
        }
        Ok(())
    }
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
        "send_req",
    ];

    /// Whether the agent, or its target by its account, did not answer in time.
    pub(super) fn is_time_out(&self) -> bool {
        match self {
            Self::TimedOut(_) => true,
            Self::Failed(failure) => failure.kind == DialErrorKind::TIMEOUT,
            _ => false,
        }
    }

    /// The value of the `reason` label of `culvert_server_dial_failures_total`, and of log lines.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::NoAgent(_) => "no_agent",
            Self::Address(_) | Self::Network(_) | Self::Failed(_) => "error_response",
            Self::TimedOut(_) => "backend_dial_timeout",
            Self::Lost { .. } => "backend_close",
            Self::Overloaded(_) | Self::Memory => "overloaded",
            Self::Refused { .. } => "refused",
            Self::Malformed { .. } => "unrecognized_response",
            Self::Request(_) => "send_req",
        }
    }

    /// What Konnectivity would count. Its HTTP CONNECT frontend does not count a dial that finds no
    /// agent, so its gRPC frontend counts that by itself.
    pub(crate) fn konnectivity_failure(&self) -> Option<KonnectivityFailure> {
        match self {
            Self::NoAgent(_) => None,
            Self::Address(_)
            | Self::Network(_)
            | Self::Failed(_)
            | Self::Overloaded(_)
            | Self::Memory
            | Self::Refused { .. } => Some(KonnectivityFailure::ErrorResponse),
            Self::TimedOut(_) => Some(KonnectivityFailure::BackendDialTimeout),
            Self::Lost { .. } | Self::Request(_) => Some(KonnectivityFailure::BackendClose),
            Self::Malformed { .. } => Some(KonnectivityFailure::UnrecognizedResponse),
        }
    }
}

/// Why a dial failed, as Konnectivity counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KonnectivityFailure {
    /// No agent is connected for the target.
    NoAgent,
    /// The agent reports a failure.
    ErrorResponse,
    /// The agent sent a reply to no dial.
    UnrecognizedResponse,
    /// The frontend did not take the positive reply.
    SendResponse,
    /// The agent was lost before its reply, or could not be asked.
    BackendClose,
    /// The agent did not reply in time.
    BackendDialTimeout,
    /// The frontend gave the dial up.
    FrontendClose,
}

impl KonnectivityFailure {
    /// Every one.
    pub(crate) const ALL: [Self; 7] = [
        Self::NoAgent,
        Self::ErrorResponse,
        Self::UnrecognizedResponse,
        Self::SendResponse,
        Self::BackendClose,
        Self::BackendDialTimeout,
        Self::FrontendClose,
    ];

    /// The value of the `reason` label of Konnectivity's `dial_failure_count`.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::NoAgent => "no_agent",
            Self::ErrorResponse => "error_response",
            Self::UnrecognizedResponse => "unrecognized_response",
            Self::SendResponse => "send_rsp",
            Self::BackendClose => "backend_close",
            Self::BackendDialTimeout => "backend_dial_timeout",
            Self::FrontendClose => "frontend_close",
        }
    }
}
