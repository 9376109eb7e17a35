//! Keeps a tunnel to every server: looks for those that are missing, moves tunnels to better carriers,
//! and never gives up. What is next is decided in [`crate::connector::plan`]; here it is done.

pub mod attempt;
pub mod backoff;
pub mod options;
pub mod plan;
pub mod quic_health;
pub mod race;

use std::{sync::Arc, time::Duration};

use culvert_process::logging::RateLimited;
use culvert_transport::TunnelLost;
use culvert_wire::CloseCode;
use tokio::{
    select,
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

use crate::{
    connector::{
        attempt::{Arrived, AttemptError, Attempted, Attempts},
        options::{AttemptOptions, CarrierOrder, QuicOutcome},
        plan::{Arrival, Cause, Found, Goal, InUse, Plan, Situation},
    },
    metrics::AgentMetrics,
    tunnels::{
        AddOutcome, Rank, ServerTunnel, ServerTunnels,
        session::{Joined, TunnelContext},
    },
};

/// How often failed attempts are told.
const TELL_INTERVAL: Duration = Duration::from_secs(10);

/// Keeps tunnels up.
#[derive(Debug)]
pub struct Connector {
    /// How a tunnel is got.
    pub attempts: Arc<Attempts>,
    /// What is next.
    pub plan: Plan,
    /// What there is.
    pub servers: Arc<ServerTunnels>,
    /// What is counted.
    pub metrics: Arc<AgentMetrics>,
}

/// An attempt that goes on.
#[derive(Debug)]
struct Pending {
    goal: Goal,
    options: AttemptOptions,
    attempted: AbortOnDropHandle<Attempted>,
}

/// The tunnels that are served, each in a task of its own.
type Tunnels = JoinSet<(Arc<ServerTunnel>, TunnelLost)>;

impl Connector {
    /// Connects and serves until the agent drains and its tunnels have ended.
    pub async fn run(mut self, context: Arc<TunnelContext>) {
        let mut tunnels = Tunnels::new();
        let mut pending: Option<Pending> = None;
        loop {
            // What is more urgent takes the place of an attempt that goes on.
            let going_on = pending.as_ref().map(|pending| pending.goal);
            let next = self.plan.next(&self.situation(), going_on, now());
            select! {
                () = context.draining.cancelled() => break,
                Some(ended) = tunnels.join_next() => {
                    // One whose task panicked has left as well, and will be looked for.
                    if let Ok((served, lost)) = ended {
                        self.on_lost(&served, &lost);
                    }
                }
                attempted = finished(&mut pending) => {
                    if let Some((goal, options, attempted)) = attempted {
                        self.on_attempted(goal, options, attempted, &mut tunnels, &context);
                    }
                }
                () = self.servers.changed() => {
                    let suspected = self.servers.in_use().iter().any(|served| served.is_suspect());
                    if !suspected && pending.as_ref().is_some_and(|p| p.goal == Goal::Replace) {
                        debug!("a silent server was heard again");
                        pending = None;
                        self.plan.on_heard(now(), fastrand::f64());
                    }
                }
                goal = due(next) => pending = Some(self.begin(goal, context.clone())),
            }
        }
        drop(pending);
        // Each ends within the time to drain, which it keeps itself.
        while tunnels.join_next().await.is_some() {}
    }

    fn situation(&self) -> Situation {
        let in_use = self.servers.in_use();
        let tunnel = |served: &Arc<ServerTunnel>| InUse {
            rank: served.rank,
            suspicion: served.suspicion(),
            since: served.since,
        };
        Situation { in_use: in_use.iter().map(tunnel).collect(), count: self.servers.count() }
    }

    fn begin(&mut self, goal: Goal, context: Arc<TunnelContext>) -> Pending {
        let options = self.plan.options(goal, &self.situation(), now(), fastrand::f64());
        debug!(?goal, ?options, "an attempt to get a tunnel");
        let attempts = self.attempts.clone();
        let suspected = self.servers.in_use().into_iter().find(|served| served.is_suspect());
        let toward = suspected.map(|served| served.tunnel.remote_address());
        let attempted =
            tokio::spawn(async move { attempts.attempt(options, toward, &context).await });
        Pending { goal, options, attempted: AbortOnDropHandle::new(attempted) }
    }

    fn on_attempted(
        &mut self,
        goal: Goal,
        options: AttemptOptions,
        Attempted { result, quic }: Attempted,
        tunnels: &mut Tunnels,
        context: &Arc<TunnelContext>,
    ) {
        match result {
            Ok(arrived) => {
                self.metrics.connect_attempt("ok");
                let rank = Rank::of(arrived.joined.tunnel(), options.large_packets);
                let reason = reason(goal, options.order, quic, rank);
                let found = self.enter(arrived, rank, reason, tunnels, context);
                let arrival = Arrival { quic, rank, found };
                self.plan.on_arrived(goal, arrival, now(), fastrand::f64());
            }
            Err(error) => {
                self.metrics.connect_attempt(error.label());
                tell(goal, &error);
                self.plan.on_failed(goal, quic, now(), fastrand::f64());
            }
        }
    }

    /// Serves a tunnel that a server has welcomed the agent on, unless that server has one as good.
    fn enter(
        &self,
        arrived: Arrived,
        rank: Rank,
        reason: &'static str,
        tunnels: &mut Tunnels,
        context: &Arc<TunnelContext>,
    ) -> Found {
        let Arrived { joined, buffers } = arrived;
        let (server_id, count) = (joined.welcome.server_id.clone(), joined.welcome.server_count);
        let tunnel = joined.tunnel().clone();
        let address = tunnel.remote_address();
        let way = (tunnel.clone(), rank);
        let entered = self.servers.enter(server_id.clone(), way, buffers, reason, now());
        let (served, other) = match entered {
            AddOutcome::New(served) => (served, None),
            AddOutcome::Instead(served, other) => (served, Some(other)),
            AddOutcome::Duplicate => {
                debug!(%server_id, %address, "a server that is connected already");
                tunnel.close(CloseCode::DONE, "a duplicate of the agent's tunnel");
                return Found::Known;
            }
        };
        self.servers.set_told_count(count);
        let transport = tunnel.carrier().name();
        let from = other.as_ref().map_or("none", |other| other.tunnel.carrier().name());
        self.metrics.transport_switched(from, transport, reason);
        info!(%server_id, %address, transport, from, reason, "server connected");
        if let Some(buffers) = buffers.filter(|buffers| buffers.is_small()) {
            warn!(
                receive = buffers.receive,
                send = buffers.send,
                "UDP buffers are small; raise net.core.rmem_max and net.core.wmem_max to 8 MiB",
            );
        }
        self.spawn(joined, served, tunnels, context);
        if other.is_some() { Found::Better } else { Found::New }
    }

    fn spawn(
        &self,
        joined: Joined,
        served: Arc<ServerTunnel>,
        tunnels: &mut Tunnels,
        context: &Arc<TunnelContext>,
    ) {
        let (servers, context) = (self.servers.clone(), context.clone());
        let leaving = Leaving(servers.clone(), served.clone());
        tunnels.spawn(async move {
            let lost = joined.serve(&served, &servers, context).await;
            drop(leaving);
            (served, lost)
        });
    }

    fn on_lost(&mut self, served: &ServerTunnel, lost: &TunnelLost) {
        let (server_id, transport) = (&served.server_id, served.tunnel.carrier());
        let retired = served.is_retired();
        self.metrics.tunnel_lost(lost.label());
        info!(%server_id, %transport, reason = %lost, retired, "server gone");
        if !retired {
            let unanswered = |code: &CloseCode| *code == CloseCode::UNRESPONSIVE;
            let cause = match lost {
                TunnelLost::ClosedHere { code, .. } if unanswered(code) => Cause::Path,
                _ => Cause::Server,
            };
            self.plan.on_lost(cause, now(), fastrand::f64());
        }
    }
}

/// Takes a tunnel out of the agent's when its task ends, however it ends.
struct Leaving(Arc<ServerTunnels>, Arc<ServerTunnel>);

impl Drop for Leaving {
    fn drop(&mut self) {
        self.0.leave(&self.1);
    }
}

/// Why a tunnel goes the way it goes, in a word.
fn reason(goal: Goal, order: CarrierOrder, quic: QuicOutcome, rank: Rank) -> &'static str {
    match (goal, quic, order) {
        (_, QuicOutcome::Failed(word), _) => word,
        (Goal::Probe, ..) => "quic_works",
        (Goal::Replace, ..) => "quic_silent",
        (_, _, CarrierOrder::TcpFirst) if !rank.is_quic() => "quic_failed_before",
        (_, _, CarrierOrder::QuicFirst | CarrierOrder::TcpFirst) if rank.is_quic() => {
            "first_choice"
        }
        // The server's address is known to a proxy alone, or one carrier was told.
        _ => "only_choice",
    }
}

fn tell(goal: Goal, error: &AttemptError) {
    static FAILED: RateLimited = RateLimited::new(TELL_INTERVAL);
    match goal {
        Goal::Probe => debug!(%error, "QUIC does not get through yet"),
        Goal::Look | Goal::Replace => {
            if let Some(suppressed) = FAILED.admit(std::time::Instant::now()) {
                warn!(%error, suppressed, "no tunnel to the server, will try again");
            }
        }
    }
}

/// The result of the attempt that goes on, which then does so no more; never without one.
async fn finished(pending: &mut Option<Pending>) -> Option<(Goal, AttemptOptions, Attempted)> {
    let Some(Pending { goal, options, attempted }) = pending else {
        return std::future::pending().await;
    };
    let (goal, options) = (*goal, *options);
    let attempted = attempted.await;
    *pending = None;
    // It cannot be aborted while it is here; were it to panic, it would be made again.
    attempted.ok().map(|attempted| (goal, options, attempted))
}

/// Completes with what is next when it is due; never when nothing is.
async fn due(next: Option<(Goal, std::time::Instant)>) -> Goal {
    match next {
        Some((goal, at)) => {
            sleep_until(at.into()).await;
            goal
        }
        None => std::future::pending().await,
    }
}

/// The time that tokio's timers go by.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}
