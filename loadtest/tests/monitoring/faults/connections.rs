//! Tunnels that are lost, absent, or over the wrong carrier.

use std::{net::SocketAddr, time::Duration};

use culvert_loadtest::{process::free_port, targets};
use tokio::time::interval;

use super::{Bench, Fault};
use crate::{
    site::Site,
    support::{echo, shaped_path::ShapedPath},
};

/// Losses of tunnels for an alert, and a few more.
const MANY: usize = 8;
/// Minimum time between two uses of a lossy path.
const PAUSE: Duration = Duration::from_millis(200);

pub(crate) async fn server_killed(bench: Bench) -> Fault {
    let site = bench.site("server_killed");
    let mut server = site.server(&[]).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        server.process.kill().await.unwrap();
        (server, agent)
    })
}

pub(crate) async fn agent_killed(bench: Bench) -> Fault {
    let mut agent = bench.common.agent("agent_killed", &[]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move {
        agent.process.kill().await.unwrap();
    })
}

pub(crate) async fn no_agents(bench: Bench) -> Fault {
    let server = bench.site("no_agents").server(&[]).await;
    Fault::of(vec![server.target.clone()], async move { server })
}

pub(crate) async fn servers_differ(bench: Bench) -> Fault {
    let (one, two) = (bench.site("servers_differ_1"), bench.site("servers_differ_2"));
    let servers = (one.server(&[]).await, two.server(&[]).await);
    let agents = [one.inner_agent("a", &[]), one.inner_agent("b", &[]), two.inner_agent("c", &[])];
    servers.0.until_joined(2).await;
    servers.1.until_joined(1).await;
    Fault::of(
        vec![servers.0.target.clone(), servers.1.target.clone()],
        async move { (servers, agents) },
    )
}

pub(crate) async fn no_server(bench: Bench) -> Fault {
    let agent = bench.site("no_server").agent("a", &[]).await;
    Fault::of(vec![agent.target.clone()], async move { agent })
}

pub(crate) async fn one_server_of_two(bench: Bench) -> Fault {
    let site = bench.site("one_server_of_two");
    let server = site.server(&["--server-count=2"]).await;
    let agent = site.agent("a", &[]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move { (server, agent) })
}

/// Agents that end without a close.
pub(crate) async fn agents_crash(bench: Bench) -> Fault {
    let site = bench.site("agents_crash");
    let server = site.server(&[]).await;
    let stays = site.inner_agent("stays", &[]);
    let mut crash = Vec::new();
    for number in 0..MANY {
        crash.push(site.inner_agent(&format!("crashes-{number}"), &[]));
    }
    server.until_joined(1 + MANY as u32).await;
    Fault::of(vec![server.target.clone()], async move {
        drop(crash);
        (server, stays)
    })
}

/// A server that ends without a close, again and again, and then for good.
pub(crate) async fn server_crashes(bench: Bench) -> Fault {
    let site = bench.site("server_crashes");
    let mut server = site.inner_server().await;
    let agent = site.agent("a", &[]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move {
        for _ in 0..MANY {
            server.abort();
            let _ = server.await;
            agent.until_without_server().await;
            server = site.inner_server().await;
            agent.until_connected().await;
        }
        server.abort();
        (agent, site)
    })
}

pub(crate) async fn streams_lost(bench: Bench) -> Fault {
    let site = bench.site("streams_lost");
    let server = site.server(&[]).await;
    let crashes = site.inner_agent("crashes", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let target = targets::echo().await.unwrap();
        let streams = site.dial_times(MANY, target.address()).await;
        let stays = site.inner_agent("stays", &[]);
        server.until_joined(2).await;
        drop(crashes);
        (server, stays, streams, target)
    })
}

/// A path without UDP, as behind most firewalls.
pub(crate) async fn udp_refused(bench: Bench) -> Fault {
    let path = ShapedPath::to(bench.common.tunnel, true).await;
    path.refuse_udp();
    let site = bench.site("udp_refused");
    let site = Site { tunnel: path.address, transport: "auto", ..site };
    let agent = site.agent("udp_refused", &[]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move { (agent, path) })
}

pub(crate) async fn agents_on_tcp(bench: Bench) -> Fault {
    let site = bench.site("agents_on_tcp");
    let server = site.server(&[]).await;
    let path = ShapedPath::to(site.tunnel, true).await;
    path.refuse_udp();
    let agent = Site { tunnel: path.address, transport: "auto", ..site }.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move { (server, agent, path) })
}

pub(crate) async fn lossy_path(bench: Bench) -> Fault {
    let site = bench.site("lossy_path");
    let server = site.server(&[]).await;
    let path = ShapedPath::to(site.tunnel, true).await;
    let near = Site { tunnel: path.address, ..site.clone() };
    let agent = near.agent("a", &[]).await;
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone(), agent.target.clone()], async move {
        path.lose_one_of(12);
        let target = targets::echo().await.unwrap();
        let mut connection = site.dial(target.address()).await.unwrap();
        let _kept = (server, agent, path);
        let mut ticks = interval(PAUSE);
        loop {
            echo(&mut connection, &[7; 16_384]).await.unwrap();
            ticks.tick().await;
        }
    })
}

/// An address at which nothing listens.
pub(super) fn nothing() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()))
}
