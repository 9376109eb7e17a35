//! A path to a server that always passes TCP, and UDP only when the test lets it, with loss or delay.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UdpSocket},
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;

/// The path. Dropping it takes it down.
pub(crate) struct ShapedPath {
    /// Address at which agents enter the path.
    pub(crate) address: SocketAddr,
    shape: Arc<Shape>,
    tcp: AbortOnDropHandle<()>,
    udp: AbortOnDropHandle<()>,
}

/// What becomes of UDP packets.
#[derive(Debug, Default)]
struct Shape {
    passes: AtomicBool,
    /// One of so many packets of each direction is lost; none with 0.
    lost_of: AtomicU64,
    /// Time that every packet takes, in milliseconds.
    delay_millis: AtomicU64,
}

/// One direction of the path.
struct Direction {
    shape: Arc<Shape>,
    passed: u64,
}

impl Direction {
    /// Whether the next packet is lost.
    fn loses(&mut self) -> bool {
        self.passed += 1;
        let lost_of = self.shape.lost_of.load(Ordering::Relaxed);
        !self.shape.passes.load(Ordering::Relaxed)
            || (lost_of > 0 && self.passed.is_multiple_of(lost_of))
    }

    /// Sends a packet that is not lost, to `peer` or where the socket is connected.
    async fn send(&self, socket: &Arc<UdpSocket>, packet: &[u8], peer: Option<SocketAddr>) {
        let delay = Duration::from_millis(self.shape.delay_millis.load(Ordering::Relaxed));
        if delay.is_zero() {
            return send(socket, packet, peer).await;
        }
        let (socket, packet) = (socket.clone(), packet.to_vec());
        culvert_transport::test_util::detached(async move {
            sleep(delay).await;
            send(&socket, &packet, peer).await;
        });
    }
}

async fn send(socket: &UdpSocket, packet: &[u8], peer: Option<SocketAddr>) {
    // Errors are those of packets to agents that are gone.
    let _ = match peer {
        Some(peer) => socket.send_to(packet, peer).await,
        None => socket.send(packet).await,
    };
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
        let shape = Arc::new(Shape { passes: udp_passes.into(), ..Shape::default() });
        let tcp = culvert_transport::task::owned(pass_tcp(listener, server));
        let udp = culvert_transport::task::owned(pass_udp(Arc::new(socket), server, shape.clone()));
        Self { address, shape, tcp, udp }
    }

    /// Passes UDP from now on, or drops it silently.
    pub(crate) fn set_udp_passes(&self, passes: bool) {
        self.shape.passes.store(passes, Ordering::Relaxed);
    }

    /// Loses one of so many UDP packets of each direction from now on.
    pub(crate) fn lose_one_of(&self, packets: u64) {
        self.shape.lost_of.store(packets, Ordering::Relaxed);
    }

    /// Delays UDP in each direction from now on.
    pub(crate) fn delay(&self, delay: Duration) {
        let millis = u64::try_from(delay.as_millis()).unwrap();
        self.shape.delay_millis.store(millis, Ordering::Relaxed);
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

async fn pass_udp(near: Arc<UdpSocket>, server: SocketAddr, shape: Arc<Shape>) {
    let mut direction = Direction { shape: shape.clone(), passed: 0 };
    let mut agents: HashMap<SocketAddr, (Arc<UdpSocket>, Back)> = HashMap::new();
    let mut packet = vec![0; 65_536];
    // Errors are those of packets to agents that are gone.
    loop {
        let Ok((length, agent)) = near.recv_from(&mut packet).await else { continue };
        if direction.loses() {
            continue;
        }
        let (far, _) = match agents.entry(agent) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => {
                let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                far.connect(server).await.unwrap();
                let back = pass_back(far.clone(), near.clone(), agent, shape.clone());
                unknown.insert((far, Back(culvert_transport::task::owned(back))))
            }
        };
        direction.send(far, &packet[..length], None).await;
    }
}

async fn pass_back(
    far: Arc<UdpSocket>,
    near: Arc<UdpSocket>,
    agent: SocketAddr,
    shape: Arc<Shape>,
) {
    let mut direction = Direction { shape, passed: 0 };
    let mut packet = vec![0; 65_536];
    loop {
        let Ok(length) = far.recv(&mut packet).await else { continue };
        if !direction.loses() {
            direction.send(&near, &packet[..length], Some(agent)).await;
        }
    }
}

struct Back(AbortOnDropHandle<()>);

impl Drop for Back {
    fn drop(&mut self) {
        self.0.abort();
    }
}
