//! One data stream on the node: read the dial request, dial the target, reply, splice.

mod dial;
mod gate;
mod network;
pub(crate) mod policy;
mod resolve;
#[cfg(test)]
mod scripted;

use std::{sync::Arc, time::Duration};

use culvert_process::{
    metrics::{PacketType, Segment},
    operator::streams::{LiveStream, LiveStreams},
};
use culvert_transport::{
    RecvHalf, SendHalf, Tunnel,
    resume::{SessionTunnel, Use},
    splice::{self, Backlog, Cut},
};
use culvert_wire::{
    ServerId, StreamCode,
    dial::{DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Frame, Message},
    resume::ResumeRequest,
};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;
use tracing::{debug, field::display};

pub(crate) use self::gate::Gate;
use self::network::{Connection, TargetNetwork};
use crate::{
    lookups::{Limits, Lookups, SystemResolver},
    metrics::AgentMetrics,
};

/// Time for the server to send a whole dial request; it does so in the stream's first packet.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// Limits of the lookups of targets' names. A resolver that hangs holds a thread and a socket for
/// each name, and is to leave threads for the names that it answers. Go's limit is 500.
const LOOKUP_LIMITS: Limits = Limits { running: 256, waiting: 1024 };

/// Dials targets for streams.
#[derive(Debug)]
pub(crate) struct Egress {
    network: TargetNetwork,
    gate: Gate,
    dial_timeout: Duration,
    metrics: Arc<AgentMetrics>,
    streams: LiveStreams,
}

/// Where a stream comes from.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// The server.
    pub(crate) server_id: ServerId,
    /// The tunnel to it.
    pub(crate) tunnel: Tunnel,
    /// The tunnel's place in the session with the server, if streams outlive it.
    pub(crate) session: Option<Arc<SessionTunnel>>,
    /// The tasks of the tunnel's streams.
    pub(crate) streams: TaskTracker,
}

impl Egress {
    /// Dials targets on the host's network, as far as `gate` permits. `dial_timeout` is the time for the lookup and
    /// connection of a target; where the server's own limit is shorter, it applies.
    /// Its streams are among `streams` while they live.
    pub(crate) fn new(
        gate: Gate,
        dial_timeout: Duration,
        metrics: Arc<AgentMetrics>,
        streams: LiveStreams,
    ) -> Self {
        let lookups = Lookups::new(SystemResolver, LOOKUP_LIMITS, metrics.target_lookups.clone());
        Self { network: TargetNetwork::Host { lookups }, gate, dial_timeout, metrics, streams }
    }

    /// The agent's metrics.
    pub(crate) fn metrics(&self) -> &AgentMetrics {
        &self.metrics
    }

    /// Serves one stream to its end.
    ///
    /// # Cancel safety
    /// Dropping the future resets the stream and the target's connection.
    pub(crate) async fn serve(&self, (mut send, mut recv): (SendHalf, RecvHalf), origin: Origin) {
        let arrived = Instant::now();
        let head = timeout(HEADER_TIMEOUT, Box::pin(recv.read_frame(DialRequest::MAX_LEN))).await;
        if let (Ok(Ok(frame)), Some(session)) = (&head, &origin.session)
            && frame.kind == ResumeRequest::KIND
        {
            let used = Box::new(origin.streams.token());
            return Box::pin(go_on(frame, session, (send, recv), used)).await;
        }
        let request = match head.map(|head| request(&head.map_err(|error| error.to_string())?)) {
            Ok(Ok(request)) => request,
            Ok(Err(error)) => return refuse(send, recv, StreamCode::MALFORMED, &error),
            Err(_) => return refuse(send, recv, StreamCode::MALFORMED, "no dial request in time"),
        };
        self.metrics.packet(Segment::ToAgent, PacketType::DialReq);
        let header_micros = DialTiming::micros(arrived.elapsed());
        let mut timing = DialTiming { header_micros, ..DialTiming::default() };
        let mut backlog = Backlog::new(&send);
        // Before anything behind the request is read.
        let mut kept = origin.session.as_ref().and_then(|session| session.keep(request.id));
        if let Some(kept) = &mut kept {
            kept.keep_received(&mut recv);
        }
        // On the heap, as the splice below: a future has room for the largest of its steps, and for
        // variables that were moved.
        let dialed = tokio::select! {
            dialed = Box::pin(self.dial(&request, &mut timing)) => dialed,
            // The server gave up, so nothing is left to reply to.
            code = Box::pin(abandoned(&send, &mut recv, &mut backlog)) => {
                self.metrics.packet(Segment::ToAgent, PacketType::DialCls);
                let trace = request.trace.as_ref().map(display);
                debug!(dial = %request.id, dial_target = %request.target, trace, "dial abandoned");
                send.reset(code);
                return recv.stop(code);
            }
        };
        let (outcome, target) = match dialed {
            Ok(target) => (Ok(()), Some(target)),
            Err(failure) => (Err(failure), None),
        };
        if let Err(failure) = &outcome {
            self.metrics.dial_failed(failure.kind);
            let trace = request.trace.as_ref().map(display);
            debug!(
                dial = %request.id, dial_target = %request.target, trace, %failure, "dial failed",
            );
        }
        let reply = DialReply { outcome, timing, extensions: Extensions::default() };
        let Ok(reply) = frame::encode(&reply) else {
            let reason = "the reply does not fit its frame";
            return refuse(send, recv, StreamCode::ABANDONED, reason);
        };
        self.metrics.packet(Segment::FromAgent, PacketType::DialRsp);
        if let Err(error) = send.write_chunk(reply).await {
            return debug!(dial = %request.id, %error, "the dial's reply was not sent");
        }
        if let Some(kept) = kept.as_mut().filter(|_| target.is_some()) {
            kept.keep_sent(&mut send);
        }
        drop(kept);
        match target {
            Some(target) => {
                self.splice(request, (target, backlog), (send, recv), origin).await;
            }
            None => {
                send.finish();
                recv.stop(StreamCode::DIAL_FAILED);
            }
        }
    }

    async fn dial(
        &self,
        request: &DialRequest,
        timing: &mut DialTiming,
    ) -> Result<Connection, DialFailure> {
        if let Err(error) = request.extensions.require_known() {
            return Err(DialFailure::new(DialErrorKind::UNSUPPORTED, error.to_string()));
        }
        let limit = match request.timeout_millis {
            0 => self.dial_timeout,
            millis => self.dial_timeout.min(Duration::from_millis(millis.into())),
        };
        let started = Instant::now();
        let target = dial::dial(
            (&self.network, &self.gate),
            request.network,
            &request.target,
            limit,
            timing,
        )
        .await?;
        self.metrics.dial_succeeded(started.elapsed());
        Ok(target)
    }

    /// Splices a target and its stream to their ends. The future has no room for what was given, only
    /// for what is needed at the end; the splice itself is on the heap.
    fn splice(
        &self,
        request: DialRequest,
        (local, backlog): (Connection, Backlog),
        stream: (SendHalf, RecvHalf),
        origin: Origin,
    ) -> impl Future<Output = ()> {
        let started = Instant::now();
        let open = self.metrics.stream_open();
        let listed = self.streams.enter(LiveStream {
            dial: request.id,
            peer: origin.server_id.as_str().to_owned(),
            target: request.target.clone(),
            kind: request.kind,
            tunnel: origin.tunnel,
            progress: stream.0.progress().clone(),
            since: started,
        });
        let splice = splice::splice_behind(backlog, local, stream, &self.metrics.meter);
        let splice = Box::pin(splice);
        async move {
            let outcome = splice.await;
            drop((open, listed));
            self.metrics.stream_ended(&outcome);
            let (dial, kind) = (request.id, request.kind.name());
            let (up, down) = (outcome.to_tunnel, outcome.from_tunnel);
            let seconds = started.elapsed().as_secs_f64();
            let trace = request.trace.as_ref().map(display);
            match outcome.end {
                Ok((to, from)) => debug!(
                    %dial, dial_target = %request.target, kind, trace, up, down, seconds, %to,
                    %from, "ended",
                ),
                Err(cut) => debug!(
                    %dial, dial_target = %request.target, kind, trace, up, down, seconds, %cut,
                    "cut off",
                ),
            }
        }
    }
}

fn request(frame: &Frame) -> Result<DialRequest, String> {
    frame.message().map_err(|error| error.to_string())
}

/// Goes on with a stream of a tunnel that was lost.
async fn go_on(
    frame: &Frame,
    session: &Arc<SessionTunnel>,
    (send, recv): (SendHalf, RecvHalf),
    used: Use,
) {
    let request: ResumeRequest = match frame.message() {
        Ok(request) => request,
        Err(error) => return refuse(send, recv, StreamCode::MALFORMED, &error.to_string()),
    };
    match session.answer(&request, (send, recv), used).await {
        Ok(()) => debug!(dial = %request.id, "a stream goes on over another tunnel"),
        Err(error) => debug!(dial = %request.id, %error, "a stream was not resumed"),
    }
}

/// Completes when the server abandons a dial that has no reply yet, or when what it sent ahead is
/// more than there is memory for; with the code of the stream's end.
async fn abandoned(send: &SendHalf, recv: &mut RecvHalf, backlog: &mut Backlog) -> StreamCode {
    let cut = tokio::select! {
        _ = send.stopped() => return StreamCode::ABANDONED,
        cut = backlog.keep(recv, 0) => cut,
    };
    match cut {
        Cut::Memory => cut.code(),
        _ => StreamCode::ABANDONED,
    }
}

fn refuse(mut send: SendHalf, mut recv: RecvHalf, code: StreamCode, reason: &str) {
    debug!(%code, reason, "a stream was refused");
    send.reset(code);
    recv.stop(code);
}

/// The host's network, for tests of its dials.
#[cfg(test)]
fn test_network() -> TargetNetwork {
    let metrics = AgentMetrics::new().unwrap().target_lookups;
    TargetNetwork::Host { lookups: Lookups::new(SystemResolver, LOOKUP_LIMITS, metrics) }
}

#[cfg(test)]
mod tests;
