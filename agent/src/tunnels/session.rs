//! One tunnel to a server, from hello to loss.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use culvert_transport::{
    Tunnel, TunnelLost,
    control::{ControlError, ControlStream, Event},
};
use culvert_wire::{
    AgentId, CloseCode, InstanceId, StreamCode,
    bounded::Text,
    control::{ControlMessage, Drain, Goodbye, Hello, Secret, Welcome},
    extension::Extensions,
    identifiers::Identifiers,
    version::{Features, REVISION},
};
use tokio::time::{Instant, sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::info;

use crate::{
    egress::Egress,
    tunnels::{
        ServerTunnel, ServerTunnels, Suspicion,
        liveness::{Liveness, Verdict},
    },
};

/// Streams the server may open at first. Slots cost memory ahead, so more are granted as they
/// are used.
pub const FIRST_STREAM_LIMIT: u32 = 256;
/// Time for the last packets of a closed tunnel.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// How long, beyond two round trips, a tunnel without streams stays when it drains: a dial may have been
/// on its way when the server heard of it.
const DRAIN_LINGER: Duration = Duration::from_millis(100);

/// What every tunnel of one agent has in common.
#[derive(Debug)]
pub struct TunnelContext {
    /// How streams are served.
    pub egress: Egress,
    /// The agent's name.
    pub agent_id: AgentId,
    /// This process among those of the name.
    pub instance: InstanceId,
    /// What the agent announces.
    pub identifiers: Identifiers,
    /// Where its token is, if it has one; read anew for each tunnel, because it is replaced.
    pub token_file: Option<PathBuf>,
    /// Streams the server may have open at most.
    pub max_streams: u32,
    /// Bytes per second that one tunnel may send a second time.
    pub hedge_rate: u32,
    /// How long streams may go on once the agent drains.
    pub drain_timeout: Duration,
    /// Told when the agent is to go away.
    pub draining: CancellationToken,
}

/// Why the server did not take the agent in.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The tunnel was lost first; the server's reason is in it.
    #[error("{0}")]
    Lost(#[from] TunnelLost),
    /// The control stream failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The agent's own token cannot be read.
    #[error("--service-account-token-path: {0}")]
    Token(#[from] io::Error),
    /// The server answered with something else.
    #[error("the server answered with another message than welcome")]
    NotWelcome,
}

impl JoinError {
    /// Whether it is this agent that the server, or the agent itself, has something against, and not
    /// the way between them.
    pub fn is_refusal(&self) -> bool {
        !matches!(self, Self::Lost(lost) if !matches!(lost, TunnelLost::ClosedByPeer { .. }))
    }
}

/// A tunnel whose server has taken the agent in. Dropping it closes the tunnel.
#[derive(Debug)]
pub struct Joined {
    /// What the server said.
    pub welcome: Welcome,
    tunnel: Tunnel,
    control: ControlStream,
}

/// Says hello on a fresh tunnel and waits for the welcome, for as long as the caller does.
///
/// # Errors
/// When the server answers with something else than a welcome; the tunnel is closed then.
///
/// # Cancel safety
/// Dropping the future drops the tunnel.
pub async fn join(tunnel: Tunnel, context: &TunnelContext) -> Result<Joined, JoinError> {
    match introduce(&tunnel, context).await {
        Ok((welcome, control)) => Ok(Joined { welcome, tunnel, control }),
        Err(error) => {
            tunnel.close(CloseCode::PROTOCOL_VIOLATION, &error.to_string());
            Err(error)
        }
    }
}

async fn introduce(
    tunnel: &Tunnel,
    context: &TunnelContext,
) -> Result<(Welcome, ControlStream), JoinError> {
    let token = match &context.token_file {
        Some(path) => Some(read_token(path).await?),
        None => None,
    };
    let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await?);
    let hello = Hello {
        revision: REVISION,
        features: Features::supported(),
        agent_id: context.agent_id.clone(),
        instance: context.instance,
        identifiers: context.identifiers.clone(),
        token,
        software: Text::truncated(format!("culvert-agent {}", env!("CARGO_PKG_VERSION"))),
        extensions: Extensions::default(),
    };
    control.send(&ControlMessage::Hello(Box::new(hello))).await?;
    match control.next().await {
        Ok(ControlMessage::Welcome(welcome)) => {
            if welcome.features.contains(Features::HEDGE) {
                tunnel.hedge(context.hedge_rate);
            }
            Ok((*welcome, control))
        }
        Ok(_) => Err(JoinError::NotWelcome),
        // A server that refuses an agent closes the tunnel, and its reason says more than how the
        // stream ended, of which the agent may hear first.
        Err(ControlError::Read(_) | ControlError::Ended) => Err(tunnel.closed().await.into()),
        Err(error) => Err(error.into()),
    }
}

async fn read_token(path: &Path) -> io::Result<Secret> {
    let token = tokio::fs::read_to_string(path).await?;
    Secret::new(token.trim()).map_err(io::Error::other)
}

impl Drop for Joined {
    fn drop(&mut self) {
        // Does nothing when the tunnel is closed already.
        self.tunnel.close(CloseCode::ABANDONED, "");
    }
}

impl Joined {
    /// The tunnel itself.
    pub fn tunnel(&self) -> &Tunnel {
        &self.tunnel
    }

    /// Serves the server's streams until the tunnel is gone, or the agent or this tunnel of it has
    /// drained; why it went.
    pub async fn serve(
        mut self,
        served: &ServerTunnel,
        servers: &ServerTunnels,
        context: Arc<TunnelContext>,
    ) -> TunnelLost {
        let streams = TaskTracker::new();
        let result = tokio::select! {
            biased;
            lost = self.tunnel.closed() => return lost,
            result = converse(&mut self.control, served, servers, &streams) => result,
            lost = accept(&self.tunnel, &context, &streams) => return lost,
            () = context.draining.cancelled() => Ok(()),
            () = served.retired.cancelled() => Ok(()),
        };
        let result = match result {
            Ok(()) => self.drain(served, servers, &context, &streams).await,
            Err(error) => Err(error),
        };
        if let Err(error) = result {
            let code = error.close_code();
            self.tunnel.close(code, &error.to_string());
            // Nobody hears the last word of a tunnel to a peer that does not answer.
            if code != CloseCode::UNRESPONSIVE {
                self.tunnel.flushed(FLUSH_TIMEOUT).await;
            }
        }
        self.tunnel.closed().await
    }

    /// Asks for no new dials, lets the streams end, and closes the tunnel. The time for that begins
    /// when the agent drains: a tunnel that a better one has replaced stays as long as its streams.
    async fn drain(
        &mut self,
        served: &ServerTunnel,
        servers: &ServerTunnels,
        context: &Arc<TunnelContext>,
        streams: &TaskTracker,
    ) -> Result<(), ControlError> {
        let limit = context.drain_timeout;
        let (deadline, why) = match context.draining.is_cancelled() {
            true => (limit, (CloseCode::DONE, "the agent has drained")),
            false => {
                (Duration::MAX, (CloseCode::SUPERSEDED, "a better tunnel has taken its place"))
            }
        };
        let deadline_millis = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        info!(server_id = %served.server_id, streams = streams.len(), "draining");
        self.control.send(&ControlMessage::Drain(Drain { deadline_millis })).await?;
        streams.close();
        let linger = DRAIN_LINGER + self.tunnel.stats().rtt * 2;
        let over = async {
            context.draining.cancelled().await;
            sleep(limit).await;
        };
        let all_ended = async {
            sleep(linger).await;
            streams.wait().await;
        };
        let (code, reason) = tokio::select! {
            () = all_ended => why,
            () = over => (CloseCode::SHUTDOWN, "the agent's time to drain is over"),
            result = converse(&mut self.control, served, servers, streams) => {
                return result;
            }
            // A dial that was on its way when the server heard of the drain is still served.
            _ = accept(&self.tunnel, context, streams) => return Ok(()),
        };
        info!(server_id = %served.server_id, cut = streams.len(), reason, "leaving");
        let goodbye = Goodbye { code: code.as_u32(), reason: Text::truncated(reason.into()) };
        let told = self.control.send(&ControlMessage::Goodbye(goodbye)).await;
        self.tunnel.close(code, reason);
        self.tunnel.flushed(FLUSH_TIMEOUT).await;
        told
    }
}

/// Answers the server's messages and watches whether it is there; ends only with an error.
async fn converse(
    control: &mut ControlStream,
    served: &ServerTunnel,
    servers: &ServerTunnels,
    streams: &TaskTracker,
) -> Result<(), ControlError> {
    let mut silence = Liveness::new(now(), &served.tunnel.stats());
    loop {
        tokio::select! {
            event = control.event() => match event? {
                Event::Message(ControlMessage::Drain(drain)) => {
                    info!(deadline_millis = drain.deadline_millis, "the server drains");
                }
                Event::Message(ControlMessage::Goodbye(goodbye)) => {
                    info!(reason = %goodbye.reason, "the server says goodbye");
                }
                // A second welcome, or a hello from the wrong side.
                Event::Message(_) => return Err(ControlError::Unexpected),
                Event::Unreachable(_) => {
                    silence.on_refused(now(), &served.tunnel.stats());
                    servers.set_suspicion(served, Some(Suspicion::Refused));
                }
            },
            // TCP tells of a peer that is gone in its own time, and there is no better way.
            () = sleep(silence.interval(streams.len())), if served.rank.is_quic() => {
                let verdict = silence.look(now(), &served.tunnel.stats(), streams.len());
                servers.set_suspicion(served, match verdict {
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

/// The time that tokio's timers go by.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Serves each stream in a task of its own, and grants more as they are used up.
async fn accept(
    tunnel: &Tunnel,
    context: &Arc<TunnelContext>,
    streams: &TaskTracker,
) -> TunnelLost {
    let mut limit = FIRST_STREAM_LIMIT.min(context.max_streams);
    loop {
        let (mut send, mut recv) = match tunnel.accept().await {
            Ok(stream) => stream,
            Err(lost) => return lost,
        };
        let open = u32::try_from(streams.len()).unwrap_or(u32::MAX);
        if open >= context.max_streams {
            send.reset(StreamCode::OVERLOADED);
            recv.stop(StreamCode::OVERLOADED);
            continue;
        }
        if open >= limit / 2 && limit < context.max_streams {
            limit = limit.saturating_mul(2).min(context.max_streams);
            tunnel.set_max_streams(limit);
        }
        let context = context.clone();
        streams.spawn(async move { context.egress.serve((send, recv)).await });
    }
}
