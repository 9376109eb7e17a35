//! Many agents, or several servers: how soon they find each other, and what that costs.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::time::{Instant, interval, sleep, timeout};

use crate::{
    balancer::Balancer,
    flags::Ports,
    http,
    peer::{Peer, Topology, server_id},
    process::Process,
    report::FleetResult,
    scenario::Fleet,
};

/// Time for all agents to join.
const PATIENCE: Duration = Duration::from_secs(60);
/// Interval at which the servers' metrics are read.
const ASK_INTERVAL: Duration = Duration::from_millis(100);
/// Series with the number of a server's agents.
const CONNECTIONS: &str = "konnectivity_network_proxy_server_ready_backend_connections";
/// Port at which agents look for servers.
const TUNNEL_PORT: u16 = 8132;
/// First ports of the servers behind a balancer.
const FIRST_TUNNEL_PORT: u16 = 10_000;
const FIRST_ADMIN_PORT: u16 = 11_000;
const FIRST_HEALTH_PORT: u16 = 12_000;

/// Starts servers and agents, kills the servers and starts them again.
pub(super) async fn run(
    peer: Peer,
    topology: &Topology,
    fleet: Fleet,
    idle: Duration,
) -> anyhow::Result<FleetResult> {
    let ports: Vec<_> = (0..fleet.servers).map(|number| ports(number, fleet.servers)).collect();
    let addresses = fleet.addresses.then(|| addresses(&ports));
    let set = addresses.as_deref();
    let mut servers = Vec::new();
    for (number, ports) in ports.iter().enumerate() {
        servers.push(peer.start_server(topology, number, fleet.servers, *ports, set).await?);
    }
    let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let behind = ports.iter().map(|ports| local(ports.tunnel)).collect();
    let _balancer = match fleet.servers {
        1 => None,
        _ => Some(Balancer::start(local(TUNNEL_PORT), behind).await?),
    };
    let empty: u64 = memory(&servers)?;
    let start = Instant::now();
    let mut agents = peer.start_fleet(topology, fleet.agents)?;
    let wanted = fleet.agents * fleet.servers;
    let joined = until_joined(&ports, wanted, start).await;
    for process in &mut agents {
        if let Some(status) = process.has_ended()? {
            anyhow::bail!("agents have ended ({status}); the log ends:\n{}", process.log_end());
        }
    }
    sleep(Duration::from_secs(2)).await;
    let grown = memory(&servers)?.saturating_sub(empty);
    let before = cpu_seconds(&servers)?;
    sleep(idle).await;
    let idle_cpu = (cpu_seconds(&servers)? - before) / idle.as_secs_f64();

    for server in &mut servers {
        server.restart().await?;
    }
    let start = Instant::now();
    let rejoined = until_joined(&ports, wanted, start).await;

    let returned = servers.iter().map(Process::cpu_seconds_since_start).sum::<io::Result<f64>>()?;
    Ok(FleetResult {
        agents: fleet.agents,
        servers: fleet.servers,
        joined_seconds: joined,
        rejoined_seconds: rejoined,
        memory_per_agent: grown as f64 / 1024.0 / f64::from(wanted),
        idle_cpu_percent: idle_cpu * 100.0,
        cpu_per_return: rejoined.map(|_| returned * 1000.0 / f64::from(wanted)),
    })
}

fn ports(number: u32, servers: u32) -> Ports {
    let number = u16::try_from(number).unwrap_or_default();
    let tunnel = if servers == 1 { TUNNEL_PORT } else { FIRST_TUNNEL_PORT + number };
    Ports { tunnel, admin: FIRST_ADMIN_PORT + number, health: FIRST_HEALTH_PORT + number }
}

/// The servers' own addresses, as `--server-addresses` takes them.
fn addresses(ports: &[Ports]) -> String {
    let entry = |(number, ports): (usize, &Ports)| {
        format!("{}={}:{}", server_id(number), Ipv4Addr::LOCALHOST, ports.tunnel)
    };
    ports.iter().enumerate().map(entry).collect::<Vec<_>>().join(",")
}

fn memory(servers: &[Process]) -> io::Result<u64> {
    servers.iter().map(Process::memory).sum()
}

fn cpu_seconds(servers: &[Process]) -> io::Result<f64> {
    servers.iter().map(Process::cpu_seconds).sum()
}

/// Seconds until the servers have this many agents together; `None` when they never do.
async fn until_joined(ports: &[Ports], wanted: u32, start: Instant) -> Option<f64> {
    let asking = async {
        let mut ticks = interval(ASK_INTERVAL);
        loop {
            ticks.tick().await;
            let mut joined = 0;
            for ports in ports {
                joined += agents(ports.admin).await.unwrap_or(0);
            }
            if joined >= wanted {
                return start.elapsed().as_secs_f64();
            }
        }
    };
    timeout(PATIENCE, asking).await.ok()
}

/// How many agents a server says it has.
async fn agents(admin: u16) -> Option<u32> {
    let answer = http::get((Ipv4Addr::LOCALHOST, admin), "/metrics").await.ok()?;
    let line = answer.body.lines().find(|line| line.starts_with(CONNECTIONS))?;
    line.rsplit_once(' ')?.1.parse::<f64>().ok().map(|agents| agents as u32)
}
