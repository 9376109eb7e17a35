//! The addresses of this server and of the others, which agents are sent.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
};

use culvert_process::faults::Faults;
use culvert_wire::ServerId;

use super::Flags;

/// Maximum number of entries that are sent: addresses, and servers without one.
pub(crate) const MAX_SERVERS: usize = 64;
/// Maximum number of addresses of one server: one of each family.
pub(crate) const MAX_ADDRESSES: usize = 2;

/// The addresses of servers that flags name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerSetConfig {
    /// This server's addresses for agents, at most two; none when they are not known. Port 0 is the
    /// port that the server listens on.
    pub advertised: BTreeSet<SocketAddr>,
    /// The servers that `--server-addresses` names with at most two addresses each and 64 in all,
    /// this one included.
    pub addresses: BTreeMap<ServerId, BTreeSet<SocketAddr>>,
}

/// Checks the flags of the server set, for a server with this id and port for agents.
pub(super) fn check(
    flags: &Flags,
    server_id: &ServerId,
    port: u16,
    faults: &mut Faults,
) -> ServerSetConfig {
    const ADVERTISE: &str = "advertise-address";
    const ADDRESSES: &str = "server-addresses";
    let own = flags.advertise_address.split(',').map(str::trim).filter(|text| !text.is_empty());
    let own = own.filter_map(|text| checked(parse(text, port), ADVERTISE, faults));
    let own: BTreeSet<_> = own.collect();
    let reason = format!("has more than {MAX_ADDRESSES} addresses");
    faults.require(own.len() <= MAX_ADDRESSES, ADVERTISE, reason);
    let mut addresses: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    let entries = flags.server_addresses.iter().flat_map(|list| list.split(','));
    for entry in entries.map(str::trim).filter(|entry| !entry.is_empty()) {
        let Some((id, address)) = entry.rsplit_once('=') else {
            faults.add(ADDRESSES, format!("{entry:?} is not ID=ADDRESS:PORT"));
            continue;
        };
        let id = id.parse::<ServerId>().map_err(|error| format!("{entry:?}: {error}"));
        let id = checked(id, ADDRESSES, faults);
        let address = checked(parse(address, port), ADDRESSES, faults);
        let (Some(id), Some(address)) = (id, address) else { continue };
        addresses.entry(id).or_default().insert(address);
    }
    for (id, _) in addresses.iter().filter(|(_, addresses)| addresses.len() > MAX_ADDRESSES) {
        let reason = format!("{:?} has more than {MAX_ADDRESSES} addresses", id.as_str());
        faults.add(ADDRESSES, reason);
    }
    let reason = format!("names more than {MAX_SERVERS} addresses");
    let count = addresses.values().map(BTreeSet::len).sum::<usize>();
    faults.require(count <= MAX_SERVERS, ADDRESSES, reason);
    let listed = addresses.get(server_id).cloned().unwrap_or_default();
    if !own.is_empty() && !listed.is_empty() {
        let listed_text: Vec<_> = listed.iter().map(SocketAddr::to_string).collect();
        let listed_text = listed_text.join(",");
        let reason = format!("must not differ from {listed_text}, which --server-addresses says");
        faults.require(own == listed, ADVERTISE, reason);
    }
    if !addresses.is_empty() && listed.is_empty() && own.is_empty() {
        faults.warn(
            ADDRESSES,
            format!(
                "does not name this server, {:?}: see --server-id and --advertise-address",
                server_id.as_str()
            ),
        );
    }
    ServerSetConfig { advertised: if own.is_empty() { listed } else { own }, addresses }
}

fn checked<T>(result: Result<T, String>, flag: &'static str, faults: &mut Faults) -> Option<T> {
    result.map_err(|fault| faults.add(flag, fault)).ok()
}

/// An address with or without a port, which is `port` by default.
fn parse(text: &str, port: u16) -> Result<SocketAddr, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let bare = bare.filter(|text| text.parse::<Ipv6Addr>().is_ok()).unwrap_or(text);
    let address = match bare.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, port),
        Err(_) => text.parse().map_err(|_| {
            format!(
                "{text:?} is neither an address nor an address and a port, such as \
                 192.0.2.7:8132 or [2001:db8::7]:8132"
            )
        })?,
    };
    let ip = address.ip().to_canonical();
    let is_broadcast = matches!(ip, IpAddr::V4(ip) if ip.is_broadcast());
    let is_usable = !ip.is_unspecified() && !ip.is_multicast() && !is_broadcast;
    match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => Err(format!("{text:?} has a zone")),
        _ if !is_usable => Err(format!("{text:?} is no address of one server")),
        _ if text.ends_with(":0") && bare.parse::<IpAddr>().is_err() => {
            Err(format!("{text:?} has no port"))
        }
        _ => Ok(SocketAddr::new(ip, address.port())),
    }
}
