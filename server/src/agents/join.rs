//! The introduction of an agent on its tunnel: hello, admission, welcome.

use std::{io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use culvert_process::{rate_limited, version::software};
use culvert_transport::{
    ConnectError, TransportFault, Tunnel, TunnelLost,
    control::{ControlError, ControlStream},
};
use culvert_wire::{
    AgentId, CloseCode,
    bounded::Text,
    control::{ControlMessage, Hello, ServerList, ServerSet, Welcome},
    extension::{Extensions, UnknownExtension},
    resume::SessionInfo,
    version::{Features, REVISION},
};
use tokio::sync::watch;
use tracing::debug;

use super::{
    AgentContext,
    admission::{Authenticated, Proof, Refusal},
    identity::{ClaimFault, Claims},
    unadmitted::{Attempt, FIRST_BYTES_TIMEOUT, JOIN_TIMEOUT, Source},
};
use crate::backends::{Backend, RegisterError};

/// Every reason for which an agent does not become a backend, as a metric label.
pub(crate) const JOIN_FAILURE_REASONS: [&str; 16] = [
    "handshake",
    "not_tls",
    "closed",
    "no_first_bytes",
    "evicted",
    "no_room",
    "timed_out",
    "lost",
    "protocol_violation",
    "incompatible",
    "unauthenticated",
    "token_not_reviewed",
    "node_not_looked_up",
    "id_not_proven",
    "id_held",
    "too_many_tunnels",
];

/// What an operator can do about a failed handshake, behind a semicolon.
fn remedy(error: &ConnectError) -> &'static str {
    let ConnectError::Handshake(TunnelLost::Transport(fault)) = error else { return "" };
    match fault {
        fault if fault.needs_another_certificate() => "; issue the agent's --agent-cert anew",
        TransportFault::TlsRefused { alert: Some(48), .. } => {
            "; the agent's --agent-cert must be of --cluster-ca-cert"
        }
        TransportFault::TlsRefused { alert: Some(116), .. } => {
            "; the agent needs --agent-cert and --agent-key, because --cluster-ca-cert is given"
        }
        TransportFault::TlsRefused { alert: Some(45), .. } => "; renew the agent's --agent-cert",
        TransportFault::TlsRefused { alert: Some(43), .. } => {
            "; the agent's --agent-cert must be for client authentication"
        }
        TransportFault::TlsAlert { alert: 48 | 51, .. } => {
            "; the agent's --ca-cert must be the CA of --cluster-cert"
        }
        TransportFault::TlsAlert { alert: 45, .. } => "; renew --cluster-cert",
        TransportFault::TlsAlert { alert: 42, .. } => {
            "; --cluster-cert must have the name by which the agent connects, or its --server-name"
        }
        TransportFault::TlsAlert { alert: 43 | 46, .. } => {
            "; the agent's log has the fault of --cluster-cert"
        }
        TransportFault::TlsAlert { alert: 40, .. } => "; see --tls-key-exchange on both sides",
        _ => "",
    }
}

/// Why an agent did not become a backend.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    #[error("handshake: {0}{remedy}", remedy = remedy(.0))]
    Handshake(ConnectError),
    #[error("it sent {0}")]
    NotTls(&'static str),
    #[error("it closed the connection without a byte")]
    Closed,
    #[error("no bytes within {FIRST_BYTES_TIMEOUT:?}")]
    Silent,
    #[error("it did not join within {JOIN_TIMEOUT:?}")]
    TimedOut,
    #[error("it gave way to another connection: too many have not joined yet")]
    Evicted,
    #[error("too many connections have not joined yet")]
    NoRoom,
    #[error("it sent more than an introduction before it was admitted")]
    Excess,
    #[error("it left before the hello: {0}")]
    Lost(#[from] TunnelLost),
    #[error(transparent)]
    Control(ControlError),
    #[error("began with another message than hello")]
    NotHello,
    #[error("its metadata: {0:?}")]
    Metadata(String),
    #[error(transparent)]
    Incompatible(#[from] UnknownExtension),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("agent {agent_id}, {identity}: {fault}")]
    Claim { agent_id: AgentId, identity: String, fault: ClaimFault },
    #[error("agent {agent_id}, {identity}: {error}")]
    NotRegistered { agent_id: AgentId, identity: String, error: RegisterError },
}

impl From<ConnectError> for JoinError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Handshake(lost) if has_left(&lost) => Self::Lost(lost),
            error => Self::Handshake(error),
        }
    }
}

/// Whether the peer has closed the connection within the handshake, and named no fault: an agent
/// drops the attempts that others have overtaken.
fn has_left(lost: &TunnelLost) -> bool {
    const NO_ERROR: u64 = 0x00; // RFC 9000 §20.1, as the next one
    const APPLICATION_ERROR: u64 = 0x0c;
    match lost {
        TunnelLost::ClosedByPeer { .. } | TunnelLost::Transport(TransportFault::Ended) => true,
        TunnelLost::Transport(TransportFault::Aborted { code, .. }) => {
            matches!(*code, NO_ERROR | APPLICATION_ERROR)
        }
        TunnelLost::Transport(TransportFault::Io(fault)) => matches!(
            fault.kind,
            ErrorKind::ConnectionReset | ErrorKind::ConnectionAborted | ErrorKind::BrokenPipe
        ),
        _ => false,
    }
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
            Self::Silent => "no_first_bytes",
            Self::TimedOut => "timed_out",
            Self::Evicted => "evicted",
            Self::NoRoom => "no_room",
            Self::Lost(_) => "lost",
            Self::Control(_) | Self::NotHello | Self::Metadata(_) | Self::Excess => {
                "protocol_violation"
            }
            Self::Incompatible(_) => "incompatible",
            Self::Refused(refusal) => refusal.label(),
            Self::Claim { fault, .. } => fault.label(),
            Self::NotRegistered { error: RegisterError::IdHeld { .. }, .. } => {
                ClaimFault::IdHeld.label()
            }
            Self::NotRegistered { error: RegisterError::TooManyTunnels(_), .. } => {
                "too_many_tunnels"
            }
        }
    }

    pub(super) fn close_code(&self) -> CloseCode {
        match self {
            Self::Control(error) => error.close_code(),
            Self::Incompatible(_) => CloseCode::INCOMPATIBLE,
            Self::TimedOut | Self::Silent => CloseCode::UNRESPONSIVE,
            Self::Evicted
            | Self::NoRoom
            | Self::NotRegistered { error: RegisterError::TooManyTunnels(_), .. } => {
                CloseCode::OVERLOADED
            }
            Self::Refused(_)
            | Self::Claim { .. }
            | Self::NotRegistered { error: RegisterError::IdHeld { .. }, .. } => {
                CloseCode::UNAUTHENTICATED
            }
            Self::Handshake(_)
            | Self::NotTls(_)
            | Self::Closed
            | Self::Lost(_)
            | Self::Excess
            | Self::NotHello
            | Self::Metadata(_) => CloseCode::PROTOCOL_VIOLATION,
        }
    }

    /// The reason that the peer is sent. It is one of a few fixed sentences: what kube-apiserver
    /// answered, names of accounts and addresses are for the server's log alone.
    pub(super) fn close_reason(&self) -> &'static str {
        match self {
            Self::TimedOut | Self::Silent => "not joined in time",
            Self::Evicted | Self::NoRoom => "too many connections have not joined yet",
            Self::Incompatible(_) => "an extension that this server does not know is required",
            Self::Refused(refusal) => refused(refusal),
            Self::Claim { .. } => "the id is not what the agent has proved to be",
            Self::NotRegistered { error: RegisterError::IdHeld { .. }, .. } => {
                "an agent of another identity has the id"
            }
            Self::NotRegistered { error: RegisterError::TooManyTunnels(_), .. } => {
                "too many tunnels of agents"
            }
            Self::Handshake(_)
            | Self::NotTls(_)
            | Self::Closed
            | Self::Lost(_)
            | Self::Control(_)
            | Self::Excess
            | Self::NotHello
            | Self::Metadata(_) => "the control stream must begin with hello and nothing else",
        }
    }
}

/// The reason that a refused agent is sent.
fn refused(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::NoToken => {
            "no token, and this server asks for one: see the agent's --service-account-token-path"
        }
        Refusal::CertificateUnreadable => "the certificate cannot be read: see the server's log",
        Refusal::NotReviewed(_) | Refusal::NoTurn(_) => {
            "the token could not be reviewed: see the server's log"
        }
        Refusal::NodeUnknown(_) => "the node could not be looked up: see the server's log",
        _ => "the token was refused: see the server's log",
    }
}

/// Counts and logs an agent that did not become a backend. Each source has a limit of its own for
/// each reason, so that port scanners do not hide agents whose certificates have expired.
pub(super) fn record_failure(remote: SocketAddr, error: &JoinError, context: &AgentContext) {
    context.metrics.join_failed(error.label());
    if ClaimFault::LABELS.contains(&error.label()) {
        context.metrics.identity_conflict(error.label());
    }
    match error {
        // The checks of a load balancer, once a second from each of its nodes.
        JoinError::Closed => {
            debug!(%remote, "a connection was closed without a byte");
            return;
        }
        // An agent races the server's addresses and carriers, and drops all tunnels but one.
        JoinError::Lost(_) => {
            debug!(%remote, %error, "an agent did not join");
            return;
        }
        _ => {}
    }
    let failure = format_args!("{}: {}", Source::of(remote.ip()), error.label());
    rate_limited!(
        Duration::from_secs(1), per failure = failure, at most 32 in all, WARN, %remote, %error,
        "an agent did not join"
    );
}

/// Changes of the set of servers; `None` for an agent that does not use it.
pub(super) type SetChanges = Option<watch::Receiver<Arc<ServerSet>>>;

/// An agent that was admitted and welcomed.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) backend: Backend,
    pub(super) control: ControlStream,
    /// The changes of the set of servers since the welcome.
    pub(super) servers: SetChanges,
}

/// Reads the hello, admits the agent and answers with the welcome, within the attempt's time. An
/// agent that is `authenticated` already is not asked for its token.
///
/// # Errors
/// When the agent is not admitted. The tunnel is closed then while the control stream still lives,
/// so that the agent sees the reason and nothing else.
pub(super) async fn join(
    tunnel: Tunnel,
    authenticated: Option<Authenticated>,
    attempt: &Attempt,
    context: &AgentContext,
) -> Result<Joined, JoinError> {
    let closer = tunnel.clone();
    let refuse = |error: JoinError| {
        closer.close(error.close_code(), error.close_reason());
        error
    };
    let opened = attempt.within(async { Ok(tunnel.accept().await?) });
    let mut control = ControlStream::new(tunnel.clone(), opened.await.map_err(refuse)?);
    let introduced = introduce(tunnel, authenticated, attempt, &mut control, context).await;
    let (backend, servers) = introduced.map_err(refuse)?;
    Ok(Joined { backend, control, servers })
}

async fn introduce(
    tunnel: Tunnel,
    authenticated: Option<Authenticated>,
    attempt: &Attempt,
    control: &mut ControlStream,
    context: &AgentContext,
) -> Result<(Backend, SetChanges), JoinError> {
    let (hello, mut authenticated) = tokio::select! {
        biased;
        identified = identify(&tunnel, authenticated, attempt, control, context) => identified?,
        () = tunnel.unexpected_datagram() => return Err(JoinError::Excess),
    };
    let claims = claims(&authenticated, &hello)?;
    context.backends.admit(&claims).map_err(|error| not_registered(&claims, error))?;
    attempt.admit();
    tunnel.admit();
    tunnel.set_memory(&context.memory);
    let peer = (&claims.agent_id, claims.identity.to_string());
    tunnel.resume(context.metrics.known_paths.to(peer));
    let (welcome, servers) = welcome(&hello, context);
    let session = welcome.extensions.session().ok().flatten();
    if welcome.features.contains(Features::HEDGE) {
        let repairs = welcome.features.contains(Features::REPAIR);
        tunnel.hedge(context.hedge_rate, repairs);
    }
    let welcome = ControlMessage::Welcome(Box::new(welcome));
    attempt.within(async { Ok(control.send(&welcome).await?) }).await?;
    let token = authenticated.take_token();
    let carrier = tunnel.clone();
    let backend = Backend::new(tunnel, hello, claims, context.max_streams);
    let session = session.map(|SessionInfo { tunnel: number, .. }| {
        context.sessions.enter(&backend.process(), carrier, number)
    });
    Ok((backend.with_token(token).with_session(session), servers))
}

/// What the agent may say about itself.
fn claims(authenticated: &Authenticated, hello: &Hello) -> Result<Claims, JoinError> {
    let claims = authenticated.claims(hello.agent_id.clone(), &hello.identifiers);
    claims.map_err(|fault| JoinError::Claim {
        agent_id: hello.agent_id.clone(),
        identity: authenticated.identity().to_string(),
        fault,
    })
}

/// The error of an agent with these claims that cannot be registered.
pub(super) fn not_registered(claims: &Claims, error: RegisterError) -> JoinError {
    let (agent_id, identity) = (claims.agent_id.clone(), claims.identity.to_string());
    JoinError::NotRegistered { agent_id, identity, error }
}

/// Reads the hello, and authenticates the agent unless that was done before.
async fn identify(
    tunnel: &Tunnel,
    authenticated: Option<Authenticated>,
    attempt: &Attempt,
    control: &mut ControlStream,
    context: &AgentContext,
) -> Result<(Hello, Authenticated), JoinError> {
    let hello = attempt.within(read_hello(control)).await?;
    hello.extensions.require_known()?;
    let mut authenticated = match authenticated {
        Some(authenticated) => authenticated,
        None => admit(tunnel, &hello, attempt, context).await?,
    };
    let looked_up = context.authenticator.look_up_node(&mut authenticated, &hello.identifiers);
    attempt.within(async { Ok(looked_up.await?) }).await?;
    Ok((hello, authenticated))
}

/// Reads one frame, which must be the hello. Pings are not answered before it: a peer that proved
/// nothing yet must not cause work that it need not pay for.
async fn read_hello(control: &mut ControlStream) -> Result<Hello, JoinError> {
    match control.first().await? {
        ControlMessage::Hello(hello) => Ok(*hello),
        _ => Err(JoinError::NotHello),
    }
}

async fn admit(
    tunnel: &Tunnel,
    hello: &Hello,
    attempt: &Attempt,
    context: &AgentContext,
) -> Result<Authenticated, JoinError> {
    let certificates = tunnel.peer_certificates();
    let proof = Proof {
        certificates: certificates.as_deref(),
        token: hello.token.as_ref(),
        remote: tunnel.remote_address().ip(),
        is_admitted: false,
    };
    let admitted = async { Ok(context.authenticator.admit(proof).await?) };
    tokio::select! {
        admitted = attempt.within(admitted) => match admitted {
            Err(JoinError::TimedOut) => Err(Refusal::too_late().into()),
            admitted => admitted,
        },
        // The agent does not wait for the review any more.
        lost = tunnel.closed() => Err(lost.into()),
    }
}

/// The welcome of an agent, and the changes of what it says about servers.
fn welcome(hello: &Hello, context: &AgentContext) -> (Welcome, SetChanges) {
    let mut offered = Features::supported();
    if !context.sessions.are_on() {
        offered = offered.without(Features::RESUME);
    }
    let features = hello.features.intersection(offered);
    let session = features.contains(Features::RESUME).then(|| context.sessions.introduce());
    let mut changes =
        features.contains(Features::SERVER_SET).then(|| context.server_set.subscribe());
    let set = changes.as_mut().map(|changes| changes.borrow_and_update().clone());
    let (server_count, servers) = match set {
        Some(set) => (set.server_count, set.servers.clone()),
        None => (context.server_count, ServerList::default()),
    };
    let welcome = Welcome {
        revision: REVISION,
        features,
        server_id: context.server_id.clone(),
        server_count,
        servers,
        max_streams: context.max_streams,
        extensions: Extensions::of_welcome(
            &Text::truncated(software("culvert-server")),
            session.as_ref(),
        ),
    };
    (welcome, changes)
}

#[cfg(test)]
mod tests {
    use std::io;

    use culvert_wire::bounded::PeerText;

    use super::*;

    #[test]
    fn a_failed_handshake_names_whose_certificate_it_is_and_the_flag() {
        let reason = || String::from("invalid peer certificate: UnknownIssuer");
        for (fault, expected) in [
            (
                TransportFault::TlsRefused { alert: Some(48), reason: reason() },
                "handshake: refused by this side: the peer's certificate is of no CA that this side \
                 trusts; the agent's --agent-cert must be of --cluster-ca-cert",
            ),
            (
                TransportFault::TlsAlert { alert: 48, reason: reason() },
                "handshake: refused by the peer: this side's certificate is of no CA that it trusts \
                 (TLS alert 48); the agent's --ca-cert must be the CA of --cluster-cert",
            ),
        ] {
            assert_eq!(JoinError::from(ConnectError::from(fault)).to_string(), expected);
        }
    }

    #[test]
    fn only_a_handshake_that_a_fault_ended_is_a_failed_handshake() {
        let aborted = |code| TransportFault::Aborted { code, reason: PeerText::default() };
        let io = |kind: ErrorKind| TransportFault::Io(io::Error::from(kind).into());
        let alert = TransportFault::TlsAlert { alert: 48, reason: "unknown CA".into() };
        for (fault, label) in [
            (TransportFault::Ended, "lost"),
            (aborted(0x0c), "lost"),
            (io(ErrorKind::ConnectionReset), "lost"),
            (aborted(0x0a), "handshake"),
            (io(ErrorKind::InvalidData), "handshake"),
            (alert, "handshake"),
            (TransportFault::Version, "handshake"),
        ] {
            assert_eq!(
                JoinError::from(ConnectError::from(fault.clone())).label(),
                label,
                "{fault}"
            );
        }
        assert_eq!(JoinError::from(ConnectError::Protocol).label(), "handshake");
        let silent = ConnectError::Handshake(TunnelLost::TimedOut);
        assert_eq!(JoinError::from(silent).label(), "handshake");
    }
}
