//! The steps of an attempt that touch files and the network. Tests script them through [`Connect`].

use std::{fmt, net::SocketAddr, sync::Arc};

use culvert_konnectivity::ALPN_H2;
use culvert_transport::{
    BufferSizes, Carrier, Settings, Tunnel, UdpHealth, quic, tcp,
    tls::{KeyExchange, TlsError},
};
use tokio_util::task::TaskTracker;

use crate::{
    config::{Config, ServersConfig},
    connector::{
        error::{CarrierError, ResolveError},
        key_exchange::with_smaller_hello,
        options::CarrierOrder,
        resolve::{Candidate, Preference, ServerAddress, ServerName, direct_candidates},
        tls::{CarrierTls, ClientTls},
    },
    files::AgentFiles,
    konnectivity,
    lookups::SystemResolver,
    metrics::AgentMetrics,
    tunnels::session::FIRST_STREAM_LIMIT,
};

/// UDP payload that every path carries that carries QUIC at all, in bytes (RFC 9000 §14).
const SMALLEST_MTU: u16 = 1200;

/// A tunnel whose handshake has succeeded. The server has not welcomed the agent yet.
#[derive(Debug)]
pub(crate) struct Connected {
    /// The tunnel.
    pub(crate) tunnel: Tunnel,
    /// Sizes of the UDP socket's kernel buffers; `None` over TCP.
    pub(crate) buffers: Option<BufferSizes>,
}

/// The steps of an attempt that touch files and the network.
pub(crate) trait Connect: fmt::Debug + Send + Sync + 'static {
    /// What [`Connect::read_tls`] reads.
    type Tls: Send + Sync;

    /// Looks at the files, and makes TLS of the certificate, key and CA as they are now.
    ///
    /// # Errors
    /// When one of them cannot be used.
    ///
    /// # Cancel safety
    /// Cancel safe.
    fn read_tls(&self) -> impl Future<Output = Result<Self::Tls, TlsError>> + Send;

    /// Resolves the servers' name, as [`ServerName::candidates`] does, so that a server that has
    /// moved needs no restart.
    ///
    /// # Errors
    /// When there is no address.
    ///
    /// # Cancel safety
    /// Cancel safe.
    fn resolve(
        &self,
        order: CarrierOrder,
        preference: &Preference,
    ) -> impl Future<Output = Result<Vec<Candidate>, ResolveError>> + Send;

    /// The addresses of one server as addresses to try, in their order.
    fn direct(&self, addresses: &[SocketAddr], order: CarrierOrder) -> Vec<Candidate>;

    /// Makes a tunnel over one carrier. [`Carrier::Tcp`] leads to a tunnel over [`Carrier::Grpc`]
    /// where the server is Konnectivity's.
    ///
    /// # Errors
    /// When the handshake fails.
    ///
    /// # Cancel safety
    /// Cancel safe: dropping the future abandons the handshake.
    fn connect(
        &self,
        carrier: Carrier,
        address: &ServerAddress,
        tls: &Self::Tls,
        large_packets: bool,
    ) -> impl Future<Output = Result<Connected, CarrierError>> + Send;
}

/// Connects over the network.
#[derive(Debug)]
pub(crate) struct NetworkConnect {
    /// The servers' address and identity.
    servers: ServersConfig,
    /// The servers' name, and where it leads.
    server_name: ServerName,
    /// Certificates, keys and CAs.
    files: AgentFiles,
    /// Settings of every tunnel.
    settings: Settings,
    /// Key exchanges that are offered.
    key_exchange: KeyExchange,
    /// What the UDP sockets have found out about the kernel and about paths.
    udp_health: Arc<UdpHealth>,
    /// Owner of the tasks that bridge Konnectivity servers. Each ends with its tunnel.
    bridges: TaskTracker,
}

impl NetworkConnect {
    /// Connects to the servers of this configuration. `bridges` gets the tasks that bridge
    /// Konnectivity servers.
    pub(crate) fn new(
        config: &Config,
        files: AgentFiles,
        metrics: &AgentMetrics,
        bridges: TaskTracker,
    ) -> Self {
        let servers = config.servers.clone();
        let lookups = metrics.server_lookups.clone();
        Self {
            server_name: ServerName::new(&servers, SystemResolver, lookups),
            servers,
            files,
            settings: config.tunnel.settings(FIRST_STREAM_LIMIT.min(config.max_streams)),
            key_exchange: config.tunnel.key_exchange,
            udp_health: metrics.udp_health.clone(),
            bridges,
        }
    }
}

impl Connect for NetworkConnect {
    type Tls = ClientTls;

    async fn read_tls(&self) -> Result<ClientTls, TlsError> {
        let files = &self.files;
        files.reloads.look().await;
        let identity = files.identity.as_ref().map(|identity| (*identity.get()).clone());
        ClientTls::new(files.ca.get(), identity, self.key_exchange, &self.servers)
    }

    async fn resolve(
        &self,
        order: CarrierOrder,
        preference: &Preference,
    ) -> Result<Vec<Candidate>, ResolveError> {
        self.server_name.candidates(&self.files.proxies, order, preference).await
    }

    fn direct(&self, addresses: &[SocketAddr], order: CarrierOrder) -> Vec<Candidate> {
        direct_candidates(addresses, &self.files.proxies, order)
    }

    async fn connect(
        &self,
        carrier: Carrier,
        address: &ServerAddress,
        tls: &ClientTls,
        large_packets: bool,
    ) -> Result<Connected, CarrierError> {
        let first = self.over(carrier, address, &tls.first, large_packets);
        match &tls.smaller {
            None => first.await,
            Some(smaller) => {
                let smaller = self.over(carrier, address, smaller, large_packets);
                with_smaller_hello(first, smaller).await
            }
        }
    }
}

impl NetworkConnect {
    /// Makes a tunnel over one carrier with one set of key exchanges.
    async fn over(
        &self,
        carrier: Carrier,
        address: &ServerAddress,
        tls: &CarrierTls,
        large_packets: bool,
    ) -> Result<Connected, CarrierError> {
        let mut settings = self.settings;
        if !large_packets {
            settings.mtu_cap = settings.mtu_cap.min(SMALLEST_MTU);
        }
        let name = self.servers.name.to_str();
        match carrier {
            Carrier::Quic => {
                let remote = address.quic.ok_or(CarrierError::UnknownAddress)?;
                let tls = tls.quic.clone();
                let (connection, buffers) =
                    quic::connect(remote, &name, tls, &settings, &self.udp_health).await?;
                Ok(Connected { tunnel: connection.into(), buffers: Some(buffers) })
            }
            Carrier::Tcp | Carrier::Grpc => {
                let tls = tls.tcp.clone();
                let connected = tcp::handshake(&address.tcp, &name, tls, &settings).await?;
                let tunnel = match connected.protocol() {
                    Some(ALPN_H2) => {
                        let keep_alive = self.servers.keep_alive_interval;
                        konnectivity::connect(connected, keep_alive, &settings, &self.bridges)
                            .await?
                    }
                    _ => connected.begin(&settings).await?.into(),
                };
                Ok(Connected { tunnel, buffers: None })
            }
        }
    }
}
