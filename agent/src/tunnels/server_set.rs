//! The set of servers, as servers report it: who they are, and where.
//= docs/protocol.md#13-server-set

use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use culvert_process::rate_limited;
use culvert_wire::{ServerId, control::ServerList};

/// Maximum number of entries of the agent's set, whatever the number of servers that report.
const MAX_ENTRIES: usize = 64;

/// Servers and their addresses; none where they are not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KnownServers(BTreeMap<ServerId, Vec<SocketAddr>>);

impl KnownServers {
    /// What the list of a server that the agent reaches at `reporter` says, without the addresses
    /// that are refused. `None` is a server whose address the agent cannot compare.
    pub(crate) fn accept(list: &ServerList, reporter: Option<IpAddr>) -> Self {
        let mut servers = BTreeMap::<_, Vec<_>>::new();
        for entry in &**list {
            let known = servers.entry(entry.id.clone()).or_default();
            if entry.address.is_empty() {
                continue;
            }
            match accepted(&entry.address, reporter) {
                Ok(address) => known.push(address),
                Err(reason) => rate_limited!(
                    Duration::from_secs(60), per server_id = entry.id, at most 32 in all, WARN,
                    address = %entry.address, %reason,
                    "an address of a server is refused"
                ),
            }
        }
        Self(servers)
    }

    /// The union of these sets, of which earlier ones go first, with at most 64 entries.
    pub(crate) fn union<'a>(sets: impl Iterator<Item = &'a Self>) -> Self {
        let mut union = BTreeMap::<ServerId, Vec<SocketAddr>>::new();
        let mut entries = 0;
        for (id, addresses) in sets.flat_map(|set| &set.0) {
            if !union.contains_key(id) {
                if union.len() == MAX_ENTRIES {
                    continue;
                }
                union.insert(id.clone(), Vec::new());
            }
            let Some(known) = union.get_mut(id) else { continue };
            for address in addresses {
                if entries < MAX_ENTRIES && !known.contains(address) {
                    known.push(*address);
                    entries += 1;
                }
            }
        }
        Self(union)
    }

    /// Whether no server is known.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of servers.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// The addresses of a server; none when they are not known.
    pub(crate) fn addresses(&self, id: &ServerId) -> &[SocketAddr] {
        self.0.get(id).map_or(&[], Vec::as_slice)
    }

    /// The servers whose addresses are known, with them.
    pub(crate) fn located(&self) -> impl Iterator<Item = (&ServerId, &Vec<SocketAddr>)> {
        self.0.iter().filter(|(_, addresses)| !addresses.is_empty())
    }

    /// Number of servers whose address is known, and of the others that are known.
    pub(crate) fn counts(&self) -> [(&'static str, usize); 2] {
        let known = self.located().count();
        [("known", known), ("unknown", self.0.len() - known)]
    }
}

/// Why an address is not dialed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    Malformed,
    NoServer,
    Local,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "it is not an address and a port",
            Self::NoServer => "no server can have it",
            Self::Local => "it is loopback or link-local, and the server that sent it is elsewhere",
        })
    }
}

/// An address that may be dialed.
fn accepted(text: &str, reporter: Option<IpAddr>) -> Result<SocketAddr, Refusal> {
    let address: SocketAddr = text.parse().map_err(|_| Refusal::Malformed)?;
    let has_zone = matches!(address, SocketAddr::V6(v6) if v6.scope_id() != 0);
    if has_zone || address.port() == 0 {
        return Err(Refusal::Malformed);
    }
    let ip = address.ip().to_canonical();
    match Scope::of(ip) {
        Scope::None => Err(Refusal::NoServer),
        Scope::Any => Ok(SocketAddr::new(ip, address.port())),
        local if reporter.map(Scope::of) == Some(local) => Ok(SocketAddr::new(ip, address.port())),
        Scope::Loopback | Scope::LinkLocal => Err(Refusal::Local),
    }
}

/// From where an address can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// From nowhere, as that of one host.
    None,
    /// From the same host.
    Loopback,
    /// From the same link.
    LinkLocal,
    Any,
}

impl Scope {
    fn of(ip: IpAddr) -> Self {
        let is_broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
        let is_link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        match ip {
            _ if ip.is_unspecified() || ip.is_multicast() || is_broadcast => Self::None,
            _ if ip.is_loopback() => Self::Loopback,
            _ if is_link_local => Self::LinkLocal,
            _ => Self::Any,
        }
    }
}

#[cfg(test)]
mod tests {
    use culvert_wire::{bounded::Text, control::ServerEntry};

    use super::*;

    fn list(entries: &[(&str, &str)]) -> ServerList {
        let entry = |(id, address): &(&str, &str)| ServerEntry {
            id: id.parse().unwrap(),
            address: Text::try_from(*address).unwrap(),
        };
        entries.iter().map(entry).collect::<Vec<_>>().try_into().unwrap()
    }

    #[test]
    fn addresses_are_dialed_unless_no_server_can_have_them_or_they_are_local_elsewhere() {
        let far = Some("192.0.2.1".parse().unwrap());
        let here = Some("127.0.0.1".parse().unwrap());
        let linked = Some("169.254.7.7".parse().unwrap());
        for (text, reporter, expected) in [
            ("10.0.0.2:8132", far, Ok("10.0.0.2:8132")),
            ("10.0.0.2:8132", None, Ok("10.0.0.2:8132")),
            ("[::ffff:10.0.0.2]:8132", far, Ok("10.0.0.2:8132")),
            ("[2001:db8::1]:8132", far, Ok("[2001:db8::1]:8132")),
            ("server-1:8132", far, Err(Refusal::Malformed)),
            ("10.0.0.2", far, Err(Refusal::Malformed)),
            ("10.0.0.2:0", far, Err(Refusal::Malformed)),
            ("[fe80::1%3]:8132", linked, Err(Refusal::Malformed)),
            ("0.0.0.0:8132", here, Err(Refusal::NoServer)),
            ("[::]:8132", here, Err(Refusal::NoServer)),
            ("224.0.0.1:8132", far, Err(Refusal::NoServer)),
            ("[ff02::1]:8132", far, Err(Refusal::NoServer)),
            ("255.255.255.255:8132", far, Err(Refusal::NoServer)),
            ("127.0.0.2:8132", far, Err(Refusal::Local)),
            ("127.0.0.2:8132", None, Err(Refusal::Local)),
            ("127.0.0.2:8132", linked, Err(Refusal::Local)),
            ("[::1]:8132", far, Err(Refusal::Local)),
            ("[::ffff:127.0.0.1]:8132", far, Err(Refusal::Local)),
            ("127.0.0.2:8132", here, Ok("127.0.0.2:8132")),
            ("169.254.169.254:80", far, Err(Refusal::Local)),
            ("169.254.169.254:80", here, Err(Refusal::Local)),
            ("169.254.8.8:8132", linked, Ok("169.254.8.8:8132")),
            ("[fe80::1]:8132", far, Err(Refusal::Local)),
        ] {
            let expected = expected.map(|address| address.parse::<SocketAddr>().unwrap());
            assert_eq!(accepted(text, reporter), expected, "{text} from {reporter:?}");
        }
    }

    #[test]
    fn a_server_without_a_usable_address_is_known_nevertheless() {
        let servers = KnownServers::accept(
            &list(&[
                ("a", ""),
                ("b", "127.0.0.1:1"),
                ("c", "10.0.0.3:1"),
                ("c", "[2001:db8::3]:1"),
            ]),
            None,
        );
        assert_eq!(servers.counts(), [("known", 1), ("unknown", 2)]);
        assert_eq!(servers.addresses(&"c".parse().unwrap()).len(), 2);
        assert_eq!(servers.addresses(&"a".parse().unwrap()), []);
    }

    #[test]
    fn the_union_of_many_sets_is_bounded() {
        let sets: Vec<_> = (0..10)
            .map(|set| {
                let ids: Vec<_> = (0..60).map(|id| format!("{set}-{id}")).collect();
                let entries: Vec<_> = ids.iter().map(|id| (id.as_str(), "10.0.0.1:1")).collect();
                KnownServers::accept(&list(&entries), None)
            })
            .collect();
        let union = KnownServers::union(sets.iter());
        assert_eq!(union.counts(), [("known", 64), ("unknown", 0)]);
        let addresses: Vec<_> = (1..61).map(|host| format!("10.0.0.{host}:1")).collect();
        let of_one: Vec<_> = addresses.iter().map(|address| ("a", address.as_str())).collect();
        let other: Vec<_> = (61..121).map(|host| format!("10.0.0.{host}:1")).collect();
        let of_other: Vec<_> = other.iter().map(|address| ("a", address.as_str())).collect();
        let sets = [list(&of_one), list(&of_other)].map(|list| KnownServers::accept(&list, None));
        assert_eq!(KnownServers::union(sets.iter()).addresses(&"a".parse().unwrap()).len(), 64);
    }
}
