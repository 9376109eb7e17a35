//! The name of what carries a tunnel.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What carries a tunnel's streams between the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
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

/// A text is not the name of a carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a carrier; write quic, tcp or grpc")]
pub struct ParseCarrierError;

impl FromStr for Carrier {
    type Err = ParseCarrierError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let all = [Self::Quic, Self::Tcp, Self::Grpc];
        all.into_iter().find(|carrier| carrier.name() == name).ok_or(ParseCarrierError)
    }
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back() {
        for carrier in [Carrier::Quic, Carrier::Tcp, Carrier::Grpc] {
            assert_eq!(carrier.to_string().parse(), Ok(carrier));
        }
        assert_eq!("QUIC".parse::<Carrier>(), Err(ParseCarrierError));
    }
}
