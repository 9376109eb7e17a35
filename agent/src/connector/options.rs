//! How an attempt is made, as the plan decides it.

/// The carriers that an attempt tries, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CarrierOrder {
    /// QUIC alone.
    Quic,
    /// TCP alone.
    Tcp,
    /// QUIC, and TCP after a head start.
    QuicFirst,
    /// TCP, and QUIC after a head start.
    TcpFirst,
}

impl CarrierOrder {
    /// Name in log lines.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
            Self::QuicFirst => "quic_first",
            Self::TcpFirst => "tcp_first",
        }
    }
}

/// How an attempt is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttemptOptions {
    /// The carriers that are tried.
    pub(crate) order: CarrierOrder,
    /// Whether QUIC's packets may grow beyond the size that every path carries.
    pub(crate) large_packets: bool,
    /// Whether both carriers start together, without a head start for the first.
    pub(crate) at_once: bool,
}
