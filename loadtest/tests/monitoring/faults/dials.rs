//! Dials that fail, wait or are refused.

use std::time::Duration;

use culvert_loadtest::{
    frontend::{Connection, FrontendKind::ConnectUnix, Protocol},
    process::free_port,
    targets,
};
use culvert_transport::{control::ControlStream, task::owned};
use culvert_wire::{control::ControlMessage, identifiers::Identifier};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet, time::interval};

use super::{Bench, Fault, connections::nothing};
use crate::{
    prometheus::Target,
    site::Site,
    support::{Carrier::Quic, agent, rig, shaped_path::ShapedPath},
};

/// Dials for an alert, and a few more.
const MANY: usize = 10;
/// Minimum time between two dials that work.
const PAUSE: Duration = Duration::from_millis(200);

pub(crate) async fn unknown_hosts(bench: Bench) -> Fault {
    let site = bench.site("unknown_hosts");
    let server = site.server(&["--proxy-strategies=destHost"]).await;
    let agent = site.inner_agent("a", &["--agent-identifiers=ipv4=127.0.0.1"]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let failed = site.dial_times(MANY, "10.9.9.9:1").await;
        assert!(failed.is_empty());
        (server, agent)
    })
}

/// So many dials succeed at the same time that those which fail are a small part, at any speed of the
/// machine.
pub(crate) async fn too_many_streams(bench: Bench) -> Fault {
    const STREAMS: usize = 64;
    let site = bench.site("too_many_streams");
    let server = site.server(&[&format!("--max-streams-per-agent={STREAMS}")]).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let target = targets::echo().await.unwrap();
        let held = site.dial_times(STREAMS + MANY, target.address()).await;
        assert_eq!(held.len(), STREAMS);
        (server, agent, target, held)
    })
}

pub(crate) async fn targets_refuse(bench: Bench) -> Fault {
    let site = bench.site("targets_refuse");
    let server = site.server(&[]).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let failed = site.dial_times(MANY, nothing()).await;
        assert!(failed.is_empty());
        (server, agent)
    })
}

pub(crate) async fn slow_path(bench: Bench) -> Fault {
    let site = bench.site("slow_path");
    let server = site.server(&[]).await;
    let path = ShapedPath::to(site.tunnel, true).await;
    let near = Site { tunnel: path.address, ..site.clone() };
    path.delay(Duration::from_millis(600));
    let agent = near.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let target = targets::echo().await.unwrap();
        let works = site.dial_times(MANY, target.address()).await;
        assert_eq!(works.len(), MANY);
        (server, agent, path, target, works)
    })
}

/// An agent that answers pings, and no dial. It gets the dials to two targets that it alone announces,
/// one after the other, so that it is ejected after three: an alert about dials needs more.
pub(crate) async fn agent_reaches_nothing(_: Bench) -> Fault {
    const NOWHERE: &str = "127.0.0.9";
    let rig = rig(ConnectUnix, Quic)
        .server_flag("--backend-dial-timeout=1s")
        .server_flag("--proxy-strategies=destHost")
        .agent_flag("--agent-identifiers=ipv4=127.0.0.1");
    let rig = rig.start().await.unwrap();
    let scraped = Target { program: "culvert-server", health: rig.server.health.port() };
    Fault::of(vec![scraped], async move {
        let target = targets::echo().await.unwrap();
        let tunnel = agent::tunnel(&rig).await;
        let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await.unwrap());
        let mut hello = agent::hello("reaches-nothing");
        if let ControlMessage::Hello(hello) = &mut hello {
            let announced = Identifier::new("ipv4", NOWHERE).unwrap();
            hello.identifiers = vec![announced].try_into().unwrap();
        }
        control.send(&hello).await.unwrap();
        let answering = owned(agent::answer_pings(control));
        rig.until_joined(2).await.unwrap();
        let socket = rig.uds();
        let dial = |target: String| Connection::dial_unix(Protocol::Connect, &socket, target);
        // The other agent replies meanwhile, so that it is not the server.
        for port in [1, 2, 1] {
            dial(format!("{NOWHERE}:{port}")).await.unwrap_err();
            dial(target.address().to_string()).await.unwrap();
        }
        let _kept = (tunnel, answering);
        let mut ticks = interval(PAUSE);
        loop {
            dial(target.address().to_string()).await.unwrap();
            ticks.tick().await;
        }
    })
}

pub(crate) async fn metadata_service(bench: Bench) -> Fault {
    const METADATA: &str = "169.254.169.254";
    let flag = format!("--agent-identifiers=ipv4={METADATA}");
    let agent = bench.common.agent("metadata_service", &[flag]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move {
        bench.common.dial(format!("{METADATA}:80")).await.unwrap_err();
        agent
    })
}

pub(crate) async fn strangers_at_the_frontend(bench: Bench) -> Fault {
    let site = bench.site("strangers_at_the_frontend");
    let port = free_port().unwrap();
    let server = site.server_over_tls(port, &site.certificates.server()).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        for _ in 0..MANY {
            let mut stranger = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        }
        (server, agent)
    })
}

/// Clients that do not read what their targets send, until the memory limit is reached.
pub(crate) async fn readers_stall(bench: Bench) -> Fault {
    const READERS: usize = 100;
    let site = bench.site("readers_stall");
    let server = site.server(&["--memory-limit=4Mi"]).await;
    let agent = site.inner_agent("a", &[]);
    server.until_joined(1).await;
    Fault::of(vec![server.target.clone()], async move {
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let (mut stalled, mut writing) = (Vec::new(), JoinSet::new());
        for _ in 0..READERS {
            stalled.push(site.dial(target.address()).await.unwrap());
        }
        for _ in 0..READERS {
            let mut socket = accepted.recv().await.unwrap();
            writing.spawn(async move {
                let chunk = vec![7; 65_536];
                while socket.write_all(&chunk).await.is_ok() {}
            });
        }
        (server, agent, target, stalled, writing)
    })
}
