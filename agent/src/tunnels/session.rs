//! One tunnel to a server, from hello to its end.

use std::{collections::HashSet, convert::Infallible, mem, sync::Arc, time::Duration};

use culvert_process::{
    metrics::{PacketType, Segment},
    version::software,
};
use culvert_transport::{
    BufferSizes, Carrier, Tunnel, TunnelLost,
    budget::{MemoryBudget, StreamRoom},
    control::{ControlError, ControlStream, Event},
    resume::{LeaveOnDrop, SessionTunnel},
    tls::Current,
};
use culvert_wire::{
    AgentId, CloseCode, InstanceId, StreamCode,
    bounded::Text,
    control::{ControlMessage, Drain, Goodbye, Hello, Renewal, Secret, ServerList, Welcome},
    extension::{Extensions, InvalidSession},
    identifiers::Identifiers,
    resume::{self as wire, Received, Resumed, SessionInfo},
    version::{Features, REVISION},
};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, info};

use crate::{
    connector::Connected,
    egress::{Egress, Origin},
    tunnels::{
        KnownServers, Rank, ServerTunnel, ServerTunnels, Suspicion,
        liveness::{Liveness, Verdict},
        sessions::Sessions,
    },
};

/// Number of streams that the server may open at first. Slots are allocated ahead, so the limit
/// grows as they are used.
pub(crate) const FIRST_STREAM_LIMIT: u32 = 256;
/// Time for the last packets of a closed tunnel.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// Time, beyond two round trips, for which a draining tunnel stays open without streams: the server
/// may have sent a dial before it received the drain.
const DRAIN_LINGER: Duration = Duration::from_millis(100);

/// Maximum number of streams that a server names as those of one session.
const MAX_RESUMED: usize = 64 * 1024;

/// What all tunnels of one agent share.
#[derive(Debug)]
pub(crate) struct SessionContext {
    /// Serves the streams.
    pub(crate) egress: Egress,
    /// The agent's name.
    pub(crate) agent_id: AgentId,
    /// Distinguishes this process from others with the same name.
    pub(crate) instance: InstanceId,
    /// The identifiers that the agent announces.
    pub(crate) identifiers: Identifiers,
    /// The agent's token, if it has one.
    pub(crate) token: Option<Current<Secret>>,
    /// Maximum number of streams that a server may have open on one tunnel.
    pub(crate) max_streams: u32,
    /// What the process may hold for its peers.
    pub(crate) memory: Arc<MemoryBudget>,
    /// Bytes per second that one tunnel may send a second time.
    pub(crate) hedge_rate: u32,
    /// Interval at which the carrier pings the server of an idle tunnel, if it does.
    pub(crate) keep_alive_interval: Option<Duration>,
    /// The sessions with server processes.
    pub(crate) sessions: Sessions,
    /// Time for streams to end once the agent drains.
    pub(crate) drain_timeout: Duration,
    /// Whether connections over TCP go through a proxy, whose address they have.
    pub(crate) uses_proxy: bool,
    /// Cancelled when the agent drains.
    pub(crate) draining: CancellationToken,
}

impl SessionContext {
    /// What the list of the server at the other end of `tunnel` says, without the addresses that
    /// are refused.
    pub(crate) fn accept_servers(&self, servers: &ServerList, tunnel: &Tunnel) -> KnownServers {
        let is_direct = tunnel.carrier() == Carrier::Quic || !self.uses_proxy;
        let reporter = is_direct.then(|| tunnel.remote_address().ip());
        KnownServers::accept(servers, reporter)
    }
}

/// Why the server did not welcome the agent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    /// The tunnel ended first, with the server's reason if it closed the tunnel.
    #[error(transparent)]
    Lost(#[from] TunnelLost),
    /// The control stream failed.
    #[error(transparent)]
    Control(ControlError),
    /// The welcome does not say in order which session the tunnel belongs to.
    #[error(transparent)]
    Session(InvalidSession),
    /// The server answered hello with another message.
    #[error("the server answered with another message than welcome")]
    NotWelcome,
}

impl From<ControlError> for JoinError {
    fn from(error: ControlError) -> Self {
        // The control stream may notice first that the tunnel is lost, and knows why.
        match error.lost() {
            Some(lost) => Self::Lost(lost.clone()),
            None => Self::Control(error),
        }
    }
}

impl JoinError {
    /// The code with which this side closes the tunnel after the error.
    fn close_code(&self) -> CloseCode {
        match self {
            Self::Control(error) => error.close_code(),
            Self::NotWelcome | Self::Session(_) => CloseCode::PROTOCOL_VIOLATION,
            Self::Lost(_) => CloseCode::ABANDONED,
        }
    }

    /// Whether the server refused this agent, or the agent cannot introduce itself: the path
    /// between them is not the cause.
    pub(crate) fn is_refusal(&self) -> bool {
        match self {
            Self::Lost(lost) => matches!(lost, TunnelLost::ClosedByPeer { .. }),
            // Silence, which the path may cause.
            Self::Control(ControlError::Unresponsive(_) | ControlError::NotReading(_)) => false,
            Self::Control(_) | Self::NotWelcome | Self::Session(_) => true,
        }
    }
}

/// A tunnel whose server has welcomed the agent. Dropping it closes the tunnel.
#[derive(Debug)]
pub(crate) struct Joined {
    /// The server's welcome.
    pub(crate) welcome: Welcome,
    /// Sizes of the UDP socket's kernel buffers; `None` over TCP.
    pub(crate) buffers: Option<BufferSizes>,
    /// The session that the tunnel belongs to, if its streams outlive it.
    resumable: Option<SessionInfo>,
    session: Session,
}

/// A tunnel and its control stream. Dropping it closes the tunnel first: a server takes the end of
/// the control stream alone for a broken protocol.
#[derive(Debug)]
struct Session {
    tunnel: Tunnel,
    control: ControlStream,
    /// The agent's token, whose replacements the server is sent; `None` when it has none, or the
    /// server does not ask for them.
    token: Option<Current<Secret>>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // Without effect when the tunnel is closed already.
        self.tunnel.close(CloseCode::ABANDONED, "");
    }
}

/// Says hello on a new tunnel and waits for the welcome, without a limit of its own.
///
/// # Errors
/// When the server does not answer with a welcome. The tunnel is closed then.
///
/// # Cancel safety
/// Cancel safe: dropping the future closes the tunnel.
pub(crate) async fn join(
    connected: Connected,
    context: &SessionContext,
) -> Result<Joined, JoinError> {
    let Connected { tunnel, buffers } = connected;
    let closer = tunnel.clone();
    let refuse = |error: JoinError| {
        closer.close(error.close_code(), &error.to_string());
        error
    };
    let control = ControlStream::new(tunnel.clone(), tunnel.open().await?);
    let mut session = Session { tunnel, control, token: context.token.clone() };
    let welcome = introduce(&mut session, context).await.map_err(refuse)?;
    let resumable = match context.sessions.are_on() && welcome.features.contains(Features::RESUME) {
        true => welcome.extensions.session().map_err(JoinError::Session).map_err(refuse)?,
        false => None,
    };
    Ok(Joined { welcome, buffers, resumable, session })
}

async fn introduce(session: &mut Session, context: &SessionContext) -> Result<Welcome, JoinError> {
    let Session { tunnel, control, token: current } = session;
    tunnel.set_memory(&context.memory);
    // A replacement that comes later is sent later.
    let token = current.as_mut().map(|token| (*token.current()).clone());
    let hello = Hello {
        revision: REVISION,
        features: match context.sessions.are_on() {
            true => Features::supported(),
            false => Features::supported().without(Features::RESUME),
        },
        agent_id: context.agent_id.clone(),
        instance: context.instance,
        identifiers: context.identifiers.clone(),
        token,
        software: Text::truncated(software("culvert-agent")),
        extensions: Extensions::default(),
    };
    control.send(&ControlMessage::Hello(Box::new(hello))).await?;
    match control.next().await {
        Ok(ControlMessage::Welcome(mut welcome)) => {
            // The id of a server that was started again is another one.
            let known = &context.egress.metrics().known_paths;
            tunnel.resume(known.to(tunnel.remote_address().ip()));
            if welcome.features.contains(Features::HEDGE) {
                let repairs = welcome.features.contains(Features::REPAIR);
                tunnel.hedge(context.hedge_rate, repairs);
            }
            if !welcome.features.contains(Features::SERVER_SET) {
                welcome.servers = ServerList::default();
            }
            if !welcome.features.contains(Features::RENEWAL) {
                *current = None;
            }
            Ok(*welcome)
        }
        Ok(_) => Err(JoinError::NotWelcome),
        // A server that refuses an agent closes the tunnel. The end of the control stream may
        // arrive first, but the reason is in the close.
        Err(ControlError::Read(_) | ControlError::Ended) => Err(tunnel.closed().await.into()),
        Err(error) => Err(error.into()),
    }
}

/// Why [`Joined::serve`] stopped accepting dials.
#[derive(Clone, Copy, Debug)]
enum DrainReason {
    AgentDrains,
    Retired,
}

impl Joined {
    /// The tunnel itself.
    pub(crate) fn tunnel(&self) -> &Tunnel {
        &self.session.tunnel
    }

    /// Whether the tunnel's streams outlive it.
    pub(crate) fn resumes(&self) -> bool {
        self.resumable.is_some()
    }

    /// Serves the server's streams until the tunnel is lost, or until it has drained because the
    /// agent drains or a better tunnel replaced it. Returns why the tunnel ended.
    pub(crate) async fn serve(
        self,
        entry: &ServerTunnel,
        tunnels: &ServerTunnels,
        context: Arc<SessionContext>,
    ) -> TunnelLost {
        let session = self.resumable.map(|info| {
            context.sessions.enter(&entry.server_id, info, self.session.tunnel.clone())
        });
        let origin = Origin {
            server_id: entry.server_id.clone(),
            tunnel: entry.tunnel.clone(),
            session: session.clone(),
            streams: TaskTracker::new(),
        };
        let session = LeaveOnDrop::new(session);
        let lost = self.serve_streams(entry, tunnels, &origin, context.clone()).await;
        if let Some(session) = session.into_inner() {
            context.sessions.leave(&session, &lost);
        }
        lost
    }

    async fn serve_streams(
        mut self,
        entry: &ServerTunnel,
        tunnels: &ServerTunnels,
        origin: &Origin,
        context: Arc<SessionContext>,
    ) -> TunnelLost {
        let Session { tunnel, control, token } = &mut self.session;
        let result = tokio::select! {
            biased;
            lost = tunnel.closed() => return lost,
            result = watch_control((control, token), entry, tunnels, &context, origin) => {
                match result {
                    Err(error) => Err(error),
                }
            }
            lost = accept(origin, &context) => return lost,
            () = context.draining.cancelled() => Ok(DrainReason::AgentDrains),
            () = entry.retired() => Ok(DrainReason::Retired),
        };
        let result = match result {
            Ok(reason) => self.drain(reason, entry, tunnels, &context, origin).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            // The control stream may notice first that the tunnel is lost, and knows why.
            if let Some(lost) = error.lost() {
                return lost.clone();
            }
            let code = error.close_code();
            self.session.tunnel.close(code, &error.to_string());
            // A peer that does not answer does not receive the close either.
            if code != CloseCode::UNRESPONSIVE {
                self.session.tunnel.flushed(FLUSH_TIMEOUT).await;
            }
        }
        self.session.tunnel.closed().await
    }

    /// Asks the server for no new dials, waits for the streams to end, and closes the tunnel.
    /// Streams have `drain_timeout` from the moment at which the agent drains; those of a retired
    /// tunnel have no limit until then.
    async fn drain(
        &mut self,
        reason: DrainReason,
        entry: &ServerTunnel,
        tunnels: &ServerTunnels,
        context: &Arc<SessionContext>,
        origin: &Origin,
    ) -> Result<(), ControlError> {
        let (limit, streams) = (context.drain_timeout, &origin.streams);
        let (announced, drained) = match reason {
            DrainReason::AgentDrains => (limit, (CloseCode::DONE, "the agent has drained")),
            DrainReason::Retired => {
                (Duration::MAX, (CloseCode::SUPERSEDED, "a better tunnel has taken its place"))
            }
        };
        let deadline_millis = u32::try_from(announced.as_millis()).unwrap_or(u32::MAX);
        info!(server_id = %entry.server_id, streams = streams.len(), "draining");
        let timed_out = async {
            context.draining.cancelled().await;
            sleep(limit).await;
        };
        let ending = async {
            let Session { tunnel, control, token } = &mut self.session;
            context.egress.metrics().packet(Segment::FromAgent, PacketType::Drain);
            control.send(&ControlMessage::Drain(Drain { deadline_millis })).await?;
            streams.close();
            let linger = DRAIN_LINGER + tunnel.stats().rtt * 2;
            let all_ended = async {
                sleep(linger).await;
                streams.wait().await;
            };
            tokio::select! {
                () = all_ended => Ok(Some(drained)),
                result = watch_control((control, token), entry, tunnels, context, origin) => {
                    match result {
                        Err(error) => Err(error),
                    }
                }
                // A dial that the server sent before it received the drain is still served.
                _ = accept(origin, context) => Ok(None),
            }
        };
        let ended = tokio::select! {
            ended = ending => ended?,
            () = timed_out => Some((CloseCode::SHUTDOWN, "the agent's time to drain is over")),
        };
        let Some((code, reason)) = ended else { return Ok(()) };
        info!(server_id = %entry.server_id, cut = streams.len(), reason, "leaving");
        let goodbye = Goodbye { code: code.as_u32(), reason: Text::truncated(reason.into()) };
        let goodbye = ControlMessage::Goodbye(goodbye);
        let sent = timeout(FLUSH_TIMEOUT, self.session.control.send(&goodbye)).await;
        self.session.tunnel.close(code, reason);
        self.session.tunnel.flushed(FLUSH_TIMEOUT).await;
        // A server that does not take the goodbye reads the close.
        sent.unwrap_or(Ok(()))
    }
}

/// Handles the server's messages, watches whether the server answers, and sends it the agent's new
/// tokens. Ends only with an error.
async fn watch_control(
    (control, token): (&mut ControlStream, &mut Option<Current<Secret>>),
    entry: &ServerTunnel,
    tunnels: &ServerTunnels,
    context: &SessionContext,
    origin: &Origin,
) -> Result<Infallible, ControlError> {
    let (streams, session) = (&origin.streams, origin.session.as_ref());
    let mut resumed = HashSet::new();
    let keep_alive = context.keep_alive_interval;
    let (carrier, stats) = (entry.tunnel.carrier(), entry.tunnel.stats());
    let mut liveness = Liveness::new(carrier, Instant::now(), &stats, keep_alive);
    // The server may repeat both as often as it likes.
    let (mut has_drained, mut has_left) = (false, false);
    loop {
        tokio::select! {
            event = control.event() => match event? {
                Event::Message(ControlMessage::Drain(drain)) => {
                    if !mem::replace(&mut has_drained, true) {
                        info!(deadline_millis = drain.deadline_millis, "the server drains");
                    }
                }
                Event::Message(ControlMessage::Goodbye(goodbye)) => {
                    if !mem::replace(&mut has_left, true) {
                        info!(reason = %goodbye.reason, "the server says goodbye");
                    }
                }
                Event::Message(ControlMessage::ServerSet(set)) => {
                    let servers = context.accept_servers(&set.servers, &entry.tunnel);
                    tunnels.set_servers(entry, servers, set.server_count);
                }
                Event::Message(ControlMessage::Received(report)) => {
                    let session = session.ok_or(ControlError::Unexpected)?.session();
                    if !session.received(&report) {
                        return Err(ControlError::Unexpected);
                    }
                }
                Event::Message(ControlMessage::Resumed(Resumed { tunnel, streams, more })) => {
                    let session = session.ok_or(ControlError::Unexpected)?.session();
                    resumed.extend(streams.iter().copied());
                    if resumed.len() > MAX_RESUMED {
                        return Err(ControlError::Unexpected);
                    }
                    if !more {
                        session.resumed(tunnel, &mem::take(&mut resumed));
                    }
                }
                // A second welcome, or a hello from the wrong side.
                Event::Message(_) => return Err(ControlError::Unexpected),
                Event::Unreachable(_) => {
                    liveness.on_refused(Instant::now(), &entry.tunnel.stats());
                    tunnels.set_suspicion(entry, Some(Suspicion::Refused));
                }
            },
            token = replaced(token) => {
                debug!(server_id = %entry.server_id, "the server is sent the new token");
                control.send(&ControlMessage::Renewal(Renewal { token })).await?;
            }
            report = next_report(session) => {
                control.send(&ControlMessage::Received(report)).await?;
            }
            number = next_lost(session) => {
                debug!(server_id = %entry.server_id, number, "streams of a lost tunnel are to go on");
                let lost = wire::TunnelLost { tunnel: number };
                control.send(&ControlMessage::TunnelLost(lost)).await?;
            }
            // The bridge to a Konnectivity server answers by itself; the kernel and HTTP/2's pings
            // watch its connection.
            () = sleep(liveness.interval(streams.len())), if entry.rank != Rank::Grpc => {
                let stats = entry.tunnel.stats();
                let now = Instant::now();
                let is_due = |quiet| tunnels.is_ping_due(entry, now, quiet, keep_alive);
                let verdict = liveness.check(now, &stats, streams.len(), is_due);
                tunnels.set_suspicion(entry, match verdict {
                    Verdict::Fine | Verdict::Ask => None,
                    Verdict::Silent => Some(Suspicion::Silent),
                    Verdict::Refused => Some(Suspicion::Refused),
                });
                if verdict == Verdict::Ask {
                    control.nudge().await?;
                }
            }
        }
    }
}

/// What the server is to be told of streams that it sends on; never without a session.
async fn next_report(session: Option<&Arc<SessionTunnel>>) -> Received {
    match session {
        Some(session) => session.report().await,
        None => std::future::pending().await,
    }
}

/// The number of a lost tunnel whose streams are to go on over this one; never without a session.
async fn next_lost(session: Option<&Arc<SessionTunnel>>) -> u64 {
    match session {
        Some(session) => session.next_lost().await,
        None => std::future::pending().await,
    }
}

/// Completes with the agent's token when that was replaced.
async fn replaced(token: &mut Option<Current<Secret>>) -> Secret {
    match token {
        Some(token) => {
            token.replaced().await;
            (*token.get()).clone()
        }
        None => std::future::pending().await,
    }
}

/// Serves each stream in a task of its own, and raises the server's limit of streams as they are
/// used.
async fn accept(origin: &Origin, context: &Arc<SessionContext>) -> TunnelLost {
    let Origin { tunnel, streams, .. } = origin;
    let mut limit = FIRST_STREAM_LIMIT.min(context.max_streams);
    let room = StreamRoom::new(&context.memory, 0);
    loop {
        let (mut send, mut recv) = match tunnel.accept().await {
            Ok(stream) => stream,
            Err(lost) => return lost,
        };
        let open = u32::try_from(streams.len()).unwrap_or(u32::MAX);
        let cost = if open < context.max_streams { room.take() } else { None };
        let Some(cost) = cost else {
            send.reset(StreamCode::OVERLOADED);
            recv.stop(StreamCode::OVERLOADED);
            continue;
        };
        if open >= limit / 2 && limit < context.max_streams {
            limit = limit.saturating_mul(2).min(context.max_streams);
            tunnel.set_max_streams(limit);
        }
        let context = context.clone();
        let origin = origin.clone();
        streams.spawn(async move {
            context.egress.serve((send, recv), origin).await;
            drop(cost);
        });
    }
}

#[cfg(test)]
mod tests;
