//! One dial: choose a backend, open a stream, ask, and wait for the answer within the deadline.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_process::logging::RateLimited;
use culvert_transport::{
    ReadError, ReadFrameError, RecvHalf, SendHalf, TunnelLost, WriteError,
    splice::{Cut, Head},
};
use culvert_wire::{
    AgentId, DialId, StreamCode, Target,
    codec::EncodeError,
    dial::{DialFailure, DialReply, DialRequest, DialTiming, Network, StreamKind, TraceContext},
    extension::{Extensions, UnknownExtension},
    frame::{self, FrameError, Message},
    target::InvalidTarget,
};
use tokio::time::{sleep, timeout};
use tracing::{debug, info};

use crate::{
    backends::{
        Backend, Backends, StreamPermit,
        registry::{Candidate, RETURN_LIMIT},
    },
    config::DialConfig,
    metrics::{Counted, ServerMetrics},
};

/// An agent that has not answered a dial for this long is asked whether it is alive. Dialing a
/// target may rightly take longer, so the dial itself goes on.
const SUSPECT_AFTER: Duration = Duration::from_secs(1);

/// How often a dial is made again because its tunnel was lost.
const MAX_MOVES: usize = 3;

/// What a frontend wants to reach.
#[derive(Clone, Debug)]
pub struct DialParameters {
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
    pub permit: StreamPermit,
    /// The agent's answer.
    pub answer: Answer,
}

/// An agent's positive answer to a dial.
#[derive(Debug)]
pub enum Answer {
    /// It came; where the agent's time went.
    Came(DialTiming),
    /// It is taken for granted and still to come.
    Expected(Box<Expected>),
}

impl Head for Answer {
    async fn take(self, recv: &mut RecvHalf) -> Result<(), Cut> {
        match self {
            Self::Came(_) => Ok(()),
            // Boxed, lest every stream has room for it for as long as it lives.
            Self::Expected(expected) => Box::pin(expected.take(recv)).await,
        }
    }
}

/// A dial whose frontend was told that it is done because the same agent reached the same target a
/// short while ago. If the agent now says otherwise, the connection is cut off.
#[derive(Debug)]
pub struct Expected {
    dialer: Dialer,
    backend: Arc<Backend>,
    target: Target,
    limit: Duration,
    _pending: Counted,
}

impl Expected {
    async fn take(self, recv: &mut RecvHalf) -> Result<(), Cut> {
        let started = Instant::now();
        let read = timeout(self.limit, read_reply(&self.backend, recv));
        let read = tokio::select! {
            read = read => read.unwrap_or(Err(DialError::TimedOut)),
            never = suspect_when_slow(&self.backend) => match never {},
        };
        let result = read.and_then(|reply| Ok(reply.outcome?));
        self.dialer.record_outcome(&self.backend, &self.target, started, &result);
        self.dialer.metrics.optimistic_dial(result.is_ok());
        result.map_err(|error| match error {
            DialError::Lost { source, .. } => Cut::Lost(source),
            DialError::TimedOut => {
                Cut::Dial { code: StreamCode::DIAL_TIMEOUT, text: error.to_string() }
            }
            error => Cut::Dial { code: StreamCode::DIAL_FAILED, text: error.to_string() },
        })
    }
}

/// Why a dial failed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No strategy found a backend.
    #[error("No agent available")]
    NoAgent,
    /// The address is not one; nobody was asked. Konnectivity's agent would say the same.
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
    /// Konnectivity has no word.
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
    config: DialConfig,
    metrics: Arc<ServerMetrics>,
}

impl Dialer {
    /// Dials through these backends.
    pub fn new(backends: Backends, config: DialConfig, metrics: Arc<ServerMetrics>) -> Self {
        Self { backends, config, metrics }
    }

    /// Dials a target.
    ///
    /// # Errors
    /// When there is no backend, or the one chosen does not connect in time.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the dial, and the agent gives it up.
    pub async fn dial(&self, parameters: DialParameters) -> Result<Dialed, DialError> {
        let started = Instant::now();
        let target = parameters.target.clone();
        let Some(backend) = self.choose(&target, started).await else {
            return Err(self.failed(&target, DialError::NoAgent));
        };
        if self.config.optimistic && backend.recently_reached.is_recent(&target, started) {
            return self
                .expect(backend, parameters)
                .await
                .map_err(|error| self.failed(&target, error));
        }
        let pending = self.metrics.dial_pending();
        let (backend, result) = self.ask_whoever_stays(backend, parameters, started).await;
        drop(pending);
        self.record_outcome(&backend, &target, started, &result);
        result
    }

    /// A backend for a target, and if there is none, one that comes back within a moment of having left.
    async fn choose(&self, target: &Target, started: Instant) -> Option<Arc<Backend>> {
        match self.backends.choose(target) {
            Some(backend) => Some(backend),
            None => {
                let expected = self.backends.expected_for(target, started)?;
                let pending = self.metrics.dial_pending();
                let came = self.wait(target, expected).await;
                drop(pending);
                came
            }
        }
    }

    /// A backend for a target that takes dials within this time. Where a dial can go nowhere else, to
    /// wait for a moment is better than to fail: whoever asked would have to ask again, and does not
    /// know when.
    async fn wait(&self, target: &Target, limit: Duration) -> Option<Arc<Backend>> {
        if limit.is_zero() {
            return None;
        }
        let came = timeout(limit.min(self.limit()), self.backends.appears(target)).await;
        let came = came.ok().flatten();
        self.metrics.dial_waited(came.is_some());
        came
    }

    /// Asks the agent, and another one, or the same on another tunnel, when the tunnel is lost before
    /// the answer: nothing of the connection has been sent by then, so nothing is sent twice. A dial that
    /// is young enough waits for such a tunnel. Whom was asked in the end, and the answer.
    async fn ask_whoever_stays(
        &self,
        mut backend: Arc<Backend>,
        parameters: DialParameters,
        started: Instant,
    ) -> (Arc<Backend>, Result<Dialed, DialError>) {
        let left = || self.limit().saturating_sub(started.elapsed());
        for _ in 0..MAX_MOVES {
            let result = self.ask(&backend, parameters.clone(), left()).await;
            if !matches!(result, Err(DialError::Lost { .. })) {
                return (backend, result);
            }
            // It may not have been taken out yet.
            self.backends.drain(&backend);
            let other = self.backends.choose(&parameters.target);
            let other = match other.filter(|other| !Arc::ptr_eq(other, &backend)) {
                Some(other) => Some(other),
                None => {
                    let limit = RETURN_LIMIT.saturating_sub(started.elapsed());
                    self.wait(&parameters.target, limit).await
                }
            };
            let Some(other) = other else { return (backend, result) };
            self.metrics.dial_moved();
            debug!(target = %parameters.target, agent_id = %other.agent_id(), "dial moved");
            backend = other;
        }
        let result = self.ask(&backend, parameters, left()).await;
        (backend, result)
    }

    /// Asks the agent and waits for its answer, for so long.
    async fn ask(
        &self,
        backend: &Arc<Backend>,
        parameters: DialParameters,
        limit: Duration,
    ) -> Result<Dialed, DialError> {
        let permit = permit(backend)?;
        let request = self.request(parameters);
        let mut pending = PendingStream(None);
        let asked = async {
            let recv = send_request(&permit, &request, &mut pending).await?;
            read_reply(backend, recv).await
        };
        let asked = tokio::select! {
            asked = timeout(limit, asked) => asked,
            never = suspect_when_slow(backend) => match never {},
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
        Ok(Dialed { id: request.id, stream, permit, answer: Answer::Came(reply.timing) })
    }

    /// Asks the agent and takes its answer for granted.
    async fn expect(
        &self,
        backend: Arc<Backend>,
        parameters: DialParameters,
    ) -> Result<Dialed, DialError> {
        let permit = permit(&backend)?;
        let (request, target) = (self.request(parameters.clone()), parameters.target);
        let mut pending = PendingStream(None);
        let sent = timeout(self.limit(), send_request(&permit, &request, &mut pending)).await;
        sent.map_err(|_| DialError::TimedOut)??;
        let stream = pending.0.take().ok_or(DialError::TimedOut)?;
        let expected = Expected {
            dialer: self.clone(),
            backend,
            target,
            limit: self.limit(),
            _pending: self.metrics.dial_pending(),
        };
        Ok(Dialed { id: request.id, stream, permit, answer: Answer::Expected(Box::new(expected)) })
    }

    fn limit(&self) -> Duration {
        self.config.limit.unwrap_or(Duration::MAX)
    }

    fn request(&self, parameters: DialParameters) -> DialRequest {
        DialRequest {
            id: DialId(fastrand::u64(..)),
            network: parameters.network,
            target: parameters.target,
            kind: parameters.kind,
            timeout_millis: self.config.limit.map_or(0, millis),
            trace: parameters.trace,
            extensions: Extensions::default(),
        }
    }

    /// Counts and remembers what an agent answered.
    fn record_outcome<T>(
        &self,
        backend: &Backend,
        target: &Target,
        started: Instant,
        result: &Result<T, DialError>,
    ) {
        match result {
            Ok(_) => self.metrics.dial_duration.record(started.elapsed()),
            Err(error) => self.count_failure(target, error),
        }
        match result {
            Ok(_) if self.config.optimistic => {
                backend.recently_reached.note(target, Instant::now())
            }
            Ok(_) => {}
            Err(_) => backend.recently_reached.forget(target),
        }
    }

    fn failed(&self, target: &Target, error: DialError) -> DialError {
        self.count_failure(target, &error);
        error
    }

    fn count_failure(&self, target: &Target, error: &DialError) {
        static DIAL_FAILED: RateLimited = RateLimited::new(Duration::from_secs(1));
        self.metrics.dial_failed(error.reason());
        if let Some(suppressed) = DIAL_FAILED.admit(Instant::now()) {
            info!(%target, reason = error.reason(), %error, suppressed, "dial failed");
        }
    }
}

fn permit(backend: &Arc<Backend>) -> Result<StreamPermit, DialError> {
    backend.permit().ok_or_else(|| DialError::Overloaded(backend.agent_id().clone()))
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

/// Opens a stream and writes the request; the half that the reply will come on.
async fn send_request<'a>(
    permit: &StreamPermit,
    request: &DialRequest,
    pending: &'a mut PendingStream,
) -> Result<&'a mut RecvHalf, DialError> {
    let backend = permit.backend();
    let lost = |source| DialError::Lost { agent_id: backend.agent_id().clone(), source };
    let (send, recv) = pending.0.insert(backend.tunnel.open().await.map_err(lost)?);
    send.write_chunk(frame::encode(request)?).await.map_err(|error| match error {
        WriteError::Lost(source) => lost(source),
        WriteError::Stopped(code) => refused(backend, code),
        WriteError::Ended => malformed(backend, error.to_string()),
    })?;
    Ok(recv)
}

/// Reads the reply, whatever it says.
async fn read_reply(backend: &Backend, recv: &mut RecvHalf) -> Result<DialReply, DialError> {
    let lost = |source| DialError::Lost { agent_id: backend.agent_id().clone(), source };
    let frame = recv.read_frame(DialReply::MAX_LEN).await.map_err(|error| match error {
        ReadFrameError::Read(ReadError::Lost(source)) => lost(source),
        ReadFrameError::Read(ReadError::Reset(code)) => refused(backend, code),
        error => malformed(backend, error.to_string()),
    })?;
    let told = |error: &dyn std::fmt::Display| malformed(backend, error.to_string());
    let reply: DialReply = frame.message().map_err(|error: FrameError| told(&error))?;
    reply.extensions.require_known().map_err(|error: UnknownExtension| told(&error))?;
    Ok(reply)
}

fn refused(backend: &Backend, code: StreamCode) -> DialError {
    DialError::Refused { agent_id: backend.agent_id().clone(), code }
}

fn malformed(backend: &Backend, reason: String) -> DialError {
    DialError::Malformed { agent_id: backend.agent_id().clone(), reason }
}

async fn suspect_when_slow(backend: &Backend) -> std::convert::Infallible {
    sleep(SUSPECT_AFTER).await;
    backend.suspect();
    std::future::pending().await
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
