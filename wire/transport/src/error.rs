//! Why a tunnel could not be made, why one ended, and why a stream cannot be used.
//!
//! Every cause that a caller may have to distinguish is a variant or a number. Texts are for people
//! alone: they may change, and nothing matches on them.

mod tls;

use std::{io, net::SocketAddr};

use culvert_wire::{
    bounded::{Escaped, PeerText},
    code::{CloseCode, StreamCode},
    frame::FrameError,
    version::ALPN,
};
use rustls::AlertDescription;

use crate::quic::udp::BindError;

/// Why a tunnel could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The local socket could not be opened.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The TLS configuration has no cipher suite that QUIC's first packets can be protected with;
    /// the fault is this side's.
    #[error("unusable TLS configuration: no cipher suite for QUIC's initial packets")]
    CipherSuites,
    /// The text is not a name that a certificate can be checked for.
    #[error("invalid server name: {0}")]
    ServerName(String),
    /// The address cannot be connected to: it has no port, or its family is not available.
    #[error("invalid remote address: {0}")]
    Address(SocketAddr),
    /// The handshake failed.
    #[error("{0}")]
    Handshake(#[from] TunnelLost),
    /// The network reports that no process listens at the server's address.
    #[error("connection refused")]
    Refused,
    /// This host or the network reports that no packet gets to the server: there is no route, or a
    /// packet filter forbids it.
    #[error("{0}")]
    Unreachable(IoFault),
    /// The proxy in front of the server did not let the connection through.
    #[error("proxy {proxy}: {fault}")]
    Proxy {
        /// The proxy, without credentials.
        proxy: String,
        /// Why it did not.
        fault: ProxyFault,
    },
    /// The peer speaks another protocol.
    #[error("the peer did not agree on the protocol {}", String::from_utf8_lossy(ALPN))]
    Protocol,
}

impl From<TransportFault> for ConnectError {
    fn from(fault: TransportFault) -> Self {
        Self::Handshake(fault.into())
    }
}

/// Why a proxy did not let a connection through.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProxyFault {
    /// The proxy cannot be connected to.
    #[error("it cannot be reached: {0}")]
    Unreachable(IoFault),
    /// The TLS handshake with the proxy itself failed.
    #[error("TLS with it failed: {0}")]
    Tls(String),
    /// A `CONNECT` request cannot name such a server.
    #[error("it cannot be asked for the server: {0}")]
    Server(String),
    /// The connection broke during the request.
    #[error("the connection broke: {0}")]
    Broken(IoFault),
    /// The proxy closed the connection instead of answering.
    #[error("it closed the connection without an answer")]
    Closed,
    /// The proxy did not answer within the idle time-out.
    #[error("it did not answer in time")]
    TimedOut,
    /// The answer is not HTTP.
    #[error("it does not speak HTTP/1.1")]
    Malformed,
    /// The head of the answer is longer than the limit.
    #[error("its answer's head is too long")]
    LongHead,
    /// The proxy refused.
    #[error("it refuses: {status} {reason}")]
    Refused {
        /// The status of its answer: 407 asks for other credentials.
        status: u16,
        /// The reason phrase, in printable ASCII.
        reason: String,
    },
}

/// Why a tunnel ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelLost {
    /// The peer closed it and said why.
    #[error("closed by the peer: {code}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    ClosedByPeer {
        /// The peer's code.
        code: CloseCode,
        /// The peer's text, possibly empty.
        reason: PeerText,
    },
    /// This side closed it.
    #[error("closed by this side: {code}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    ClosedHere {
        /// This side's code.
        code: CloseCode,
        /// This side's text, possibly empty.
        reason: String,
    },
    /// Nothing arrived for the whole idle time-out.
    #[error("nothing came within the idle time-out")]
    TimedOut,
    /// The peer does not know the tunnel any more (RFC 9000 §10.3): its process was restarted, or it
    /// gave the tunnel up while this side could not be reached.
    #[error("the peer no longer knows the tunnel: it was restarted, or gave the tunnel up")]
    PeerRestarted,
    /// The carrier failed below the tunnel.
    #[error(transparent)]
    Transport(#[from] TransportFault),
}

/// The codes of closes after which a tunnel's streams may go on over another one.
const RESUMABLE: [CloseCode; 3] =
    [CloseCode::UNRESPONSIVE, CloseCode::SUPERSEDED, CloseCode::TOO_MANY_PINGS];

impl TunnelLost {
    /// Every cause as a metric label.
    pub fn labels() -> impl Iterator<Item = &'static str> {
        let codes = CloseCode::ALL.iter().map(|code| code.name());
        codes.chain(["unknown", "timed_out", "peer_restarted", "transport"])
    }

    /// Whether neither side has closed the tunnel on purpose: the path, the carrier or the peer's
    /// process has failed.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::ClosedByPeer { .. } => false,
            Self::ClosedHere { code, .. } => *code == CloseCode::UNRESPONSIVE,
            Self::TimedOut | Self::PeerRestarted | Self::Transport(_) => true,
        }
    }

    /// Whether the tunnel's streams may go on over another tunnel between the same processes.
    //= docs/protocol.md#14-resumption
    pub fn is_resumable(&self) -> bool {
        match self {
            Self::ClosedByPeer { code, .. } | Self::ClosedHere { code, .. } => {
                RESUMABLE.contains(code)
            }
            Self::TimedOut | Self::PeerRestarted | Self::Transport(_) => true,
        }
    }

    /// The labels of the causes after which streams may go on.
    pub fn resumable_labels() -> impl Iterator<Item = &'static str> {
        RESUMABLE.iter().map(|code| code.name()).chain(["timed_out", "peer_restarted", "transport"])
    }

    /// The cause as a metric label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::ClosedByPeer { code, .. } | Self::ClosedHere { code, .. } => code.name(),
            Self::TimedOut => "timed_out",
            Self::PeerRestarted => "peer_restarted",
            Self::Transport(_) => "transport",
        }
    }
}

/// Why a carrier failed below the tunnel: in its handshake, its socket or its protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportFault {
    /// The byte stream ended although nothing had closed the tunnel.
    #[error("the connection ended without a close")]
    Ended,
    /// The operating system reported an error of the socket.
    #[error(transparent)]
    Io(#[from] IoFault),
    /// This side's TLS refused the peer: its certificate, its parameters or its bytes.
    #[error("refused by this side: {}", Escaped(&tls::refusal(reason)))]
    TlsRefused {
        /// The alert that the peer was sent (RFC 8446 §6), if one fits.
        alert: Option<u8>,
        /// The fault, as the TLS library reports it. It may quote names of the peer's certificate.
        reason: String,
    },
    /// The peer's TLS refused this side.
    #[error("refused by the peer: {}", tls::alert(*alert))]
    TlsAlert {
        /// The alert that the peer sent (RFC 8446 §6).
        alert: u8,
        /// The fault, as the TLS library reports it.
        reason: String,
    },
    /// The peer broke the carrier's protocol.
    #[error("the peer broke the protocol: {}", Escaped(.0))]
    Protocol(String),
    /// The peer's carrier closed the connection, with a code of the carrier's own protocol.
    #[error("{reason}")]
    Aborted {
        /// The code (RFC 9000 §20.1).
        code: u64,
        /// The peer's reason, for people.
        reason: PeerText,
    },
    /// The peers have no version of the carrier's protocol in common.
    #[error("the peers have no version of QUIC in common")]
    Version,
    /// The UDP socket failed, or its endpoint.
    #[error("the UDP socket has failed")]
    Socket,
    /// This side cannot number another connection.
    #[error("no connection id is left")]
    Exhausted,
}

impl TransportFault {
    /// Whether the peer's bytes are no TLS: another service has the port.
    pub fn is_not_tls(&self) -> bool {
        matches!(self, Self::TlsRefused { reason, .. } if tls::is_not_tls(reason))
    }

    /// Whether this side refused a certificate that is faulty in itself, whatever the clock and the
    /// CAs: it ends before it begins, or is of X.509 version 1.
    pub fn needs_another_certificate(&self) -> bool {
        let Self::TlsRefused { reason, .. } = self else { return false };
        tls::needs_another_certificate(reason)
    }
}

impl From<io::Error> for TransportFault {
    /// Finds the TLS fault behind an I/O error of a TLS stream.
    fn from(error: io::Error) -> Self {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match tls {
            Some(rustls::Error::AlertReceived(alert)) => {
                Self::TlsAlert { alert: (*alert).into(), reason: error.to_string() }
            }
            Some(tls) => Self::TlsRefused { alert: alert(tls), reason: error.to_string() },
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::Ended,
            None => Self::Io(error.into()),
        }
    }
}

impl From<io::Error> for TunnelLost {
    fn from(error: io::Error) -> Self {
        Self::Transport(error.into())
    }
}

/// The alert with which rustls answers this fault, where it depends on the fault alone.
fn alert(error: &rustls::Error) -> Option<u8> {
    let alert = match error {
        rustls::Error::InvalidCertificate(fault) => AlertDescription::from(fault.clone()),
        rustls::Error::NoCertificatesPresented => AlertDescription::CertificateRequired,
        rustls::Error::NoApplicationProtocol => AlertDescription::NoApplicationProtocol,
        _ => return None,
    };
    Some(alert.into())
}

/// An error of the operating system that can be compared and copied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct IoFault {
    /// The error's kind, for programs.
    pub kind: io::ErrorKind,
    /// The error's text, for people.
    pub text: String,
}

impl From<io::Error> for IoFault {
    fn from(error: io::Error) -> Self {
        Self { kind: error.kind(), text: error.to_string() }
    }
}

/// Why nothing more can be written to a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The peer stopped the stream: it reads no more of it.
    #[error("stopped by the peer: {0}")]
    Stopped(StreamCode),
    /// The tunnel is lost.
    #[error("tunnel lost: {0}")]
    Lost(#[from] TunnelLost),
    /// This side has ended the stream already; the fault is this side's.
    #[error("stream has ended already")]
    Ended,
}

/// Why nothing more can be read from a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The peer reset the stream: what it had sent is incomplete.
    #[error("reset by the peer: {0}")]
    Reset(StreamCode),
    /// The tunnel is lost.
    #[error("tunnel lost: {0}")]
    Lost(#[from] TunnelLost),
    /// This side has stopped the stream already; the fault is this side's.
    #[error("stream has been stopped already")]
    Ended,
}

/// Why a frame could not be read from a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadFrameError {
    /// The stream ended between frames.
    #[error("the stream ended")]
    End,
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The frame breaks the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
}

#[cfg(test)]
mod tests {
    use rustls::CertificateError;

    use super::*;

    fn tls(error: rustls::Error) -> TransportFault {
        io::Error::new(io::ErrorKind::InvalidData, error).into()
    }

    #[test]
    fn a_tls_fault_is_found_behind_an_io_error() {
        let unknown_ca = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        assert!(matches!(tls(unknown_ca), TransportFault::TlsRefused { alert: Some(48), .. }));
        for (error, expected) in [
            (rustls::Error::NoCertificatesPresented, 116),
            (rustls::Error::NoApplicationProtocol, 120),
        ] {
            let fault = tls(error);
            assert!(
                matches!(fault, TransportFault::TlsRefused { alert: Some(alert), .. } if alert == expected),
                "{fault:?}",
            );
        }
        let received = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
        assert!(matches!(tls(received), TransportFault::TlsAlert { alert: 116, .. }));
        let other = tls(rustls::Error::DecryptError);
        assert!(matches!(other, TransportFault::TlsRefused { alert: None, .. }));
    }

    #[test]
    fn an_io_error_keeps_its_kind_and_its_text() {
        let reset = || io::Error::from(io::ErrorKind::ConnectionReset);
        let fault = TransportFault::from(reset());
        assert_eq!(fault, TransportFault::Io(reset().into()));
        assert_eq!(fault.to_string(), "connection reset");
        let ended = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert_eq!(TransportFault::from(ended), TransportFault::Ended);
    }

    #[test]
    fn what_ended_a_tunnel_has_a_label() {
        let code = CloseCode::SUPERSEDED;
        let closed = TunnelLost::ClosedByPeer { code, reason: PeerText::lossy(b"newer") };
        assert_eq!(closed.label(), "superseded");
        assert_eq!(closed.to_string(), "closed by the peer: superseded: newer");
        let forging = TunnelLost::ClosedByPeer { code, reason: PeerText::lossy(b"\nINFO") };
        assert_eq!(forging.to_string(), "closed by the peer: superseded: \\nINFO");
        let closed = TunnelLost::ClosedHere { code, reason: String::new() };
        assert_eq!(closed.to_string(), "closed by this side: superseded");
        assert_eq!(TunnelLost::TimedOut.label(), "timed_out");
        assert_eq!(TunnelLost::PeerRestarted.label(), "peer_restarted");
        assert_eq!(TunnelLost::from(TransportFault::Ended).label(), "transport");
        let labels: Vec<_> = TunnelLost::labels().collect();
        for lost in [closed, TunnelLost::TimedOut, TunnelLost::PeerRestarted] {
            assert!(labels.contains(&lost.label()), "{lost}");
        }
    }
}
