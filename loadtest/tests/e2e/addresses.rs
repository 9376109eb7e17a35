//! A name of the servers with several addresses, of which one does not answer.

use std::{
    net::{SocketAddr, TcpListener, UdpSocket},
    thread,
    time::Duration,
};

use culvert_loadtest::frontend::FrontendKind;
use tokio::{runtime::Builder, time::Instant};

use crate::support::{
    Carrier,
    network::{has_namespaces, replace_file},
    rig, within,
};

/// A name that has the addresses of the hosts file alone.
const NAME: &str = "servers.culvert.test";
/// Longest time for an agent to join. With its first address dead it takes a quarter of a second
/// more, and took ten more before addresses were raced; the rest is room for a busy machine.
const MAX_JOIN_TIME: Duration = Duration::from_secs(5);
/// Maximum number of agents until one tries the dead address first; the order is random.
const MAX_AGENTS: usize = 40;

/// An address at which the kernel takes packets and connections, and no process reads them.
struct DeadAddress {
    udp: UdpSocket,
    _tcp: TcpListener,
}

impl DeadAddress {
    fn new(address: SocketAddr) -> Self {
        let udp = UdpSocket::bind(address).unwrap();
        udp.set_nonblocking(true).unwrap();
        Self { udp, _tcp: TcpListener::bind(address).unwrap() }
    }

    /// Whether an agent has tried it over QUIC.
    fn was_tried(&self) -> bool {
        self.udp.recv(&mut [0; 64]).is_ok()
    }
}

async fn agents_join_beside_a_dead_address() {
    let mut rig = rig(FrontendKind::ConnectUnix, Carrier::Quic).agents(0).start().await.unwrap();
    let dead = DeadAddress::new(SocketAddr::from(([127, 0, 0, 2], rig.server.tunnel.port())));
    for number in 1..=MAX_AGENTS {
        let mut config = rig.agent_config(&format!("agent-{number}")).unwrap();
        config.servers.host = NAME.to_owned();
        let started = Instant::now();
        rig.add_agent_with(&config).unwrap();
        rig.until_joined(number).await.unwrap();
        let elapsed = started.elapsed();
        assert!(elapsed < MAX_JOIN_TIME, "{elapsed:?}");
        if dead.was_tried() {
            return;
        }
    }
    panic!("none of {MAX_AGENTS} agents tried the dead address");
}

#[test]
fn an_agent_joins_soon_although_an_address_of_the_servers_is_dead() {
    if !has_namespaces() {
        return;
    }
    let with_hosts = || {
        let hosts = format!("127.0.0.2 {NAME}\n127.0.0.1 {NAME}\n");
        replace_file("/etc/hosts", &hosts).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(within(agents_join_beside_a_dead_address()));
    };
    thread::spawn(with_hosts).join().unwrap();
}
