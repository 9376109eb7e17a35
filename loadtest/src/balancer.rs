//! One address in front of several servers, as a load balancer has it, for TCP and UDP.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc};

use parking_lot::Mutex;
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};

/// Largest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// A running balancer. It stops when dropped.
#[derive(Debug)]
pub struct Balancer(#[expect(dead_code, reason = "its end is what counts")] JoinSet<()>);

/// Chooses the server of a new TCP connection or a new UDP sender; `None` ends the balancer.
type Choose = Arc<Mutex<dyn FnMut() -> Option<SocketAddr> + Send>>;

impl Balancer {
    /// Sends each new TCP connection, and each new UDP sender, to the next server.
    ///
    /// # Errors
    /// As [`start_with`](Self::start_with).
    pub async fn start(address: SocketAddr, servers: Vec<SocketAddr>) -> io::Result<Self> {
        let mut next = servers.into_iter().cycle();
        Self::start_with(address, move || next.next()).await
    }

    /// Sends each new TCP connection, and each new UDP sender, to the server that `choose` returns.
    /// Listens in the calling task's runtime and host.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn start_with(
        address: SocketAddr,
        choose: impl FnMut() -> Option<SocketAddr> + Send + 'static,
    ) -> io::Result<Self> {
        let tcp = TcpListener::bind(address).await?;
        let udp = Arc::new(UdpSocket::bind(address).await?);
        let choose: Choose = Arc::new(Mutex::new(choose));
        let choose_for_udp = choose.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = tcp.accept().await {
                let Some(server) = choose.lock()() else { return };
                connections.spawn(relay(socket, server));
                while connections.try_join_next().is_some() {}
            }
        });
        tasks.spawn(async move {
            let mut paths: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut replies = JoinSet::new();
            let mut datagram = vec![0; MAX_DATAGRAM];
            while let Ok((length, from)) = udp.recv_from(&mut datagram).await {
                let path = match paths.get(&from) {
                    Some(path) => Arc::clone(path),
                    None => {
                        let Some(server) = choose_for_udp.lock()() else { return };
                        let Ok(path) = path(server).await else { continue };
                        paths.insert(from, Arc::clone(&path));
                        replies.spawn(answer(Arc::clone(&path), Arc::clone(&udp), from));
                        path
                    }
                };
                // Lost when the server is down.
                let _ = path.send(&datagram[..length]).await;
            }
        });
        Ok(Self(tasks))
    }
}

async fn relay(mut socket: TcpStream, server: SocketAddr) {
    if let Ok(mut server) = TcpStream::connect(server).await {
        let _ = tokio::io::copy_bidirectional(&mut socket, &mut server).await;
    }
}

async fn path(server: SocketAddr) -> io::Result<Arc<UdpSocket>> {
    let socket = UdpSocket::bind("127.0.0.1:0").await?;
    socket.connect(server).await?;
    Ok(Arc::new(socket))
}

/// Forwards the datagrams of a server to their client.
async fn answer(path: Arc<UdpSocket>, udp: Arc<UdpSocket>, to: SocketAddr) {
    let mut datagram = vec![0; MAX_DATAGRAM];
    loop {
        // An error means that the server was down for a moment.
        if let Ok(length) = path.recv(&mut datagram).await {
            let _ = udp.send_to(&datagram[..length], to).await;
        }
    }
}
