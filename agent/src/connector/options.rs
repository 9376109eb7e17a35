//! Which carriers an attempt tries and how QUIC did, how two of them are tried at once, and what is
//! remembered of that.

/// Which carriers are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CarrierOrder {
    /// QUIC alone.
    Quic,
    /// TCP alone.
    Tcp,
    /// QUIC, and TCP a little later.
    QuicFirst,
    /// TCP, and QUIC a little later.
    TcpFirst,
}

/// What is known of QUIC after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuicOutcome {
    /// Nothing: it was not tried, or the server was not reached in any other way either.
    Unknown,
    /// It got through.
    Worked,
    /// It did not, and something else did; in a word.
    Failed(&'static str),
}

/// How an attempt is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttemptOptions {
    /// Which carriers are tried.
    pub order: CarrierOrder,
    /// Whether packets may be larger than any path carries.
    pub large_packets: bool,
    /// Whether the second carrier is tried together with the first, and not a little later.
    pub at_once: bool,
}
