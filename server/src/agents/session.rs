//! One agent's tunnel, from handshake to loss: who it is, what it says on the control stream, and
//! what happens when it falls silent.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use culvert_process::logging::RateLimited;
use culvert_transport::{
    ConnectError, Settings, Tunnel, TunnelLost,
    control::{ControlError, ControlStream},
};
use culvert_wire::{
    CloseCode, ServerId,
    bounded::{List, Text},
    control::{ControlMessage, Drain, Goodbye, Hello, Welcome},
    extension::Extensions,
    version::{Features, REVISION},
};
use tokio::time::{Instant, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    agents::admission::{Authenticated, Authenticator, Refusal},
    backends::{Backend, Backends, SUSPECT_LIMIT, registry::Candidate},
    metrics::ServerMetrics,
};

/// Time for an agent to complete the handshake and introduce itself.
pub(crate) const JOIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Time for the last packets of a tunnel that is closed.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// What every tunnel of one server has in common.
#[derive(Debug)]
pub struct TunnelContext {
    /// Where a tunnel is entered once its agent is known.
    pub backends: Backends,
    /// Who is let in.
    pub authenticator: Authenticator,
    /// What is counted.
    pub metrics: Arc<ServerMetrics>,
    /// This server's name, told to agents.
    pub server_id: ServerId,
    /// How many servers there are, told to agents.
    pub server_count: u32,
    /// Streams one agent may carry.
    pub max_streams: u32,
    /// Bytes per second that one tunnel may send a second time.
    pub hedge_rate: u32,
    /// How long draining tunnels are kept.
    pub drain_timeout: Duration,
    /// Told when agents should look for another server.
    pub draining: CancellationToken,
    /// Told when tunnels are to be closed.
    pub closing: CancellationToken,
    /// What tunnels are set up with.
    pub settings: Settings,
    /// Quiet time after which a Konnectivity agent's connection is pinged.
    pub konnectivity_keep_alive_interval: Option<Duration>,
    /// The tasks of all tunnels.
    pub tunnels: TaskTracker,
}

/// Why an agent did not become a backend.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    #[error("handshake: {0}")]
    Handshake(#[from] ConnectError),
    #[error("no hello within {JOIN_TIMEOUT:?}")]
    TimedOut,
    #[error("tunnel lost before the hello: {0}")]
    Lost(#[from] TunnelLost),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("began with another message than hello")]
    NotHello,
    #[error("{0}")]
    Incompatible(String),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl JoinError {
    fn label(&self) -> &'static str {
        match self {
            Self::Handshake(_) => "handshake",
            Self::TimedOut => "timed_out",
            Self::Lost(_) => "lost",
            Self::Control(_) | Self::NotHello => "protocol_violation",
            Self::Incompatible(_) => "incompatible",
            Self::Refused(refusal) => refusal.label(),
        }
    }

    fn close_code(&self) -> CloseCode {
        match self {
            Self::Control(error) => error.close_code(),
            Self::Incompatible(_) => CloseCode::INCOMPATIBLE,
            Self::TimedOut => CloseCode::UNRESPONSIVE,
            Self::Refused(_) => CloseCode::UNAUTHENTICATED,
            _ => CloseCode::PROTOCOL_VIOLATION,
        }
    }
}

/// Serves one agent until its tunnel is gone. One that was admitted already is not asked again.
pub async fn serve_tunnel(
    tunnel: Tunnel,
    authenticated: Option<Authenticated>,
    context: Arc<TunnelContext>,
) {
    let remote = tunnel.remote_address();
    let (backend, control) = match join(tunnel, authenticated, &context).await {
        Ok(joined) => joined,
        Err(error) => return not_joined(remote, &error, &context),
    };
    let backend = Arc::new(backend);
    let agent_id = backend.agent_id().clone();
    let counted = context.metrics.tunnel_open(&backend);
    let registered = context.backends.register(backend.clone());
    info!(
        agent_id = %agent_id, %remote, transport = %backend.tunnel.carrier(),
        instance = ?backend.instance(), "agent connected",
    );
    let lost = drive(&backend, control, &context).await;
    drop(registered);
    drop(counted);
    context.metrics.tunnel_lost(lost.label());
    let cut = backend.open_streams();
    info!(agent_id = %agent_id, %remote, reason = %lost, cut, "agent gone");
}

/// Tells of an agent that did not become a backend.
pub(crate) fn not_joined(remote: SocketAddr, error: &JoinError, context: &TunnelContext) {
    static JOIN_FAILED: RateLimited = RateLimited::new(Duration::from_secs(1));
    context.metrics.join_failed(error.label());
    if let Some(suppressed) = JOIN_FAILED.admit(std::time::Instant::now()) {
        warn!(%remote, %error, suppressed, "an agent did not join");
    }
}

/// Reads the hello and answers it. A refusal closes the tunnel while the control stream still lives, so
/// that the reason is all that the agent hears.
async fn join(
    tunnel: Tunnel,
    authenticated: Option<Authenticated>,
    context: &TunnelContext,
) -> Result<(Backend, ControlStream), JoinError> {
    let closer = tunnel.clone();
    let refuse = |error: JoinError| {
        closer.close(error.close_code(), &error.to_string());
        error
    };
    let deadline = Instant::now() + JOIN_TIMEOUT;
    let opened = within(deadline, async { Ok(tunnel.accept().await?) });
    let mut control = ControlStream::new(tunnel.clone(), opened.await.map_err(refuse)?);
    let hello = within(deadline, hear(&mut control)).await.map_err(refuse)?;
    let backend = introduce(tunnel, *hello, authenticated, &mut control, context).await;
    Ok((backend.map_err(refuse)?, control))
}

async fn within<T>(
    deadline: Instant,
    step: impl Future<Output = Result<T, JoinError>>,
) -> Result<T, JoinError> {
    timeout_at(deadline, step).await.unwrap_or(Err(JoinError::TimedOut))
}

async fn hear(control: &mut ControlStream) -> Result<Box<Hello>, JoinError> {
    match control.next().await? {
        ControlMessage::Hello(hello) => Ok(hello),
        _ => Err(JoinError::NotHello),
    }
}

async fn introduce(
    tunnel: Tunnel,
    hello: Hello,
    authenticated: Option<Authenticated>,
    control: &mut ControlStream,
    context: &TunnelContext,
) -> Result<Backend, JoinError> {
    let incompatible = |error: &dyn std::fmt::Display| JoinError::Incompatible(error.to_string());
    hello.extensions.require_known().map_err(|error| incompatible(&error))?;
    let authenticated = match authenticated {
        Some(authenticated) => authenticated,
        None => tokio::select! {
            authenticated = context.authenticator.admit(hello.token.as_ref()) => authenticated?,
            // Nobody waits for the answer any more.
            lost = tunnel.closed() => return Err(lost.into()),
        },
    };
    let welcome = welcome(&hello, context);
    if welcome.features.contains(Features::HEDGE) {
        tunnel.hedge(context.hedge_rate);
    }
    control.send(&ControlMessage::Welcome(Box::new(welcome))).await?;
    Ok(Backend::new(tunnel, hello, authenticated, context.max_streams))
}

fn welcome(hello: &Hello, context: &TunnelContext) -> Welcome {
    Welcome {
        revision: REVISION,
        features: hello.features.intersection(Features::supported()),
        server_id: context.server_id.clone(),
        server_count: context.server_count,
        servers: List::default(),
        max_streams: context.max_streams,
        extensions: Extensions::default(),
    }
}

/// Runs the control stream until the tunnel is gone; why it went.
async fn drive(
    backend: &Backend,
    mut control: ControlStream,
    context: &TunnelContext,
) -> TunnelLost {
    let tunnel = &backend.tunnel;
    let result = tokio::select! {
        biased;
        lost = tunnel.closed() => return lost,
        () = context.closing.cancelled() => goodbye(&mut control, tunnel).await,
        result = converse(backend, &mut control, context) => result,
    };
    if let Err(error) = result {
        tunnel.close(error.close_code(), &error.to_string());
    }
    tunnel.closed().await
}

/// Answers the agent's messages and passes doubts and drains on; ends only with an error.
async fn converse(
    backend: &Backend,
    control: &mut ControlStream,
    context: &TunnelContext,
) -> Result<(), ControlError> {
    let mut told = false;
    loop {
        tokio::select! {
            message = control.next() => match message? {
                ControlMessage::Drain(Drain { deadline_millis }) => {
                    context.backends.drain(backend);
                    info!(agent_id = %backend.agent_id(), deadline_millis, "agent drains");
                }
                ControlMessage::Goodbye(Goodbye { reason, .. }) => {
                    context.backends.drain(backend);
                    info!(agent_id = %backend.agent_id(), %reason, "agent says goodbye");
                }
                // A second introduction, or an answer to none.
                _ => return Err(ControlError::Unexpected),
            },
            () = backend.suspected() => control.ask(SUSPECT_LIMIT).await?,
            () = context.draining.cancelled(), if !told => {
                told = true;
                let deadline_millis =
                    u32::try_from(context.drain_timeout.as_millis()).unwrap_or(u32::MAX);
                control.send(&ControlMessage::Drain(Drain { deadline_millis })).await?;
            }
        }
    }
}

async fn goodbye(control: &mut ControlStream, tunnel: &Tunnel) -> Result<(), ControlError> {
    let code = CloseCode::SHUTDOWN;
    let reason = "the server stops";
    let goodbye = Goodbye { code: code.as_u32(), reason: Text::truncated(reason.into()) };
    let told = control.send(&ControlMessage::Goodbye(goodbye)).await;
    tunnel.close(code, reason);
    tunnel.flushed(FLUSH_TIMEOUT).await;
    told
}
