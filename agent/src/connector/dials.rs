//! Dials of servers of the set at their own addresses. [`Direct`](super::Direct) decides which and
//! when; this module does it.

use std::sync::Arc;

use culvert_process::rate_limited;
use culvert_wire::ServerId;
use tokio::{
    task::{JoinError, JoinSet},
    time::Instant,
};
use tracing::debug;

use super::{Connector, FAILURE_LOG_INTERVAL, Sessions, panic_text, reason};
use crate::{
    connector::{
        attempt::{Attempted, Found, Places, attempt},
        connect::Connect,
        error::AttemptError,
        options::AttemptOptions,
        plan::{Gain, Goal, Success},
    },
    tunnels::session::SessionContext,
};

/// The dials that have not ended.
pub(super) type Dials = JoinSet<Dialed>;

/// A dial that has ended.
#[derive(Debug)]
pub(super) struct Dialed {
    server_id: ServerId,
    options: AttemptOptions,
    attempted: Attempted,
}

impl<C: Connect> Connector<C> {
    /// Begins the dials that are due. Returns when the next one is, or the plan needs another look.
    pub(super) fn begin_dials(
        &mut self,
        dials: &mut Dials,
        context: &Arc<SessionContext>,
    ) -> Option<Instant> {
        let now = Instant::now();
        self.direct.on_known(&self.tunnels.known(), now, fastrand::f64());
        let connected = self.tunnels.connected_servers();
        for (server_id, addresses) in self.direct.due(&connected, dials.len(), now) {
            let options = self.plan.options(Goal::Find, &self.snapshot(), now, fastrand::f64());
            debug!(%server_id, addresses = addresses.len(), "a server is dialed at its own address");
            let places = Places { addresses, by_name: false };
            let (connect, tunnels) = (self.connect.clone(), self.tunnels.clone());
            let context = context.clone();
            let attempt =
                async move { attempt(&*connect, options, &places, &tunnels, &context).await };
            // In a task of its own, so that a panic is the result of this server's dial.
            let attempt = culvert_transport::task::owned(Box::pin(attempt));
            dials.spawn(async move {
                let attempted = attempt.await.unwrap_or_else(|error| {
                    Attempted::failed(AttemptError::Panicked(panic_text(error)))
                });
                Dialed { server_id, options, attempted }
            });
        }
        self.direct.next(&connected, dials.len(), now)
    }

    pub(super) fn on_dialed(
        &mut self,
        dialed: Result<Dialed, JoinError>,
        sessions: &mut Sessions,
        context: &Arc<SessionContext>,
    ) {
        // It neither panics nor is aborted.
        let Ok(Dialed { server_id, options, attempted }) = dialed else { return };
        let Attempted { result, quic } = attempted;
        let mut gained = false;
        let failure = match result {
            Ok(Found::Server(joined, rank)) => {
                let reason = reason(Goal::Find, None, options.order, quic, rank);
                let gain = self.add(*joined, rank, reason, "address", sessions, context);
                gained = gain != Gain::Nothing;
                let success = Success { quic, rank, gain };
                self.plan.on_dialed(success, Instant::now(), fastrand::f64());
                self.metrics.connect_attempt("ok");
                "other_server"
            }
            Ok(Found::Duplicate(_)) => {
                self.metrics.connect_attempt("ok");
                "other_server"
            }
            Err(error) => {
                self.metrics.connect_attempt(error.label());
                rate_limited!(
                    FAILURE_LOG_INTERVAL, per server_id = &server_id, at most 32 in all, WARN, %error,
                    "a server is not reached at its own address, will try again"
                );
                "failed"
            }
        };
        let reached = self.tunnels.connected_servers().contains(&server_id);
        self.metrics.direct_dial(match (reached, gained) {
            (true, true) => "ok",
            (true, false) => "connected_already",
            (false, _) => failure,
        });
        self.direct.on_ended(&server_id, reached, Instant::now(), fastrand::f64());
    }
}
