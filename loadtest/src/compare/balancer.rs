//! One address in front of several servers, as a load balancer has it: every new TCP connection,
//! and every new UDP sender, goes to the next server.

use std::{collections::HashMap, io, net::SocketAddr, sync::Arc};

use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};

/// Largest datagram.
const MAX_DATAGRAM: usize = 65_535;

/// A running balancer. It stops when dropped.
#[derive(Debug)]
pub(super) struct Balancer(#[expect(dead_code, reason = "its end is what counts")] JoinSet<()>);

impl Balancer {
    /// Listens on TCP and UDP, in the calling task's runtime and host.
    pub(super) async fn start(address: SocketAddr, servers: Vec<SocketAddr>) -> io::Result<Self> {
        let tcp = TcpListener::bind(address).await?;
        let udp = Arc::new(UdpSocket::bind(address).await?);
        let mut tasks = JoinSet::new();
        let mut next = servers.clone().into_iter().cycle();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = tcp.accept().await {
                let Some(server) = next.next() else { return };
                connections.spawn(relay(socket, server));
                while connections.try_join_next().is_some() {}
            }
        });
        tasks.spawn(async move {
            let mut next = servers.into_iter().cycle();
            let mut paths: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
            let mut replies = JoinSet::new();
            let mut datagram = vec![0; MAX_DATAGRAM];
            while let Ok((length, from)) = udp.recv_from(&mut datagram).await {
                let path = match paths.get(&from) {
                    Some(path) => Arc::clone(path),
                    None => {
                        let Some(server) = next.next() else { return };
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
