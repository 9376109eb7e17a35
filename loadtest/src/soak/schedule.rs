//! Disturbances, in an order that the seed decides.

use std::fmt;

/// What is done to processes or link during one phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Disturbance {
    /// Nothing: the load alone.
    None,
    /// An agent gets SIGTERM and is started again.
    AgentTerminated,
    /// An agent gets SIGKILL and is started again.
    AgentKilled,
    /// A server gets SIGTERM and is started again.
    ServerTerminated,
    /// A server gets SIGKILL and is started again.
    ServerKilled,
    /// The node's NAT forgets its mappings.
    NatRebound,
    /// The node gets another address.
    AddressChanged,
    /// Packets are lost.
    Loss,
    /// UDP is dropped for a while.
    UdpDropped,
    /// UDP is answered with ICMP for a while.
    UdpRejected,
    /// New certificates are written and every process gets SIGHUP.
    CertificatesRotated,
    /// Connections that prove nothing are opened to every port.
    Strangers,
}

impl Disturbance {
    const ALL: [Self; 12] = [
        Self::None,
        Self::AgentTerminated,
        Self::AgentKilled,
        Self::ServerTerminated,
        Self::ServerKilled,
        Self::NatRebound,
        Self::AddressChanged,
        Self::Loss,
        Self::UdpDropped,
        Self::UdpRejected,
        Self::CertificatesRotated,
        Self::Strangers,
    ];
}

impl fmt::Display for Disturbance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::AgentTerminated => "agent terminated",
            Self::AgentKilled => "agent killed",
            Self::ServerTerminated => "server terminated",
            Self::ServerKilled => "server killed",
            Self::NatRebound => "NAT rebound",
            Self::AddressChanged => "node's address changed",
            Self::Loss => "packets lost",
            Self::UdpDropped => "UDP dropped",
            Self::UdpRejected => "UDP rejected",
            Self::CertificatesRotated => "certificates rotated",
            Self::Strangers => "strangers",
        })
    }
}

/// Disturbances without an end: rounds of all of them, each round in an order of its own. Equal
/// seeds give equal orders.
pub(super) fn schedule(seed: u64) -> impl Iterator<Item = Disturbance> {
    let mut random = fastrand::Rng::with_seed(seed);
    std::iter::repeat_with(move || {
        let mut round = Disturbance::ALL;
        random.shuffle(&mut round);
        round
    })
    .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_has_every_disturbance_in_an_order_of_the_seed() {
        let count = Disturbance::ALL.len();
        let order = |seed| schedule(seed).take(3 * count).collect::<Vec<_>>();
        assert_eq!(order(7), order(7));
        assert_ne!(order(7), order(8));
        for round in order(7).chunks(count) {
            assert!(Disturbance::ALL.iter().all(|one| round.contains(one)), "{round:?}");
        }
    }
}
