//! The frontend's listener: a Unix socket, or TCP with mutual TLS.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_process::{listen, logging::RateLimited};
use culvert_transport::{
    splice,
    tls::{Identity, KeyExchange, TlsError, authorities, certificates},
};
use rustls::{
    ServerConfig,
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::{FrontendContext, tls::SharedTcp};
use crate::config::{FrontendConfig, FrontendListen, Mode, TlsConfig, TlsVersion};

/// Owner and group may connect: kube-apiserver and the server share one or the other.
const SOCKET_MODE: u32 = 0o770;
/// Wait after a failed accept: it fails for want of file descriptors, which takes a moment.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// Connections the kernel completes ahead of us: a burst of kube-apiserver's.
const BACKLOG: i32 = 4096;

/// The frontend cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The Unix socket cannot be made.
    #[error("--uds-name: cannot listen on {path}: {source}")]
    Unix {
        /// Where it was to be.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The TCP port cannot be had.
    #[error("--server-port: cannot listen on {address}: {source}")]
    Tcp {
        /// What was to be bound.
        address: SocketAddr,
        /// The kernel's reason.
        source: io::Error,
    },
    /// Certificate, key or CA cannot be used.
    #[error("--server-cert, --server-key, --server-ca-cert: {0}")]
    Tls(#[from] TlsError),
}

/// Where the frontend can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrontendAddress {
    /// The path of a Unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
}

/// A listening frontend. Dropping it removes its Unix socket.
#[derive(Debug)]
pub struct FrontendListener {
    listener: Listener,
    max_connections: u32,
}

#[derive(Debug)]
enum Listener {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener, Arc<ServerConfig>),
}

/// A socket file, removed when dropped unless another process has put its own in its place.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl FrontendListener {
    /// Listens where the configuration says.
    ///
    /// # Errors
    /// When the socket cannot be had, or the certificates cannot be used.
    pub fn bind(config: &FrontendConfig, tls: &TlsConfig) -> Result<Self, ListenError> {
        let listener = match &config.listen {
            FrontendListen::Unix { path, delete_existing } => {
                let (listener, file) = bind_unix(path, *delete_existing)
                    .map_err(|source| ListenError::Unix { path: path.clone(), source })?;
                Listener::Unix(listener, file)
            }
            FrontendListen::Tcp { address, certificate, client_ca } => {
                let identity =
                    Identity::from_pem_files(&certificate.certificate, &certificate.key)?;
                let tls = server_tls(identity, client_ca, config.mode, tls.min_version)?;
                let listener = listen::tcp(*address)
                    .map_err(|source| ListenError::Tcp { address: *address, source })?;
                Listener::Tcp(listener, Arc::new(tls))
            }
        };
        Ok(Self { listener, max_connections: config.max_connections })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the kernel does not tell.
    pub fn address(&self) -> io::Result<FrontendAddress> {
        Ok(match &self.listener {
            Listener::Unix(_, file) => FrontendAddress::Unix(file.path.clone()),
            Listener::Tcp(listener, _) => FrontendAddress::Tcp(listener.local_addr()?),
        })
    }

    /// Serves connections until the context says stop; those it has accepted go on.
    pub async fn run(self, context: Arc<FrontendContext>) {
        static ACCEPT_FAILED: RateLimited = RateLimited::new(Duration::from_secs(10));
        let places = Arc::new(Semaphore::new(self.max_connections as usize));
        loop {
            let accepted = tokio::select! {
                () = context.stopping.cancelled() => return,
                accepted = self.accept(&places) => accepted,
            };
            match accepted {
                Ok((accepted, place)) => {
                    let context = context.clone();
                    context.tasks.clone().spawn(async move {
                        let closing = context.closing.clone();
                        // On the heap, because every future it would be moved into grows by it.
                        let serving = Box::pin(accepted.serve(context));
                        closing.run_until_cancelled_owned(serving).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    if let Some(suppressed) = ACCEPT_FAILED.admit(Instant::now()) {
                        warn!(%error, suppressed, "a frontend's connection was not accepted");
                    }
                    sleep(ACCEPT_RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// The next connection, once there is a place for it.
    async fn accept(
        &self,
        places: &Arc<Semaphore>,
    ) -> io::Result<(Accepted, tokio::sync::OwnedSemaphorePermit)> {
        let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
        let accepted = match &self.listener {
            Listener::Unix(listener, _) => Accepted::Unix(listener.accept().await?.0),
            Listener::Tcp(listener, tls) => Accepted::Tcp(listener.accept().await?.0, tls.clone()),
        };
        Ok((accepted, place))
    }
}

/// A connection that has said nothing yet.
enum Accepted {
    Unix(UnixStream),
    Tcp(TcpStream, Arc<ServerConfig>),
}

impl Accepted {
    async fn serve(self, context: Arc<FrontendContext>) {
        match self {
            Self::Unix(socket) => context.serve(socket).await,
            Self::Tcp(socket, tls) => {
                splice::prepare(&socket);
                let handshake = TlsAcceptor::from(tls).accept(SharedTcp::new(socket));
                match timeout(context.header_timeout, handshake).await {
                    Ok(Ok(socket)) => context.serve(socket).await,
                    Ok(Err(error)) => debug!(%error, "a frontend's TLS handshake failed"),
                    Err(_) => debug!("a frontend's TLS handshake took too long"),
                }
            }
        }
    }
}

fn bind_unix(path: &Path, delete_existing: bool) -> io::Result<(UnixListener, SocketFile)> {
    if delete_existing {
        remove_stale(path)?;
    }
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    let metadata = fs::symlink_metadata(path)?;
    let file = SocketFile { path: path.into(), inode: (metadata.dev(), metadata.ino()) };
    // Until here the process's umask decides, which never gives others the right to connect.
    fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))?;
    socket.listen(BACKLOG)?;
    Ok((UnixListener::from_std(socket.into())?, file))
}

/// Removes what a crash left; anything but a socket is somebody's file and stays.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "a file that is not a socket is in the way",
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == self.inode;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// TLS for kube-apiserver over TCP: its client certificate is what lets it in.
fn server_tls(
    identity: Identity,
    client_ca: &Path,
    mode: Mode,
    min_version: TlsVersion,
) -> Result<ServerConfig, TlsError> {
    let provider = KeyExchange::Hybrid.provider();
    let roots = authorities(&certificates(client_ca)?)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| TlsError::Authority(error.to_string()))?;
    let versions: &[_] = match min_version {
        TlsVersion::Tls13 => &[&rustls::version::TLS13],
        TlsVersion::Tls12 => &[&rustls::version::TLS13, &rustls::version::TLS12],
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(identity.chain, identity.key)?;
    config.alpn_protocols = match mode {
        Mode::Grpc => vec![b"h2".to_vec()],
        Mode::HttpConnect => vec![b"http/1.1".to_vec()],
    };
    // A resumed session would not check the client's certificate again.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_unix_socket_is_private_to_owner_and_group_and_removed_at_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frontend.sock");
        let (listener, file) = bind_unix(&path, true).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, SOCKET_MODE);
        UnixStream::connect(&path).await.unwrap();
        drop((listener, file));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("frontend.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        assert!(bind_unix(&path, false).is_err());
        let first = bind_unix(&path, true).unwrap();
        // A successor takes the path over; the end of the first must not remove it.
        let second = bind_unix(&path, true).unwrap();
        drop(first);
        UnixStream::connect(&path).await.unwrap();
        drop(second);

        fs::write(&path, "precious").unwrap();
        assert!(bind_unix(&path, true).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
