//! Why a connection and its streams ended, in the errors of every carrier.

use std::sync::{Arc, OnceLock};

use culvert_wire::{
    bounded::PeerText,
    code::{CloseCode, StreamCode},
};
use quinn::VarInt;

use super::inspection::Inbound;
use crate::{ReadError, TransportFault, TunnelLost};

/// The code and the reason with which this side closed the connection. Its streams report them when
/// they end for it.
#[derive(Clone, Debug)]
pub(super) struct CloseReason {
    closed: Arc<OnceLock<(CloseCode, String)>>,
    /// Knows why packets of the peer were refused.
    inbound: Arc<Inbound>,
}

impl CloseReason {
    pub(super) fn new(inbound: Arc<Inbound>) -> Self {
        Self { closed: Arc::default(), inbound }
    }

    /// Closes the connection, and remembers the reason; without effect on one that has ended.
    pub(super) fn close(&self, connection: &quinn::Connection, code: CloseCode, reason: &str) {
        // quinn would report this close to streams that notice the end later.
        if connection.close_reason().is_some() {
            return;
        }
        // Only the first close counts, for the peer too.
        let _ = self.closed.set((code, reason.to_owned()));
        connection.close(code.as_u32().into(), reason.as_bytes());
    }

    /// Why the tunnel ended.
    pub(super) fn lost(&self, error: quinn::ConnectionError) -> TunnelLost {
        match (lost(error), self.closed.get(), self.inbound.violation()) {
            (TunnelLost::ClosedHere { .. }, Some((code, reason)), _) => {
                TunnelLost::ClosedHere { code: *code, reason: reason.clone() }
            }
            (TunnelLost::Transport(TransportFault::Protocol(_)), _, Some(violation)) => {
                TunnelLost::Transport(TransportFault::Protocol(violation.to_owned()))
            }
            (lost, ..) => lost,
        }
    }

    pub(super) fn read_error(&self, error: quinn::ReadError) -> ReadError {
        match error {
            quinn::ReadError::Reset(code) => ReadError::Reset(stream_code(code)),
            quinn::ReadError::ConnectionLost(error) => ReadError::Lost(self.lost(error)),
            // Reads are always ordered, and 0-RTT is never used.
            quinn::ReadError::ClosedStream
            | quinn::ReadError::IllegalOrderedRead
            | quinn::ReadError::ZeroRttRejected => ReadError::Ended,
        }
    }
}

pub(super) fn stream_code(code: VarInt) -> StreamCode {
    StreamCode::from_wire(code.into_inner())
}

/// Why the tunnel ended, as far as QUIC knows.
pub(super) fn lost(error: quinn::ConnectionError) -> TunnelLost {
    match error {
        quinn::ConnectionError::ApplicationClosed(close) => TunnelLost::ClosedByPeer {
            code: CloseCode::from_wire(close.error_code.into_inner()),
            reason: PeerText::lossy(&close.reason),
        },
        quinn::ConnectionError::LocallyClosed => {
            TunnelLost::ClosedHere { code: CloseCode::ABANDONED, reason: String::new() }
        }
        quinn::ConnectionError::TimedOut => TunnelLost::TimedOut,
        quinn::ConnectionError::Reset => TunnelLost::PeerRestarted,
        error => TunnelLost::Transport(fault(error)),
    }
}

/// What quinn says of connections whose endpoint has ended.
const ENDPOINT_ENDED: &str = "endpoint driver future was dropped";

/// The fault below the tunnel that ended the connection.
fn fault(error: quinn::ConnectionError) -> TransportFault {
    let reason = error.to_string();
    match error {
        quinn::ConnectionError::TransportError(error)
            if error.code == quinn::TransportErrorCode::INTERNAL_ERROR
                && error.reason == ENDPOINT_ENDED =>
        {
            TransportFault::Socket
        }
        quinn::ConnectionError::TransportError(error) => match alert(error.code) {
            Some(alert) => TransportFault::TlsRefused { alert: Some(alert), reason },
            None => TransportFault::Protocol(reason),
        },
        quinn::ConnectionError::ConnectionClosed(close) => match alert(close.error_code) {
            Some(alert) => TransportFault::TlsAlert { alert, reason },
            None => {
                let reason = PeerText::truncated(reason);
                TransportFault::Aborted { code: close.error_code.into(), reason }
            }
        },
        quinn::ConnectionError::VersionMismatch => TransportFault::Version,
        _ => TransportFault::Exhausted,
    }
}

/// The TLS alert that a code of QUIC stands for (RFC 9001 §4.8).
fn alert(code: quinn::TransportErrorCode) -> Option<u8> {
    match u64::from(code) {
        code @ 0x100..0x200 => u8::try_from(code - 0x100).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use quinn::{ConnectionError, TransportErrorCode};

    use super::*;

    /// The loss of a connection that ended with an internal error of quinn's.
    fn lost_with(reason: &str) -> TunnelLost {
        let mut error = ConnectionError::TransportError(TransportErrorCode::INTERNAL_ERROR.into());
        if let ConnectionError::TransportError(error) = &mut error {
            error.reason = reason.to_owned();
        }
        lost(error)
    }

    #[test]
    fn only_an_endpoint_that_ended_is_a_failed_socket() {
        let ended = lost_with(ENDPOINT_ENDED);
        assert!(matches!(ended, TunnelLost::Transport(TransportFault::Socket)), "{ended:?}");
        let other = lost_with("some defect");
        let TunnelLost::Transport(TransportFault::Protocol(reason)) = &other else {
            panic!("{other:?}")
        };
        assert!(reason.contains("some defect"), "{reason}");
    }
}
