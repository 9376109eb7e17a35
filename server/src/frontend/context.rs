//! What the connections of all frontends share, and the splice that each of them ends in.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_process::operator::streams::{LiveStream, LiveStreams};
use culvert_transport::{
    budget::StreamMemory,
    splice::{self, Abort, Cut, HalfEnd, Local, LocalRead, LocalWrite},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, field::display};

use super::{
    observed::{ObservedRead, ObservedWrite},
    reach::Reach,
};
use crate::{
    backends::registry::Candidate,
    config::Mode,
    dial::{Dialed, Dialer},
    metrics::ServerMetrics,
};

/// What all frontend connections of one server share.
#[derive(Debug)]
pub(crate) struct FrontendContext {
    /// Dials targets.
    pub(crate) dialer: Dialer,
    /// Metrics.
    pub(crate) metrics: Arc<ServerMetrics>,
    /// Holds packets of frontends that have arrived in part.
    pub(crate) memory: Arc<StreamMemory>,
    /// Protocol of the frontend.
    pub(crate) mode: Mode,
    /// The spliced streams.
    pub(crate) streams: LiveStreams,
    /// Whether frontends reach the server.
    pub(crate) reach: Reach,
    /// Time for a TLS handshake, and for the head of a request.
    pub(crate) header_timeout: Duration,
    /// Idle time after which a gRPC connection is pinged; zero never pings.
    pub(crate) keep_alive_interval: Duration,
    /// Cancelled when no new requests are to be taken.
    pub(crate) stopping: CancellationToken,
    /// Cancelled when connections that are still open are to be cut off.
    pub(crate) closing: CancellationToken,
    /// Tasks of all frontend connections.
    pub(crate) tasks: TaskTracker,
}

impl FrontendContext {
    /// Splices a frontend to its stream; how both directions ended.
    ///
    /// # Errors
    /// When the splice was cut off. Either outcome is counted and logged.
    pub(super) async fn carry<R: LocalRead, W: LocalWrite, A: Abort>(
        &self,
        local: Local<R, W, A>,
        dialed: Box<Dialed>,
    ) -> Result<(HalfEnd, HalfEnd), Cut> {
        let Dialed { id, trace, target, kind, stream, permit, cost, reply } = *dialed;
        let started = Instant::now();
        let agent_id = permit.backend().agent_id().as_str();
        let (trace, timing) = (trace.as_ref().map(display), reply.timing());
        debug!(
            dial = %id, agent_id, header_micros = timing.map(|timing| timing.header_micros),
            resolve_micros = timing.map(|timing| timing.resolve_micros),
            connect_micros = timing.map(|timing| timing.connect_micros), trace, "spliced",
        );
        let open = self.metrics.stream_open();
        let listed = self.streams.enter(LiveStream {
            dial: id,
            peer: agent_id.to_owned(),
            target,
            kind,
            tunnel: permit.backend().tunnel.clone(),
            progress: stream.0.progress().clone(),
            since: tokio::time::Instant::now(),
        });
        let flow = &self.metrics.flow;
        let local = local
            .map_reader(|reader| ObservedRead::new(reader, flow))
            .map_writer(|writer| ObservedWrite::new(writer, flow));
        let splice = Box::pin(splice::splice_after(reply, local, stream, &self.metrics.meter));
        let outcome = splice.await;
        drop((open, listed, cost));
        if !matches!(outcome.end, Err(Cut::Lost(_))) {
            flow.closed();
        }
        self.metrics.stream_ended(started, &outcome);
        let (up, down) = (outcome.to_tunnel, outcome.from_tunnel);
        let seconds = started.elapsed().as_secs_f64();
        match &outcome.end {
            Ok((to, from)) => debug!(dial = %id, agent_id, up, down, seconds, %to, %from, "ended"),
            Err(cut) => debug!(dial = %id, agent_id, up, down, seconds, %cut, "cut off"),
        }
        outcome.end
    }
}
