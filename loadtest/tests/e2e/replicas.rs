//! Servers with one TLS key behind one address, whose UDP balancer misdirects packets.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use culvert_loadtest::{frontend::FrontendKind, rig::Running, targets};
use tokio::{net::UdpSocket, task::JoinSet};

use crate::support::{Carrier, echo, eventually, noise, rig, within};

/// Largest datagram on loopback.
const MAX_DATAGRAM: usize = 65_535;

/// A UDP balancer before two servers: every flow goes to the first until it is told otherwise. The
/// agent sees one address, whichever server answers.
struct Balancer {
    address: SocketAddr,
    rules: Arc<Rules>,
    _task: JoinSet<()>,
}

#[derive(Default)]
struct Rules {
    /// Whether flows go to the second server.
    moved: AtomicBool,
    /// Every datagram with this number goes to the other server; 0 misdirects none.
    astray_every: AtomicUsize,
    astray: AtomicUsize,
}

impl Balancer {
    async fn start(servers: [SocketAddr; 2]) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let (address, rules) = (front.local_addr().unwrap(), Arc::<Rules>::default());
        let mut task = JoinSet::new();
        task.spawn(forward(front, servers, rules.clone()));
        Self { address, rules, _task: task }
    }
}

async fn forward(front: Arc<UdpSocket>, servers: [SocketAddr; 2], rules: Arc<Rules>) {
    let mut flows: HashMap<SocketAddr, [Arc<UdpSocket>; 2]> = HashMap::new();
    let mut answers = JoinSet::new();
    let mut datagram = vec![0; MAX_DATAGRAM];
    let mut number = 0;
    while let Ok((length, agent)) = front.recv_from(&mut datagram).await {
        if let Entry::Vacant(flow) = flows.entry(agent) {
            let paths = [path(servers[0]).await, path(servers[1]).await];
            for path in paths.clone() {
                answers.spawn(answer(path, front.clone(), agent));
            }
            flow.insert(paths);
        }
        number += 1;
        let every = rules.astray_every.load(Ordering::Relaxed);
        let astray = every > 0 && number % every == 0;
        if astray {
            rules.astray.fetch_add(1, Ordering::Relaxed);
        }
        let server = usize::from(rules.moved.load(Ordering::Relaxed) ^ astray);
        let _ = flows[&agent][server].send(&datagram[..length]).await;
    }
}

async fn path(server: SocketAddr) -> Arc<UdpSocket> {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    socket.connect(server).await.unwrap();
    Arc::new(socket)
}

async fn answer(path: Arc<UdpSocket>, front: Arc<UdpSocket>, agent: SocketAddr) {
    let mut datagram = vec![0; MAX_DATAGRAM];
    while let Ok(length) = path.recv(&mut datagram).await {
        let _ = front.send_to(&datagram[..length], agent).await;
    }
}

/// Two servers with one key, and an agent that reaches them through a balancer.
async fn behind_one_address() -> (Running, culvert_loadtest::rig::RunningServer, Balancer) {
    let mut rig = rig(FrontendKind::ConnectUnix, Carrier::Quic).agents(0).start().await.unwrap();
    let other = rig.add_server("server-1").unwrap();
    let balancer = Balancer::start([rig.server.tunnel, other.tunnel]).await;
    let mut config = rig.agent_config("agent").unwrap();
    config.servers.host = balancer.address.ip().to_string();
    config.servers.port = balancer.address.port();
    rig.add_agent_with(&config).unwrap();
    rig.until_joined(1).await.unwrap();
    (rig, other, balancer)
}

fn restarts(rig: &Running) -> f64 {
    rig.agents()[0].metric("culvert_agent_tunnels_lost_total{reason=\"peer_restarted\"}")
}

#[tokio::test]
async fn packets_that_reach_the_wrong_server_end_no_tunnel() {
    within(async {
        let (rig, other, balancer) = behind_one_address().await;
        let target = targets::echo().await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        balancer.rules.astray_every.store(20, Ordering::Relaxed);
        let bytes = noise(31, 16 * 1024);
        while balancer.rules.astray.load(Ordering::Relaxed) < 50 {
            echo(&mut frontend, &bytes).await.unwrap();
        }
        assert_eq!(restarts(&rig), 0.0);
        assert_eq!((rig.server.tunnels(Carrier::Quic), other.tunnels(Carrier::Quic)), (1, 0));
    })
    .await;
}

#[tokio::test]
async fn a_flow_that_moves_to_another_server_is_a_silence_and_no_restart() {
    within(async {
        let (rig, other, balancer) = behind_one_address().await;
        let target = targets::echo().await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        balancer.rules.moved.store(true, Ordering::Relaxed);
        let _ = frontend.write(b"lost").await;
        eventually("the agent joins the other server", async || other.tunnels(Carrier::Quic) == 1)
            .await;
        assert_eq!(restarts(&rig), 0.0);
    })
    .await;
}
