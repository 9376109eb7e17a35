//! The set of servers and their addresses, which agents are sent.
//= docs/protocol.md#13-server-set

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
};

use culvert_process::kubernetes::leases::Holder;
use culvert_wire::{
    ServerId,
    bounded::{List, Text},
    codec::MAX_BODY_LEN,
    control::{self, ServerEntry, ServerList},
};
use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::info;

use crate::config::{MAX_ADDRESSES, MAX_SERVERS, ServerSetConfig};

/// Maximum length of the entries of one message, in bytes: with the other fields of a welcome they
/// fit a message.
const MAX_ENTRIES_LEN: usize = MAX_BODY_LEN - 1024;

/// Addresses of each server; none where they are not known.
type Servers = BTreeMap<ServerId, BTreeSet<SocketAddr>>;

/// The set of servers, as far as this one knows it.
#[derive(Debug)]
pub(crate) struct ServerSet {
    own: ServerId,
    advertised: BTreeSet<SocketAddr>,
    /// The servers that flags name.
    fixed: Servers,
    /// Number of servers that a flag says, at least 1.
    count: u32,
    /// The servers that hold Leases; `None` before they were listed.
    leased: Mutex<Option<Servers>>,
    sent: watch::Sender<Arc<control::ServerSet>>,
}

impl ServerSet {
    /// The set that flags describe, of the server `own`, which listens on `port`. With `leases` the
    /// set is not known until Leases were listed.
    pub(crate) fn new(
        own: ServerId,
        port: u16,
        config: &ServerSetConfig,
        count: u32,
        leases: bool,
    ) -> Self {
        let with_port = |address: SocketAddr| match address.port() {
            0 => SocketAddr::new(address.ip(), port),
            _ => address,
        };
        let advertised: BTreeSet<_> = config.advertised.iter().copied().map(with_port).collect();
        let mut fixed = config.addresses.clone();
        if !leases && !advertised.is_empty() {
            fixed.insert(own.clone(), advertised.clone());
        }
        let nothing = Arc::new(control::ServerSet { server_count: 0, servers: List::default() });
        let set = Self {
            own,
            advertised,
            fixed,
            count,
            leased: Mutex::default(),
            sent: watch::Sender::new(nothing),
        };
        set.sent.send_replace(Arc::new(set.message(None)));
        set
    }

    /// This server's own addresses for agents, separated by commas, as its Lease has them; `None`
    /// without one.
    pub(crate) fn advertised(&self) -> Option<String> {
        let addresses: Vec<_> = self.advertised.iter().map(SocketAddr::to_string).collect();
        (!addresses.is_empty()).then(|| addresses.join(","))
    }

    /// What agents are sent now, and each change of it.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<control::ServerSet>> {
        self.sent.subscribe()
    }

    /// Number of servers whose address is known, and of the others that are known.
    pub(crate) fn counts(&self) -> [(&'static str, usize); 2] {
        let servers = self.servers(self.leased.lock().as_ref());
        let known = servers.values().filter(|addresses| !addresses.is_empty()).count();
        [("known", known), ("unknown", servers.len() - known)]
    }

    /// Records the servers that hold Leases.
    pub(crate) fn set_leased<'a>(&self, holders: impl Iterator<Item = &'a Holder>) {
        let mut leased = Servers::new();
        for Holder { id, address, .. } in holders {
            let Ok(id) = id.parse::<ServerId>() else { continue };
            let addresses = address.iter().flat_map(|text| text.split(','));
            let addresses = addresses.filter_map(|text| text.parse::<SocketAddr>().ok());
            leased.entry(id).or_default().extend(addresses.take(MAX_ADDRESSES));
        }
        // Held until the message is out, so that an older set does not follow a newer one.
        let mut last = self.leased.lock();
        let message = self.message(Some(&leased));
        *last = Some(leased);
        let changed = self.sent.send_if_modified(|sent| {
            let changes = **sent != message;
            if changes {
                *sent = Arc::new(message);
            }
            changes
        });
        if changed {
            let sent = self.sent.borrow();
            let addresses = sent.servers.iter().filter(|server| !server.address.is_empty()).count();
            info!(servers = sent.server_count, addresses, "the set of servers has changed");
        }
    }

    /// All servers, this one included; none when the set is not known.
    fn servers(&self, leased: Option<&Servers>) -> Servers {
        let mut servers = self.fixed.clone();
        for (id, addresses) in leased.into_iter().flatten() {
            // A flag counts more than a Lease.
            servers.entry(id.clone()).or_insert_with(|| addresses.clone());
        }
        if leased.is_some() || !servers.is_empty() {
            let own = servers.entry(self.own.clone()).or_default();
            if !self.advertised.is_empty() {
                own.clone_from(&self.advertised);
            }
        }
        servers
    }

    fn message(&self, leased: Option<&Servers>) -> control::ServerSet {
        let servers = self.servers(leased);
        let known = u32::try_from(servers.len()).unwrap_or(u32::MAX);
        control::ServerSet { server_count: known.max(self.count), servers: entries(&servers) }
    }
}

/// As many entries as fit, those with an address first.
fn entries(servers: &Servers) -> ServerList {
    let (known, unknown): (Vec<_>, Vec<_>) =
        servers.iter().partition(|(_, addresses)| !addresses.is_empty());
    let known = known
        .into_iter()
        .flat_map(|(id, addresses)| addresses.iter().map(move |address| (id, address.to_string())));
    let unknown = unknown.into_iter().map(|(id, _)| (id, String::new()));
    let mut length = 0;
    let entries = known
        .chain(unknown)
        .map(|(id, address)| ServerEntry { id: id.clone(), address: Text::truncated(address) });
    let fitting = entries.take_while(|entry| {
        // Each length takes up to three bytes.
        length += entry.id.as_str().len() + entry.address.len() + 6;
        length <= MAX_ENTRIES_LEN
    });
    let fitting: Vec<_> = fitting.take(MAX_SERVERS).collect();
    fitting.try_into().expect("no more than fit were taken")
}

#[cfg(test)]
pub(crate) mod tests;
