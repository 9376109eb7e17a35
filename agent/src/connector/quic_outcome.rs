//! What an attempt shows about QUIC on the path to the servers.

use culvert_transport::{ConnectError, TunnelLost};

use crate::{connector::error::CarrierError, tunnels::session::JoinError};

/// What an attempt shows about QUIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuicOutcome {
    /// Nothing: QUIC was not tried, or no other carrier reached the server either.
    Unknown,
    /// A handshake over QUIC succeeded.
    Worked,
    /// QUIC failed, and nothing shows that the server is at fault.
    Failed(QuicFailure),
}

/// How QUIC failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuicFailure {
    /// The network reports that no process listens, or that no packet gets to the server.
    Refused,
    /// No answer came in time.
    Silent,
    /// The peer or this side refused the connection: TLS, the protocol, a socket.
    Rejected,
}

impl QuicFailure {
    /// The failure as a metric label: the reason for which a tunnel is over TCP.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Refused => "quic_refused",
            Self::Silent => "quic_silent",
            Self::Rejected => "quic_rejected",
        }
    }
}

impl From<&CarrierError> for QuicFailure {
    fn from(error: &CarrierError) -> Self {
        match error {
            CarrierError::Connect(ConnectError::Refused | ConnectError::Unreachable(_)) => {
                Self::Refused
            }
            CarrierError::Connect(ConnectError::Handshake(TunnelLost::TimedOut))
            | CarrierError::Join(JoinError::Lost(TunnelLost::TimedOut))
            | CarrierError::TimedOut(_) => Self::Silent,
            CarrierError::Connect(_) | CarrierError::Join(_) | CarrierError::UnknownAddress => {
                Self::Rejected
            }
        }
    }
}

impl QuicOutcome {
    /// What it shows about QUIC that a server did not welcome the agent on a tunnel over it. A
    /// server that refuses the agent shows nothing: it would refuse it over any carrier.
    pub(crate) fn of_failed_join(error: &CarrierError) -> Self {
        match error {
            CarrierError::Join(error) if error.is_refusal() => Self::Unknown,
            error => Self::Failed(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use culvert_transport::TransportFault;
    use culvert_wire::{CloseCode, bounded::PeerText};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn a_failure_is_a_refusal_silence_or_a_rejection() {
        let handshake = |lost| CarrierError::Connect(ConnectError::Handshake(lost));
        let unreachable = std::io::Error::from(std::io::ErrorKind::NetworkUnreachable);
        let unreachable = CarrierError::Connect(ConnectError::Unreachable(unreachable.into()));
        for (error, failure, label) in [
            (unreachable, QuicFailure::Refused, "quic_refused"),
            (CarrierError::Connect(ConnectError::Refused), QuicFailure::Refused, "quic_refused"),
            (handshake(TunnelLost::TimedOut), QuicFailure::Silent, "quic_silent"),
            (CarrierError::TimedOut(LIMIT), QuicFailure::Silent, "quic_silent"),
            (handshake(TunnelLost::PeerRestarted), QuicFailure::Rejected, "quic_rejected"),
            (handshake(TransportFault::Version.into()), QuicFailure::Rejected, "quic_rejected"),
            (CarrierError::Connect(ConnectError::Protocol), QuicFailure::Rejected, "quic_rejected"),
        ] {
            assert_eq!(QuicFailure::from(&error), failure, "{error}");
            assert_eq!(failure.label(), label);
        }
    }

    #[test]
    fn a_server_that_refuses_the_agent_shows_nothing_about_quic() {
        let reason = PeerText::lossy(b"the token was refused");
        let refused = TunnelLost::ClosedByPeer { code: CloseCode::UNAUTHENTICATED, reason };
        let refused = CarrierError::Join(JoinError::Lost(refused));
        assert_eq!(QuicOutcome::of_failed_join(&refused), QuicOutcome::Unknown);
        let silent = CarrierError::Join(JoinError::Lost(TunnelLost::TimedOut));
        let failed = QuicOutcome::Failed(QuicFailure::Silent);
        assert_eq!(QuicOutcome::of_failed_join(&silent), failed);
        assert_eq!(QuicOutcome::of_failed_join(&CarrierError::TimedOut(LIMIT)), failed);
    }
}
