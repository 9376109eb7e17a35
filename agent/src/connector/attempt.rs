//! One attempt to get a tunnel to a server: address by address, carriers race for the handshake,
//! and the winner carries hello and welcome.

use std::{net::SocketAddr, time::Duration};

use culvert_transport::Carrier;
use tokio::time::timeout;

use crate::{
    connector::{
        connect::{Connect, Connected},
        error::{AttemptError, CarrierError, CarrierFailures},
        options::{AttemptOptions, CarrierOrder},
        quic_outcome::{QuicFailure, QuicOutcome},
        race::{Race, race},
        resolve::ServerAddress,
    },
    tunnels::session::{self, Joined, SessionContext},
};

/// Head start of the first carrier. Most round trips are shorter, and a person does not notice it.
const HEAD_START: Duration = Duration::from_millis(300);
/// Time for a handshake, and again for the welcome. A handshake whose first packets are lost twice
/// takes three seconds, and a server may have to ask kube-apiserver before it welcomes an agent.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(10);

/// The result of an attempt.
#[derive(Debug)]
pub(crate) struct Attempted {
    /// The tunnel, or why there is none.
    pub(crate) result: Result<Joined, AttemptError>,
    /// What the attempt shows about QUIC.
    pub(crate) quic: QuicOutcome,
}

impl Attempted {
    /// An attempt that failed without showing anything about QUIC.
    pub(crate) fn failed(error: impl Into<AttemptError>) -> Self {
        Self { result: Err(error.into()), quic: QuicOutcome::Unknown }
    }
}

/// Tries the addresses of the servers one after the other, `first` at the front, until a server
/// welcomes the agent. When none does, the result is that of the last address.
///
/// # Cancel safety
/// Cancel safe: dropping the future abandons the attempt.
pub(crate) async fn attempt<C: Connect>(
    connect: &C,
    options: AttemptOptions,
    first: Option<SocketAddr>,
    context: &SessionContext,
) -> Attempted {
    let tls = match connect.read_tls().await {
        Ok(tls) => tls,
        Err(error) => return Attempted::failed(error),
    };
    let candidates = match connect.resolve(options.order, first).await {
        Ok(candidates) => candidates,
        Err(error) => return Attempted::failed(error),
    };
    let mut last = None;
    for (address, order) in candidates {
        let options = AttemptOptions { order, ..options };
        let candidate = Candidate { connect, address, tls: &tls, options };
        let attempted = candidate.attempt(context).await;
        if attempted.result.is_ok() {
            return attempted;
        }
        last = Some(attempted);
    }
    // The resolver gives an error in place of an empty list.
    last.unwrap_or_else(|| {
        let (address, failures) = (String::new(), CarrierFailures(Vec::new()));
        Attempted::failed(AttemptError::Carriers { address, failures })
    })
}

/// One address that an attempt tries.
struct Candidate<'a, C: Connect> {
    connect: &'a C,
    address: ServerAddress,
    tls: &'a C::Tls,
    options: AttemptOptions,
}

/// The carriers that were tried, each with its error.
type Failures = Vec<(Carrier, CarrierError)>;

impl<C: Connect> Candidate<'_, C> {
    /// Carriers race for the handshake alone. The winner's server is asked once for its welcome,
    /// however long that takes, because its answer does not depend on the carrier.
    async fn attempt(&self, context: &SessionContext) -> Attempted {
        let (connected, quic) = self.handshake().await;
        let connected = match connected {
            Ok(connected) => connected,
            Err(failures) => return self.failed(failures, quic),
        };
        let carrier = connected.tunnel.carrier();
        match in_time(async { Ok(session::join(connected, context).await?) }).await {
            Ok(joined) => Attempted { result: Ok(joined), quic },
            Err(error) => {
                let quic = match carrier {
                    Carrier::Quic => QuicOutcome::of_failed_join(&error),
                    Carrier::Tcp | Carrier::Grpc => quic,
                };
                self.failed(vec![(carrier, error)], quic)
            }
        }
    }

    fn failed(&self, failures: Failures, quic: QuicOutcome) -> Attempted {
        let (address, failures) = (self.address.to_string(), CarrierFailures(failures));
        Attempted { result: Err(AttemptError::Carriers { address, failures }), quic }
    }

    /// The first handshake that succeeds, and what the race shows about QUIC.
    async fn handshake(&self) -> (Result<Connected, Failures>, QuicOutcome) {
        let (quic, tcp) = (self.over(Carrier::Quic), self.over(Carrier::Tcp));
        let head_start = if self.options.at_once { Duration::ZERO } else { HEAD_START };
        let both = |quic, tcp| {
            let failures = vec![(Carrier::Quic, quic), (Carrier::Tcp, tcp)];
            (Err(failures), QuicOutcome::Unknown)
        };
        match self.options.order {
            CarrierOrder::Quic => match quic.await {
                Ok(connected) => (Ok(connected), QuicOutcome::Worked),
                Err(error) => {
                    let outcome = QuicOutcome::Failed((&error).into());
                    (Err(vec![(Carrier::Quic, error)]), outcome)
                }
            },
            CarrierOrder::Tcp => {
                let connected = tcp.await.map_err(|error| vec![(Carrier::Tcp, error)]);
                (connected, QuicOutcome::Unknown)
            }
            CarrierOrder::QuicFirst => match race(quic, tcp, head_start).await {
                Race::First(connected) => (Ok(connected), QuicOutcome::Worked),
                Race::Second(connected, quic) => {
                    let failure = quic.map_or(QuicFailure::Silent, |error| (&error).into());
                    (Ok(connected), QuicOutcome::Failed(failure))
                }
                Race::Neither(quic, tcp) => both(quic, tcp),
            },
            CarrierOrder::TcpFirst => match race(tcp, quic, head_start).await {
                Race::First(connected) => (Ok(connected), QuicOutcome::Unknown),
                Race::Second(connected, _) => (Ok(connected), QuicOutcome::Worked),
                Race::Neither(tcp, quic) => both(quic, tcp),
            },
        }
    }

    async fn over(&self, carrier: Carrier) -> Result<Connected, CarrierError> {
        let large_packets = self.options.large_packets;
        // On the heap: the state of a handshake is large, and a race holds it several times.
        let handshake = self.connect.connect(carrier, &self.address, self.tls, large_packets);
        in_time(Box::pin(handshake)).await
    }
}

async fn in_time<T>(
    step: impl Future<Output = Result<T, CarrierError>>,
) -> Result<T, CarrierError> {
    timeout(CARRIER_TIMEOUT, step).await.unwrap_or(Err(CarrierError::TimedOut(CARRIER_TIMEOUT)))
}

#[cfg(test)]
mod tests;
