//! The network that a peer connects from.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr},
};

/// Bits of an IPv6 address that one customer of a network has in common: the smallest assignment
/// to a site (RFC 6177).
const IPV6_PREFIX: u32 = 56;

/// Source of connections: one IPv4 address, or the 2^72 IPv6 addresses of one site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::agents) struct Source(IpAddr);

impl Source {
    /// The source of an address; an IPv4 address that is mapped to IPv6 is that IPv4 address.
    pub(in crate::agents) fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => {
                let mask = u128::MAX << (128 - IPV6_PREFIX);
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
            }
        })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            IpAddr::V4(address) => write!(f, "{address}"),
            IpAddr::V6(prefix) => write!(f, "{prefix}/{IPV6_PREFIX}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(address: &str) -> String {
        Source::of(address.parse().unwrap()).to_string()
    }

    #[test]
    fn a_source_is_one_ipv4_address_or_the_first_56_bits_of_an_ipv6_address() {
        assert_eq!(source("192.0.2.7"), "192.0.2.7");
        assert_ne!(source("192.0.2.7"), source("192.0.2.8"));
        assert_eq!(source("2001:db8:1:2ff::1"), "2001:db8:1:200::/56");
        assert_eq!(source("2001:db8:1:200::1"), source("2001:db8:1:2ff:ffff::2"));
        assert_ne!(source("2001:db8:1:200::1"), source("2001:db8:1:300::1"));
    }

    #[test]
    fn an_ipv4_address_that_is_mapped_to_ipv6_is_the_ipv4_address() {
        assert_eq!(source("::ffff:192.0.2.7"), source("192.0.2.7"));
        assert_ne!(source("::ffff:192.0.2.7"), source("::ffff:192.0.2.8"));
    }
}
