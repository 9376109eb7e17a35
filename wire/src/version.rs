//! The protocol's name and version, and how two peers agree on what both can do.

use serde::{Deserialize, Serialize};

/// The name of the protocol and its major version in TLS (ALPN, RFC 7301).
///
/// Peers with different names cannot talk to each other. Smaller changes are negotiated with
/// [`Features`] under one name.
//= docs/protocol.md#2-version-and-features
pub const ALPN: &[u8] = b"culvert/1";

/// Revision of the protocol below the ALPN name, sent in hello and welcome.
///
/// It is for logs; [`Features`] alone decide how a peer behaves.
pub const REVISION: u16 = 1;

/// The optional behaviours a peer offers, as a set of bits.
///
/// Both peers use the intersection of what they offered. A bit that one peer does not know is not
/// in it, so a newer peer can offer anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Features(u64);

impl Features {
    /// No optional behaviour.
    pub const NONE: Self = Self(0);
    /// Pings on the control stream are answered.
    pub const PING: Self = Self(1 << 0);
    /// A drain message is understood: no new dials, old ones end, then the tunnel closes.
    pub const DRAIN: Self = Self(1 << 1);
    /// Datagrams that carry second copies of thin writes are understood.
    pub const HEDGE: Self = Self(1 << 2);

    /// Agents renew the proof of their identity before it expires, and servers understand
    /// [`Renewal`](crate::control::Renewal).
    pub const RENEWAL: Self = Self(1 << 3);
    /// Servers send the set of servers with their addresses, and agents use it.
    pub const SERVER_SET: Self = Self(1 << 4);
    /// Datagrams that carry repair shards of short bursts, or the end of a stream, are understood.
    pub const REPAIR: Self = Self(1 << 5);
    /// Streams are resumed on another tunnel (see [`crate::resume`]).
    pub const RESUME: Self = Self(1 << 6);

    /// Everything this build offers.
    pub const fn supported() -> Self {
        Self::PING
            .union(Self::DRAIN)
            .union(Self::HEDGE)
            .union(Self::RENEWAL)
            .union(Self::SERVER_SET)
            .union(Self::REPAIR)
            .union(Self::RESUME)
    }

    /// The features of this set that are not in the other.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The features in both sets.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The features in either set.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether every bit of `other` is in this set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The names of the known features in the set.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let known = [
            (Self::PING, "ping"),
            (Self::DRAIN, "drain"),
            (Self::HEDGE, "hedge"),
            (Self::RENEWAL, "renewal"),
            (Self::SERVER_SET, "server_set"),
            (Self::REPAIR, "repair"),
            (Self::RESUME, "resume"),
        ];
        known.into_iter().filter(move |(bit, _)| self.contains(*bit)).map(|(_, name)| name)
    }

    /// The set as it crosses the wire.
    pub const fn bits(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bits_fall_out_of_the_intersection() {
        let newer = Features(u64::MAX);
        let agreed = newer.intersection(Features::supported());
        assert_eq!(agreed, Features::supported());
        assert!(agreed.contains(Features::PING));
        assert!(!Features::NONE.contains(Features::DRAIN));
    }

    #[test]
    fn sets_are_combined_bit_by_bit() {
        let both = Features::PING.union(Features::HEDGE);
        assert_eq!(both.bits(), 0b101);
        assert_eq!(both.union(Features::PING), both);
        assert!(both.contains(Features::PING) && both.contains(Features::NONE));
        assert!(!both.contains(Features::DRAIN.union(Features::PING)));
        assert_eq!(both.intersection(Features::DRAIN), Features::NONE);
        assert_eq!(Features::supported().bits(), 0b111_1111);
        assert_eq!(Features::supported().names().count(), 7);
        assert_eq!(both.without(Features::HEDGE), Features::PING);
        assert_eq!(Features::DRAIN.names().collect::<Vec<_>>(), ["drain"]);
        assert_eq!(Features(u64::MAX).names().last(), Some("resume"));
    }
}
