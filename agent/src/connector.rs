//! Keeps a tunnel to every server: finds servers, replaces tunnels whose peer is suspect, and moves
//! tunnels to better carriers. [`plan`] decides what comes next and when, and [`direct`] which
//! servers are dialed at their own addresses; this module does it.

mod attempt;
mod backoff;
mod connect;
mod dials;
mod direct;
mod error;
mod key_exchange;
mod options;
mod plan;
mod quic_health;
mod quic_outcome;
mod resolve;
mod tls;

use std::{any::Any, sync::Arc, time::Duration};

use culvert_process::rate_limited;
use culvert_transport::{
    TunnelLost,
    tls::{Current, Identity},
};
use culvert_wire::CloseCode;
use tokio::{
    select,
    task::{JoinError, JoinSet},
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, info, warn};

pub(crate) use self::options::CarrierOrder;
pub(crate) use self::{
    connect::{Connect, Connected, NetworkConnect},
    direct::Direct,
    error::{CarrierError, CarrierFailures},
    plan::Plan,
    resolve::{Candidate, Preference},
};
#[cfg(test)]
pub(crate) use self::{error::ResolveError, resolve::ServerAddress};
use crate::{
    connector::{
        attempt::{Attempted, Found, Places, attempt},
        dials::Dials,
        error::AttemptError,
        options::AttemptOptions,
        plan::{Gain, Goal, LossCause, Snapshot, Success, TunnelState},
        quic_outcome::{QuicFailure, QuicOutcome},
    },
    metrics::{AgentMetrics, PANICKED},
    tunnels::{
        AddOutcome, NewTunnel, PeerVersion, Rank, ServerTunnel, ServerTunnels,
        session::{Joined, SessionContext},
    },
};

/// Minimum interval between log lines about failed attempts.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Keeps a tunnel to every server.
#[derive(Debug)]
pub(crate) struct Connector<C> {
    /// The steps of an attempt that touch files and the network.
    pub(crate) connect: Arc<C>,
    /// Decides what comes next.
    pub(crate) plan: Plan,
    /// Decides which servers are dialed at their own addresses, and when.
    pub(crate) direct: Direct,
    /// The agent's certificate, if it has one.
    pub(crate) certificate: Option<Current<Identity>>,
    /// The tunnels, shared with metrics and readiness.
    pub(crate) tunnels: Arc<ServerTunnels>,
    /// The agent's metrics.
    pub(crate) metrics: Arc<AgentMetrics>,
}

/// An attempt that is not done yet.
#[derive(Debug)]
struct Pending {
    goal: Goal,
    options: AttemptOptions,
    task: AbortOnDropHandle<Attempted>,
}

/// The tasks that serve the tunnels, one each.
type Sessions = JoinSet<(Arc<ServerTunnel>, TunnelLost)>;

impl<C: Connect> Connector<C> {
    /// Connects, and serves the tunnels, until the agent drains and its tunnels have ended.
    pub(crate) async fn run(mut self, context: Arc<SessionContext>) {
        let mut sessions = Sessions::new();
        let mut pending: Option<Pending> = None;
        let mut dials = Dials::new();
        loop {
            let next_dial = self.begin_dials(&mut dials, &context);
            let goal = pending.as_ref().map(|pending| pending.goal);
            let (snapshot, now) = (self.snapshot(), Instant::now());
            let next = self.plan.next(&snapshot, goal, now);
            self.tunnels.quic().next_try = self.plan.next_probe(&snapshot, now);
            select! {
                () = context.draining.cancelled() => break,
                Some(ended) = sessions.join_next() => self.on_session_end(ended),
                Some(dialed) = dials.join_next() => {
                    self.on_dialed(dialed, &mut sessions, &context);
                }
                () = reached(next_dial) => {}
                (goal, options, attempted) = finished(&mut pending) => {
                    self.on_attempted(goal, options, attempted, &mut sessions, &context);
                }
                () = self.tunnels.changed() => {
                    let suspect = self.tunnels.in_use().iter().any(|tunnel| tunnel.is_suspect());
                    if !suspect && pending.as_ref().is_some_and(|p| p.goal == Goal::Replace) {
                        debug!("a silent server answers again");
                        pending = None;
                        self.plan.on_answer(Instant::now(), fastrand::f64());
                    }
                }
                () = replaced(&mut self.certificate) => {
                    self.tunnels.outdate();
                    self.plan.on_outdated(Instant::now(), fastrand::f64());
                }
                // A more urgent attempt replaces a pending one.
                goal = due(next) => pending = Some(self.begin(goal, context.clone())),
            }
        }
        drop((pending, dials));
        // Each session ends within the time for draining.
        while let Some(ended) = sessions.join_next().await {
            self.on_session_end(ended);
        }
    }

    fn snapshot(&self) -> Snapshot {
        let state = |tunnel: &Arc<ServerTunnel>| TunnelState {
            rank: tunnel.rank,
            suspicion: tunnel.suspicion(),
            outdated: tunnel.is_outdated(),
            since: tunnel.since,
        };
        let connected = self.tunnels.connected_servers();
        Snapshot {
            tunnels: self.tunnels.in_use().iter().map(state).collect(),
            server_count: self.tunnels.count(),
            promising: self.direct.promising(&connected, Instant::now()),
            proven: self.direct.proven(&connected),
        }
    }

    /// The best rank of the tunnels whose servers are suspected to be gone.
    fn suspect_rank(&self) -> Option<Rank> {
        let tunnels = self.tunnels.in_use();
        tunnels.iter().filter(|tunnel| tunnel.is_suspect()).map(|tunnel| tunnel.rank).max()
    }

    fn begin(&mut self, goal: Goal, context: Arc<SessionContext>) -> Pending {
        let options = self.plan.options(goal, &self.snapshot(), Instant::now(), fastrand::f64());
        let AttemptOptions { order, large_packets, at_once } = options;
        let (goal_name, order) = (goal.name(), order.name());
        debug!(goal = goal_name, order, large_packets, at_once, "an attempt to get a tunnel");
        let (connect, tunnels) = (self.connect.clone(), self.tunnels.clone());
        let places = self.places(goal);
        let attempt = async move { attempt(&*connect, options, &places, &tunnels, &context).await };
        let task = culvert_transport::task::owned(Box::pin(attempt));
        Pending { goal, options, task }
    }

    /// Where an attempt looks: for the server of a certain tunnel at its own addresses first.
    fn places(&self, goal: Goal) -> Places {
        let tunnels = self.tunnels.in_use();
        let mut tunnels = tunnels.iter();
        let tunnel = match goal {
            Goal::Find => None,
            Goal::Replace => tunnels.find(|tunnel| tunnel.is_suspect()),
            Goal::Renew => tunnels.find(|tunnel| tunnel.is_outdated()),
            Goal::Probe => tunnels.min_by_key(|tunnel| tunnel.rank),
        };
        let known = self.tunnels.known();
        let addresses = tunnel.map(|tunnel| known.addresses(&tunnel.server_id).to_vec());
        Places { addresses: addresses.unwrap_or_default(), by_name: true }
    }

    fn on_attempted(
        &mut self,
        goal: Goal,
        options: AttemptOptions,
        Attempted { result, quic }: Attempted,
        sessions: &mut Sessions,
        context: &Arc<SessionContext>,
    ) {
        if let QuicOutcome::Failed(failure) = quic {
            self.tunnels.quic().failed(failure.label(), Instant::now());
        }
        match result {
            Ok(found) => {
                self.metrics.connect_attempt("ok");
                let (rank, gain) = match found {
                    Found::Server(joined, rank) => {
                        let reason = reason(goal, self.suspect_rank(), options.order, quic, rank);
                        let gain = self.add(*joined, rank, reason, "name", sessions, context);
                        // A tunnel that fell silent is a failure of QUIC too, even when no
                        // handshake over QUIC has failed since.
                        let silent = QuicFailure::Silent.label();
                        let is_noted = matches!(quic, QuicOutcome::Failed(_));
                        if reason == silent && !is_noted && gain != Gain::Nothing {
                            self.tunnels.quic().failed(silent, Instant::now());
                        }
                        (rank, gain)
                    }
                    Found::Duplicate(rank) => (rank, Gain::Nothing),
                };
                let success = Success { quic, rank, gain };
                self.plan.on_success(goal, success, Instant::now(), fastrand::f64());
            }
            Err(error) => {
                self.metrics.connect_attempt(error.label());
                log_failure(goal, &error);
                self.plan.on_failure(goal, quic, Instant::now(), fastrand::f64());
            }
        }
    }

    /// Adds and serves a tunnel whose server has welcomed the agent, or closes it if that server
    /// has one that is as good.
    fn add(
        &self,
        joined: Joined,
        rank: Rank,
        reason: &'static str,
        found_by: &'static str,
        sessions: &mut Sessions,
        context: &Arc<SessionContext>,
    ) -> Gain {
        let (server_id, count) = (joined.welcome.server_id.clone(), joined.welcome.server_count);
        let revision = joined.welcome.revision;
        let (tunnel, buffers) = (joined.tunnel().clone(), joined.buffers);
        let (address, carrier) = (tunnel.remote_address(), tunnel.carrier());
        let new = NewTunnel {
            server_id: server_id.clone(),
            tunnel: tunnel.clone(),
            buffers,
            rank,
            reason,
            version: PeerVersion { software: joined.welcome.extensions.software(), revision },
            servers: context.accept_servers(&joined.welcome.servers, &tunnel),
        };
        let (added, retired) = match self.tunnels.add(new, Instant::now()) {
            AddOutcome::New(added) => (added, None),
            AddOutcome::Replaced { added, retired } => (added, Some(retired)),
            AddOutcome::Duplicate => {
                debug!(%server_id, %address, "a server that is connected already");
                tunnel.close(CloseCode::DONE, "a duplicate of the agent's tunnel");
                return Gain::Nothing;
            }
        };
        self.tunnels.set_reported_count(count);
        let from = retired.as_ref().map_or("none", |retired| retired.tunnel.carrier().name());
        self.metrics.transport_switched(from, carrier.name(), reason);
        // One that works keeps its streams.
        if let Some(silent) = retired.as_ref().filter(|it| it.is_suspect() && joined.resumes()) {
            silent.tunnel.close(CloseCode::UNRESPONSIVE, "the server does not answer on it");
        }
        info!(
            %server_id, %address, transport = %carrier, from, reason, found_by, revision,
            "server connected",
        );
        if let Some(buffers) = buffers.filter(|buffers| buffers.is_small()) {
            warn!(
                receive = buffers.receive,
                send = buffers.send,
                "UDP buffers are small; raise net.core.rmem_max and net.core.wmem_max to 8 MiB",
            );
        }
        self.serve(joined, added, sessions, context.clone());
        if retired.is_some() { Gain::BetterTunnel } else { Gain::Server }
    }

    fn serve(
        &self,
        joined: Joined,
        tunnel: Arc<ServerTunnel>,
        sessions: &mut Sessions,
        context: Arc<SessionContext>,
    ) {
        let tunnels = self.tunnels.clone();
        let guard = RemoveOnDrop(tunnels.clone(), tunnel.clone());
        sessions.spawn(async move {
            let lost = joined.serve(&tunnel, &tunnels, context).await;
            drop(guard);
            (tunnel, lost)
        });
    }

    fn on_session_end(&mut self, ended: Result<(Arc<ServerTunnel>, TunnelLost), JoinError>) {
        let (tunnel, lost) = match ended {
            Ok(ended) => ended,
            Err(error) => {
                let panic = panic_text(error);
                error!(panic, "internal error: the task of a tunnel panicked");
                self.metrics.tunnel_lost(PANICKED);
                // With a delay, so that a panic that repeats does not become a busy loop.
                self.plan.on_lost(LossCause::Server, Instant::now(), fastrand::f64());
                return;
            }
        };
        let (server_id, carrier) = (&tunnel.server_id, tunnel.tunnel.carrier());
        let retired = tunnel.is_retired();
        self.metrics.tunnel_lost(lost.label());
        if lost.is_failure() {
            self.metrics.server_failed();
            self.tunnels.on_server_lost(Instant::now());
        }
        info!(%server_id, transport = %carrier, reason = %lost, retired, "server gone");
        if !retired {
            let cause = match lost {
                TunnelLost::ClosedHere { code: CloseCode::UNRESPONSIVE, .. } => LossCause::Path,
                _ => LossCause::Server,
            };
            self.plan.on_lost(cause, Instant::now(), fastrand::f64());
            self.direct.on_lost(server_id, cause, Instant::now(), fastrand::f64());
        }
    }
}

/// Removes a tunnel from the agent's when its task ends, even by a panic.
struct RemoveOnDrop(Arc<ServerTunnels>, Arc<ServerTunnel>);

impl Drop for RemoveOnDrop {
    fn drop(&mut self) {
        self.0.remove(&self.1);
    }
}

/// Why a tunnel of `rank` has its carrier, as a metric label. `suspect` is the rank of the tunnel
/// that it is to replace.
fn reason(
    goal: Goal,
    suspect: Option<Rank>,
    order: CarrierOrder,
    quic: QuicOutcome,
    rank: Rank,
) -> &'static str {
    match (goal, quic, order) {
        (_, QuicOutcome::Failed(failure), _) => failure.label(),
        (Goal::Probe, ..) => "quic_works",
        (Goal::Replace, ..) if suspect.is_some_and(|suspect| !suspect.is_quic()) => "tcp_silent",
        (Goal::Replace, ..) => "quic_silent",
        (Goal::Renew, ..) => "renewed",
        (_, _, CarrierOrder::TcpFirst) if !rank.is_quic() => "quic_failed_before",
        (_, _, CarrierOrder::QuicFirst | CarrierOrder::TcpFirst) if rank.is_quic() => {
            "first_choice"
        }
        // Only a proxy can resolve the server's name, or `--transport` names one carrier.
        _ => "only_choice",
    }
}

fn log_failure(goal: Goal, error: &AttemptError) {
    match (error, goal) {
        (AttemptError::Panicked(_), _) => error!(%error, "no tunnel to the server, will try again"),
        (_, Goal::Probe) => debug!(%error, "QUIC does not get through yet"),
        (_, Goal::Find | Goal::Renew | Goal::Replace) => {
            rate_limited!(
                FAILURE_LOG_INTERVAL, per error = error, at most 8 in all, WARN,
                "no tunnel to the server, will try again"
            );
        }
    }
}

/// Completes when the agent's certificate was replaced.
async fn replaced(certificate: &mut Option<Current<Identity>>) {
    match certificate {
        Some(certificate) => certificate.replaced().await,
        None => std::future::pending().await,
    }
}

/// Completes with the pending attempt's result and takes it out; never without a pending attempt.
async fn finished(pending: &mut Option<Pending>) -> (Goal, AttemptOptions, Attempted) {
    let Some(Pending { goal, options, task }) = pending else {
        return std::future::pending().await;
    };
    let (goal, options) = (*goal, *options);
    let attempted = task
        .await
        .unwrap_or_else(|error| Attempted::failed(AttemptError::Panicked(panic_text(error))));
    *pending = None;
    (goal, options, attempted)
}

/// The message of a panic.
fn panic_text(error: JoinError) -> String {
    let text = |panic: Box<dyn Any + Send>| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().unwrap_or(&"without a message").to_string(),
    };
    error.try_into_panic().map_or_else(|error| error.to_string(), text)
}

/// Completes at this time; never without one.
async fn reached(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// Completes with the next goal when its time has come; never when there is none.
async fn due(next: Option<(Goal, Instant)>) -> Goal {
    match next {
        Some((goal, at)) => {
            sleep_until(at).await;
            goal
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
