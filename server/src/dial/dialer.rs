//! The policy of a dial: which backend is asked, how long one is waited for, and what happens when
//! its tunnel is lost.

use std::{sync::Arc, time::Duration};

use culvert_process::rate_limited;
use culvert_wire::{DialId, Target, dial::DialRequest, extension::Extensions};
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::{
    DialParameters, Dialed, Reply,
    error::DialError,
    exchange::{Deadline, PendingStream, permit, suspecting, until},
    optimistic::ExpectedReply,
};
use crate::{
    backends::{
        Backend, Backends,
        registry::{Candidate, RETURN_LIMIT},
    },
    config::DialConfig,
    metrics::ServerMetrics,
};

/// Maximum number of times that one dial moves to another tunnel because its own was lost.
pub(super) const MAX_MOVES: usize = 3;

/// Dials targets through the connected backends. Clones dial through the same ones.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    backends: Backends,
    config: DialConfig,
    pub(super) metrics: Arc<ServerMetrics>,
}

/// One dial: what is asked for, and since and until when.
struct Dial {
    parameters: DialParameters,
    started: Instant,
    deadline: Deadline,
}

impl Dial {
    fn target(&self) -> &Target {
        &self.parameters.target
    }
}

impl Dialer {
    /// Dials through these backends.
    pub(crate) fn new(backends: Backends, config: DialConfig, metrics: Arc<ServerMetrics>) -> Self {
        Self { backends, config, metrics }
    }

    /// Dials a target.
    ///
    /// # Errors
    /// When there is no backend, or the agent does not reach the target before the deadline.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the dial, and the agent gives it up.
    pub(crate) async fn dial(&self, parameters: DialParameters) -> Result<Dialed, DialError> {
        let started = Instant::now();
        // A limit beyond what the clock can represent is none.
        let deadline = self.config.limit.and_then(|limit| started.checked_add(limit));
        let dial = Dial { parameters, started, deadline };
        let Some(backend) = self.choose(&dial).await else {
            let failed = Err(DialError::NoAgent);
            self.record(dial.target(), None, started, &failed);
            return failed;
        };
        if self.config.optimistic && backend.recently_reached.is_recent(dial.target(), started) {
            match self.expect(&backend, &dial).await {
                // The frontend has no answer yet, so the dial may still move.
                Err(DialError::Lost { .. }) => {}
                Err(error) => {
                    let failed = Err(error);
                    self.record(dial.target(), Some(&backend), started, &failed);
                    return failed;
                }
                // Recorded once the reply is here.
                dialed => return dialed,
            }
        }
        let (backend, result) = {
            let _pending = self.metrics.dial_pending();
            self.ask_until_answered(backend, &dial).await
        };
        self.record(dial.target(), Some(&backend), started, &result);
        result
    }

    /// A backend for the target. When there is none, but was one a moment ago, waits for a moment.
    async fn choose(&self, dial: &Dial) -> Option<Arc<Backend>> {
        if let Some(backend) = self.backends.choose(dial.target()) {
            return Some(backend);
        }
        let limit = self.backends.expected_for(dial.target(), dial.started)?;
        let _pending = self.metrics.dial_pending();
        self.wait(dial, limit).await
    }

    /// A backend that takes the dial within `limit` and before its deadline. For a dial that can go
    /// to no other backend a short wait is better than a failure: the client would have to retry,
    /// and does not know when.
    async fn wait(&self, dial: &Dial, limit: Duration) -> Option<Arc<Backend>> {
        if limit.is_zero() {
            return None;
        }
        let appears = timeout(limit, self.backends.appears(dial.target()));
        let appeared = until(dial.deadline, async { Ok(appears.await.ok().flatten()) }).await;
        let backend = appeared.ok().flatten();
        self.metrics.dial_waited(backend.is_some());
        backend
    }

    /// Asks the agent; and another one, or the same one on another tunnel, when the tunnel is lost
    /// before the reply: no byte of the connection was sent by then, so none is sent twice. Returns
    /// the backend that was asked last, and the result.
    async fn ask_until_answered(
        &self,
        mut backend: Arc<Backend>,
        dial: &Dial,
    ) -> (Arc<Backend>, Result<Dialed, DialError>) {
        for _ in 0..MAX_MOVES {
            let result = self.ask(&backend, dial).await;
            if !matches!(result, Err(DialError::Lost { .. })) {
                return (backend, result);
            }
            let Some(other) = self.other(&backend, dial).await else { return (backend, result) };
            self.metrics.dial_moved();
            debug!(dial_target = %dial.target(), agent_id = %other.agent_id(), "dial moved");
            backend = other;
        }
        let result = self.ask(&backend, dial).await;
        (backend, result)
    }

    /// Another backend for a dial whose tunnel was lost. A young dial waits for one.
    async fn other(&self, lost: &Arc<Backend>, dial: &Dial) -> Option<Arc<Backend>> {
        // The lost one may still be registered.
        self.backends.drain(lost);
        let other = self.backends.choose(dial.target());
        match other.filter(|other| !Arc::ptr_eq(other, lost)) {
            Some(other) => Some(other),
            None => self.wait(dial, RETURN_LIMIT.saturating_sub(dial.started.elapsed())).await,
        }
    }

    /// Asks the agent and waits for its reply.
    async fn ask(&self, backend: &Arc<Backend>, dial: &Dial) -> Result<Dialed, DialError> {
        let permit = permit(backend)?;
        let request = self.request(&dial.parameters);
        let exchange = async {
            let mut pending = until(dial.deadline, PendingStream::open(&permit)).await?;
            let reply = pending.exchange(backend, &request, dial.deadline).await?;
            reply.outcome?;
            Ok((pending.into_stream(), Reply::Received(reply.timing)))
        };
        let exchanged: Result<_, DialError> = suspecting(backend, exchange).await;
        let (stream, reply) = exchanged?;
        Ok(Dialed { id: request.id, trace: request.trace, stream, permit, reply })
    }

    /// Asks the agent and takes its positive reply for granted.
    async fn expect(&self, backend: &Arc<Backend>, dial: &Dial) -> Result<Dialed, DialError> {
        let permit = permit(backend)?;
        let request = self.request(&dial.parameters);
        let mut pending = until(dial.deadline, PendingStream::open(&permit)).await?;
        pending.send(backend, &request, dial.deadline).await?;
        let expected = ExpectedReply {
            dialer: self.clone(),
            backend: backend.clone(),
            target: dial.target().clone(),
            deadline: dial.deadline,
            _pending: self.metrics.dial_pending(),
        };
        let (stream, reply) = (pending.into_stream(), Reply::Expected(Box::new(expected)));
        Ok(Dialed { id: request.id, trace: request.trace, stream, permit, reply })
    }

    fn request(&self, parameters: &DialParameters) -> DialRequest {
        let DialParameters { network, target, kind, trace } = parameters.clone();
        DialRequest {
            id: DialId(fastrand::u64(..)),
            network,
            target,
            kind,
            timeout_millis: self.config.limit.map_or(0, millis),
            trace,
            extensions: Extensions::default(),
        }
    }

    /// Records the outcome of a dial: in the metrics, in the log, and in what `backend` reached
    /// recently.
    pub(super) fn record<T>(
        &self,
        target: &Target,
        backend: Option<&Backend>,
        started: Instant,
        result: &Result<T, DialError>,
    ) {
        let reached = backend.map(|backend| &backend.recently_reached);
        match result {
            Ok(_) => {
                self.metrics.dial_duration.record(started.elapsed());
                if let Some(reached) = reached.filter(|_| self.config.optimistic) {
                    reached.note(target, Instant::now());
                }
            }
            Err(error) => {
                self.metrics.dial_failed(error.reason());
                if let Some(reached) = reached {
                    reached.forget(target);
                }
                let agent_id = backend.map(|backend| backend.agent_id().as_str());
                rate_limited!(
                    Duration::from_secs(1), per dial_target = target, INFO, agent_id,
                    reason = error.reason(), %error, "dial failed"
                );
            }
        }
    }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
