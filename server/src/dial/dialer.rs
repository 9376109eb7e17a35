//! The policy of a dial: which backend is asked, how long one is waited for, and what happens when
//! its tunnel is lost.

use std::{sync::Arc, time::Duration};

use culvert_process::{
    metrics::{PacketType, Segment},
    rate_limited,
};
use culvert_transport::{
    TunnelLost,
    budget::{StreamCost, StreamRoom},
};
use culvert_wire::{CloseCode, DialId, Target, dial::DialRequest, extension::Extensions};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::{
    DialParameters, Dialed, Reply,
    error::{DialError, NoReply},
    exchange::{Deadline, PendingStream, permit, suspecting, unless_superseded, until},
    optimistic::ExpectedReply,
};
use crate::{
    backends::{Backend, Backends, Process, registry::Candidate},
    config::DialConfig,
    metrics::ServerMetrics,
};

/// Maximum number of agent processes that one dial asks: a dial that makes each process that it
/// reaches fail must not reach all of them. Another tunnel of the same process does not count.
pub(super) const MAX_PROCESSES: usize = 4;
/// Maximum number of times that one dial moves to another tunnel. Only a failing path or a failing
/// agent loses so many tunnels within one dial.
pub(super) const MAX_MOVES: usize = 16;

/// Dials targets through the connected backends. Clones dial through the same ones.
#[derive(Clone, Debug)]
pub(crate) struct Dialer {
    backends: Backends,
    config: DialConfig,
    pub(super) metrics: Arc<ServerMetrics>,
    room: StreamRoom,
}

/// One dial: what is asked for, and since and until when.
struct Dial {
    parameters: DialParameters,
    started: Instant,
    deadline: Deadline,
    cost: Arc<StreamCost>,
}

impl Dial {
    fn target(&self) -> &Target {
        &self.parameters.target
    }
}

impl Dialer {
    /// Dials through these backends, as long as there is room for streams.
    pub(crate) fn new(
        backends: Backends,
        config: DialConfig,
        metrics: Arc<ServerMetrics>,
        room: StreamRoom,
    ) -> Self {
        Self { backends, config, metrics, room }
    }

    /// Dials a target.
    ///
    /// # Errors
    /// When there is no room or no backend, or the agent does not reach the target before the deadline.
    ///
    /// # Cancel safety
    /// Dropping the future abandons the dial, and the agent gives it up.
    pub(crate) async fn dial(&self, parameters: DialParameters) -> Result<Dialed, DialError> {
        let started = Instant::now();
        // A limit beyond what the clock can represent is none.
        let deadline = self.config.limit.and_then(|limit| started.checked_add(limit));
        let Some(cost) = self.room.take() else {
            let failed = Err(DialError::Memory);
            self.record(&parameters.target, None, started, &failed);
            return failed;
        };
        let dial = Dial { parameters, started, deadline, cost: Arc::new(cost) };
        let Some(backend) = self.choose(&dial).await else {
            let failed = Err(DialError::NoAgent(self.backends.absence(dial.target())));
            self.record(dial.target(), None, started, &failed);
            return failed;
        };
        let optimistic = self.config.optimistic && !backend.is_silent();
        if optimistic && backend.recently_reached.is_recent(dial.target(), started) {
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

    /// A backend for the target. When there is none, but one is expected back, waits for it.
    async fn choose(&self, dial: &Dial) -> Option<Arc<Backend>> {
        if let Some(backend) = self.backends.choose(dial.target()) {
            return Some(backend);
        }
        let until = self.backends.expected_until(dial.target(), dial.started)?;
        let _pending = self.metrics.dial_pending();
        self.wait(dial, until).await
    }

    /// A backend that takes the dial before its deadline, and before `until`. A wait is better than
    /// a failure for a dial that can go to no other backend: the client would have to retry, and
    /// does not know when. The wait ends early when the server stops.
    async fn wait(&self, dial: &Dial, until: Instant) -> Option<Arc<Backend>> {
        let until = dial.deadline.map_or(until, |deadline| deadline.min(until));
        let appears = timeout_at(until, self.backends.appears(dial.target()));
        let backend = appears.await.ok().flatten();
        self.metrics.dial_waited(backend.is_some());
        backend
    }

    /// Asks the agent; and another one, or the same one on another tunnel, when the tunnel is lost or
    /// superseded before the reply: no byte of the connection was sent by then, so none is sent
    /// twice. Returns the backend that was asked last, and the result.
    async fn ask_until_answered(
        &self,
        mut backend: Arc<Backend>,
        dial: &Dial,
    ) -> (Arc<Backend>, Result<Dialed, DialError>) {
        let (mut processes, mut moves) = (vec![backend.process()], 0);
        loop {
            let result = unless_superseded(&backend, self.ask(&backend, dial)).await;
            let (agent_id, source) = match result {
                Some(Err(DialError::Lost { agent_id, source, .. })) => {
                    // Another dial may choose it until the task of its tunnel has noticed.
                    self.backends.remove(&backend, &source);
                    (agent_id, source)
                }
                Some(result) => return (backend, result),
                None => (backend.agent_id().clone(), superseded()),
            };
            let other = match moves {
                MAX_MOVES => Err(Duration::ZERO),
                _ => self.other(dial, &mut processes).await,
            };
            let other = match other {
                Ok(other) => other,
                Err(waited) => {
                    return (backend, Err(DialError::Lost { agent_id, source, waited }));
                }
            };
            moves += 1;
            self.metrics.dial_moved();
            debug!(dial_target = %dial.target(), agent_id = %other.agent_id(), "dial moved");
            backend = other;
        }
    }

    /// Another backend for a dial whose tunnel was lost: at once, or before the deadline for as long
    /// as one is expected back. It may be a tunnel of a process that was asked before, or of one
    /// more process within the limit.
    ///
    /// # Errors
    /// The time for which a backend was waited for in vain; zero if none was waited for, or if one
    /// appeared whose process is beyond the limit.
    async fn other(
        &self,
        dial: &Dial,
        processes: &mut Vec<Process>,
    ) -> Result<Arc<Backend>, Duration> {
        // Before the choice: an agent that has come back is expected no longer.
        let now = Instant::now();
        let until = self.backends.expected_until(dial.target(), now);
        let other = match self.backends.choose(dial.target()) {
            Some(other) => other,
            None => {
                let until = until.ok_or(Duration::ZERO)?;
                self.wait(dial, until).await.ok_or_else(|| now.elapsed())?
            }
        };
        let process = other.process();
        if !processes.contains(&process) {
            if processes.len() == MAX_PROCESSES {
                return Err(Duration::ZERO);
            }
            processes.push(process);
        }
        Ok(other)
    }

    /// Asks the agent and waits for its reply.
    async fn ask(&self, backend: &Arc<Backend>, dial: &Dial) -> Result<Dialed, DialError> {
        let permit = permit(backend)?;
        let request = self.request(&dial.parameters);
        let _pending = backend.dial_pending();
        let (asked, received_before) = (Instant::now(), backend.tunnel.stats().received_bytes);
        let exchange = async {
            let mut pending = until(dial.deadline, PendingStream::open(&permit)).await?;
            self.metrics.flow.packet(Segment::ToAgent, PacketType::DialReq);
            let reply = pending.exchange(backend, &request, dial.deadline).await?;
            self.metrics.flow.packet(Segment::FromAgent, PacketType::DialRsp);
            reply.outcome?;
            let (mut send, mut recv) = pending.into_stream();
            if let Some(mut kept) = backend.session().and_then(|session| session.keep(request.id)) {
                kept.keep_sent(&mut send);
                kept.keep_received(&mut recv);
            }
            Ok(((send, recv), Reply::Received(reply.timing)))
        };
        let (stream, reply) = suspecting(backend, exchange).await.map_err(|error| match error {
            DialError::TimedOut(None) => {
                DialError::TimedOut(Some(NoReply::of(backend, asked, received_before)))
            }
            error => error,
        })?;
        let DialRequest { id, trace, target, kind, .. } = request;
        let cost = dial.cost.clone();
        Ok(Dialed { id, trace, target, kind, stream, permit, cost, reply })
    }

    /// Asks the agent and takes its positive reply for granted.
    async fn expect(&self, backend: &Arc<Backend>, dial: &Dial) -> Result<Dialed, DialError> {
        let permit = permit(backend)?;
        let request = self.request(&dial.parameters);
        let mut pending = until(dial.deadline, PendingStream::open(&permit)).await?;
        self.metrics.flow.packet(Segment::ToAgent, PacketType::DialReq);
        pending.send(backend, &request, dial.deadline).await?;
        let (mut send, recv) = pending.into_stream();
        let mut kept = backend.session().and_then(|session| session.keep(request.id));
        if let Some(kept) = &mut kept {
            kept.keep_sent(&mut send);
        }
        let expected = ExpectedReply {
            dialer: self.clone(),
            backend: backend.clone(),
            target: dial.target().clone(),
            deadline: dial.deadline,
            kept,
            _pending: (self.metrics.dial_pending(), backend.dial_pending()),
        };
        let (stream, reply) = ((send, recv), Reply::Expected(Box::new(expected)));
        let DialRequest { id, trace, target, kind, .. } = request;
        let cost = dial.cost.clone();
        Ok(Dialed { id, trace, target, kind, stream, permit, cost, reply })
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
        if let Some(backend) = backend {
            self.judge(backend, target, result);
        }
        let reached = backend.map(|backend| &backend.recently_reached);
        match result {
            Ok(_) => {
                self.metrics.dial_succeeded(started.elapsed());
                if let Some(reached) = reached.filter(|_| self.config.optimistic) {
                    reached.note(target, Instant::now());
                }
            }
            Err(error) => {
                self.metrics.dial_failed(error);
                if let Some(reached) = reached {
                    reached.forget(target);
                }
                let agent_id = backend.map(|backend| backend.agent_id().as_str());
                rate_limited!(
                    Duration::from_secs(10), per dial_target = target, INFO, agent_id,
                    reason = error.reason(), %error, "dial failed"
                );
            }
        }
    }
}

impl Dialer {
    /// Takes the outcome of a dial into what decides whether the backend gets further ones.
    fn judge<T>(&self, backend: &Backend, target: &Target, result: &Result<T, DialError>) {
        match result {
            Err(error) if error.is_time_out() => {
                if let Some(time) = self.backends.dial_timed_out(backend, target) {
                    self.metrics.backend_ejected();
                    warn!(
                        agent_id = %backend.agent_id(), seconds = time.as_secs(),
                        "dials through an agent time out while those through others do not"
                    );
                }
            }
            Ok(_) | Err(DialError::Failed(_)) => self.backends.dial_replied(backend),
            Err(_) => {}
        }
    }
}

/// Why a dial leaves a tunnel that is not lost.
fn superseded() -> TunnelLost {
    TunnelLost::ClosedHere { code: CloseCode::SUPERSEDED, reason: "a newer tunnel exists".into() }
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
