//! Tunnels over TCP: the whole way from a frontend to a target, and who falls back to it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{io, net::SocketAddr, time::Duration};

use culvert_agent::config::Transport;
use culvert_loadtest::{
    frontend::{Connection, Door},
    rig::Running,
    targets::{self, Target},
};
use culvert_transport::tcp::Proxies;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use common::{echo, noise, path::Path, within};

const DOOR: Door = Door::ConnectUnix;

/// Tunnels that a server has.
#[derive(Debug, PartialEq, Eq)]
struct Tunnels {
    tcp: usize,
    quic: usize,
}

impl Tunnels {
    fn of(rig: &Running) -> Self {
        let tunnels = rig.server.backends.all();
        let over = |transport| {
            tunnels.iter().filter(|backend| backend.tunnel.carrier().name() == transport).count()
        };
        Self { tcp: over("tcp"), quic: over("quic") }
    }
}

/// A server, and an agent that may choose its transport and is told what `configure` says. It has
/// joined.
async fn rig_with_agent(
    configure: impl AsyncFnOnce(&Running, &mut culvert_agent::Config),
) -> Running {
    let retry = Duration::from_millis(200);
    let rig = DOOR.rig().agents(0).transport(Transport::Auto).quic_retry_interval(retry);
    let mut rig = rig.start().await.unwrap();
    let mut config = rig.agent_config("agent");
    configure(&rig, &mut config).await;
    rig.add_agent_with(&config).unwrap();
    rig.until_joined(1).await.unwrap();
    rig
}

/// A connection to an echo that has been used.
async fn used(rig: &Running, target: &Target) -> Connection {
    let mut frontend = DOOR.dial(rig, target.address()).await.unwrap();
    echo(&mut frontend, b"hello").await.unwrap();
    frontend
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_cross_both_ways_and_all_that_was_written_before_a_close_arrives() {
    for door in Door::ALL.into_iter().filter(|door| door.transport() == Transport::Tcp) {
        within(async {
            let rig = door.rig().start().await.unwrap();
            assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 1, quic: 0 });
            let target = targets::echo().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            let bytes = noise(3, 1 << 20);
            for part in bytes.chunks(64 << 10) {
                echo(&mut frontend, part).await.unwrap();
            }
            let (recorder, mut recorded) = targets::recorder("").await.unwrap();
            let mut frontend = door.dial(&rig, recorder.address()).await.unwrap();
            frontend.write(&bytes[..64 << 10]).await.unwrap();
            frontend.close().await.unwrap();
            assert!(recorded.recv().await.unwrap().bytes == bytes[..64 << 10], "{door:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_reset_and_a_refusal_are_told_as_over_quic() {
    for door in [Door::ConnectTlsTunnelTcp, Door::GrpcUnixTunnelTcp] {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            targets::reset(accepted.recv().await.unwrap());
            let error = frontend.read_to_end().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{door:?}: {error}");
            let address = target.address();
            drop(target);
            let error = door.dial(&rig, address).await.unwrap_err();
            assert!(error.to_string().contains("connection refused"), "{door:?}: {error}");
        })
        .await;
    }
}

/// What becomes of UDP on the way to a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Udp {
    Passes,
    Swallowed,
    Refused,
}

/// A rig whose one agent comes through a path, and may choose its transport.
struct Behind {
    rig: Running,
    path: Path,
}

impl Behind {
    async fn start(udp: Udp) -> Self {
        let mut kept = None;
        let rig = rig_with_agent(async |rig, config| {
            let path = Path::to(rig.server.tunnel, udp == Udp::Passes).await;
            if udp == Udp::Refused {
                path.refuse_udp();
            }
            config.servers.port = path.address.port();
            kept = Some(path);
        });
        let rig = rig.await;
        Self { rig, path: kept.expect("the agent was configured") }
    }

    /// Waits until the server has these tunnels.
    async fn until(&self, expected: Tunnels) {
        common::eventually(&format!("{expected:?}"), || Tunnels::of(&self.rig) == expected).await;
    }

    /// What the agent says of its tunnels.
    async fn readiness(&self) -> String {
        let address = self.rig.agents()[0].health;
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /readyz?verbose HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Waits until the agent counts this switch, which the server may have seen before.
    async fn until_switched(&self, from: &str, to: &str, reason: &str) {
        let agent = &self.rig.agents()[0];
        let labels = format!("from=\"{from}\",to=\"{to}\",reason=\"{reason}\"");
        let name = format!("culvert_agent_transport_switches_total{{{labels}}}");
        common::eventually(&name, || {
            common::metric(&agent.metrics.render(&agent.servers), &name) == 1.0
        })
        .await;
    }
}

#[tokio::test]
async fn an_agent_whose_udp_is_refused_comes_over_tcp_at_once() {
    within(async {
        let Behind { rig, path: _path } = Behind::start(Udp::Refused).await;
        assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 1, quic: 0 });
        used(&rig, &targets::echo().await.unwrap()).await;
    })
    .await;
}

#[tokio::test]
async fn an_agent_whose_udp_is_swallowed_comes_over_tcp_and_says_why() {
    within(async {
        let behind = Behind::start(Udp::Swallowed).await;
        assert_eq!(Tunnels::of(&behind.rig), Tunnels { tcp: 1, quic: 0 });
        behind.until_switched("none", "tcp", "quic_silent").await;
        let answer = behind.readiness().await;
        assert!(answer.contains("[+]tunnel server-0: tcp for 0."), "{answer}");
        assert!(answer.contains("s (quic_silent), used\n"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_may_choose_takes_quic_where_it_gets_through() {
    within(async {
        let rig = DOOR.rig().transport(Transport::Auto).start().await.unwrap();
        assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 0, quic: 1 });
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_moves_to_quic_when_udp_passes_again_and_its_streams_go_on_where_they_are() {
    within(async {
        let behind = Behind::start(Udp::Swallowed).await;
        let target = targets::echo().await.unwrap();
        let mut old = used(&behind.rig, &target).await;
        behind.path.set_udp_passes(true);
        behind.until(Tunnels { tcp: 1, quic: 1 }).await;
        behind.until_switched("tcp", "quic", "quic_works").await;
        echo(&mut old, b"still over TCP").await.unwrap();
        let mut new = used(&behind.rig, &target).await;
        let answer = behind.readiness().await;
        assert!(answer.contains("(quic_silent), retired"), "{answer}");
        assert!(answer.contains("(quic_works), used"), "{answer}");
        // The old tunnel ends with its last stream, and the new one stays.
        old.close().await.unwrap();
        behind.until(Tunnels { tcp: 0, quic: 1 }).await;
        echo(&mut new, b"over QUIC").await.unwrap();
    })
    .await;
}

/// Far sooner than the idle time-out, which is 25 s.
#[tokio::test]
async fn a_tunnel_whose_udp_is_swallowed_in_its_life_gives_way_to_one_over_tcp() {
    within(async {
        let behind = Behind::start(Udp::Passes).await;
        assert_eq!(Tunnels::of(&behind.rig), Tunnels { tcp: 0, quic: 1 });
        let target = targets::echo().await.unwrap();
        let mut old = used(&behind.rig, &target).await;
        behind.path.set_udp_passes(false);
        old.write(b"into the dark").await.unwrap();
        timeout(Duration::from_secs(15), behind.until(Tunnels { tcp: 1, quic: 1 })).await.unwrap();
        let new = used(&behind.rig, &target).await;
        behind.until_switched("quic", "tcp", "quic_silent").await;
        // Nobody hears the old one any more: its frontend is cut off and not left hanging.
        behind.until(Tunnels { tcp: 1, quic: 0 }).await;
        old.read_to_end().await.unwrap();
        // And when UDP passes again, the agent goes back.
        behind.path.set_udp_passes(true);
        behind.until(Tunnels { tcp: 1, quic: 1 }).await;
        drop(new);
        behind.until(Tunnels { tcp: 0, quic: 1 }).await;
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_whose_udp_is_refused_in_its_life_gives_way_to_one_over_tcp() {
    within(async {
        let behind = Behind::start(Udp::Passes).await;
        let target = targets::echo().await.unwrap();
        let mut old = used(&behind.rig, &target).await;
        behind.path.refuse_udp();
        let _ = old.write(b"refused").await;
        // Meanwhile no dial fails, wherever it goes.
        let gives_way = timeout(Duration::from_secs(15), behind.until(Tunnels { tcp: 1, quic: 0 }));
        let dials = async {
            loop {
                drop(DOOR.dial(&behind.rig, target.address()).await.unwrap());
            }
        };
        tokio::select! {
            given = gives_way => given.unwrap(),
            () = dials => {}
        }
        used(&behind.rig, &target).await;
    })
    .await;
}

/// An egress proxy that lets everybody through to this server, whatever it is called.
async fn proxy_to(server: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(near.read_u8().await.unwrap());
            }
            assert!(head.starts_with(b"CONNECT server.test:8132 HTTP/1.1\r\n"));
            near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            let mut far = TcpStream::connect(server).await.unwrap();
            tokio::spawn(async move { copy_bidirectional(&mut near, &mut far).await });
        }
    });
    address
}

#[tokio::test]
async fn an_agent_behind_a_proxy_comes_through_it_to_a_name_that_it_cannot_look_up() {
    within(async {
        let rig = rig_with_agent(async |rig, config| {
            let proxy = proxy_to(rig.server.tunnel).await.to_string();
            (config.servers.host, config.servers.port) = ("server.test".into(), 8132);
            let environment = |name| (name == "HTTPS_PROXY").then(|| proxy.clone());
            config.proxies = Proxies::from_env(environment).unwrap();
        });
        let rig = rig.await;
        assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 1, quic: 0 });
        let target = targets::echo().await.unwrap();
        used(&rig, &target).await;
    })
    .await;
}
