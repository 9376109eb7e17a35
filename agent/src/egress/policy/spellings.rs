//! The addresses that one address leads to: itself, and IPv4 addresses written into an IPv6 one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Positions of the IPv4 address's octets in an IPv6 one behind a NAT64 prefix of 96, 64, 56 and 48
/// bits (RFC 6052 §2.2).
const NAT64: [[usize; 4]; 4] = [[12, 13, 14, 15], [9, 10, 11, 12], [7, 9, 10, 11], [6, 7, 9, 10]];

/// An address, and the IPv4 addresses that translators and tunnels forward it to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spellings {
    /// The address; IPv4 where it is IPv4-mapped, because the kernel connects to that.
    pub(super) address: IpAddr,
    embedded: Vec<Ipv4Addr>,
}

impl Spellings {
    pub(super) fn of(address: IpAddr) -> Self {
        let address = address.to_canonical();
        let embedded = match address {
            IpAddr::V4(_) => Vec::new(),
            IpAddr::V6(v6) => embedded(v6),
        };
        Self { address, embedded }
    }

    /// The address and those that it leads to.
    pub(super) fn iter(&self) -> impl Iterator<Item = IpAddr> {
        std::iter::once(self.address).chain(self.embedded.iter().copied().map(IpAddr::V4))
    }
}

/// The IPv4 addresses in `address`.
fn embedded(address: Ipv6Addr) -> Vec<Ipv4Addr> {
    let octets = address.octets();
    let at = |positions: [usize; 4]| Ipv4Addr::from(positions.map(|position| octets[position]));
    let segments = address.segments();
    let mut found = match segments {
        // SIIT (RFC 2765 §2.1).
        [0, 0, 0, 0, 0xffff, 0, ..] => vec![at(NAT64[0])],
        // NAT64's well-known prefix, and IPv4-compatible addresses.
        [0x64, 0xff9b, 0, 0, 0, 0, ..] | [0, 0, 0, 0, 0, 0, ..] => vec![at(NAT64[0])],
        // NAT64's prefix for local use has any length (RFC 8215 §3).
        [0x64, 0xff9b, 1, ..] => NAT64.map(at).into(),
        // 6to4.
        [0x2002, ..] => vec![at([2, 3, 4, 5])],
        // Teredo: the server's address, and the client's, inverted.
        [0x2001, 0, ..] => {
            let client = u32::from(at(NAT64[0]));
            vec![at([4, 5, 6, 7]), Ipv4Addr::from(!client)]
        }
        _ => Vec::new(),
    };
    // ISATAP, behind any prefix, with or without the bit of a unique identifier (RFC 5214 §6.1).
    if segments[4] & !0x0200 == 0 && segments[5] == 0x5efe {
        found.push(at(NAT64[0]));
    }
    // Zeros are no address: they are in ::1, and behind a prefix of another length.
    found.into_iter().filter(|v4| v4.octets()[0] != 0).collect()
}
