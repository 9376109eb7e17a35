//! The addresses at which an attempt looks for servers.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use culvert_transport::tcp::{Proxies, Route};
use parking_lot::Mutex;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::{
    config::ServersConfig,
    connector::{error::ResolveError, options::CarrierOrder},
    lookups::{Limits, Lookups, Resolve},
    metrics::LookupMetrics,
    race::interleave,
};

/// Time for the resolver to answer.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the resolver to answer where earlier addresses can be used instead. Most lookups take
/// less, and an attempt is to take less than a second.
const LOOKUP_PATIENCE: Duration = Duration::from_millis(500);
/// A thread for the servers' name, which no target's name can take.
const LOOKUP_LIMITS: Limits = Limits { running: 1, waiting: 1 };

/// Where one server may be, for each carrier.
#[derive(Clone, Debug)]
pub(crate) struct ServerAddress {
    /// The address for QUIC; `None` where only a proxy can resolve the server's name.
    pub(crate) quic: Option<SocketAddr>,
    /// The route for TCP.
    pub(crate) tcp: Route,
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.tcp, self.quic) {
            (Route::Proxied { host, port, .. }, None) => write!(f, "{host} port {port}"),
            (Route::Proxied { .. }, Some(address)) => write!(f, "{address}"),
            (Route::Direct(address), _) => write!(f, "{address}"),
        }
    }
}

/// Addresses that are tried earlier or later than others.
#[derive(Clone, Debug, Default)]
pub(crate) struct Preference {
    /// The address that is tried first.
    pub(crate) first: Option<SocketAddr>,
    /// Addresses that are tried last, because the agent has a tunnel to a server there.
    pub(crate) last: Vec<SocketAddr>,
}

/// One address to try.
#[derive(Clone, Debug)]
pub(crate) struct Candidate {
    /// The address.
    pub(crate) address: ServerAddress,
    /// The carriers that are worth trying there.
    pub(crate) order: CarrierOrder,
    /// Whether it is one of [`Preference::last`].
    pub(crate) is_last: bool,
}

/// The servers' name, and the addresses that it had last.
#[derive(Debug)]
pub(crate) struct ServerName {
    host: String,
    port: u16,
    lookups: Lookups,
    last_found: LastFound,
    /// Whether the last lookup failed and earlier addresses were used.
    uses_last_found: AtomicBool,
}

impl ServerName {
    /// The name of `servers`, which `resolver` resolves.
    pub(crate) fn new(
        servers: &ServersConfig,
        resolver: impl Resolve,
        metrics: LookupMetrics,
    ) -> Self {
        let last_found = LastFound::default();
        let resolver = Remembering { resolver, last_found: last_found.clone() };
        Self {
            host: servers.host.clone(),
            port: servers.port,
            lookups: Lookups::new(resolver, LOOKUP_LIMITS, metrics),
            last_found,
            uses_last_found: AtomicBool::new(false),
        }
    }

    /// The addresses to try, in random order, so that every server behind a name is found, but in
    /// turns of the two families, and by preference.
    ///
    /// When the lookup fails, the addresses that the last good one found are used.
    ///
    /// # Errors
    /// When there is no address, unless TCP may be tried through a proxy, which resolves the name
    /// itself.
    ///
    /// # Cancel safety
    /// Cancel safe. A lookup that has begun goes on, and its answer is used by the next call.
    pub(crate) async fn candidates(
        &self,
        proxies: &Proxies,
        order: CarrierOrder,
        preference: &Preference,
    ) -> Result<Vec<Candidate>, ResolveError> {
        let (host, port) = (&self.host, self.port);
        let proxied = proxies.proxy_for(host, port).map(|proxy| Route::Proxied {
            proxy,
            host: host.to_owned(),
            port,
        });
        let found = self.addresses().await;
        candidates(found, proxied, order, preference)
            .map_err(|reason| ResolveError { host: host.to_owned(), reason })
    }

    /// The addresses of the name as they are now, or were last; not empty.
    async fn addresses(&self) -> Result<Vec<SocketAddr>, String> {
        if let Ok(ip) = self.host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(ip, self.port)]);
        }
        let known = self.last_found.get().is_some();
        let limit = if known { LOOKUP_PATIENCE } else { LOOKUP_TIMEOUT };
        let reason = match timeout(limit, self.lookups.look_up(&self.host)).await {
            Ok(Ok(found)) if !found.is_empty() => {
                if self.uses_last_found.swap(false, Ordering::Relaxed) {
                    info!(host = %self.host, "the servers' name can be resolved again");
                }
                return Ok(self.with_port(&found));
            }
            Ok(Ok(_)) => "it has no address".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {limit:?}"),
        };
        let Some(last) = self.last_found.get() else { return Err(reason) };
        if !self.uses_last_found.swap(true, Ordering::Relaxed) {
            warn!(
                host = %self.host, %reason, addresses = last.len(),
                "the servers' name cannot be resolved, their last addresses are used",
            );
        }
        Ok(self.with_port(&last))
    }

    fn with_port(&self, addresses: &[SocketAddr]) -> Vec<SocketAddr> {
        let mut addresses = addresses.to_vec();
        addresses.iter_mut().for_each(|address| address.set_port(self.port));
        addresses
    }
}

/// The addresses of one server, in their order, for a server that `proxies` may stand before.
pub(crate) fn direct_candidates(
    addresses: &[SocketAddr],
    proxies: &Proxies,
    order: CarrierOrder,
) -> Vec<Candidate> {
    let candidate = |address: &SocketAddr| {
        let (host, port) = (address.ip().to_string(), address.port());
        let tcp = match proxies.proxy_for(&host, port) {
            Some(proxy) => Route::Proxied { proxy, host, port },
            None => Route::Direct(*address),
        };
        let address = ServerAddress { quic: Some(*address), tcp };
        Candidate { address, order, is_last: false }
    };
    addresses.iter().map(candidate).collect()
}

/// The addresses that the last good lookup found, if there was one. Clones share them.
#[derive(Clone, Debug, Default)]
struct LastFound(Arc<Mutex<Option<Vec<SocketAddr>>>>);

impl LastFound {
    fn get(&self) -> Option<Vec<SocketAddr>> {
        self.0.lock().clone()
    }
}

/// A resolver whose last good answer is kept, also if no caller waits for it any more.
struct Remembering<R> {
    resolver: R,
    last_found: LastFound,
}

impl<R: Resolve> Resolve for Remembering<R> {
    fn resolve(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
        let found = self.resolver.resolve(host)?;
        if !found.is_empty() {
            *self.last_found.0.lock() = Some(found.clone());
        }
        Ok(found)
    }
}

/// The addresses to try, given those of the name and the proxy for TCP, if there is one.
fn candidates(
    found: Result<Vec<SocketAddr>, String>,
    proxied: Option<Route>,
    order: CarrierOrder,
    preference: &Preference,
) -> Result<Vec<Candidate>, String> {
    let found = match (found, &proxied) {
        (Ok(addresses), _) => addresses,
        (Err(_), Some(route)) if order != CarrierOrder::Quic => {
            let address = ServerAddress { quic: None, tcp: route.clone() };
            return Ok(vec![Candidate { address, order: CarrierOrder::Tcp, is_last: false }]);
        }
        (Err(reason), _) => return Err(reason),
    };
    let candidate = |address| {
        let tcp = proxied.clone().unwrap_or(Route::Direct(address));
        let is_last = preference.last.contains(&address);
        Candidate { address: ServerAddress { quic: Some(address), tcp }, order, is_last }
    };
    let mut candidates: Vec<_> = ordered(found, preference).into_iter().map(candidate).collect();
    if proxied.is_some() {
        // The proxy chooses the address, so it is asked once.
        candidates.truncate(if order == CarrierOrder::Tcp { 1 } else { usize::MAX });
        candidates.iter_mut().skip(1).for_each(|other| other.order = CarrierOrder::Quic);
    }
    Ok(candidates)
}

/// The addresses by preference, otherwise in turns of the two families, each in random order. The
/// resolver's first address shows the family that it prefers.
fn ordered(mut addresses: Vec<SocketAddr>, preference: &Preference) -> Vec<SocketAddr> {
    let prefers_ipv4 = addresses.first().is_some_and(SocketAddr::is_ipv4);
    fastrand::shuffle(&mut addresses);
    addresses.sort_by_key(|address| address.is_ipv4() != prefers_ipv4);
    let mut addresses = interleave(addresses);
    addresses.sort_by_key(|address| {
        let is_first = Some(*address) == preference.first;
        (!is_first, preference.last.contains(address))
    });
    addresses
}

#[cfg(test)]
mod tests;
