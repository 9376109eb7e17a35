//! Resolves and connects a target, and tells a failure in the words of Go's `net` package, which
//! users and their alerts know.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use culvert_transport::splice;
use culvert_wire::{
    Target,
    dial::{DialErrorKind, DialFailure, DialTiming, Network},
};
use tokio::{
    net::{TcpStream, lookup_host},
    time::timeout,
};

/// Connects to a target within `limit`, which covers the look-up and every address tried.
///
/// The timing tells how long each stage took, also when it failed.
///
/// # Errors
/// The first address's failure, as Go reports it.
///
/// # Cancel safety
/// Dropping the future abandons the attempt. A name look-up that has begun goes on in its own
/// thread until the resolver gives up.
pub(super) async fn dial(
    network: Network,
    target: &Target,
    limit: Duration,
    timing: &mut DialTiming,
) -> Result<TcpStream, DialFailure> {
    let started = Instant::now();
    let resolved = timeout(limit, resolve(network, target)).await;
    timing.resolve_micros = DialTiming::micros(started.elapsed());
    let addresses = match resolved {
        Ok(addresses) => addresses?,
        Err(_) => {
            let text = format!("dial {}: lookup {}: i/o timeout", network.name(), target.host());
            return Err(DialFailure::new(DialErrorKind::TIMEOUT, text));
        }
    };
    let connecting = Instant::now();
    let connected = connect_any(network, &addresses, started + limit).await;
    timing.connect_micros = DialTiming::micros(connecting.elapsed());
    connected
}

/// The addresses of a target in the order in which they are tried; at least one.
async fn resolve(network: Network, target: &Target) -> Result<Vec<SocketAddr>, DialFailure> {
    let port = target.port();
    // Go takes no host for the node itself.
    let ip = match target.host() {
        "" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        _ => target.ip(),
    };
    let found: Vec<SocketAddr> = match ip {
        Some(ip) => vec![SocketAddr::new(ip, port)],
        None => lookup_host((target.host(), port))
            .await
            .map_err(|error| lookup_failure(network, target.host(), &error))?
            .collect(),
    };
    let suits = |address: &SocketAddr| match network {
        Network::Tcp => true,
        Network::Tcp4 => address.is_ipv4(),
        Network::Tcp6 => address.is_ipv6(),
    };
    let addresses: Vec<_> = found.into_iter().filter(suits).collect();
    if addresses.is_empty() {
        let text = match ip {
            Some(ip) => format!("dial {}: address {ip}: no suitable address found", network.name()),
            None => format!("dial {}: lookup {}: no such host", network.name(), target.host()),
        };
        return Err(DialFailure::new(DialErrorKind::UNRESOLVABLE, text));
    }
    Ok(addresses)
}

/// A failed look-up in Go's words. The system's resolver tells only in words of its own why.
fn lookup_failure(network: Network, host: &str, error: &io::Error) -> DialFailure {
    let reason = match error.to_string() {
        text if text.contains("Temporary failure") => "server misbehaving",
        text if text.contains("Too many open files") => "too many open files",
        _ => "no such host",
    };
    let text = format!("dial {}: lookup {host}: {reason}", network.name());
    DialFailure::new(DialErrorKind::UNRESOLVABLE, text)
}

/// Tries the addresses in turn, each with its share of the time that is left.
async fn connect_any(
    network: Network,
    addresses: &[SocketAddr],
    deadline: Instant,
) -> Result<TcpStream, DialFailure> {
    let mut first_failure = None;
    for (index, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let result = match timeout(share, TcpStream::connect(address)).await {
            Ok(Ok(socket)) => {
                splice::prepare(&socket);
                return Ok(socket);
            }
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
        first_failure.get_or_insert_with(|| connect_failure(network, *address, &result));
    }
    // There was at least one address.
    Err(first_failure.unwrap_or_else(|| DialFailure::new(DialErrorKind::OTHER, "no address")))
}

/// A failed connection in Go's words.
fn connect_failure(network: Network, address: SocketAddr, error: &io::Error) -> DialFailure {
    let (kind, reason) = match error.kind() {
        io::ErrorKind::TimedOut => (DialErrorKind::TIMEOUT, "i/o timeout".into()),
        io::ErrorKind::ConnectionRefused => {
            (DialErrorKind::REFUSED, "connect: connection refused".into())
        }
        io::ErrorKind::NetworkUnreachable => {
            (DialErrorKind::UNREACHABLE, "connect: network is unreachable".into())
        }
        io::ErrorKind::HostUnreachable => {
            (DialErrorKind::UNREACHABLE, "connect: no route to host".into())
        }
        io::ErrorKind::ConnectionReset => {
            (DialErrorKind::RESET, "connect: connection reset by peer".into())
        }
        _ => match error.raw_os_error() {
            Some(EMFILE | ENFILE) => {
                (DialErrorKind::OVERLOADED, "socket: too many open files".into())
            }
            _ => (DialErrorKind::OTHER, format!("connect: {}", errno_text(error))),
        },
    };
    DialFailure::new(kind, format!("dial {} {address}: {reason}", network.name()))
}

/// errno 24: this process has too many open files.
const EMFILE: i32 = 24;
/// errno 23: the host has too many open files.
const ENFILE: i32 = 23;

/// An error without Rust's "(os error N)" and in lower case, as Go prints it.
fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn failure(network: Network, address: &str) -> DialFailure {
        let target: Target = address.parse().unwrap();
        dial(network, &target, Duration::from_secs(5), &mut DialTiming::default())
            .await
            .unwrap_err()
    }

    #[tokio::test]
    async fn a_closed_port_is_refused_in_gos_words() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let failure = failure(Network::Tcp, &free.to_string()).await;
        assert_eq!(failure.kind, DialErrorKind::REFUSED);
        assert_eq!(*failure.text, format!("dial tcp {free}: connect: connection refused"));
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_told_as_no_such_host_or_a_failing_resolver() {
        let failure = failure(Network::Tcp, "no-such-host.invalid:80").await;
        assert_eq!(failure.kind, DialErrorKind::UNRESOLVABLE);
        let text = failure.text.as_str();
        assert!(
            text == "dial tcp: lookup no-such-host.invalid: no such host"
                || text == "dial tcp: lookup no-such-host.invalid: server misbehaving",
            "{text}"
        );
    }

    #[tokio::test]
    async fn an_address_of_the_other_family_does_not_suit() {
        let failure = failure(Network::Tcp6, "127.0.0.1:80").await;
        assert_eq!(
            failure.text.as_str(),
            "dial tcp6: address 127.0.0.1: no suitable address found"
        );
    }

    #[tokio::test]
    async fn an_empty_host_is_the_node_itself() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::new("", listener.local_addr().unwrap().port()).unwrap();
        let limit = Duration::from_secs(5);
        let mut timing = DialTiming::default();
        let socket = dial(Network::Tcp, &target, limit, &mut timing).await.unwrap();
        assert_eq!(socket.peer_addr().unwrap(), listener.local_addr().unwrap());
        assert!(timing.total() < limit);
    }

    #[test]
    fn every_errno_is_told_in_gos_words() {
        let address = "10.0.0.9:10250".parse().unwrap();
        for (errno, kind, text) in [
            (111, DialErrorKind::REFUSED, "connect: connection refused"),
            (110, DialErrorKind::TIMEOUT, "i/o timeout"),
            (101, DialErrorKind::UNREACHABLE, "connect: network is unreachable"),
            (113, DialErrorKind::UNREACHABLE, "connect: no route to host"),
            (104, DialErrorKind::RESET, "connect: connection reset by peer"),
            (24, DialErrorKind::OVERLOADED, "socket: too many open files"),
            (13, DialErrorKind::OTHER, "connect: permission denied"),
            (22, DialErrorKind::OTHER, "connect: invalid argument"),
        ] {
            let error = io::Error::from_raw_os_error(errno);
            let failure = connect_failure(Network::Tcp, address, &error);
            assert_eq!(failure.kind, kind);
            assert_eq!(*failure.text, format!("dial tcp 10.0.0.9:10250: {text}"));
        }
    }
}
