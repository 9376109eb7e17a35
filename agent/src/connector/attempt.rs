//! One attempt to get a tunnel to a server: files, names, carriers, hello and welcome.

use std::{fmt, net::SocketAddr, path::Path, sync::Arc, time::Duration};

use culvert_konnectivity::ALPN_H2;
use culvert_transport::{
    BufferSizes, ConnectError, Settings, Tunnel, TunnelLost, quic,
    tcp::{self, Proxies, Route},
    tls::{self, Identity, TlsError},
};
use tokio::{net::lookup_host, time::timeout};

use crate::{
    config::ServersConfig,
    connector::{
        options::{AttemptOptions, CarrierOrder, QuicOutcome},
        race::{Race, race},
    },
    konnectivity,
    tunnels::session::{self, JoinError, Joined, TunnelContext},
};

/// How long the likelier carrier is tried alone. Most round trips are shorter, and a person does not
/// notice it.
const HEAD_START: Duration = Duration::from_millis(300);
/// How long a handshake may take, and then the welcome: a handshake whose first packets are lost twice
/// takes three seconds, and a server may have to ask others before it takes an agent in.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a name may take to be looked up.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// UDP payload that every path carries that carries QUIC at all (RFC 9000 §14).
const SMALLEST_MTU: u16 = 1200;

/// A tunnel that a server has welcomed the agent on.
#[derive(Debug)]
pub struct Arrived {
    /// The tunnel.
    pub joined: Joined,
    /// What the kernel granted its socket, if it is UDP.
    pub buffers: Option<BufferSizes>,
}

/// What an attempt came to.
#[derive(Debug)]
pub struct Attempted {
    /// The tunnel, or why there is none.
    pub result: Result<Arrived, AttemptError>,
    /// How QUIC did.
    pub quic: QuicOutcome,
}

/// Why an attempt to get a tunnel failed.
#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    /// The server's name has no address.
    #[error("cannot resolve {host}: {reason}")]
    Resolve {
        /// The name.
        host: String,
        /// Why not.
        reason: String,
    },
    /// Certificate, key or CA cannot be used.
    #[error("{0}")]
    Tls(#[from] TlsError),
    /// No carrier that may be used got through.
    #[error("{place}: {failed}")]
    CarrierOrder {
        /// Where the server is said to be.
        place: String,
        /// Each carrier's reason.
        failed: CarrierFailures,
    },
}

impl AttemptError {
    /// A short word for metric labels.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "unresolvable",
            Self::Tls(_) => "tls_files",
            Self::CarrierOrder { failed, .. }
                if failed.0.iter().any(|(_, error)| error.is_join()) =>
            {
                "join_failed"
            }
            Self::CarrierOrder { .. } => "connect_failed",
        }
    }
}

/// Each carrier that was tried, and why it did not get through.
#[derive(Debug)]
pub struct CarrierFailures(Vec<(&'static str, CarrierError)>);

impl fmt::Display for CarrierFailures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (carrier, error)) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}over {carrier}: {error}")?;
        }
        Ok(())
    }
}

/// Why one carrier did not get through.
#[derive(Debug, thiserror::Error)]
pub enum CarrierError {
    /// There is no connection.
    #[error("{0}")]
    Connect(#[from] ConnectError),
    /// There is one, and the server did not take the agent in.
    #[error("{0}")]
    Join(#[from] JoinError),
    /// The server's address is not known: a proxy looks its name up.
    #[error("the server's address is not known")]
    UnknownAddress,
    /// Nothing came of it for too long.
    #[error("nothing within {CARRIER_TIMEOUT:?}")]
    TimedOut,
}

impl CarrierError {
    fn is_join(&self) -> bool {
        matches!(self, Self::Join(_))
    }

    /// How QUIC failed, in a word.
    fn label(&self) -> &'static str {
        match self {
            Self::Connect(ConnectError::Refused) => "quic_refused",
            Self::Connect(ConnectError::Handshake(TunnelLost::TimedOut))
            | Self::Join(JoinError::Lost(TunnelLost::TimedOut))
            | Self::TimedOut => "quic_silent",
            _ => "quic_rejected",
        }
    }
}

/// How tunnels are got.
#[derive(Debug)]
pub struct Attempts {
    /// Where the servers are and how they are known.
    pub servers: ServersConfig,
    /// What tunnels are set up with.
    pub settings: Settings,
    /// Which key exchanges are offered.
    pub key_exchange: tls::KeyExchange,
    /// Through which proxy TCP goes, if through any.
    pub proxies: Proxies,
}

impl Attempts {
    /// One attempt: every address of the servers in turn, in random order, so that each server's is
    /// found, and `toward` first.
    ///
    /// Files and names are read anew each time, so a rotated certificate or a moved server needs no
    /// restart.
    ///
    /// # Cancel safety
    /// Dropping the future gives up what was begun.
    pub async fn attempt(
        &self,
        AttemptOptions { order, large_packets, at_once }: AttemptOptions,
        toward: Option<SocketAddr>,
        context: &TunnelContext,
    ) -> Attempted {
        let unknown = |error| Attempted { result: Err(error), quic: QuicOutcome::Unknown };
        let tls = match self.client_tls() {
            Ok(tls) => tls,
            Err(error) => return unknown(error.into()),
        };
        let mut settings = self.settings;
        if !large_packets {
            settings.mtu_cap = settings.mtu_cap.min(SMALLEST_MTU);
        }
        let places = match self.places(order, toward).await {
            Ok(places) => places,
            Err(error) => return unknown(error),
        };
        let mut last = None;
        for (place, order) in places {
            let head_start = if at_once { Duration::ZERO } else { HEAD_START };
            let place = Place { place, tls: &tls, settings, head_start, attempts: self, context };
            let attempted = place.attempt(order).await;
            if attempted.result.is_ok() {
                return attempted;
            }
            last = Some(attempted);
        }
        let no_address = || self.unresolvable("it has no address");
        last.unwrap_or_else(|| unknown(no_address()))
    }

    /// Where to look for a server, and which carriers lead there. A proxy knows names that nobody here
    /// can look up.
    async fn places(
        &self,
        order: CarrierOrder,
        toward: Option<SocketAddr>,
    ) -> Result<Vec<(Ends, CarrierOrder)>, AttemptError> {
        let ServersConfig { host, port, .. } = &self.servers;
        let proxied = self.proxies.proxy_for(host, *port).map(|proxy| Route::Proxied {
            proxy,
            host: host.clone(),
            port: *port,
        });
        let found = match timeout(LOOK_UP_TIMEOUT, lookup_host((host.as_str(), *port))).await {
            Ok(Ok(addresses)) => Ok(addresses.collect()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("no answer within {LOOK_UP_TIMEOUT:?}")),
        };
        let mut addresses: Vec<_> = match found {
            Ok(addresses) => addresses,
            Err(_) if proxied.is_some() && order != CarrierOrder::Quic => Vec::new(),
            Err(reason) => return Err(self.unresolvable(&reason)),
        };
        fastrand::shuffle(&mut addresses);
        addresses.sort_by_key(|address| Some(*address) != toward);
        let direct = addresses.into_iter().map(|address| {
            let tcp = proxied.clone().unwrap_or(Route::Direct(address));
            (Ends { quic: Some(address), tcp }, order)
        });
        let places: Vec<_> = direct.collect();
        match proxied {
            Some(tcp) if places.is_empty() => {
                Ok(vec![(Ends { quic: None, tcp }, CarrierOrder::Tcp)])
            }
            _ => Ok(places),
        }
    }

    fn unresolvable(&self, reason: &str) -> AttemptError {
        AttemptError::Resolve { host: self.servers.host.clone(), reason: reason.into() }
    }

    /// TLS from the files as they are now.
    fn client_tls(&self) -> Result<ClientTls, TlsError> {
        let identity = match &self.servers.certificate {
            Some(pair) => Some(Identity::from_pem_files(&pair.certificate, &pair.key)?),
            None => None,
        };
        let roots = tls::authorities(&tls::certificates(Path::new(&self.servers.ca))?)?;
        let quic = tls::tunnel_client(roots, identity, self.key_exchange)?;
        let mut tcp = quic.clone();
        let extra = self.servers.extra_alpn.iter().map(|name| name.clone().into_bytes());
        tcp.alpn_protocols.extend(extra.chain([ALPN_H2.to_vec()]));
        Ok(ClientTls { quic: Arc::new(quic), tcp: Arc::new(tcp) })
    }

    /// Reads every file once, so that a fault shows at start.
    ///
    /// # Errors
    /// When a certificate, key or CA cannot be used.
    pub fn check_files(&self) -> Result<(), TlsError> {
        self.client_tls().map(drop)
    }
}

/// TLS of both carriers: over TCP, Konnectivity servers are talked to as well.
struct ClientTls {
    quic: Arc<rustls::ClientConfig>,
    tcp: Arc<rustls::ClientConfig>,
}

/// How a server is reached over each carrier.
#[derive(Clone, Debug)]
struct Ends {
    /// Not without an address, which a proxy does not tell.
    quic: Option<SocketAddr>,
    tcp: Route,
}

impl fmt::Display for Ends {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.tcp, self.quic) {
            (Route::Proxied { host, port, .. }, None) => write!(f, "{host} port {port}"),
            (Route::Proxied { .. }, Some(address)) => write!(f, "{address}"),
            (Route::Direct(address), _) => write!(f, "{address}"),
        }
    }
}

/// One place where a server may be.
struct Place<'a> {
    place: Ends,
    tls: &'a ClientTls,
    settings: Settings,
    head_start: Duration,
    attempts: &'a Attempts,
    context: &'a TunnelContext,
}

/// A handshake that is complete: who is there is known, but not whether the agent is taken in.
struct Reached {
    carrier: &'static str,
    tunnel: Tunnel,
    /// What the kernel granted its socket, if it is UDP.
    buffers: Option<BufferSizes>,
}

/// The names of carriers in reasons.
const QUIC: &str = "QUIC";
const TCP: &str = "TCP";

impl Place<'_> {
    /// Carriers race for the handshake alone. Whether a server takes the agent in is asked of it once,
    /// however long it takes to find out, and does not depend on the carrier.
    async fn attempt(&self, order: CarrierOrder) -> Attempted {
        let (reached, quic) = self.reach(order).await;
        let failed = |failed, quic| Attempted {
            result: Err(AttemptError::CarrierOrder {
                place: self.place.to_string(),
                failed: CarrierFailures(failed),
            }),
            quic,
        };
        let Reached { carrier, tunnel, buffers } = match reached {
            Ok(reached) => reached,
            Err(errors) => return failed(errors, quic),
        };
        let joined = async { Ok(session::join(tunnel, self.context).await?) };
        match within(joined).await {
            Ok(joined) => Attempted { result: Ok(Arrived { joined, buffers }), quic },
            Err(error) => {
                let quic = match (carrier, &error) {
                    (QUIC, CarrierError::Join(error)) if error.is_refusal() => QuicOutcome::Unknown,
                    (QUIC, error) => QuicOutcome::Failed(error.label()),
                    _ => quic,
                };
                failed(vec![(carrier, error)], quic)
            }
        }
    }

    async fn reach(
        &self,
        order: CarrierOrder,
    ) -> (Result<Reached, Vec<(&'static str, CarrierError)>>, QuicOutcome) {
        match order {
            CarrierOrder::Quic => match self.over_quic().await {
                Ok(reached) => (Ok(reached), QuicOutcome::Worked),
                Err(error) => {
                    let fate = QuicOutcome::Failed(error.label());
                    (Err(vec![(QUIC, error)]), fate)
                }
            },
            CarrierOrder::Tcp => match self.over_tcp().await {
                Ok(reached) => (Ok(reached), QuicOutcome::Unknown),
                Err(error) => (Err(vec![(TCP, error)]), QuicOutcome::Unknown),
            },
            CarrierOrder::QuicFirst => {
                match race(self.over_quic(), self.over_tcp(), self.head_start).await {
                    Race::First(reached) => (Ok(reached), QuicOutcome::Worked),
                    Race::Second(reached, failed) => {
                        let word = failed.map_or("quic_silent", |error| error.label());
                        (Ok(reached), QuicOutcome::Failed(word))
                    }
                    Race::Neither(quic, tcp) => {
                        (Err(vec![(QUIC, quic), (TCP, tcp)]), QuicOutcome::Unknown)
                    }
                }
            }
            CarrierOrder::TcpFirst => {
                match race(self.over_tcp(), self.over_quic(), self.head_start).await {
                    Race::First(reached) => (Ok(reached), QuicOutcome::Unknown),
                    Race::Second(reached, _) => (Ok(reached), QuicOutcome::Worked),
                    Race::Neither(tcp, quic) => {
                        (Err(vec![(QUIC, quic), (TCP, tcp)]), QuicOutcome::Unknown)
                    }
                }
            }
        }
    }

    async fn over_quic(&self) -> Result<Reached, CarrierError> {
        let Some(address) = self.place.quic else {
            return Err(CarrierError::UnknownAddress);
        };
        within(async {
            let (connection, buffers) =
                quic::connect(address, &self.name(), self.tls.quic.clone(), &self.settings).await?;
            Ok(Reached { carrier: QUIC, tunnel: connection.into(), buffers: Some(buffers) })
        })
        .await
    }

    async fn over_tcp(&self) -> Result<Reached, CarrierError> {
        within(async {
            let (way, tls) = (&self.place.tcp, self.tls.tcp.clone());
            let connected = tcp::handshake(way, &self.name(), tls, &self.settings).await?;
            let tunnel = match connected.protocol() == Some(ALPN_H2) {
                true => {
                    let keep_alive = self.attempts.servers.keep_alive_interval;
                    konnectivity::connect(connected, keep_alive, &self.settings).await?
                }
                false => connected.begin(&self.settings).await?.into(),
            };
            Ok(Reached { carrier: TCP, tunnel, buffers: None })
        })
        .await
    }

    fn name(&self) -> String {
        self.attempts.servers.name.to_str().into_owned()
    }
}

async fn within<T>(way: impl Future<Output = Result<T, CarrierError>>) -> Result<T, CarrierError> {
    timeout(CARRIER_TIMEOUT, way).await.unwrap_or(Err(CarrierError::TimedOut))
}
