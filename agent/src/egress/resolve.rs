//! The addresses of a target, and a failed lookup in the words of Go's `net` package.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use culvert_wire::{
    Target,
    dial::{DialErrorKind, DialFailure, Network},
};

use super::network::TargetNetwork;
use crate::lookups::LookupError;

/// The addresses of a target in the order in which they are tried; at least one.
///
/// # Errors
/// When the target has no address of the network's family, in Go's words.
///
/// # Cancel safety
/// As [`TargetNetwork::look_up`].
pub(super) async fn resolve(
    network: &TargetNetwork,
    family: Network,
    target: &Target,
) -> Result<Vec<SocketAddr>, DialFailure> {
    let port = target.port();
    // In Go an empty host is the node itself.
    let ip = match target.host() {
        "" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        _ => target.ip(),
    };
    let found = match ip {
        Some(ip) => vec![SocketAddr::new(ip, port)],
        None => network
            .look_up(target.host(), port)
            .await
            .map_err(|error| lookup_failure(family, target.host(), &error))?,
    };
    let matches = |address: &SocketAddr| match family {
        Network::Tcp => true,
        Network::Tcp4 => address.is_ipv4(),
        Network::Tcp6 => address.is_ipv6(),
    };
    let addresses: Vec<_> = found.into_iter().filter(matches).collect();
    if addresses.is_empty() {
        let text = match ip {
            Some(ip) => format!("dial {}: address {ip}: no suitable address found", family.name()),
            None => format!("dial {}: lookup {}: no such host", family.name(), target.host()),
        };
        return Err(DialFailure::new(DialErrorKind::UNRESOLVABLE, text));
    }
    Ok(addresses)
}

/// A failed lookup in Go's words. The system's resolver reports the cause only in its message.
fn lookup_failure(family: Network, host: &str, error: &LookupError) -> DialFailure {
    let (kind, reason) = match error {
        LookupError::Failed(text) if text.contains("Temporary failure") => {
            (DialErrorKind::UNRESOLVABLE, "server misbehaving")
        }
        LookupError::Failed(text) if text.contains("Too many open files") => {
            (DialErrorKind::OVERLOADED, "too many open files")
        }
        LookupError::Failed(_) => (DialErrorKind::UNRESOLVABLE, "no such host"),
        LookupError::Internal(_) => (DialErrorKind::OTHER, "internal error"),
        // Go does not limit lookups, and ends without a thread.
        LookupError::Busy => (DialErrorKind::OVERLOADED, "too many lookups"),
        LookupError::NoThread(_) => (DialErrorKind::OVERLOADED, "resource temporarily unavailable"),
    };
    DialFailure::new(kind, format!("dial {}: lookup {host}: {reason}", family.name()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egress::{scripted::Scripted, test_network};

    async fn text(network: Scripted, family: Network, target: &str) -> String {
        let failure = resolve(&network.into(), family, &target.parse().unwrap()).await.unwrap_err();
        assert_eq!(failure.kind, DialErrorKind::UNRESOLVABLE);
        failure.text.as_str().to_owned()
    }

    #[test]
    fn an_internal_error_of_a_lookup_does_not_mean_that_the_name_is_unknown() {
        let error = LookupError::Internal("the lookup panicked");
        let failure = lookup_failure(Network::Tcp, "host", &error);
        assert_eq!(failure.kind, DialErrorKind::OTHER);
        assert_eq!(failure.text.as_str(), "dial tcp: lookup host: internal error");
    }

    #[tokio::test]
    async fn addresses_keep_the_resolvers_order_within_the_family() {
        let found = ["10.0.0.1:80", "[fd00::1]:80", "10.0.0.2:80"];
        let network = Scripted::resolving(&found).into();
        for (family, expected) in [
            (Network::Tcp, &found[..]),
            (Network::Tcp4, &["10.0.0.1:80", "10.0.0.2:80"]),
            (Network::Tcp6, &["[fd00::1]:80"]),
        ] {
            let addresses = resolve(&network, family, &"a:80".parse().unwrap()).await.unwrap();
            let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            assert_eq!(addresses, expected, "{family:?}");
        }
    }

    #[tokio::test]
    async fn an_address_is_not_looked_up_and_no_host_is_the_node_itself() {
        let network = Scripted::unresolvable("asked for an address").into();
        for (target, address) in [("10.0.0.9:80", "10.0.0.9:80"), ("[fd00::9]:80", "[fd00::9]:80")]
        {
            let addresses = resolve(&network, Network::Tcp, &target.parse().unwrap()).await;
            assert_eq!(addresses.unwrap(), [address.parse().unwrap()]);
        }
        let node = Target::new("", 80).unwrap();
        let addresses = resolve(&network, Network::Tcp, &node).await.unwrap();
        assert_eq!(addresses, ["127.0.0.1:80".parse().unwrap()]);
    }

    #[tokio::test]
    async fn a_failed_lookup_is_reported_in_gos_words() {
        for (message, reason) in [
            ("failed to lookup address information: Name or service not known", "no such host"),
            ("Temporary failure in name resolution", "server misbehaving"),
        ] {
            let network = Scripted::unresolvable(message);
            let text = text(network, Network::Tcp, "node-1:80").await;
            assert_eq!(text, format!("dial tcp: lookup node-1: {reason}"));
        }
    }

    #[test]
    fn a_lookup_that_was_refused_is_an_overload_of_the_agent() {
        for (error, reason) in [
            (LookupError::Busy, "too many lookups"),
            (LookupError::NoThread("EAGAIN".into()), "resource temporarily unavailable"),
            (
                LookupError::Failed("Too many open files (os error 24)".into()),
                "too many open files",
            ),
        ] {
            let failure = lookup_failure(Network::Tcp, "node-1", &error);
            assert_eq!(failure.kind, DialErrorKind::OVERLOADED);
            assert_eq!(*failure.text, format!("dial tcp: lookup node-1: {reason}"));
        }
    }

    #[tokio::test]
    async fn a_target_without_an_address_of_the_family_is_reported_in_gos_words() {
        let network = || Scripted::resolving(&["10.0.0.1:80"]);
        assert_eq!(
            text(network(), Network::Tcp6, "node-1:80").await,
            "dial tcp6: lookup node-1: no such host"
        );
        assert_eq!(
            text(network(), Network::Tcp6, "127.0.0.1:80").await,
            "dial tcp6: address 127.0.0.1: no suitable address found"
        );
    }

    #[tokio::test]
    async fn the_systems_resolver_has_no_address_for_an_invalid_name() {
        let target = "no-such-host.invalid:80".parse().unwrap();
        let failure = resolve(&test_network(), Network::Tcp, &target).await.unwrap_err();
        assert_eq!(failure.kind, DialErrorKind::UNRESOLVABLE);
        // Where there is no resolver at all, its failure is temporary.
        let texts = ["no such host", "server misbehaving"]
            .map(|reason| format!("dial tcp: lookup no-such-host.invalid: {reason}"));
        assert!(texts.contains(&failure.text.as_str().to_owned()), "{failure}");
    }
}
