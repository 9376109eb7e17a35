//! The name of what carries a tunnel.

use std::fmt;

/// What carries a tunnel's streams between the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Carrier {
    /// QUIC over UDP: streams are independent of each other.
    Quic,
    /// QMux over TLS over TCP: a lost packet delays every stream.
    Tcp,
    /// Konnectivity's gRPC stream over TLS over TCP: connections also wait for each other's
    /// readers.
    Grpc,
}

impl Carrier {
    /// The carrier's name in logs and metric labels: `quic`, `tcp` or `grpc`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
            Self::Grpc => "grpc",
        }
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
