//! One dial request and its reply, on one stream of one backend.

use std::{convert::Infallible, sync::Arc, time::Duration};

use culvert_transport::{ReadError, ReadFrameError, RecvHalf, SendHalf, TunnelLost, WriteError};
use culvert_wire::{
    StreamCode,
    dial::{DialReply, DialRequest},
    frame::{self, Message},
};
use scopeguard::ScopeGuard;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::error::{DialError, MalformedReply, RequestError};
use crate::backends::{Backend, StreamPermit, registry::Candidate};

/// Time without a reply after which an agent is suspected. A target may rightly need longer, so the
/// dial itself goes on.
pub(super) const SUSPECT_AFTER: Duration = Duration::from_secs(1);

/// Time without a reply after which a dial moves to a newer tunnel of the same agent process: an
/// agent replaces a tunnel that does not work, and a direction of it may still work. It has been
/// suspected by then, and had the time for an answer.
pub(super) const MOVE_AFTER: Duration = Duration::from_millis(2500);

/// When a dial fails; `None` is never.
pub(super) type Deadline = Option<Instant>;

/// Runs a step of a dial until its deadline.
pub(super) async fn until<T>(
    deadline: Deadline,
    step: impl Future<Output = Result<T, DialError>>,
) -> Result<T, DialError> {
    match deadline {
        Some(deadline) => {
            timeout_at(deadline, step).await.unwrap_or(Err(DialError::TimedOut(None)))
        }
        None => step.await,
    }
}

/// A permit of the backend.
pub(super) fn permit(backend: &Arc<Backend>) -> Result<StreamPermit, DialError> {
    backend.permit().ok_or_else(|| DialError::Overloaded(backend.agent_id().clone()))
}

type Halves = (SendHalf, RecvHalf);

/// A stream whose dial has not succeeded. Dropping it cancels the dial: both halves end with
/// [`StreamCode::CANCELLED`], unless they have ended already.
pub(super) struct PendingStream(ScopeGuard<Halves, fn(Halves)>);

impl PendingStream {
    /// Opens a stream. Nothing is sent yet.
    pub(super) async fn open(permit: &StreamPermit) -> Result<Self, DialError> {
        let backend = permit.backend();
        let halves = backend.tunnel.open().await.map_err(|source| lost(backend, source))?;
        Ok(Self(scopeguard::guard(halves, |mut halves| end(&mut halves, StreamCode::CANCELLED))))
    }

    /// Sends the request and waits for the reply, until the deadline; then the agent is asked to
    /// give up.
    pub(super) async fn exchange(
        &mut self,
        backend: &Backend,
        request: &DialRequest,
        deadline: Deadline,
    ) -> Result<DialReply, DialError> {
        self.timed(deadline, async |(send, recv)| {
            send_request(backend, send, request).await?;
            read_reply(backend, recv).await
        })
        .await
    }

    /// Sends the request, until the deadline.
    pub(super) async fn send(
        &mut self,
        backend: &Backend,
        request: &DialRequest,
        deadline: Deadline,
    ) -> Result<(), DialError> {
        self.timed(deadline, async |(send, _)| send_request(backend, send, request).await).await
    }

    /// The stream, which from now on is the caller's to end.
    pub(super) fn into_stream(self) -> Halves {
        ScopeGuard::into_inner(self.0)
    }

    async fn timed<T>(
        &mut self,
        deadline: Deadline,
        step: impl AsyncFnOnce(&mut Halves) -> Result<T, DialError>,
    ) -> Result<T, DialError> {
        let result = until(deadline, step(&mut self.0)).await;
        if matches!(result, Err(DialError::TimedOut(_))) {
            end(&mut self.0, StreamCode::DIAL_TIMEOUT);
        }
        result
    }
}

fn end((send, recv): &mut Halves, code: StreamCode) {
    send.reset(code);
    recv.stop(code);
}

async fn send_request(
    backend: &Backend,
    send: &mut SendHalf,
    request: &DialRequest,
) -> Result<(), DialError> {
    let frame = frame::encode(request).map_err(RequestError::from)?;
    send.write_chunk(frame).await.map_err(|error| match error {
        WriteError::Lost(source) => lost(backend, source),
        WriteError::Stopped(code) => refused(backend, code),
        error @ WriteError::Ended => RequestError::Stream(error).into(),
    })
}

/// Reads the reply, which may be negative.
pub(super) async fn read_reply(
    backend: &Backend,
    recv: &mut RecvHalf,
) -> Result<DialReply, DialError> {
    let frame = recv.read_frame(DialReply::MAX_LEN).await.map_err(|error| match error {
        ReadFrameError::Read(ReadError::Lost(source)) => lost(backend, source),
        ReadFrameError::Read(ReadError::Reset(code)) => refused(backend, code),
        error => malformed(backend, error),
    })?;
    let reply: DialReply = frame.message().map_err(|error| malformed(backend, error))?;
    reply.extensions.require_known().map_err(|error| malformed(backend, error))?;
    Ok(reply)
}

fn lost(backend: &Backend, source: TunnelLost) -> DialError {
    DialError::Lost { agent_id: backend.agent_id().clone(), source, waited: Duration::ZERO }
}

fn refused(backend: &Backend, code: StreamCode) -> DialError {
    DialError::Refused { agent_id: backend.agent_id().clone(), code }
}

fn malformed(backend: &Backend, source: impl Into<MalformedReply>) -> DialError {
    DialError::Malformed { agent_id: backend.agent_id().clone(), source: source.into() }
}

/// Runs an exchange with an agent until a newer tunnel of the same process has taken the place of
/// this one, and then for [`MOVE_AFTER`] from the begin; `None` without an answer by then.
pub(super) async fn unless_superseded<T>(
    backend: &Backend,
    exchange: impl Future<Output = T>,
) -> Option<T> {
    let superseded = async {
        let earliest = Instant::now() + MOVE_AFTER;
        backend.superseded().await;
        sleep_until(earliest).await;
    };
    tokio::select! {
        biased;
        result = exchange => Some(result),
        () = superseded => None,
    }
}

/// Runs an exchange with an agent, which is suspected once that takes [`SUSPECT_AFTER`]; at once if
/// the agent is silent.
pub(super) async fn suspecting<T>(backend: &Backend, exchange: impl Future<Output = T>) -> T {
    let suspect = async {
        sleep(if backend.is_silent() { Duration::ZERO } else { SUSPECT_AFTER }).await;
        backend.suspect();
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        result = exchange => result,
        never = suspect => match never {},
    }
}
