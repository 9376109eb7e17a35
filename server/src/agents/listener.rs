//! The listener for agents: one port number, over UDP and over TCP.

use std::{error::Error as _, io, net::SocketAddr, sync::Arc, time::Duration};

use culvert_konnectivity::ALPN_H2;
use culvert_process::{
    accept::Acceptor,
    listen::{self, ListenFlags},
    supervision::propagate_panic,
};
use culvert_transport::{
    BufferSizes, ConnectError, Settings, UdpHealth,
    quic::{self, ResetKey},
    tls::{self, Current, TlsError},
};
use culvert_wire::{CloseCode, version::ALPN};
use rustls::ServerConfig;
use tokio::{net::TcpListener, task::JoinSet};
use tracing::warn;

use super::{AgentContext, unadmitted::Unadmitted};
use crate::{config::Config, files::ServerFiles};

/// Maximum number of bytes that a peer over QUIC may send ahead of the reader before it is
/// admitted: a hello and little else.
const UNADMITTED_WINDOW: u32 = 16 * 1024;
/// Maximum number of attempts to find a port number that is free for UDP and TCP.
const MAX_ATTEMPTS: usize = 16;

/// The listener for agents cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The port cannot be bound over UDP.
    #[error("--{flag}: {0}{remedy}", flag = flag_of(.0), remedy = remedy(.0))]
    Tunnel(#[from] ConnectError),
    /// The port cannot be bound over TCP.
    #[error(
        "--{}: cannot listen on {address} over TCP: {source}{}",
        FLAGS.at_fault(source), listen::remedy(source)
    )]
    TunnelTcp {
        /// Address of the port.
        address: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// TLS cannot be configured; the fault is ours.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// No agent can be accepted over QUIC any more.
    #[error("--agent-port: the UDP socket has failed")]
    Ended,
    /// The kernel does not report the bound address.
    #[error(transparent)]
    Address(#[from] io::Error),
}

/// The flags of the port.
const FLAGS: ListenFlags = ListenFlags { port: "agent-port", address: "agent-bind-address" };

/// The flag to change where the port cannot be bound over UDP.
fn flag_of(error: &ConnectError) -> &'static str {
    kernel_error(error).map_or(FLAGS.port, |source| FLAGS.at_fault(source))
}

/// What an operator can do where the port cannot be bound over UDP.
fn remedy(error: &ConnectError) -> &'static str {
    kernel_error(error).map_or("", listen::remedy)
}

fn kernel_error(error: &ConnectError) -> Option<&io::Error> {
    let ConnectError::Bind(error) = error else { return None };
    error.source()?.downcast_ref()
}

/// Both listeners of the port, bound and not accepting yet.
#[derive(Debug)]
pub(crate) struct AgentListener {
    quic: quic::Listener,
    tcp: TcpAccept,
    settings: Settings,
}

/// Accepts agents over TCP, Konnectivity's among them.
#[derive(Debug)]
struct TcpAccept {
    acceptor: Acceptor<TcpListener>,
    tls: Arc<ServerConfig>,
    settings: Settings,
}

impl AgentListener {
    /// Binds the port, with the certificates and the secret of the files.
    ///
    /// # Errors
    /// When the port cannot be bound over UDP or TCP.
    pub(crate) fn bind(config: &Config, files: &ServerFiles) -> Result<Self, ListenerError> {
        let key_exchange = config.tunnel.key_exchange;
        let tls = tls::tunnel_server_with(files.agents.clone(), key_exchange)?;
        let tls = Arc::new(tls);
        // Agents open the control stream and nothing else.
        let settings = config.tunnel.settings(1);
        let of_strangers = settings.with_unadmitted_window(UNADMITTED_WINDOW);
        let address = config.agents.address;
        let (quic, tcp) = bind_both(address, &tls, &of_strangers, files.reset_key.as_ref())?;
        let mut tls = tls::server(files.agents.clone(), key_exchange, &config.tls.tls12)?;
        tls.alpn_protocols = vec![ALPN.to_vec(), ALPN_H2.to_vec()];
        let sizes = quic.buffer_sizes();
        if sizes.is_small() {
            warn!(
                receive = sizes.receive,
                send = sizes.send,
                "UDP buffers are small; raise net.core.rmem_max and net.core.wmem_max to 8 MiB",
            );
        }
        let tcp =
            TcpAccept { acceptor: Acceptor::new("agents", tcp), tls: Arc::new(tls), settings };
        Ok(Self { quic, tcp, settings })
    }

    /// Settings of tunnels that are not over QUIC, such as the bridges to Konnectivity agents.
    pub(crate) fn settings(&self) -> Settings {
        self.settings
    }

    /// The bound address, over UDP and TCP.
    ///
    /// # Errors
    /// When the kernel does not report it.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.quic.local_addr()
    }

    /// Kernel buffers granted to the UDP socket.
    pub(crate) fn buffer_sizes(&self) -> BufferSizes {
        self.quic.buffer_sizes()
    }

    /// What the UDP socket has found out about the kernel and about paths.
    pub(crate) fn udp_health(&self) -> &Arc<UdpHealth> {
        self.quic.udp_health()
    }

    /// Accepts and serves agents from now on, over QUIC and over TCP in a task each.
    pub(crate) fn start(self, context: &Arc<AgentContext>) -> AcceptingAgents {
        let quic = Arc::new(self.quic);
        let mut tasks = JoinSet::new();
        tasks.spawn(accept_over_quic(quic.clone(), context.clone()));
        tasks.spawn(self.tcp.run(context.clone()));
        AcceptingAgents { quic, tasks }
    }
}

/// A listener that accepts agents. Dropping it ends every QUIC tunnel.
#[derive(Debug)]
pub(crate) struct AcceptingAgents {
    quic: Arc<quic::Listener>,
    tasks: JoinSet<()>,
}

impl AcceptingAgents {
    /// Completes when agents can no longer be accepted over QUIC: the kernel has failed its socket.
    ///
    /// # Panics
    /// With the panic of an accept loop.
    ///
    /// # Cancel safety
    /// Cancel safe: the loops go on.
    pub(crate) async fn failed(&mut self) -> ListenerError {
        if let Some(ended) = self.tasks.join_next().await {
            propagate_panic(ended);
        }
        ListenerError::Ended
    }

    /// Refuses agents that come from now on; those that have come are served on.
    pub(crate) async fn refuse_new(&mut self) {
        self.quic.refuse_new();
        self.tasks.shutdown().await;
    }

    /// Closes every QUIC tunnel and waits until the last packets are out, at most `limit`.
    pub(crate) async fn close(&self, code: CloseCode, reason: &str, limit: Duration) {
        self.quic.close(code, reason, limit).await;
    }
}

async fn accept_over_quic(quic: Arc<quic::Listener>, context: Arc<AgentContext>) {
    while let Some(incoming) = quic.accept().await {
        if context.unadmitted.is_crowded() && incoming.may_retry() {
            context.metrics.address_validated();
            incoming.retry();
            continue;
        }
        if let Some(peer) = Unadmitted::over_quic(incoming, &context).await {
            context.tasks.spawn(peer.serve(context.clone()));
        }
    }
}

impl TcpAccept {
    async fn run(mut self, context: Arc<AgentContext>) {
        let (tls, settings) = (self.tls, self.settings);
        loop {
            let accepted = self.acceptor.accept().await;
            let peer = Unadmitted::over_tcp(accepted, tls.clone(), settings, &context).await;
            if let Some(peer) = peer {
                context.tasks.spawn(peer.serve(context.clone()));
            }
        }
    }
}

/// Binds one port number for both; for port 0 one that is free for both.
fn bind_both(
    address: SocketAddr,
    tls: &Arc<ServerConfig>,
    settings: &Settings,
    reset_key: Option<&Current<ResetKey>>,
) -> Result<(quic::Listener, TcpListener), ListenerError> {
    let mut attempts = if address.port() == 0 { MAX_ATTEMPTS } else { 1 };
    loop {
        attempts -= 1;
        let quic = quic::Listener::bind(address, tls.clone(), settings, reset_key.cloned())?;
        let bound = SocketAddr::new(address.ip(), quic.local_addr()?.port());
        match listen::tcp(bound) {
            Ok(tcp) => return Ok((quic, tcp)),
            Err(source) if attempts == 0 => {
                return Err(ListenerError::TunnelTcp { address: bound, source });
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::context;

    fn listening() -> AcceptingAgents {
        let pair = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der());
        let identity = tls::Identity { chain: vec![pair.cert.into()], key: key.unwrap() };
        let tls = tls::tunnel_server(identity, None, tls::KeyExchange::default()).unwrap();
        let (tls, settings) = (Arc::new(tls), Settings::default());
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let (quic, tcp) = bind_both(address, &tls, &settings, None).unwrap();
        let tcp = TcpAccept { acceptor: Acceptor::new("agents", tcp), tls, settings };
        AgentListener { quic, tcp, settings }.start(&context())
    }

    #[tokio::test]
    async fn a_udp_socket_that_fails_is_a_failure_of_the_listener() {
        let mut agents = listening();
        assert!(tokio::time::timeout(Duration::ZERO, agents.failed()).await.is_err());
        // As when its socket has failed: the endpoint accepts nothing any more.
        agents.quic.close(CloseCode::SHUTDOWN, "", Duration::ZERO).await;
        agents.failed().await;
    }
}
