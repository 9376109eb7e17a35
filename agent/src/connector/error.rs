//! Why an attempt to get a tunnel failed.

use std::{fmt, io::ErrorKind, time::Duration};

use culvert_transport::{Carrier, ConnectError, TransportFault, TunnelLost, tls::TlsError};

use crate::{metrics::PANICKED, tunnels::session::JoinError};

/// Why an attempt to get a tunnel failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttemptError {
    /// The server's name has no address.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// Certificate, key or CA cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No carrier led to a welcome at the last address tried.
    #[error("{address}: {failures}")]
    Carriers {
        /// The server's address.
        address: String,
        /// Each carrier's error.
        failures: CarrierFailures,
    },
    /// The attempt panicked; the fault is ours.
    #[error("internal error: the attempt panicked: {0}")]
    Panicked(String),
}

impl AttemptError {
    /// The error as a metric label.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Resolve(_) => "unresolvable",
            Self::Tls(_) => "tls_files",
            Self::Carriers { failures, .. } if failures.is_join() => "join_failed",
            Self::Carriers { .. } => "connect_failed",
            Self::Panicked(_) => PANICKED,
        }
    }
}

/// The server's name could not be resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot resolve {host}: {reason}")]
pub(crate) struct ResolveError {
    /// The name.
    pub(crate) host: String,
    /// The resolver's reason.
    pub(crate) reason: String,
}

/// The carriers that were tried, each with its error.
#[derive(Debug)]
pub(crate) struct CarrierFailures(pub(crate) Vec<(Carrier, CarrierError)>);

impl CarrierFailures {
    /// Whether a handshake succeeded and the server did not welcome the agent.
    fn is_join(&self) -> bool {
        self.0.iter().any(|(_, error)| matches!(error, CarrierError::Join(_)))
    }
}

/// Each text once, with the carriers that it is of, and what to do about it.
impl fmt::Display for CarrierFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut texts: Vec<(String, String)> = Vec::new();
        for (carrier, error) in &self.0 {
            let text = error.to_string();
            match texts.iter_mut().find(|(_, known)| *known == text) {
                Some((carriers, _)) => *carriers += &format!(" and {carrier}"),
                None => texts.push((format!("over {carrier}"), text)),
            }
        }
        for (index, (carriers, text)) in texts.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{carriers}: {text}")?;
        }
        let mut remedies: Vec<_> = self.0.iter().filter_map(|(_, error)| remedy(error)).collect();
        remedies.dedup();
        remedies.iter().try_for_each(|remedy| write!(f, "; {remedy}"))
    }
}

/// What an operator can do about a failed handshake.
fn remedy(error: &CarrierError) -> Option<&'static str> {
    const NO_SERVER: &str = "is --proxy-server-port the agent port of a server?";
    let fault = match error {
        CarrierError::Connect(ConnectError::Unreachable(fault))
            if fault.kind == ErrorKind::PermissionDenied =>
        {
            return Some("a packet filter of this node forbids it");
        }
        CarrierError::Connect(ConnectError::Unreachable(_)) => {
            return Some("see this node's routes to the server");
        }
        CarrierError::Connect(ConnectError::Protocol) => return Some(NO_SERVER),
        // With TLS 1.3 the agent's handshake is over before the server judges its certificate.
        CarrierError::Connect(ConnectError::Handshake(TunnelLost::Transport(fault)))
        | CarrierError::Join(JoinError::Lost(TunnelLost::Transport(fault))) => fault,
        _ => return None,
    };
    match fault {
        fault if fault.is_not_tls() => Some(NO_SERVER),
        fault if fault.needs_another_certificate() => {
            Some("issue the server's --cluster-cert anew, with the names of subjectAltName")
        }
        TransportFault::TlsRefused { alert: Some(42), reason } if reason.contains("for name") => {
            Some("set --server-name to a name of the server's certificate")
        }
        TransportFault::TlsRefused { alert: Some(45), .. } => {
            Some("renew the server's --cluster-cert, or set this node's clock")
        }
        TransportFault::TlsRefused { alert: Some(48), .. } => {
            Some("set --ca-cert to the CA of the server's --cluster-cert")
        }
        TransportFault::TlsRefused { alert: Some(43), .. } => {
            Some("the server's --cluster-cert must be for server authentication")
        }
        TransportFault::TlsAlert { alert: 45, .. } => {
            Some("renew --agent-cert, or set the server's clock")
        }
        TransportFault::TlsAlert { alert: 48 | 51, .. } => {
            Some("set --agent-cert to a certificate of the server's --cluster-ca-cert")
        }
        TransportFault::TlsAlert { alert: 42 | 43 | 46, .. } => {
            Some("set --agent-cert to a certificate for client authentication")
        }
        TransportFault::TlsAlert { alert: 116, .. } => {
            Some("set --agent-cert and --agent-key, which the server's --cluster-ca-cert requires")
        }
        TransportFault::TlsAlert { alert: 40, .. } => Some("see --tls-key-exchange on both sides"),
        TransportFault::TlsAlert { alert: 120, .. } => Some(NO_SERVER),
        _ => None,
    }
}

/// Why one carrier did not lead to a welcome.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CarrierError {
    /// The handshake failed.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The handshake succeeded, and the server did not welcome the agent.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// The server's address is not known: only a proxy can resolve its name.
    #[error("the server's address is not known")]
    UnknownAddress,
    /// The handshake, or the welcome after it, took too long.
    #[error("nothing within {0:?}")]
    TimedOut(Duration),
}

impl CarrierError {
    /// Whether one side's TLS refused the other.
    pub(crate) fn is_of_tls(&self) -> bool {
        let (Self::Connect(ConnectError::Handshake(lost)) | Self::Join(JoinError::Lost(lost))) =
            self
        else {
            return false;
        };
        let TunnelLost::Transport(fault) = lost else { return false };
        matches!(fault, TransportFault::TlsRefused { .. } | TransportFault::TlsAlert { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(faults: Vec<(Carrier, TransportFault)>) -> String {
        let errors =
            faults.into_iter().map(|(carrier, fault)| (carrier, ConnectError::from(fault).into()));
        CarrierFailures(errors.collect()).to_string()
    }

    #[test]
    fn a_fault_of_both_carriers_is_reported_once_with_the_flag_to_change() {
        let refused =
            |reason: &str| TransportFault::TlsRefused { alert: Some(48), reason: reason.into() };
        let text = shown(vec![
            (Carrier::Quic, refused("error 48: invalid peer certificate: UnknownIssuer")),
            (Carrier::Tcp, refused("invalid peer certificate: UnknownIssuer")),
        ]);
        let expected = "over quic and tcp: refused by this side: the peer's certificate is of no CA \
                        that this side trusts; set --ca-cert to the CA of the server's --cluster-cert";
        assert_eq!(text.to_lowercase(), expected.to_lowercase());
    }

    #[test]
    fn a_refusal_by_the_server_names_the_agents_certificate() {
        let alert = |alert| TransportFault::TlsAlert { alert, reason: "raw".into() };
        for (number, expected) in [
            (48, "set --agent-cert to a certificate of the server's --cluster-ca-cert"),
            (116, "set --agent-cert and --agent-key"),
            (45, "renew --agent-cert"),
            (43, "for client authentication"),
        ] {
            let text =
                shown(vec![(Carrier::Quic, alert(number)), (Carrier::Tcp, TransportFault::Ended)]);
            assert!(text.contains("refused by the peer: "), "{text}");
            assert_eq!(text.matches(expected).count(), 1, "{text}");
            assert!(!text.contains("raw"), "{text}");
            let lost = JoinError::Lost(TunnelLost::Transport(alert(number)));
            let text = CarrierFailures(vec![(Carrier::Quic, lost.into())]).to_string();
            assert_eq!(text.matches(expected).count(), 1, "after the handshake: {text}");
        }
        assert_eq!(shown(vec![(Carrier::Tcp, alert(80))]).matches(';').count(), 0);
    }

    #[test]
    fn a_certificate_that_is_faulty_in_itself_is_to_be_issued_anew() {
        for (alert, fault) in [(45, "Expired"), (46, "Other(OtherError(UnsupportedCertVersion))")] {
            let reason = format!("invalid peer certificate: {fault}");
            let refused = TransportFault::TlsRefused { alert: Some(alert), reason };
            let text = shown(vec![(Carrier::Quic, refused)]);
            assert!(text.contains("; issue the server's --cluster-cert anew"), "{text}");
            assert!(!text.contains("clock"), "{text}");
        }
    }

    #[test]
    fn a_wrong_name_and_a_port_of_another_service_have_their_remedies() {
        let reason = "invalid peer certificate: certificate not valid for name \"a.test\"; certificate \
                      is only valid for DnsName(\"b.test\")";
        let wrong = TransportFault::TlsRefused { alert: Some(42), reason: reason.into() };
        let text = shown(vec![(Carrier::Quic, wrong)]);
        assert!(text.contains("\"a.test\", but for b.test; set --server-name"), "{text}");
        let other =
            CarrierFailures(vec![(Carrier::Tcp, ConnectError::Protocol.into())]).to_string();
        let expected = "is --proxy-server-port the agent port of a server?";
        assert!(other.ends_with(expected), "{other}");
        let reason = "received corrupt message of type InvalidContentType".into();
        let text = shown(vec![(Carrier::Tcp, TransportFault::TlsRefused { alert: None, reason })]);
        assert!(text.ends_with(&format!("the peer's answer is not TLS; {expected}")), "{text}");
    }
}
