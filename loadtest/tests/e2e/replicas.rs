//! Servers with one TLS key behind one address: a UDP balancer that misdirects packets, and agents
//! that reach the servers at their own addresses.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use culvert_loadtest::{
    balancer::Balancer,
    frontend::FrontendKind,
    process::free_port,
    rig::{Running, RunningServer},
    targets,
};
use culvert_process::kubernetes::KubernetesConfig;
use culvert_server::config::{LeaseConfig, ServerSetConfig};
use rstest::rstest;
use serde_json::json;
use tokio::{
    net::{TcpListener, UdpSocket},
    task::JoinSet,
};

use crate::support::{Carrier, echo, eventually, kube_api::KubeApi, noise, rig, within};

/// Largest datagram on loopback.
const MAX_DATAGRAM: usize = 65_535;

/// A UDP balancer before two servers: every flow goes to the first until it is told otherwise. The
/// agent sees one address, whichever server answers.
struct Misdirecting {
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

impl Misdirecting {
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
async fn behind_one_address() -> (Running, RunningServer, Misdirecting) {
    let mut rig = rig(FrontendKind::ConnectUnix, Carrier::Quic).agents(0).start().await.unwrap();
    let other = rig.add_server("server-1").unwrap();
    let balancer = Misdirecting::start([rig.server.tunnel, other.tunnel]).await;
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

/// Adds a server that has an address of its own and knows these others.
fn add_member(rig: &mut Running, id: &str, others: &[(&str, SocketAddr)]) -> RunningServer {
    let other = |(id, address): &(&str, SocketAddr)| (id.parse().unwrap(), [*address].into());
    let addresses = others.iter().map(other).collect();
    rig.add_server_with(id, |config| {
        // The port is the one that the server gets.
        let advertised = ["127.0.0.1:0".parse().unwrap()].into();
        config.server_set = ServerSetConfig { advertised, addresses };
    })
    .unwrap()
}

/// A balancer before these servers that picks one at random, and an agent that knows its address.
async fn agent_behind_a_balancer(rig: &mut Running, servers: &[SocketAddr]) -> Balancer {
    let address = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
    let servers = servers.to_vec();
    let balancer = Balancer::start_with(address, move || fastrand::choice(&servers).copied());
    let balancer = balancer.await.unwrap();
    let mut config = rig.agent_config("agent").unwrap();
    config.servers.port = address.port();
    rig.add_agent_with(&config).unwrap();
    balancer
}

async fn until_connected(rig: &Running, servers: u32) {
    let agent = &rig.agents()[0];
    let connected = async || agent.servers.connected() == servers;
    eventually(&format!("{servers} servers are connected"), connected).await;
}

fn direct(rig: &Running, result: &str) -> f64 {
    let series = format!("culvert_agent_direct_dials_total{{result=\"{result}\"}}");
    rig.agents()[0].metric(&series)
}

#[rstest]
#[tokio::test]
async fn servers_are_reached_at_their_own_addresses_whatever_the_balancer_picks(
    #[values(Carrier::Quic, Carrier::Tcp)] carrier: Carrier,
) {
    within(async {
        let mut rig = rig(FrontendKind::ConnectUnix, carrier).agents(0).start().await.unwrap();
        let mut known = vec![("server-0", rig.server.tunnel)];
        let mut servers = vec![rig.server.clone()];
        for id in ["server-1", "server-2", "server-3", "server-4"] {
            let server = add_member(&mut rig, id, &known);
            known.push((id, server.tunnel));
            servers.push(server);
        }
        // The last one knows them all, and the balancer leads to no other.
        let _balancer = agent_behind_a_balancer(&mut rig, &[servers[4].tunnel]).await;
        until_connected(&rig, 5).await;
        for server in &servers {
            eventually("the agent has joined", async || server.tunnels(carrier) == 1).await;
        }
        eventually("the dials are counted", async || direct(&rig, "ok") == 4.0).await;
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn servers_whose_own_addresses_lead_nowhere_are_found_at_the_address_of_all(
    #[values(Carrier::Quic, Carrier::Tcp)] carrier: Carrier,
    #[values(true, false)] refused: bool,
) {
    within(async {
        // The first server knows of no set, and the balancer may lead to it first.
        let rig = rig(FrontendKind::ConnectUnix, carrier).agents(0).server_flag("--server-count=3");
        let mut rig = rig.start().await.unwrap();
        // At a port that is not refused the kernel takes packets and connections.
        let dead = SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()));
        let taken = match refused {
            true => None,
            false => {
                Some((TcpListener::bind(dead).await.unwrap(), UdpSocket::bind(dead).await.unwrap()))
            }
        };
        let ids = ["server-0", "server-1", "server-2"];
        let mut addresses = vec![rig.server.tunnel];
        for id in &ids[1..] {
            let others: Vec<_> =
                ids.iter().filter(|other| *other != id).map(|other| (*other, dead)).collect();
            addresses.push(add_member(&mut rig, id, &others).tunnel);
        }
        let _balancer = agent_behind_a_balancer(&mut rig, &addresses).await;
        until_connected(&rig, 3).await;
        drop(taken);
    })
    .await;
}

/// Adds a server that publishes its address in a Lease.
fn add_leasing(rig: &mut Running, id: &str, api: &KubeApi) -> RunningServer {
    let kubeconfig = Some(api.kubeconfig().to_owned());
    rig.add_server_with(id, |config| {
        // The second one leads nowhere; the agent gets to the server by the first.
        config.server_set.advertised =
            ["127.0.0.1:0", "[::1]:1"].map(|address| address.parse().unwrap()).into();
        config.kubernetes = KubernetesConfig { kubeconfig, ..KubernetesConfig::default() };
        config.leases = Some(LeaseConfig {
            namespace: "kube-system".into(),
            labels: vec![("k8s-app".into(), "konnectivity-server".into())],
        });
    })
    .unwrap()
}

#[tokio::test]
async fn servers_that_come_and_go_are_followed_by_their_leases() {
    within(async {
        let carrier = Carrier::Quic;
        let mut rig = rig(FrontendKind::ConnectUnix, carrier).agents(0).start().await.unwrap();
        let api = KubeApi::start(rig.certificates()).await;
        let first = add_leasing(&mut rig, "server-1", &api);
        let _balancer = agent_behind_a_balancer(&mut rig, &[first.tunnel]).await;
        until_connected(&rig, 1).await;
        for (number, id) in [(2, "server-2"), (3, "server-3")] {
            let server = add_leasing(&mut rig, id, &api);
            until_connected(&rig, number).await;
            assert_eq!(server.tunnels(carrier), 1);
        }
        let lease = api.lease("konnectivity-proxy-server-server-3").unwrap();
        assert!(lease["metadata"]["annotations"]["culvert/agent-address"].is_string(), "{lease}");
        let known = |state: &str| {
            rig.agents()[0].metric(&format!("culvert_agent_set_servers{{address=\"{state}\"}}"))
        };
        let count = || rig.agents()[0].servers.count();
        // A Konnectivity server has no address of its own.
        api.put_lease("konnectivity", json!({ "k8s-app": "konnectivity-server" }), 0);
        eventually("it is known", async || known("unknown") == 1.0 && count() == 4).await;
        api.remove_lease("konnectivity");
        eventually("it is gone", async || known("unknown") == 0.0 && count() == 3).await;
        assert_eq!((known("known"), direct(&rig, "ok")), (3.0, 2.0));
        let own = first.metric("culvert_server_set_servers{address=\"known\"}");
        assert_eq!(own, 3.0);
    })
    .await;
}
