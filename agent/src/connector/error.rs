//! Why an attempt to get a tunnel failed.

use std::{fmt, time::Duration};

use culvert_transport::{Carrier, ConnectError, tls::TlsError};

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

impl fmt::Display for CarrierFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (carrier, error)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}over {carrier}: {error}")?;
        }
        Ok(())
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
