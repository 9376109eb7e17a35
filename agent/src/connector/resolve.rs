//! The addresses at which an attempt looks for servers.

use std::{fmt, net::SocketAddr, time::Duration};

use culvert_process::look_up::LookUps;
use culvert_transport::tcp::{Proxies, Route};
use tokio::time::timeout;

use crate::connector::{error::ResolveError, options::CarrierOrder};

/// Time for the resolver to answer.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Look-ups of servers. One that hangs must not stop the next attempts.
static LOOK_UPS: LookUps = LookUps::new(8);

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

/// The addresses of `host`, with the carriers that are worth trying at each: in random order, so
/// that every server behind a name is found, but `first` at the front.
///
/// # Errors
/// When `host` has no address, unless TCP may be tried through a proxy, which resolves it itself.
///
/// # Cancel safety
/// Cancel safe. A lookup that has begun goes on in its own thread.
pub(crate) async fn resolve(
    host: &str,
    port: u16,
    proxies: &Proxies,
    order: CarrierOrder,
    first: Option<SocketAddr>,
) -> Result<Vec<(ServerAddress, CarrierOrder)>, ResolveError> {
    let proxied = proxies.proxy_for(host, port).map(|proxy| Route::Proxied {
        proxy,
        host: host.to_owned(),
        port,
    });
    let found = match timeout(LOOKUP_TIMEOUT, LOOK_UPS.look_up(host, port)).await {
        Ok(Ok(addresses)) => Ok(addresses),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {LOOKUP_TIMEOUT:?}")),
    };
    candidates(found, proxied, order, first)
        .map_err(|reason| ResolveError { host: host.to_owned(), reason })
}

/// The addresses to try, given the resolver's answer and the proxy for TCP, if there is one.
fn candidates(
    found: Result<Vec<SocketAddr>, String>,
    proxied: Option<Route>,
    order: CarrierOrder,
    first: Option<SocketAddr>,
) -> Result<Vec<(ServerAddress, CarrierOrder)>, String> {
    let found = match (found, &proxied) {
        (Ok(addresses), _) if !addresses.is_empty() => addresses,
        (_, Some(route)) if order != CarrierOrder::Quic => {
            let address = ServerAddress { quic: None, tcp: route.clone() };
            return Ok(vec![(address, CarrierOrder::Tcp)]);
        }
        (found, _) => return Err(found.err().unwrap_or_else(|| "it has no address".into())),
    };
    let mut addresses = found;
    fastrand::shuffle(&mut addresses);
    addresses.sort_by_key(|address| Some(*address) != first);
    let candidate = |address| {
        let tcp = proxied.clone().unwrap_or(Route::Direct(address));
        (ServerAddress { quic: Some(address), tcp }, order)
    };
    Ok(addresses.into_iter().map(candidate).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 8132))
    }

    fn proxied() -> Option<Route> {
        let variable = |name: &str| (name == "HTTPS_PROXY").then(|| "http://proxy:3128".to_owned());
        let proxy = Proxies::from_env(variable).unwrap().proxy_for("servers", 8132)?;
        Some(Route::Proxied { proxy, host: "servers".into(), port: 8132 })
    }

    fn shown(
        found: Result<Vec<SocketAddr>, String>,
        proxied: Option<Route>,
        order: CarrierOrder,
    ) -> Result<Vec<(String, Option<SocketAddr>, CarrierOrder)>, String> {
        let candidates = candidates(found, proxied, order, None)?;
        let shown =
            |(address, order): (ServerAddress, _)| (address.to_string(), address.quic, order);
        Ok(candidates.into_iter().map(shown).collect())
    }

    #[test]
    fn addresses_come_in_any_order_but_the_wanted_one_is_first() {
        let found: Vec<_> = (1..=4).map(address).collect();
        let mut seconds = std::collections::HashSet::new();
        for _ in 0..200 {
            let order = CarrierOrder::QuicFirst;
            let tried = candidates(Ok(found.clone()), None, order, Some(address(3))).unwrap();
            let mut tried: Vec<_> =
                tried.iter().map(|(address, _)| address.quic.unwrap()).collect();
            assert_eq!(tried[0], address(3));
            seconds.insert(tried[1]);
            tried.sort();
            assert_eq!(tried, found);
        }
        assert_eq!(seconds.len(), 3, "{seconds:?}");
    }

    #[test]
    fn a_server_that_only_a_proxy_can_resolve_is_reached_over_tcp_alone() {
        let through_proxy = Ok(vec![("servers port 8132".into(), None, CarrierOrder::Tcp)]);
        for found in [Ok(vec![]), Err("no such host".into())] {
            for order in [CarrierOrder::Tcp, CarrierOrder::TcpFirst, CarrierOrder::QuicFirst] {
                assert_eq!(shown(found.clone(), proxied(), order), through_proxy, "{found:?}");
            }
        }
        assert_eq!(
            shown(Err("no such host".into()), proxied(), CarrierOrder::Quic),
            Err("no such host".into())
        );
        // With an address, QUIC goes there directly.
        assert_eq!(
            shown(Ok(vec![address(1)]), proxied(), CarrierOrder::QuicFirst),
            Ok(vec![("10.0.0.1:8132".into(), Some(address(1)), CarrierOrder::QuicFirst)])
        );
    }

    #[test]
    fn without_a_proxy_a_name_needs_an_address() {
        let order = CarrierOrder::TcpFirst;
        assert_eq!(shown(Err("no such host".into()), None, order), Err("no such host".into()));
        assert_eq!(shown(Ok(vec![]), None, order), Err("it has no address".into()));
    }
}
