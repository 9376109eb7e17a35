//! Connects to a target, and reports a failure in the words of Go's `net` package, which users and
//! their alerts know.

use std::{io, net::SocketAddr, time::Duration};

use culvert_wire::{
    Target,
    dial::{DialErrorKind, DialFailure, DialTiming, Network},
};
use nix::errno::Errno;
use tokio::time::{Instant, timeout};

use super::{
    network::{LocalOf, TargetNetwork},
    resolve::resolve,
};

/// Connects to a target within `limit`, which covers the lookup and all addresses.
///
/// `timing` receives the duration of each stage, also of one that failed.
///
/// # Errors
/// The first address's failure, as Go reports it.
///
/// # Cancel safety
/// Cancel safe: dropping the future abandons the dial. A lookup that has begun goes on in its own
/// thread.
pub(super) async fn dial<N: TargetNetwork>(
    network: &N,
    family: Network,
    target: &Target,
    limit: Duration,
    timing: &mut DialTiming,
) -> Result<LocalOf<N>, DialFailure> {
    let started = Instant::now();
    let resolved = timeout(limit, resolve(network, family, target)).await;
    timing.resolve_micros = DialTiming::micros(started.elapsed());
    let addresses = resolved.unwrap_or_else(|_| {
        let text = format!("dial {}: lookup {}: i/o timeout", family.name(), target.host());
        Err(DialFailure::new(DialErrorKind::TIMEOUT, text))
    })?;
    let connecting = Instant::now();
    let connected = connect_any(network, family, &addresses, started + limit).await;
    timing.connect_micros = DialTiming::micros(connecting.elapsed());
    connected
}

/// Tries the addresses one after the other, each with its share of the time that is left.
async fn connect_any<N: TargetNetwork>(
    network: &N,
    family: Network,
    addresses: &[SocketAddr],
    deadline: Instant,
) -> Result<LocalOf<N>, DialFailure> {
    let mut first_failure = None;
    for (index, address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addresses.len() - index).unwrap_or(u32::MAX);
        let error = match timeout(share, network.connect(*address)).await {
            Ok(Ok(connected)) => return Ok(connected),
            Ok(Err(error)) => error,
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
        first_failure.get_or_insert_with(|| connect_failure(family, *address, &error));
    }
    // There was at least one address.
    Err(first_failure.unwrap_or_else(|| DialFailure::new(DialErrorKind::OTHER, "no address")))
}

/// A failed connection in Go's words.
fn connect_failure(family: Network, address: SocketAddr, error: &io::Error) -> DialFailure {
    let errno = error.raw_os_error().map(Errno::from_raw);
    let (kind, reason) = match (error.kind(), errno) {
        (io::ErrorKind::TimedOut, _) => (DialErrorKind::TIMEOUT, "i/o timeout".into()),
        (io::ErrorKind::ConnectionRefused, _) => {
            (DialErrorKind::REFUSED, "connect: connection refused".into())
        }
        (io::ErrorKind::NetworkUnreachable, _) => {
            (DialErrorKind::UNREACHABLE, "connect: network is unreachable".into())
        }
        (io::ErrorKind::HostUnreachable, _) => {
            (DialErrorKind::UNREACHABLE, "connect: no route to host".into())
        }
        (io::ErrorKind::ConnectionReset, _) => {
            (DialErrorKind::RESET, "connect: connection reset by peer".into())
        }
        (_, Some(Errno::EMFILE | Errno::ENFILE)) => {
            (DialErrorKind::OVERLOADED, "socket: too many open files".into())
        }
        _ => (DialErrorKind::OTHER, format!("connect: {}", errno_text(error))),
    };
    DialFailure::new(kind, format!("dial {} {address}: {reason}", family.name()))
}

/// An error without Rust's "(os error N)" and in lower case, as Go prints it.
fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::egress::{
        network::HostNetwork,
        scripted::{Scripted, Step},
    };

    const LIMIT: Duration = Duration::from_secs(5);

    /// The result of a dial of `node-1:80`, its duration, and the timing that it reported.
    async fn dialed(network: &Scripted) -> (Result<(), DialFailure>, Duration, DialTiming) {
        let target = "node-1:80".parse().unwrap();
        let (started, mut timing) = (Instant::now(), DialTiming::default());
        let result = dial(network, Network::Tcp, &target, LIMIT, &mut timing).await;
        (result.map(drop), started.elapsed(), timing)
    }

    fn micros(millis: u32) -> u32 {
        millis * 1000
    }

    #[tokio::test(start_paused = true)]
    async fn each_stage_of_a_dial_is_timed() {
        let network = Scripted::resolving(&["10.0.0.1:80"])
            .lookup_takes(70)
            .connects(Step::after(30).connects());
        let (result, elapsed, timing) = dialed(&network).await;
        assert_eq!(result, Ok(()));
        assert_eq!(elapsed, Duration::from_millis(100));
        let expected = (0, micros(70), micros(30));
        assert_eq!((timing.header_micros, timing.resolve_micros, timing.connect_micros), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stage_that_fails_is_timed_too() {
        let network = Scripted::unresolvable("no").lookup_takes(70);
        let (result, _, timing) = dialed(&network).await;
        assert_eq!(result.unwrap_err().kind, DialErrorKind::UNRESOLVABLE);
        assert_eq!((timing.resolve_micros, timing.connect_micros), (micros(70), 0));

        let network = Scripted::resolving(&["10.0.0.1:80", "10.0.0.2:80"])
            .lookup_takes(1)
            .connects(Step::after(20).fails(Errno::ECONNREFUSED))
            .connects(Step::after(30).fails(Errno::EHOSTUNREACH));
        let (result, _, timing) = dialed(&network).await;
        assert_eq!(
            result.unwrap_err().text.as_str(),
            "dial tcp 10.0.0.1:80: connect: connection refused",
            "the first failure is reported"
        );
        assert_eq!((timing.resolve_micros, timing.connect_micros), (micros(1), micros(50)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_limit_covers_lookup_and_connection() {
        let network = Scripted::resolving(&["10.0.0.1:80"]).lookup_takes(6000);
        let (result, elapsed, timing) = dialed(&network).await;
        let failure = result.unwrap_err();
        assert_eq!(failure.kind, DialErrorKind::TIMEOUT);
        assert_eq!(failure.text.as_str(), "dial tcp: lookup node-1: i/o timeout");
        assert_eq!((elapsed, timing.resolve_micros), (LIMIT, micros(5000)));

        let network = Scripted::resolving(&["10.0.0.1:80"])
            .lookup_takes(4000)
            .connects(Step::after(2000).connects());
        let (result, elapsed, timing) = dialed(&network).await;
        let failure = result.unwrap_err();
        assert_eq!(failure.kind, DialErrorKind::TIMEOUT);
        assert_eq!(failure.text.as_str(), "dial tcp 10.0.0.1:80: i/o timeout");
        assert_eq!((elapsed, timing.connect_micros), (LIMIT, micros(1000)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_leaves_time_for_the_others() {
        let network = Scripted::resolving(&["10.0.0.1:80", "10.0.0.2:80"])
            .connects(Step::after(60_000).connects())
            .connects(Step::after(10).connects());
        let (result, elapsed, _) = dialed(&network).await;
        assert_eq!(result, Ok(()));
        assert_eq!(elapsed, LIMIT / 2 + Duration::from_millis(10));
    }

    async fn failure_on_host(target: &str) -> DialFailure {
        let (target, mut timing) = (target.parse().unwrap(), DialTiming::default());
        let result = dial(&HostNetwork, Network::Tcp, &target, LIMIT, &mut timing).await;
        result.map(drop).unwrap_err()
    }

    #[tokio::test]
    async fn a_closed_port_is_refused_in_gos_words() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let failure = failure_on_host(&free.to_string()).await;
        assert_eq!(failure.kind, DialErrorKind::REFUSED);
        assert_eq!(*failure.text, format!("dial tcp {free}: connect: connection refused"));
    }

    #[tokio::test]
    async fn the_host_connects_to_a_listener() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = Target::new("", listener.local_addr().unwrap().port()).unwrap();
        let mut timing = DialTiming::default();
        let _local = dial(&HostNetwork, Network::Tcp, &target, LIMIT, &mut timing).await.unwrap();
        listener.accept().unwrap();
    }

    #[test]
    fn every_errno_is_reported_in_gos_words() {
        let address = "10.0.0.9:10250".parse().unwrap();
        for (errno, kind, text) in [
            (Errno::ECONNREFUSED, DialErrorKind::REFUSED, "connect: connection refused"),
            (Errno::ETIMEDOUT, DialErrorKind::TIMEOUT, "i/o timeout"),
            (Errno::ENETUNREACH, DialErrorKind::UNREACHABLE, "connect: network is unreachable"),
            (Errno::EHOSTUNREACH, DialErrorKind::UNREACHABLE, "connect: no route to host"),
            (Errno::ECONNRESET, DialErrorKind::RESET, "connect: connection reset by peer"),
            (Errno::EMFILE, DialErrorKind::OVERLOADED, "socket: too many open files"),
            (Errno::ENFILE, DialErrorKind::OVERLOADED, "socket: too many open files"),
            (Errno::EACCES, DialErrorKind::OTHER, "connect: permission denied"),
            (Errno::EINVAL, DialErrorKind::OTHER, "connect: invalid argument"),
        ] {
            let error = io::Error::from_raw_os_error(errno as i32);
            let failure = connect_failure(Network::Tcp, address, &error);
            assert_eq!(failure.kind, kind);
            assert_eq!(*failure.text, format!("dial tcp 10.0.0.9:10250: {text}"));
        }
    }
}
