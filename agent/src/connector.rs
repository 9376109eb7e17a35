//! Keeps a tunnel to the server: connects, serves until it is lost, waits, and never gives up.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Instant};

use culvert_wire::{
    process::logging::RateLimited,
    tls::{self, Identity, TlsError},
    transport::{
        BufferSizes,
        quic::{ConnectError, Settings},
    },
};
use tokio::{net::lookup_host, time::sleep};
use tracing::{info, warn};

use crate::{
    backoff::Backoff,
    config::{ServersConfig, Transport},
    metrics::AgentMetrics,
    transport,
    tunnel::{self, JoinError, Joined, TunnelContext},
};

/// Gets tunnels to the server at one address.
#[derive(Debug)]
pub struct Connector {
    /// Where the server is and how it is known.
    pub servers: ServersConfig,
    /// What tunnels are set up with.
    pub settings: Settings,
    /// Which carrier tunnels get.
    pub transport: Transport,
    /// Which key exchanges are offered.
    pub key_exchange: tls::KeyExchange,
    /// How long to wait after a failure.
    pub backoff: Backoff,
    /// What is counted.
    pub metrics: Arc<AgentMetrics>,
}

/// Why an attempt to get a tunnel failed.
#[derive(Debug, thiserror::Error)]
enum AttemptError {
    #[error("cannot resolve {host}: {reason}")]
    Resolve { host: String, reason: String },
    #[error("{0}")]
    Tls(#[from] TlsError),
    #[error("{address}: {source}")]
    Connect { address: SocketAddr, source: ConnectError },
    #[error("{address}: {source}")]
    Join { address: SocketAddr, source: JoinError },
}

impl AttemptError {
    fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "unresolvable",
            Self::Tls(_) => "tls_files",
            Self::Connect { .. } => "connect_failed",
            Self::Join { .. } => "join_failed",
        }
    }
}

impl Connector {
    /// Connects and serves until the agent drains.
    pub async fn run(mut self, context: Arc<TunnelContext>) {
        static ATTEMPT_FAILED: RateLimited = RateLimited::new(std::time::Duration::from_secs(10));
        while !context.draining.is_cancelled() {
            let attempt = tokio::select! {
                () = context.draining.cancelled() => return,
                attempt = self.attempt(&context) => attempt,
            };
            match attempt {
                Ok((joined, address, buffers)) => {
                    self.metrics.connect_attempt("ok");
                    self.backoff.reset();
                    self.serve(joined, address, buffers, &context).await;
                }
                Err(error) => {
                    self.metrics.connect_attempt(error.label());
                    if let Some(suppressed) = ATTEMPT_FAILED.admit(Instant::now()) {
                        warn!(%error, suppressed, "no tunnel to the server, will try again");
                    }
                }
            }
            let delay = self.backoff.next(fastrand::f64());
            tokio::select! {
                () = context.draining.cancelled() => return,
                () = sleep(delay) => {}
            }
        }
    }

    async fn serve(
        &self,
        joined: Joined,
        address: SocketAddr,
        buffers: Option<BufferSizes>,
        context: &Arc<TunnelContext>,
    ) {
        let welcome = &joined.welcome;
        let server_id = welcome.server_id.clone();
        info!(%server_id, %address, transport = joined.tunnel().transport(), "server connected");
        if let Some(buffers) = buffers.filter(|buffers| buffers.is_small()) {
            warn!(
                receive = buffers.receive,
                send = buffers.send,
                "UDP buffers are small; raise net.core.rmem_max and net.core.wmem_max to 8 MiB",
            );
        }
        let shown = self.metrics.tunnel_open(
            server_id.clone(),
            welcome.server_count,
            joined.tunnel().clone(),
            buffers,
        );
        let lost = joined.serve(context.clone()).await;
        drop(shown);
        self.metrics.tunnel_lost(lost.label());
        info!(%server_id, %address, reason = %lost, "server gone");
    }

    /// One attempt: every address of the server in turn.
    ///
    /// Files and names are read anew each time, so a rotated certificate or a moved server needs
    /// no restart.
    async fn attempt(
        &self,
        context: &TunnelContext,
    ) -> Result<(Joined, SocketAddr, Option<BufferSizes>), AttemptError> {
        let tls = Arc::new(self.client_tls()?);
        let mut failure = None;
        for address in self.addresses().await? {
            match self.connect(address, tls.clone(), context).await {
                Ok((joined, buffers)) => return Ok((joined, address, buffers)),
                Err(error) => failure = Some(error),
            }
        }
        let unresolved = || AttemptError::Resolve {
            host: self.servers.host.clone(),
            reason: "it has no address".into(),
        };
        Err(failure.unwrap_or_else(unresolved))
    }

    async fn connect(
        &self,
        address: SocketAddr,
        tls: Arc<rustls::ClientConfig>,
        context: &TunnelContext,
    ) -> Result<(Joined, Option<BufferSizes>), AttemptError> {
        let name = self.servers.name.to_str();
        let (tunnel, buffers) =
            transport::connect(self.transport, address, &name, tls, &self.settings)
                .await
                .map_err(|source| AttemptError::Connect { address, source })?;
        let joined = tunnel::join(tunnel, context)
            .await
            .map_err(|source| AttemptError::Join { address, source })?;
        Ok((joined, buffers))
    }

    async fn addresses(&self) -> Result<Vec<SocketAddr>, AttemptError> {
        let ServersConfig { host, port, .. } = &self.servers;
        match lookup_host((host.as_str(), *port)).await {
            Ok(addresses) => Ok(addresses.collect()),
            Err(error) => {
                Err(AttemptError::Resolve { host: host.clone(), reason: error.to_string() })
            }
        }
    }

    /// TLS from the files as they are now.
    fn client_tls(&self) -> Result<rustls::ClientConfig, TlsError> {
        let identity = match &self.servers.certificate {
            Some(pair) => Some(Identity::from_pem_files(&pair.certificate, &pair.key)?),
            None => None,
        };
        let roots = tls::authorities(&tls::certificates(Path::new(&self.servers.ca))?)?;
        tls::tunnel_client(roots, identity, self.key_exchange)
    }

    /// Reads every file once, so that a fault shows at start.
    ///
    /// # Errors
    /// When a certificate, key or CA cannot be used.
    pub fn check_files(&self) -> Result<(), TlsError> {
        self.client_tls().map(drop)
    }
}
