//! Denials that every policy begins with: addresses that no dial of kube-apiserver's needs, and that
//! give away a node's credentials or reach what was not named.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Why an address is denied without a rule of the operator's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Builtin {
    /// 169.254.0.0/16 or fe80::/10. Metadata services of most clouds are here.
    LinkLocal,
    /// A metadata service elsewhere.
    Metadata,
    /// 224.0.0.0/4 or ff00::/8.
    Multicast,
    /// 255.255.255.255.
    Broadcast,
    /// 0.0.0.0/8 or ::, which Linux connects to the node itself.
    Unspecified,
}

/// Metadata services that are not link-local, IPv4.
const METADATA_V4: [Ipv4Addr; 3] = [
    // Alibaba Cloud.
    Ipv4Addr::new(100, 100, 100, 200),
    // Azure's WireServer, which hands out the node's bootstrap data.
    Ipv4Addr::new(168, 63, 129, 16),
    // Oracle Cloud, first generation.
    Ipv4Addr::new(192, 0, 0, 192),
];

/// Metadata services that are not link-local, IPv6.
const METADATA_V6: [Ipv6Addr; 5] = [
    // EC2: instance metadata, and the credentials of EKS's pods.
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),
    // Google Cloud.
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    // Oracle Cloud.
    Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
    // Scaleway.
    Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42),
];

impl Builtin {
    /// Every denial.
    pub(super) const ALL: [Self; 5] =
        [Self::LinkLocal, Self::Metadata, Self::Multicast, Self::Broadcast, Self::Unspecified];

    /// The denial of `address`, which is not IPv4-mapped.
    pub(super) fn of(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(v4) if v4.is_link_local() => Some(Self::LinkLocal),
            IpAddr::V4(v4) if METADATA_V4.contains(&v4) => Some(Self::Metadata),
            IpAddr::V4(v4) if v4.is_multicast() => Some(Self::Multicast),
            IpAddr::V4(v4) if v4.is_broadcast() => Some(Self::Broadcast),
            IpAddr::V4(v4) if v4.octets()[0] == 0 => Some(Self::Unspecified),
            IpAddr::V6(v6) if v6.is_unicast_link_local() => Some(Self::LinkLocal),
            IpAddr::V6(v6) if METADATA_V6.contains(&v6) => Some(Self::Metadata),
            IpAddr::V6(v6) if v6.is_multicast() => Some(Self::Multicast),
            IpAddr::V6(v6) if v6.is_unspecified() => Some(Self::Unspecified),
            _ => None,
        }
    }

    /// The denial's value in metrics.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::LinkLocal => "link_local",
            Self::Metadata => "metadata",
            Self::Multicast => "multicast",
            Self::Broadcast => "broadcast",
            Self::Unspecified => "unspecified",
        }
    }

    /// The denial for people.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::LinkLocal => "link-local",
            Self::Metadata => "metadata service",
            other => other.label(),
        }
    }
}
