//! A reply that is taken for granted.

use std::sync::Arc;

use culvert_process::metrics::{Counted, PacketType, Segment};
use culvert_transport::{RecvHalf, resume::KeptStream, splice::Cut};
use culvert_wire::{StreamCode, Target};
use tokio::time::Instant;

use super::{
    dialer::Dialer,
    error::DialError,
    exchange::{Deadline, read_reply, suspecting, until},
};
use crate::backends::{Backend, PendingDial};

/// The reply to a dial whose frontend was answered before it came, because the same agent reached
/// the same target recently. When it is negative or late, the connection is cut off.
#[derive(Debug)]
pub(crate) struct ExpectedReply {
    pub(super) dialer: Dialer,
    pub(super) backend: Arc<Backend>,
    pub(super) target: Target,
    pub(super) deadline: Deadline,
    /// Keeps what is received behind the reply, if the stream outlives its tunnel.
    pub(super) kept: Option<KeptStream>,
    /// The dial counts as pending until the reply is here.
    pub(super) _pending: (Counted, PendingDial),
}

impl ExpectedReply {
    /// Takes the reply off the stream.
    ///
    /// # Errors
    /// When it is negative or malformed, or does not come before the deadline.
    pub(super) async fn take(self, recv: &mut RecvHalf) -> Result<(), Cut> {
        let Self { dialer, backend, target, deadline, kept, .. } = self;
        let started = Instant::now();
        let reply = until(deadline, read_reply(&backend, recv));
        let result = suspecting(&backend, reply).await.and_then(|reply| {
            dialer.metrics.flow.packet(Segment::FromAgent, PacketType::DialRsp);
            Ok(reply.outcome?)
        });
        dialer.record(&target, Some(&backend), started, &result);
        dialer.metrics.optimistic_dial(result.is_ok());
        if result.is_ok()
            && let Some(mut kept) = kept
        {
            kept.keep_received(recv);
        }
        result.map_err(cut)
    }
}

fn cut(error: DialError) -> Cut {
    match error {
        DialError::Lost { source, .. } => Cut::Lost(source),
        DialError::TimedOut(_) => {
            Cut::Preamble { code: StreamCode::DIAL_TIMEOUT, reason: error.into() }
        }
        error => Cut::Preamble { code: StreamCode::DIAL_FAILED, reason: error.into() },
    }
}
