//! A path to a server that always passes TCP, and UDP only when the test lets it.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UdpSocket},
};
use tokio_util::task::AbortOnDropHandle;

/// The path. Dropping it takes it down.
pub(crate) struct ShapedPath {
    /// Address at which agents enter the path.
    pub(crate) address: SocketAddr,
    passes: Arc<AtomicBool>,
    tcp: AbortOnDropHandle<()>,
    udp: AbortOnDropHandle<()>,
}

impl ShapedPath {
    /// A path to this server that passes UDP or drops it silently.
    pub(crate) async fn to(server: SocketAddr, udp_passes: bool) -> Self {
        // One port number for both; another process may have it for UDP already.
        let (listener, socket) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(socket) = UdpSocket::bind(listener.local_addr().unwrap()).await {
                break (listener, socket);
            }
        };
        let address = listener.local_addr().unwrap();
        let passes = Arc::new(AtomicBool::new(udp_passes));
        let tcp = culvert_transport::task::owned(pass_tcp(listener, server));
        let udp =
            culvert_transport::task::owned(pass_udp(Arc::new(socket), server, passes.clone()));
        Self { address, passes, tcp, udp }
    }

    /// Passes UDP from now on, or drops it silently.
    pub(crate) fn set_udp_passes(&self, passes: bool) {
        self.passes.store(passes, Ordering::Relaxed);
    }

    /// Refuses UDP from now on: the kernel answers with ICMP, because the socket is closed.
    pub(crate) fn refuse_udp(&self) {
        self.udp.abort();
    }
}

impl Drop for ShapedPath {
    fn drop(&mut self) {
        self.tcp.abort();
        self.udp.abort();
    }
}

async fn pass_tcp(listener: TcpListener, server: SocketAddr) {
    while let Ok((mut near, _)) = listener.accept().await {
        let mut far = TcpStream::connect(server).await.unwrap();
        culvert_transport::test_util::detached(async move {
            copy_bidirectional(&mut near, &mut far).await
        });
    }
}

async fn pass_udp(near: Arc<UdpSocket>, server: SocketAddr, passes: Arc<AtomicBool>) {
    let mut agents: HashMap<SocketAddr, (Arc<UdpSocket>, Back)> = HashMap::new();
    let mut packet = vec![0; 65_536];
    // Errors are those of packets to agents that are gone.
    loop {
        let Ok((length, agent)) = near.recv_from(&mut packet).await else { continue };
        if !passes.load(Ordering::Relaxed) {
            continue;
        }
        let (far, _) = match agents.entry(agent) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                far.connect(server).await.unwrap();
                let back = pass_back(far.clone(), near.clone(), agent, passes.clone());
                unknown.insert((far, Back(culvert_transport::task::owned(back))))
            }
        };
        let _ = far.send(&packet[..length]).await;
    }
}

async fn pass_back(
    far: Arc<UdpSocket>,
    near: Arc<UdpSocket>,
    agent: SocketAddr,
    passes: Arc<AtomicBool>,
) {
    let mut packet = vec![0; 65_536];
    loop {
        let Ok(length) = far.recv(&mut packet).await else { continue };
        if passes.load(Ordering::Relaxed) {
            let _ = near.send_to(&packet[..length], agent).await;
        }
    }
}

struct Back(AbortOnDropHandle<()>);

impl Drop for Back {
    fn drop(&mut self) {
        self.0.abort();
    }
}
