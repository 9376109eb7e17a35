//! The frontend's listener: a Unix socket, or TCP with mutual TLS.

use std::{fmt, io, net::SocketAddr, path::PathBuf, sync::Arc};

use culvert_process::{
    accept::Acceptor,
    listen::{self, ListenFlags},
    unix_socket::{self, SocketFile},
};
use culvert_transport::{
    splice,
    tls::{ServerCredentials, Tls12, TlsError},
};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tracing::debug;

use super::{
    FrontendContext,
    clients::ClientNames,
    connect, grpc,
    reach::Reach,
    socket::{FrontendSocket, SharedTcp},
    tls::server_tls,
};
use crate::{
    config::{FrontendConfig, FrontendListen, Mode},
    metrics::{FrontendKind, FrontendRefusal},
};

/// Owner and group may connect: kube-apiserver and the server share one or the other.
const SOCKET_MODE: u32 = 0o770;
/// The flags of the TCP port.
const FLAGS: ListenFlags = ListenFlags { port: "server-port", address: "server-bind-address" };
/// Name of the listener in log lines.
const NAME: &str = "frontend";

/// The frontend cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The Unix socket cannot be bound.
    #[error("--uds-name: cannot listen on {path}: {source}")]
    Unix {
        /// Path of the socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The TCP port cannot be bound.
    #[error(
        "--{}: cannot listen on {address}: {source}{}",
        FLAGS.at_fault(source), listen::remedy(source)
    )]
    Tcp {
        /// Address of the port.
        address: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// TLS cannot be configured; the fault is ours.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// Address that the frontend is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrontendAddress {
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

impl fmt::Display for FrontendAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// A listening frontend. Dropping it removes its Unix socket.
#[derive(Debug)]
pub(crate) struct FrontendListener {
    listener: Listener,
    max_connections: u32,
}

#[derive(Debug)]
enum Listener {
    Unix(Acceptor<UnixListener>, SocketFile),
    Tcp(Acceptor<TcpListener>, Arc<Tls>),
}

/// What a client over TCP is served with.
#[derive(Debug)]
struct Tls {
    config: Arc<ServerConfig>,
    clients: ClientNames,
}

impl FrontendListener {
    /// Binds the address of the configuration. Over TCP `credentials` are needed.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub(crate) fn bind(
        config: &FrontendConfig,
        tls12: &Tls12,
        credentials: Option<ServerCredentials>,
    ) -> Result<Self, ListenError> {
        let listener = match &config.listen {
            FrontendListen::Unix { path, delete_existing } => {
                let (listener, file) = unix_socket::bind(path, *delete_existing, SOCKET_MODE)
                    .map_err(|source| ListenError::Unix { path: path.clone(), source })?;
                Listener::Unix(Acceptor::new(NAME, listener), file)
            }
            FrontendListen::Tcp { address, .. } => {
                let credentials = credentials.expect("the files of a frontend over TCP were read");
                let tls = server_tls(credentials, config.mode, tls12)?;
                let listener = listen::tcp(*address)
                    .map_err(|source| ListenError::Tcp { address: *address, source })?;
                let clients = ClientNames::new(&config.client_names);
                let tls = Tls { config: Arc::new(tls), clients };
                Listener::Tcp(Acceptor::new(NAME, listener), Arc::new(tls))
            }
        };
        Ok(Self { listener, max_connections: config.max_connections })
    }

    /// The bound address.
    ///
    /// # Errors
    /// When the kernel does not report it.
    pub(crate) fn address(&self) -> io::Result<FrontendAddress> {
        Ok(match &self.listener {
            Listener::Unix(_, file) => FrontendAddress::Unix(file.path().into()),
            Listener::Tcp(acceptor, _) => FrontendAddress::Tcp(acceptor.listener().local_addr()?),
        })
    }

    /// Accepts connections until the server stops; those that it has accepted go on.
    pub(crate) async fn run(mut self, context: Arc<FrontendContext>) {
        let permits = Arc::new(Semaphore::new(self.max_connections as usize));
        loop {
            let (accepted, permit) = tokio::select! {
                () = context.stopping.cancelled() => return,
                accepted = self.accept(&permits, &context.reach) => accepted,
            };
            let context = context.clone();
            context.tasks.clone().spawn(async move {
                let closing = context.closing.clone();
                // Boxed, because every future that it is moved into grows by it.
                let serving = Box::pin(accepted.serve(context));
                closing.run_until_cancelled_owned(serving).await;
                drop(permit);
            });
        }
    }

    /// The next connection, once one more may be open.
    async fn accept(
        &mut self,
        permits: &Arc<Semaphore>,
        reach: &Reach,
    ) -> (Accepted, OwnedSemaphorePermit) {
        let permit = permits.clone().acquire_owned().await.expect("it is never closed");
        let accepted = match &mut self.listener {
            Listener::Unix(acceptor, file) => loop {
                tokio::select! {
                    (socket, _) = acceptor.accept() => break Accepted::Unix(socket),
                    (listener, made) = reach.remade(file) => {
                        (*acceptor, *file) = (Acceptor::new(NAME, listener), made);
                    }
                }
            },
            Listener::Tcp(acceptor, tls) => Accepted::Tcp(acceptor.accept().await.0, tls.clone()),
        };
        (accepted, permit)
    }
}

/// A connection of which nothing was read yet.
enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream, Arc<Tls>),
}

impl Accepted {
    async fn serve(self, context: Arc<FrontendContext>) {
        match self {
            Self::Unix(socket) => serve(socket, context).await,
            Self::Tcp(socket, tls) => {
                splice::prepare(&socket);
                let acceptor = TlsAcceptor::from(tls.config.clone());
                // On the heap: a connection has no room for it later.
                let handshake = Box::pin(acceptor.accept(SharedTcp::new(socket)));
                match timeout(context.header_timeout, handshake).await {
                    Ok(Ok(socket))
                        if tls.clients.permit(socket.get_ref().1.peer_certificates()) =>
                    {
                        serve(socket, context).await;
                    }
                    Ok(Ok(_)) => context.metrics.frontend_refused(FrontendRefusal::ClientName),
                    Ok(Err(error)) => {
                        context.metrics.frontend_refused(FrontendRefusal::Handshake);
                        debug!(%error, "a frontend's TLS handshake failed");
                    }
                    Err(_) => {
                        context.metrics.frontend_refused(FrontendRefusal::TimedOut);
                        debug!("a frontend's TLS handshake took too long");
                    }
                }
            }
        }
    }
}

/// Serves one connection to its end.
async fn serve<S: FrontendSocket>(socket: S, context: Arc<FrontendContext>) {
    match context.mode {
        Mode::HttpConnect => {
            let _open = context.metrics.frontend_open(FrontendKind::Connect);
            Box::pin(connect::serve(socket, &context)).await;
        }
        Mode::Grpc => Box::pin(grpc::serve(socket, context)).await,
    }
}
