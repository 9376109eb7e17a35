//! Connects to a target, and reports a failure in the words of Go's `net` package, which users and
//! their alerts know.

use std::{io, net::SocketAddr, time::Duration};

use culvert_wire::{
    Target,
    dial::{DialErrorKind, DialFailure, DialTiming, Network},
};
use nix::errno::Errno;
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    gate::Gate,
    network::{Connection, TargetNetwork},
    resolve::resolve,
};
use crate::race::{ATTEMPT_DELAY, interleave, race};

/// Minimum delay between the starts of two connections, RFC 8305's recommendation (§5).
const MIN_ATTEMPT_DELAY: Duration = Duration::from_millis(100);

/// Connects to a target within `limit`, which covers the lookup and all addresses.
///
/// `timing` receives the duration of each stage, also of one that failed.
///
/// # Errors
/// The first address's failure, as Go reports it. If the egress policy permits no address, its
/// refusal.
///
/// # Cancel safety
/// Cancel safe: dropping the future abandons the dial. A lookup that has begun goes on, see
/// [`TargetNetwork::look_up`].
pub(super) async fn dial(
    (network, gate): (&TargetNetwork, &Gate),
    family: Network,
    target: &Target,
    limit: Duration,
    timing: &mut DialTiming,
) -> Result<Connection, DialFailure> {
    let started = Instant::now();
    let resolved = timeout(limit, resolve(network, family, target)).await;
    timing.resolve_micros = DialTiming::micros(started.elapsed());
    let addresses = resolved.unwrap_or_else(|_| {
        let text = format!("dial {}: lookup {}: i/o timeout", family.name(), target.host());
        Err(DialFailure::new(DialErrorKind::TIMEOUT, text))
    })?;
    let addresses = gate.permitted(family, target, addresses)?;
    let connecting = Instant::now();
    let connected = connect_any(network, family, addresses, started + limit).await;
    timing.connect_micros = DialTiming::micros(connecting.elapsed());
    connected
}

/// Races the addresses.
async fn connect_any(
    network: &TargetNetwork,
    family: Network,
    addresses: Vec<SocketAddr>,
    deadline: Instant,
) -> Result<Connection, DialFailure> {
    let addresses = interleave(addresses);
    let Some(&first) = addresses.first() else {
        // The resolver gives an error in place of an empty list.
        return Err(DialFailure::new(DialErrorKind::OTHER, "no address"));
    };
    let delay = attempt_delay(deadline.saturating_duration_since(Instant::now()), addresses.len());
    let attempts = addresses.into_iter().map(|address| connect(network, address, deadline));
    let raced = race(attempts, delay).await;
    if let Some((_, connected)) = raced.winner {
        return Ok(connected);
    }
    // An attempt without a failure gave way to others.
    let error = raced.failures.into_iter().find(|(number, _)| *number == 0).map(|(_, error)| error);
    Err(connect_failure(family, first, &error.unwrap_or_else(|| io::ErrorKind::TimedOut.into())))
}

/// Connects to one address before `deadline`.
async fn connect(
    network: &TargetNetwork,
    address: SocketAddr,
    deadline: Instant,
) -> io::Result<Connection> {
    // A time-out starts the next attempt, also when the time is over.
    if Instant::now() >= deadline {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let connected = timeout_at(deadline, network.connect(address)).await;
    connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The delay between the starts of two connections where there are `count` addresses: as usual,
/// or shorter, so that the last address begins while half the time is left.
fn attempt_delay(left: Duration, count: usize) -> Duration {
    let starts = u32::try_from(count.saturating_sub(1)).unwrap_or(u32::MAX).max(1);
    (left / 2 / starts).clamp(MIN_ATTEMPT_DELAY, ATTEMPT_DELAY)
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
        policy::Policy,
        scripted::{Scripted, Step},
        test_network,
    };

    const LIMIT: Duration = Duration::from_secs(5);

    /// The result of a dial of `node-1:80`, its duration, and the timing that it reported.
    async fn dialed(network: Scripted) -> (Result<(), DialFailure>, Duration, DialTiming) {
        dialed_on(&network.into()).await
    }

    async fn dialed_on(network: &TargetNetwork) -> (Result<(), DialFailure>, Duration, DialTiming) {
        let target = "node-1:80".parse().unwrap();
        let (started, mut timing) = (Instant::now(), DialTiming::default());
        let result = dial(
            (network, &Gate::open(Policy::default())),
            Network::Tcp,
            &target,
            LIMIT,
            &mut timing,
        )
        .await;
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
        let (result, elapsed, timing) = dialed(network).await;
        assert_eq!(result, Ok(()));
        assert_eq!(elapsed, Duration::from_millis(100));
        let expected = (0, micros(70), micros(30));
        assert_eq!((timing.header_micros, timing.resolve_micros, timing.connect_micros), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stage_that_fails_is_timed_too() {
        let network = Scripted::unresolvable("no").lookup_takes(70);
        let (result, _, timing) = dialed(network).await;
        assert_eq!(result.unwrap_err().kind, DialErrorKind::UNRESOLVABLE);
        assert_eq!((timing.resolve_micros, timing.connect_micros), (micros(70), 0));

        let network = Scripted::resolving(&["10.0.0.1:80", "10.0.0.2:80"])
            .lookup_takes(1)
            .connects(Step::after(20).fails(Errno::ECONNREFUSED))
            .connects(Step::after(30).fails(Errno::EHOSTUNREACH));
        let (result, _, timing) = dialed(network).await;
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
        let (result, elapsed, timing) = dialed(network).await;
        let failure = result.unwrap_err();
        assert_eq!(failure.kind, DialErrorKind::TIMEOUT);
        assert_eq!(failure.text.as_str(), "dial tcp: lookup node-1: i/o timeout");
        assert_eq!((elapsed, timing.resolve_micros), (LIMIT, micros(5000)));

        let network = Scripted::resolving(&["10.0.0.1:80"])
            .lookup_takes(4000)
            .connects(Step::after(2000).connects());
        let (result, elapsed, timing) = dialed(network).await;
        let failure = result.unwrap_err();
        assert_eq!(failure.kind, DialErrorKind::TIMEOUT);
        assert_eq!(failure.text.as_str(), "dial tcp 10.0.0.1:80: i/o timeout");
        assert_eq!((elapsed, timing.connect_micros), (LIMIT, micros(1000)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_costs_one_delay() {
        let network = Scripted::resolving(&["[fd00::1]:80", "10.0.0.2:80"])
            .connects(Step::after(60_000).connects())
            .connects(Step::after(10).connects());
        let (result, elapsed, timing) = dialed(network).await;
        assert_eq!((result, elapsed), (Ok(()), Duration::from_millis(260)));
        assert_eq!(timing.connect_micros, micros(260));
    }

    #[tokio::test(start_paused = true)]
    async fn the_one_address_of_five_that_answers_is_reached_in_time() {
        let addresses = ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.4:80", "10.0.0.5:80"];
        let mut network = Scripted::resolving(&addresses);
        for _ in 0..4 {
            network = network.connects(Step::after(60_000).connects());
        }
        let network = network.connects(Step::after(10).connects());
        let (result, elapsed, _) = dialed(network).await;
        assert_eq!((result, elapsed), (Ok(()), Duration::from_millis(1010)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_address_costs_nothing_and_families_take_turns() {
        let addresses = ["[fd00::1]:80", "[fd00::2]:80", "10.0.0.1:80"];
        let network = Scripted::resolving(&addresses)
            .connects(Step::after(1).fails(Errno::ECONNREFUSED))
            .connects(Step::after(1).fails(Errno::ECONNREFUSED))
            .connects(Step::after(1).connects());
        let network = network.into();
        let (result, elapsed, _) = dialed_on(&network).await;
        assert_eq!((result, elapsed), (Ok(()), Duration::from_millis(3)));
        assert_eq!(network.tried(), ["[fd00::1]:80", "10.0.0.1:80", "[fd00::2]:80"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_failure_of_the_first_address_is_reported_whichever_ends_last() {
        // Each connection takes 60 s or is refused after so many milliseconds.
        for (steps, text, millis) in [
            ([Some(10), None], "dial tcp 10.0.0.1:80: connect: connection refused", 5000),
            ([None, Some(10)], "dial tcp 10.0.0.1:80: i/o timeout", 5000),
            ([Some(400), Some(10)], "dial tcp 10.0.0.1:80: connect: connection refused", 400),
        ] {
            let mut network = Scripted::resolving(&["10.0.0.1:80", "10.0.0.2:80"]);
            for refused_after in steps {
                network = network.connects(match refused_after {
                    Some(millis) => Step::after(millis).fails(Errno::ECONNREFUSED),
                    None => Step::after(60_000).connects(),
                });
            }
            let (result, elapsed, _) = dialed(network).await;
            assert_eq!(result.unwrap_err().text.as_str(), text);
            assert_eq!(elapsed, Duration::from_millis(millis), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_connection_begins_when_the_time_is_over() {
        let addresses: Vec<_> = (0..=255).map(|last| format!("10.0.0.{last}:80")).collect();
        let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
        let mut network = Scripted::resolving(&addresses);
        for _ in &addresses {
            network = network.connects(Step::after(60_000).connects());
        }
        let network = network.into();
        let (result, elapsed, _) = dialed_on(&network).await;
        assert_eq!(result.unwrap_err().text.as_str(), "dial tcp 10.0.0.0:80: i/o timeout");
        assert_eq!((elapsed, network.tried().len()), (LIMIT, 50), "one in each tenth of a second");
    }

    #[test]
    fn many_addresses_or_little_time_shorten_the_delay() {
        for (left, count, delay) in [
            (5000, 1, 250),
            (5000, 2, 250),
            (5000, 11, 250),
            (5000, 21, 125),
            (5000, 200, 100),
            (1000, 5, 125),
            (0, 2, 100),
        ] {
            let left = Duration::from_millis(left);
            assert_eq!(
                attempt_delay(left, count),
                Duration::from_millis(delay),
                "{left:?} {count}"
            );
        }
    }

    async fn failure_on_host(target: &str) -> DialFailure {
        let gate = Gate::open(Policy::default());
        let (target, mut timing) = (target.parse().unwrap(), DialTiming::default());
        let result =
            dial((&test_network(), &gate), Network::Tcp, &target, LIMIT, &mut timing).await;
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
        let gate = Gate::open(Policy::default());
        let mut timing = DialTiming::default();
        let _local = dial((&test_network(), &gate), Network::Tcp, &target, LIMIT, &mut timing)
            .await
            .unwrap();
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
