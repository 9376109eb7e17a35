//! One attempt to get a tunnel to a server: addresses race, at each of them carriers race for the
//! handshake, and the winner carries hello and welcome.

use std::{net::SocketAddr, time::Duration};

use culvert_process::rate_limited;
use culvert_transport::Carrier;
use culvert_wire::CloseCode;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::debug;

use crate::{
    connector::{
        connect::{Connect, Connected},
        error::{AttemptError, CarrierError, CarrierFailures, ResolveError},
        options::{AttemptOptions, CarrierOrder},
        quic_outcome::{QuicFailure, QuicOutcome},
        resolve::{Candidate, Preference},
    },
    race::{ATTEMPT_DELAY, race},
    tunnels::{
        Rank, ServerTunnels,
        session::{self, Joined, SessionContext},
    },
};

/// Head start of the first carrier: longer than most round trips, and too short to be noticed.
const HEAD_START: Duration = Duration::from_millis(300);
/// Time for a handshake, and again for the welcome. A handshake whose first packets are lost twice
/// takes three seconds, and a server may have to ask kube-apiserver before it welcomes an agent.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for the other addresses once one has led to a server with a tunnel already. A server far
/// away answers within it, and the next attempt, which may be luckier, does not wait for a dead one.
const AFTER_DUPLICATE: Duration = Duration::from_secs(2);

/// The result of an attempt.
#[derive(Debug)]
pub(crate) struct Attempted {
    /// What was found, or why nothing was.
    pub(crate) result: Result<Found, AttemptError>,
    /// What the attempt shows about QUIC.
    pub(crate) quic: QuicOutcome,
}

/// What an attempt found.
#[derive(Debug)]
pub(crate) enum Found {
    /// A tunnel whose server has welcomed the agent, and its rank.
    Server(Box<Joined>, Rank),
    /// Only servers that have a tunnel as good as one of this rank.
    Duplicate(Rank),
}

impl Attempted {
    /// An attempt that failed without showing anything about QUIC.
    pub(crate) fn failed(error: impl Into<AttemptError>) -> Self {
        Self { result: Err(error.into()), quic: QuicOutcome::Unknown }
    }
}

/// Where an attempt looks for servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Places {
    /// The addresses of one server, which are tried first.
    pub(crate) addresses: Vec<SocketAddr>,
    /// Whether the servers' name is resolved, and its addresses are tried too.
    pub(crate) by_name: bool,
}

/// Races the addresses of the servers until a server welcomes the agent. The address of a suspect
/// tunnel comes first, and those with a tunnel last.
///
/// A server that has a tunnel already does not win: the others are tried for some time more, except
/// those with a tunnel. When no server welcomes the agent, the result is that of the last address,
/// or of the last one whose handshake succeeded.
///
/// # Cancel safety
/// Cancel safe: dropping the future abandons the attempt.
pub(crate) async fn attempt<C: Connect>(
    connect: &C,
    options: AttemptOptions,
    places: &Places,
    tunnels: &ServerTunnels,
    context: &SessionContext,
) -> Attempted {
    let tls = match connect.read_tls().await {
        Ok(tls) => tls,
        Err(error) => return Attempted::failed(error),
    };
    let candidates = match candidates(connect, options, places, tunnels).await {
        Ok(candidates) => candidates,
        Err(error) => return Attempted::failed(error),
    };
    Attempt { connect, tls: &tls, options, tunnels, context }.run(candidates).await
}

/// The addresses of one server first, then those of the servers' name.
async fn candidates<C: Connect>(
    connect: &C,
    options: AttemptOptions,
    places: &Places,
    tunnels: &ServerTunnels,
) -> Result<Vec<Candidate>, ResolveError> {
    let mut candidates = connect.direct(&places.addresses, options.order);
    if places.by_name {
        let preference = preference(tunnels, options);
        match connect.resolve(options.order, &preference).await {
            Ok(mut found) => {
                let addresses = &places.addresses;
                let is_new = |address: SocketAddr| !addresses.contains(&address);
                found.retain(|candidate| candidate.address.quic.is_none_or(is_new));
                candidates.extend(found);
            }
            Err(error) if candidates.is_empty() => return Err(error),
            // Those of the one server are left.
            Err(error) => debug!(%error, "only the server's own addresses are tried"),
        }
    }
    Ok(candidates)
}

/// The addresses to try first and last, given the tunnels.
fn preference(tunnels: &ServerTunnels, options: AttemptOptions) -> Preference {
    let expected = match options.order {
        CarrierOrder::Quic | CarrierOrder::QuicFirst => {
            Rank::of(Carrier::Quic, options.large_packets)
        }
        CarrierOrder::Tcp | CarrierOrder::TcpFirst => Rank::Tcp,
    };
    let in_use = tunnels.in_use();
    let suspect = in_use.iter().find(|tunnel| tunnel.is_suspect());
    let suspect = suspect.or_else(|| in_use.iter().find(|tunnel| tunnel.is_outdated()));
    let last = in_use.iter().filter(|tunnel| tunnel.is_as_good_as(expected));
    Preference {
        first: suspect.map(|tunnel| tunnel.tunnel.remote_address()),
        last: last.map(|tunnel| tunnel.tunnel.remote_address()).collect(),
    }
}

/// What the steps of an attempt share.
struct Attempt<'a, C: Connect> {
    connect: &'a C,
    tls: &'a C::Tls,
    options: AttemptOptions,
    tunnels: &'a ServerTunnels,
    context: &'a SessionContext,
}

/// The carriers that were tried, each with its error.
type Failures = Vec<(Carrier, CarrierError)>;

impl<C: Connect> Attempt<'_, C> {
    async fn run(&self, mut left: Vec<Candidate>) -> Attempted {
        let mut report = Report::default();
        while !left.is_empty() {
            let handshakes = left.clone().into_iter().map(|candidate| self.handshake(candidate));
            let raced = tokio::select! {
                biased;
                raced = race(handshakes, ATTEMPT_DELAY) => raced,
                () = report.until() => break,
            };
            let mut ended: Vec<_> = raced.failures.iter().map(|(number, _)| *number).collect();
            for (number, (failures, quic)) in raced.failures {
                report.failed(&left[number], failures, quic);
            }
            // Handshakes that made way for others have had their time.
            let Some((number, (connected, quic))) = raced.winner else { break };
            let carrier = connected.tunnel.carrier();
            let joining = in_time(async { Ok(session::join(connected, self.context).await?) });
            let joined = tokio::select! {
                biased;
                joined = joining => joined,
                () = report.until() => break,
            };
            match joined {
                Ok(joined) => {
                    let rank = Rank::of(carrier, self.options.large_packets);
                    if !self.tunnels.is_duplicate(&joined.welcome.server_id, rank) {
                        return Attempted { result: Ok(Found::Server(joined.into(), rank)), quic };
                    }
                    report.duplicate(&joined, rank, quic);
                }
                Err(error) => {
                    let quic = match carrier {
                        Carrier::Quic => QuicOutcome::of_failed_join(&error),
                        Carrier::Tcp | Carrier::Grpc => quic,
                    };
                    report.not_welcomed(&left[number], (carrier, error), quic);
                }
            }
            ended.push(number);
            let is_duplicate = report.duplicate.is_some();
            let numbered = left.into_iter().enumerate();
            let wanted = numbered.filter(|(number, candidate)| {
                let is_known = is_duplicate && candidate.is_last;
                !is_known && !ended.contains(number)
            });
            left = wanted.map(|(_, candidate)| candidate).collect();
        }
        report.done()
    }

    /// The first handshake at one address that succeeds, and what the carriers' race shows about
    /// QUIC. The winner's server is asked once for its welcome, however long that takes, because
    /// its answer does not depend on the carrier.
    async fn handshake(
        &self,
        candidate: Candidate,
    ) -> Result<(Connected, QuicOutcome), (Failures, QuicOutcome)> {
        let carriers: &[Carrier] = match candidate.order {
            CarrierOrder::Quic => &[Carrier::Quic],
            CarrierOrder::Tcp => &[Carrier::Tcp],
            CarrierOrder::QuicFirst => &[Carrier::Quic, Carrier::Tcp],
            CarrierOrder::TcpFirst => &[Carrier::Tcp, Carrier::Quic],
        };
        let head_start = if self.options.at_once { Duration::ZERO } else { HEAD_START };
        let handshakes = carriers.iter().copied().map(|carrier| self.over(carrier, &candidate));
        let raced = race(handshakes, head_start).await;
        let mut failures: Failures =
            raced.failures.into_iter().map(|(number, error)| (carriers[number], error)).collect();
        failures.sort_by_key(|(carrier, _)| *carrier != Carrier::Quic);
        let quic_failure = failures
            .first()
            .and_then(|(carrier, error)| (*carrier == Carrier::Quic).then(|| error.into()));
        match (raced.winner, candidate.order) {
            (Some((number, connected)), _) if carriers[number] == Carrier::Quic => {
                Ok((connected, QuicOutcome::Worked))
            }
            (Some((_, connected)), CarrierOrder::QuicFirst) => {
                let failure = quic_failure.unwrap_or(QuicFailure::Silent);
                Ok((connected, QuicOutcome::Failed(failure)))
            }
            (Some((_, connected)), _) => Ok((connected, QuicOutcome::Unknown)),
            (None, CarrierOrder::Quic) => {
                let quic = quic_failure.map_or(QuicOutcome::Unknown, QuicOutcome::Failed);
                Err((failures, quic))
            }
            (None, _) => Err((failures, QuicOutcome::Unknown)),
        }
    }

    async fn over(
        &self,
        carrier: Carrier,
        candidate: &Candidate,
    ) -> Result<Connected, CarrierError> {
        let (address, large_packets) = (&candidate.address, self.options.large_packets);
        // On the heap: the state of a handshake is large, and a race holds it several times.
        let handshake = self.connect.connect(carrier, address, self.tls, large_packets);
        in_time(Box::pin(handshake)).await
    }
}

/// What an attempt has led to so far.
#[derive(Debug, Default)]
struct Report {
    /// The last server that has a tunnel already.
    duplicate: Option<(Rank, QuicOutcome)>,
    /// When the attempt ends because of it.
    until: Option<Instant>,
    /// The error to report.
    error: Option<AttemptError>,
    /// Whether a server answered and did not welcome the agent, which is reported rather than a
    /// failed handshake.
    not_welcomed: bool,
    /// What each address that failed shows about QUIC.
    quic: Vec<QuicOutcome>,
}

impl Report {
    /// Closes a tunnel whose server has one already. At once, because the server may dial on it.
    fn duplicate(&mut self, joined: &Joined, rank: Rank, quic: QuicOutcome) {
        let (tunnel, server_id) = (joined.tunnel(), &joined.welcome.server_id);
        debug!(%server_id, address = %tunnel.remote_address(), "a server that is connected already");
        tunnel.close(CloseCode::DONE, "a duplicate of the agent's tunnel");
        self.duplicate = Some((rank, quic));
        self.until.get_or_insert_with(|| Instant::now() + AFTER_DUPLICATE);
    }

    fn failed(&mut self, candidate: &Candidate, failures: Failures, quic: QuicOutcome) {
        self.quic.push(quic);
        if !self.not_welcomed {
            self.error = Some(error(candidate, failures));
        }
    }

    fn not_welcomed(
        &mut self,
        candidate: &Candidate,
        failure: (Carrier, CarrierError),
        quic: QuicOutcome,
    ) {
        self.quic.push(quic);
        self.not_welcomed = true;
        self.error = Some(error(candidate, vec![failure]));
    }

    /// Completes when the time after a duplicate is over; never without one.
    async fn until(&self) {
        match self.until {
            Some(until) => sleep_until(until).await,
            None => std::future::pending().await,
        }
    }

    fn done(self) -> Attempted {
        if let Some((rank, quic)) = self.duplicate {
            if let Some(error) = self.error.filter(|_| self.not_welcomed) {
                rate_limited!(
                    Duration::from_secs(60), per error = error, at most 8 in all, WARN,
                    "another server did not welcome the agent"
                );
            }
            return Attempted { result: Ok(Found::Duplicate(rank)), quic };
        }
        // The resolver gives an error in place of an empty list.
        let error = self.error.unwrap_or_else(|| AttemptError::Carriers {
            address: String::new(),
            failures: CarrierFailures(Vec::new()),
        });
        // Where one address shows nothing, its server may be down, and so may be the others.
        let quic = match self.quic.last() {
            Some(last) if !self.quic.contains(&QuicOutcome::Unknown) => *last,
            _ => QuicOutcome::Unknown,
        };
        Attempted { result: Err(error), quic }
    }
}

fn error(candidate: &Candidate, failures: Failures) -> AttemptError {
    let address = candidate.address.to_string();
    AttemptError::Carriers { address, failures: CarrierFailures(failures) }
}

async fn in_time<T>(
    step: impl Future<Output = Result<T, CarrierError>>,
) -> Result<T, CarrierError> {
    timeout(CARRIER_TIMEOUT, step).await.unwrap_or(Err(CarrierError::TimedOut(CARRIER_TIMEOUT)))
}

#[cfg(test)]
mod tests;
