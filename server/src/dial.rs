//! One dial: choose a backend, open a stream, ask, and wait for the answer within the deadline.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_wire::{
    AgentId, DialId, StreamCode, Target,
    codec::EncodeError,
    dial::{DialFailure, DialReply, DialRequest, DialTiming, Network, StreamKind, TraceContext},
    extension::{Extensions, UnknownExtension},
    frame::{self, FrameError, Message},
    process::logging::RateLimited,
    target::InvalidTarget,
    transport::{ReadError, ReadFrameError, RecvHalf, SendHalf, TunnelLost, WriteError},
};
use tokio::time::{sleep, timeout};
use tracing::info;

use crate::{
    backend::{Backends, Place},
    metrics::ServerMetrics,
    registry::Candidate,
};

/// An agent that has not answered a dial for this long is asked whether it is alive. Dialing a
/// target may rightly take longer, so the dial itself goes on.
const DOUBT_AFTER: Duration = Duration::from_secs(1);

/// What a frontend wants to reach.
#[derive(Clone, Debug)]
pub struct Wish {
    /// How the target is spoken to.
    pub network: Network,
    /// The target.
    pub target: Target,
    /// What the connection is for, if the frontend was told.
    pub kind: StreamKind,
    /// The request's place in a trace, if the frontend was told.
    pub trace: Option<TraceContext>,
}

/// A stream whose other end is the target.
#[derive(Debug)]
pub struct Dialed {
    /// Names the dial in both sides' logs.
    pub id: DialId,
    /// The stream, at the first byte of the target's.
    pub stream: (SendHalf, RecvHalf),
    /// The backend's place that the stream takes up.
    pub place: Place,
    /// Where the agent's time went.
    pub timing: DialTiming,
}

/// Why a dial failed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No strategy found a backend.
    #[error("No agent available")]
    NoAgent,
    /// The address is not one; nobody was asked. Stock's agent would say the same.
    #[error("dial tcp: {0}")]
    Address(#[from] InvalidTarget),
    /// The network is not one that is carried.
    #[error("dial {0}: unknown network {0}")]
    Network(String),
    /// The agent answered that the target cannot be reached; the words are the agent's.
    #[error(transparent)]
    Failed(#[from] DialFailure),
    /// The agent did not answer in time.
    #[error("timed out waiting for backend dial")]
    TimedOut,
    /// The tunnel was lost before the agent answered.
    #[error("agent {agent_id} was lost while dialing: {source}")]
    Lost {
        /// Whose tunnel it was.
        agent_id: AgentId,
        /// Why it was lost.
        source: TunnelLost,
    },
    /// The agent carries as many streams as it may.
    #[error("agent {0} has too many open streams")]
    Overloaded(AgentId),
    /// The agent refused the stream without an answer.
    #[error("agent {agent_id} refused the dial: {code}")]
    Refused {
        /// Who refused.
        agent_id: AgentId,
        /// Why.
        code: StreamCode,
    },
    /// The agent's answer breaks the protocol.
    #[error("agent {agent_id} gave a malformed answer: {reason}")]
    Malformed {
        /// Whose answer it was.
        agent_id: AgentId,
        /// What is wrong with it.
        reason: String,
    },
    /// The request does not fit its frame.
    #[error(transparent)]
    Request(#[from] EncodeError),
}

impl DialError {
    /// The reason in the vocabulary of Konnectivity's `dial_failure_count` metric, extended where
    /// stock has no word.
    pub fn reason(&self) -> &'static str {
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

/// Dials targets through the connected backends.
#[derive(Clone, Debug)]
pub struct Dialer {
    backends: Backends,
    limit: Option<Duration>,
    metrics: Arc<ServerMetrics>,
}

impl Dialer {
    /// Dials through these backends, waiting at most `limit` for each answer.
    pub fn new(backends: Backends, limit: Option<Duration>, metrics: Arc<ServerMetrics>) -> Self {
        Self { backends, limit, metrics }
    }

    /// Dials a target.
    ///
    /// # Errors
    /// When there is no backend, or the one chosen does not connect in time.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the dial, and the agent gives it up.
    pub async fn dial(&self, wish: Wish) -> Result<Dialed, DialError> {
        static DIAL_FAILED: RateLimited = RateLimited::new(Duration::from_secs(1));
        let target = wish.target.clone();
        let pending = self.metrics.dial_pending();
        let started = Instant::now();
        let result = self.try_dial(wish).await;
        drop(pending);
        match &result {
            Ok(_) => self.metrics.dial_duration.record(started.elapsed()),
            Err(error) => {
                self.metrics.dial_failed(error.reason());
                if let Some(suppressed) = DIAL_FAILED.admit(Instant::now()) {
                    info!(%target, reason = error.reason(), %error, suppressed, "dial failed");
                }
            }
        }
        result
    }

    async fn try_dial(&self, wish: Wish) -> Result<Dialed, DialError> {
        let backend = self.backends.choose(&wish.target).ok_or(DialError::NoAgent)?;
        let overloaded = || DialError::Overloaded(backend.agent_id().clone());
        let place = backend.reserve().ok_or_else(overloaded)?;
        let request = DialRequest {
            id: DialId(fastrand::u64(..)),
            network: wish.network,
            target: wish.target,
            kind: wish.kind,
            timeout_millis: self.limit.map_or(0, millis),
            trace: wish.trace,
            extensions: Extensions::default(),
        };
        let mut pending = PendingStream(None);
        let limit = self.limit.unwrap_or(Duration::MAX);
        let asked = tokio::select! {
            asked = timeout(limit, ask(&place, &request, &mut pending)) => asked,
            never = doubt_when_slow(&place) => match never {},
        };
        let reply = match asked {
            Ok(reply) => reply?,
            Err(_) => {
                pending.reset(StreamCode::DIAL_TIMEOUT);
                return Err(DialError::TimedOut);
            }
        };
        reply.outcome?;
        // Without a stream there was no reply.
        let stream = pending.0.take().ok_or(DialError::TimedOut)?;
        Ok(Dialed { id: request.id, stream, place, timing: reply.timing })
    }
}

/// A stream whose dial has not been answered: reset as cancelled when the frontend gives up.
struct PendingStream(Option<(SendHalf, RecvHalf)>);

impl PendingStream {
    fn reset(&mut self, code: StreamCode) {
        if let Some((send, recv)) = &mut self.0 {
            send.reset(code);
            recv.stop(code);
        }
    }
}

impl Drop for PendingStream {
    fn drop(&mut self) {
        self.reset(StreamCode::CANCELLED);
    }
}

/// Opens a stream, writes the request and reads the reply.
async fn ask(
    place: &Place,
    request: &DialRequest,
    pending: &mut PendingStream,
) -> Result<DialReply, DialError> {
    let backend = place.backend();
    let agent_id = || backend.agent_id().clone();
    let lost = |source| DialError::Lost { agent_id: agent_id(), source };
    let refused = |code| DialError::Refused { agent_id: agent_id(), code };
    let malformed = |reason: String| DialError::Malformed { agent_id: agent_id(), reason };

    let (send, recv) = pending.0.insert(backend.tunnel.open().await.map_err(lost)?);
    send.write_chunk(frame::encode(request)?).await.map_err(|error| match error {
        WriteError::Lost(source) => lost(source),
        WriteError::Stopped(code) => refused(code),
        WriteError::Ended => malformed(error.to_string()),
    })?;
    let frame = recv.read_frame(DialReply::MAX_LEN).await.map_err(|error| match error {
        ReadFrameError::Read(ReadError::Lost(source)) => lost(source),
        ReadFrameError::Read(ReadError::Reset(code)) => refused(code),
        error => malformed(error.to_string()),
    })?;
    let reply: DialReply = frame.message().map_err(|e: FrameError| malformed(e.to_string()))?;
    reply.extensions.require_known().map_err(|e: UnknownExtension| malformed(e.to_string()))?;
    Ok(reply)
}

async fn doubt_when_slow(place: &Place) -> std::convert::Infallible {
    sleep(DOUBT_AFTER).await;
    place.backend().doubt();
    std::future::pending().await
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
