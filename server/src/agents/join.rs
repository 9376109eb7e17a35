//! The introduction of an agent on its tunnel: hello, admission, welcome.

use std::{net::SocketAddr, time::Duration};

use culvert_process::rate_limited;
use culvert_transport::{
    ConnectError, Tunnel, TunnelLost,
    control::{ControlError, ControlStream},
};
use culvert_wire::{
    CloseCode,
    bounded::List,
    control::{ControlMessage, Hello, Welcome},
    extension::{Extensions, UnknownExtension},
    version::{Features, REVISION},
};
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::{
    AgentContext,
    admission::{Authenticated, Refusal},
    unadmitted::JOIN_TIMEOUT,
};
use crate::backends::Backend;

/// Every reason for which an agent does not become a backend, as a metric label.
pub(crate) const JOIN_FAILURE_REASONS: [&str; 9] = [
    "handshake",
    "not_tls",
    "closed",
    "timed_out",
    "lost",
    "protocol_violation",
    "incompatible",
    "unauthenticated",
    "token_not_reviewed",
];

/// Why an agent did not become a backend.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    #[error("handshake: {0}")]
    Handshake(#[from] ConnectError),
    #[error("it sent {0}")]
    NotTls(&'static str),
    #[error("it closed the connection without a byte")]
    Closed,
    #[error("no hello within {JOIN_TIMEOUT:?}")]
    TimedOut,
    #[error("tunnel lost before the hello: {0}")]
    Lost(#[from] TunnelLost),
    #[error(transparent)]
    Control(ControlError),
    #[error("began with another message than hello")]
    NotHello,
    #[error(transparent)]
    Incompatible(#[from] UnknownExtension),
    #[error(transparent)]
    Refused(#[from] Refusal),
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
    fn label(&self) -> &'static str {
        match self {
            Self::Handshake(_) => "handshake",
            Self::NotTls(_) => "not_tls",
            Self::Closed => "closed",
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
            Self::Handshake(_)
            | Self::NotTls(_)
            | Self::Closed
            | Self::Lost(_)
            | Self::NotHello => CloseCode::PROTOCOL_VIOLATION,
        }
    }
}

/// Counts and logs an agent that did not become a backend. Each reason has a limit of its own, so
/// that port scanners do not hide agents whose certificates have expired.
pub(super) fn record_failure(remote: SocketAddr, error: &JoinError, context: &AgentContext) {
    context.metrics.join_failed(error.label());
    match error {
        // The checks of a load balancer, once a second from each of its nodes.
        JoinError::Closed => {
            debug!(%remote, "a connection was closed without a byte");
            return;
        }
        // An agent races the server's addresses and drops all tunnels but one.
        JoinError::Lost(_) => {
            debug!(%remote, %error, "an agent did not join");
            return;
        }
        _ => {}
    }
    rate_limited!(
        Duration::from_secs(1), per reason = error.label(), WARN, %remote, %error,
        "an agent did not join"
    );
}

/// Reads the hello, admits the agent and answers with the welcome, until the deadline. An agent
/// that is `authenticated` already is not asked for its token.
///
/// # Errors
/// When the agent is not admitted. The tunnel is closed then while the control stream still lives,
/// so that the agent sees the reason and nothing else.
pub(super) async fn join(
    tunnel: Tunnel,
    authenticated: Option<Authenticated>,
    deadline: Instant,
    context: &AgentContext,
) -> Result<(Backend, ControlStream), JoinError> {
    let closer = tunnel.clone();
    let refuse = |error: JoinError| {
        closer.close(error.close_code(), &error.to_string());
        error
    };
    let opened = within(deadline, async { Ok(tunnel.accept().await?) });
    let mut control = ControlStream::new(tunnel.clone(), opened.await.map_err(refuse)?);
    let introduced = introduce(tunnel, authenticated, deadline, &mut control, context).await;
    Ok((introduced.map_err(refuse)?, control))
}

async fn introduce(
    tunnel: Tunnel,
    authenticated: Option<Authenticated>,
    deadline: Instant,
    control: &mut ControlStream,
    context: &AgentContext,
) -> Result<Backend, JoinError> {
    let hello = within(deadline, read_hello(control)).await?;
    hello.extensions.require_known()?;
    let authenticated = match authenticated {
        Some(authenticated) => authenticated,
        None => admit(&tunnel, &hello, deadline, context).await?,
    };
    let welcome = welcome(&hello, context);
    if welcome.features.contains(Features::HEDGE) {
        tunnel.hedge(context.hedge_rate);
    }
    let welcome = ControlMessage::Welcome(Box::new(welcome));
    within(deadline, async { Ok(control.send(&welcome).await?) }).await?;
    Ok(Backend::new(tunnel, hello, authenticated, context.max_streams))
}

async fn within<T>(
    deadline: Instant,
    step: impl Future<Output = Result<T, JoinError>>,
) -> Result<T, JoinError> {
    timeout_at(deadline, step).await.unwrap_or(Err(JoinError::TimedOut))
}

async fn read_hello(control: &mut ControlStream) -> Result<Hello, JoinError> {
    match control.next().await? {
        ControlMessage::Hello(hello) => Ok(*hello),
        _ => Err(JoinError::NotHello),
    }
}

async fn admit(
    tunnel: &Tunnel,
    hello: &Hello,
    deadline: Instant,
    context: &AgentContext,
) -> Result<Authenticated, JoinError> {
    let remote = tunnel.remote_address().ip();
    let admitted = context.authenticator.admit(hello.token.as_ref(), remote);
    let admitted = timeout_at(deadline, admitted);
    tokio::select! {
        admitted = admitted => Ok(admitted.unwrap_or_else(|_| Err(Refusal::too_late()))?),
        // The agent does not wait for the review any more.
        lost = tunnel.closed() => Err(lost.into()),
    }
}

fn welcome(hello: &Hello, context: &AgentContext) -> Welcome {
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
