//! Where kube-apiserver comes in: listeners, and what is done with each accepted connection.
//!
//! A frontend asks for a target, gets a stream from the [`Dialer`], and is spliced to it.

pub mod connect;
pub mod grpc;
pub mod listen;
mod tls;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_transport::splice::{self, Abort, Cut, HalfEnd, Local, LocalRead, LocalWrite};
use culvert_wire::dial::{StreamKind, TraceContext};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

use crate::{
    backends::registry::Candidate,
    config::Mode,
    dial::{Dialed, Dialer},
    metrics::{FrontendKind, ServerMetrics},
};

/// Declares what a connection is for, as a request header or gRPC metadata; kube-apiserver sends
/// none.
const KIND_HEADER: &str = "culvert-kind";

/// What a frontend's request says beyond its target.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct RequestHints {
    kind: StreamKind,
    trace: Option<TraceContext>,
}

impl RequestHints {
    /// Reads the headers that `header` finds by their lower-case names.
    fn read<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Self {
        let trace = header("traceparent").and_then(|traceparent| {
            Some(TraceContext {
                traceparent: traceparent.try_into().ok()?,
                tracestate: header("tracestate").unwrap_or_default().try_into().ok()?,
            })
        });
        let kind = header(KIND_HEADER).map_or(StreamKind::UNKNOWN, StreamKind::from_name);
        Self { kind, trace }
    }
}

/// What every frontend connection of one server has in common.
#[derive(Debug)]
pub struct FrontendContext {
    /// How targets are reached.
    pub dialer: Dialer,
    /// What is counted.
    pub metrics: Arc<ServerMetrics>,
    /// What is spoken.
    pub mode: Mode,
    /// Time for a connection to say what it wants.
    pub header_timeout: Duration,
    /// Quiet time after which a gRPC connection is pinged; zero never pings.
    pub keep_alive_interval: Duration,
    /// Told when no new requests are to be taken.
    pub stopping: CancellationToken,
    /// Told when whatever is still open is to be cut off.
    pub closing: CancellationToken,
    /// Everything that works for frontends.
    pub tasks: TaskTracker,
}

impl FrontendContext {
    /// Serves one accepted connection to its end.
    async fn serve<S: connect::FrontendSocket>(self: Arc<Self>, socket: S) {
        match self.mode {
            Mode::HttpConnect => {
                let _counted = self.metrics.frontend_open(FrontendKind::Connect);
                Box::pin(connect::serve(socket, &self)).await;
            }
            Mode::Grpc => Box::pin(grpc::serve(socket, self)).await,
        }
    }

    /// Splices a frontend to its stream; how it ended.
    async fn carry<R: LocalRead, W: LocalWrite, A: Abort>(
        &self,
        local: Local<R, W, A>,
        dialed: Dialed,
    ) -> Result<(HalfEnd, HalfEnd), Cut> {
        let Dialed { id, stream, permit, answer } = dialed;
        let started = Instant::now();
        let agent_id = permit.backend().agent_id().as_str();
        debug!(dial = %id, agent_id, ?answer, "spliced");
        let counted = self.metrics.stream_open();
        let splice = Box::pin(splice::splice_behind(answer, local, stream, &self.metrics.meter));
        let outcome = splice.await;
        drop(counted);
        self.metrics.stream_ended(started, &outcome);
        let (up, down) = (outcome.to_tunnel, outcome.from_tunnel);
        let seconds = started.elapsed().as_secs_f64();
        match &outcome.end {
            Ok((to, from)) => debug!(dial = %id, agent_id, up, down, seconds, ?to, ?from, "ended"),
            Err(cut) => debug!(dial = %id, agent_id, up, down, seconds, %cut, "cut off"),
        }
        outcome.end
    }
}
