//! One agent's tunnel as a backend, from its introduction to its loss.

pub(crate) mod recheck;
pub(crate) mod renewal;

use std::{mem, pin::pin, sync::Arc, time::Duration};

use culvert_process::{
    metrics::{PacketType, Segment},
    rate_limited,
};
use culvert_transport::{
    Tunnel, TunnelLost,
    control::{ControlError, ControlStream},
    resume::{LeaveOnDrop, Resumption},
};
use culvert_wire::{
    CloseCode,
    bounded::Text,
    control::{ControlMessage, Drain, Goodbye, Renewal, ServerSet},
    resume::{self as wire, Received, Resumed},
};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout, timeout_at},
};
use tracing::{debug, info, warn};

use self::renewal::ProofKeeper;
use super::{
    AgentContext,
    admission::Authenticated,
    identity::ClaimFault,
    join::{self, Joined, SetChanges},
    unadmitted::Attempt,
};
use crate::backends::{Backend, Dismissal, registry::Candidate};

/// Time for a suspected agent to prove that it is alive before its tunnel is closed: well above the
/// pause of a busy node, well below what a person waits for.
const SUSPECT_LIMIT: Duration = Duration::from_millis(1500);
/// Time in which an agent leaves that looks for other servers and meets this one again. Its tunnel is
/// not logged as one that came and went: while a server of the set is missing, each agent does that
/// every few seconds.
const MEETING_TIME: Duration = Duration::from_secs(1);
/// Time for the last packets of a closed tunnel.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Serves one agent until its tunnel is lost. It has to join within the attempt's time; one that is
/// `authenticated` already is not asked for its token.
pub(super) async fn serve(
    tunnel: Tunnel,
    authenticated: Option<Authenticated>,
    attempt: Attempt,
    context: Arc<AgentContext>,
) {
    let remote = tunnel.remote_address();
    let joined = match join::join(tunnel, authenticated, &attempt, &context).await {
        Ok(joined) => joined,
        Err(error) => return join::record_failure(remote, &error, &context),
    };
    drop(attempt);
    // Allocated now, so that the task of a stranger has no room for what follows the admission.
    Box::pin(serve_joined(joined, &context)).await;
}

/// Serves an agent that has joined until its tunnel is lost.
async fn serve_joined(Joined { backend, control, servers }: Joined, context: &AgentContext) {
    let remote = backend.tunnel.remote_address();
    let backend = Arc::new(backend);
    let session = LeaveOnDrop::new(backend.session().cloned());
    let agent_id = backend.agent_id().clone();
    let registration = match context.backends.register(backend.clone()) {
        Ok(registration) => registration,
        Err(error) => {
            let error = join::not_registered(&backend.claims, error);
            backend.tunnel.close(error.close_code(), error.close_reason());
            if let Some(session) = session.into_inner() {
                let lost = backend.tunnel.closed().await;
                context.sessions.leave(&backend.process(), &session, &lost).await;
            }
            return join::record_failure(remote, &error, context);
        }
    };
    let has_another = context.backends.has_another(&backend);
    if !has_another {
        log_connected(&backend);
    }
    record_conflicts(&backend, registration.held(), context);
    let proof = ProofKeeper::new(&backend, context);
    let mut driving = pin!(drive(&backend, control, (proof, servers), context));
    let early = match has_another {
        true => timeout(MEETING_TIME, &mut driving).await.ok(),
        false => None,
    };
    let met_again = early.as_ref().is_some_and(|(lost, _)| is_done(lost));
    if has_another && !met_again {
        log_connected(&backend);
    }
    let (lost, cut) = match early {
        Some(ended) => ended,
        None => driving.await,
    };
    registration.end(&lost);
    context.metrics.tunnel_lost(lost.label());
    if lost.is_failure() {
        context.metrics.flow.canceled(Segment::FromAgent, None);
    }
    context.unadmitted.remember(backend.tunnel.remote_address().ip());
    match met_again {
        true => debug!(%agent_id, %remote, "an agent met this server again"),
        false => info!(%agent_id, %remote, reason = %lost, open = cut, "agent gone"),
    }
    if let Some(session) = session.into_inner() {
        let process = backend.process();
        tokio::select! {
            () = context.sessions.leave(&process, &session, &lost) => {}
            () = context.closing.cancelled() => session.session().end(&lost),
        }
    }
}

fn log_connected(backend: &Backend) {
    let expiry = backend.claims.identity.expiry();
    info!(
        agent_id = %backend.agent_id(), remote = %backend.tunnel.remote_address(),
        transport = %backend.tunnel.carrier(), instance = %backend.instance(),
        software = %backend.software(), revision = backend.revision(),
        identity = %backend.claims.identity,
        expires = %expiry.map_or_else(|| "never".into(), |at| at.to_string()),
        "agent connected",
    );
}

/// Whether the agent has closed the tunnel in order.
fn is_done(lost: &TunnelLost) -> bool {
    matches!(lost, TunnelLost::ClosedByPeer { code, .. } if *code == CloseCode::DONE)
}

/// Counts and logs the identifiers that the agent announces and does not get.
fn record_conflicts(backend: &Backend, held: &[String], context: &AgentContext) {
    let not_proven = backend
        .claims
        .not_proven
        .iter()
        .map(|identifier| (ClaimFault::IdentifierNotProven, identifier.value.as_str()));
    let held = held.iter().map(|value| (ClaimFault::IdentifierHeld, value.as_str()));
    for (fault, identifier) in not_proven.chain(held) {
        context.metrics.identity_conflict(fault.label());
        rate_limited!(
            Duration::from_secs(10), per agent_id = backend.agent_id(), WARN,
            identity = %backend.claims.identity, %identifier, reason = %fault,
            "an agent does not get an identifier"
        );
    }
}

/// Runs the control stream until the tunnel is lost; why it was, and the number of streams that were
/// open then.
async fn drive(
    backend: &Arc<Backend>,
    mut control: ControlStream,
    watched: (ProofKeeper<'_>, SetChanges),
    context: &AgentContext,
) -> (TunnelLost, usize) {
    let tunnel = &backend.tunnel;
    // The server has no other path to the agent: ICMP makes it ask, and no less patient.
    control.set_report_limit(SUSPECT_LIMIT);
    let (result, cut) = tokio::select! {
        biased;
        lost = tunnel.closed() => return (lost, backend.open_streams()),
        () = context.closing.cancelled() => {
            goodbye(&mut control, backend, CloseCode::SHUTDOWN, "the server stops").await
        }
        result = converse(backend, &mut control, watched, context) => match result {
            Ok(dismissal) => {
                let (code, reason) = (dismissal.close_code(), dismissal.reason());
                goodbye(&mut control, backend, code, reason).await
            }
            Err(error) => (Err(error), backend.open_streams()),
        },
    };
    if let Err(error) = result {
        // The control stream may notice first that the tunnel is lost, and knows why.
        if let Some(lost) = error.lost() {
            return (lost.clone(), cut);
        }
        tunnel.close(error.close_code(), &error.to_string());
    }
    (tunnel.closed().await, cut)
}

/// Answers the agent's messages, asks a suspected agent whether it is alive, and sends the server's
/// drain and changes of the set of servers. Ends with an error, or when the backend was dismissed and its streams have ended.
async fn converse(
    backend: &Arc<Backend>,
    control: &mut ControlStream,
    (mut proof, mut servers): (ProofKeeper<'_>, SetChanges),
    context: &AgentContext,
) -> Result<Dismissal, ControlError> {
    let mut drain_sent = false;
    let mut resuming = JoinSet::new();
    // The agent may repeat both as often as it likes.
    let (mut has_drained, mut has_left) = (false, false);
    let mut leaving: Option<(Dismissal, Instant)> = None;
    loop {
        tokio::select! {
            message = control.next() => match message? {
                ControlMessage::Drain(Drain { deadline_millis }) => {
                    if !mem::replace(&mut has_drained, true) {
                        context.backends.drain(backend);
                        context.metrics.flow.packet(Segment::FromAgent, PacketType::Drain);
                        info!(agent_id = %backend.agent_id(), deadline_millis, "agent drains");
                    }
                }
                ControlMessage::Goodbye(Goodbye { reason, .. }) => {
                    if !mem::replace(&mut has_left, true) {
                        context.backends.drain(backend);
                        info!(agent_id = %backend.agent_id(), %reason, "agent says goodbye");
                    }
                }
                ControlMessage::Renewal(Renewal { token }) => proof.renew(token),
                ControlMessage::Received(report) => {
                    let session = backend.session().ok_or(ControlError::Unexpected)?;
                    if !session.session().received(&report) {
                        return Err(ControlError::Unexpected);
                    }
                }
                ControlMessage::TunnelLost(wire::TunnelLost { tunnel }) => {
                    let session = backend.session().ok_or(ControlError::Unexpected)?;
                    session.on_peer_lost(tunnel);
                }
                // A second introduction, or a message that only servers send.
                _ => return Err(ControlError::Unexpected),
            },
            set = changed(&mut servers) => {
                control.send(&ControlMessage::ServerSet(Box::new(set))).await?;
            }
            report = next_report(backend) => {
                control.send(&ControlMessage::Received(report)).await?;
            }
            (messages, resumptions) = next_to_resume(backend) => {
                for message in messages {
                    control.send(&ControlMessage::Resumed(message)).await?;
                }
                resumptions.into_iter().for_each(|it| resume(it, backend, &mut resuming));
            }
            Some(_) = resuming.join_next() => {}
            () = backend.suspected() => control.ask(SUSPECT_LIMIT).await?,
            () = context.draining.cancelled(), if !drain_sent => {
                drain_sent = true;
                control.send(&drain(context.drain_timeout)).await?;
            }
            dismissal = backend.dismissed(), if leaving.is_none() => {
                let limit = dismissal.grace();
                context.backends.drain(backend);
                leaving = Some((dismissal, Instant::now() + limit));
                if !limit.is_zero() && !mem::replace(&mut drain_sent, true) {
                    control.send(&drain(limit)).await?;
                }
            }
            dismissal = proof.ended(), if leaving.is_none() => {
                log_end_of_proof(backend, dismissal);
                backend.dismiss(dismissal);
            }
            dismissal = emptied(backend, leaving) => return Ok(dismissal),
        }
    }
}

/// What the agent is to be told of streams that it sends on; never without a session.
async fn next_report(backend: &Backend) -> Received {
    match backend.session() {
        Some(session) => session.report().await,
        None => std::future::pending().await,
    }
}

/// The streams of a lost tunnel that go on over this one, and the messages that name them; never
/// without a session.
async fn next_to_resume(backend: &Backend) -> (Vec<Resumed>, Vec<Resumption>) {
    match backend.session() {
        Some(session) => session.next_to_resume().await,
        None => std::future::pending().await,
    }
}

/// Goes on with a stream over the backend's tunnel. Without a permit it waits for another tunnel.
fn resume(resumption: Resumption, backend: &Arc<Backend>, resuming: &mut JoinSet<()>) {
    let Some(permit) = backend.permit() else { return };
    let agent_id = backend.agent_id().clone();
    resuming.spawn(async move {
        let dial = resumption.id();
        match resumption.run(Box::new(permit)).await {
            Ok(()) => debug!(%dial, %agent_id, "a stream goes on over another tunnel"),
            Err(error) => debug!(%dial, %agent_id, %error, "a stream was not resumed"),
        }
    });
}

/// Completes with the set of servers when it has changed; never for an agent that does not use it.
async fn changed(servers: &mut SetChanges) -> ServerSet {
    if let Some(servers) = servers
        && servers.changed().await.is_ok()
    {
        return ServerSet::clone(&servers.borrow_and_update());
    }
    std::future::pending().await
}

fn log_end_of_proof(backend: &Backend, dismissal: Dismissal) {
    let (agent_id, identity) = (backend.agent_id(), &backend.claims.identity);
    match dismissal {
        Dismissal::Revoked => {
            warn!(%agent_id, %identity, "an agent's proof of identity was revoked");
        }
        _ => warn!(%agent_id, %identity, "an agent's proof of identity has expired"),
    }
}

fn drain(limit: Duration) -> ControlMessage {
    let deadline_millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
    ControlMessage::Drain(Drain { deadline_millis })
}

/// Completes when the streams of a backend that leaves have ended, or had their time; never for
/// one that stays.
async fn emptied(backend: &Backend, leaving: Option<(Dismissal, Instant)>) -> Dismissal {
    match leaving {
        Some((dismissal, deadline)) => {
            let _ = timeout_at(deadline, backend.emptied()).await;
            dismissal
        }
        None => std::future::pending().await,
    }
}

/// Closes the tunnel. Returns whether the agent could be notified, and the number of streams that
/// were open: they end while the last packets are sent.
async fn goodbye(
    control: &mut ControlStream,
    backend: &Backend,
    code: CloseCode,
    reason: &str,
) -> (Result<(), ControlError>, usize) {
    let goodbye = Goodbye { code: code.as_u32(), reason: Text::truncated(reason.into()) };
    let goodbye = ControlMessage::Goodbye(goodbye);
    let sent = timeout(FLUSH_TIMEOUT, control.send(&goodbye)).await;
    let cut = backend.open_streams();
    backend.tunnel.close(code, reason);
    backend.tunnel.flushed(FLUSH_TIMEOUT).await;
    // An agent that does not take the goodbye reads the close.
    (sent.unwrap_or(Ok(())), cut)
}

#[cfg(test)]
mod tests;
