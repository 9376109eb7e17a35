//! Tunnels over TCP: the whole way from a frontend to a target, and who falls back to it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{io, net::SocketAddr, time::Duration};

use common::{noise, path::Path, within};
use culvert_agent::config::Transport;
use culvert_loadtest::{
    frontend::{Connection, Door},
    rig::Running,
    targets,
};
use culvert_wire::transport::tcp::Proxies;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::timeout,
};

async fn rig(door: Door) -> Running {
    door.rig().transport(Transport::Tcp).start().await.unwrap()
}

/// Tunnels of this carrier that the server has.
fn tunnels(rig: &Running, transport: &str) -> usize {
    let tunnels = rig.server.metrics.tunnels();
    tunnels.iter().filter(|backend| backend.tunnel.transport() == transport).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_cross_both_ways_and_all_that_was_written_before_a_close_arrives() {
    for door in Door::ALL {
        within(async {
            let rig = rig(door).await;
            assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (1, 0));
            let echo = targets::echo().await.unwrap();
            let mut frontend = door.dial(&rig, echo.address()).await.unwrap();
            let bytes = noise(3, 1 << 20);
            for part in bytes.chunks(64 << 10) {
                frontend.write(part).await.unwrap();
                assert!(frontend.read_count(part.len()).await.unwrap() == part, "{door:?}");
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
    for door in [Door::ConnectTls, Door::GrpcUnix] {
        within(async {
            let rig = rig(door).await;
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

/// A rig whose one agent comes through a path, and may choose its transport.
struct Behind {
    rig: Running,
    path: Path,
}

impl Behind {
    async fn start(udp_passes: bool) -> Self {
        let retry = Duration::from_millis(200);
        let rig = DOOR.rig().agents(0).transport(Transport::Auto).quic_retry_interval(retry);
        let mut rig = rig.start().await.unwrap();
        let path = Path::to(rig.server.tunnel, udp_passes).await;
        let mut config = rig.agent_config("behind-a-firewall");
        config.servers.port = path.address.port();
        rig.add_agent_with(&config).unwrap();
        rig.until_joined(1).await.unwrap();
        Self { rig, path }
    }

    /// Waits until the server has so many tunnels over TCP, and over QUIC.
    async fn until(&self, tcp: usize, quic: usize) {
        common::eventually(&format!("{tcp} over TCP and {quic} over QUIC"), || {
            (tunnels(&self.rig, "tcp"), tunnels(&self.rig, "quic")) == (tcp, quic)
        })
        .await;
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

const DOOR: Door = Door::ConnectUnix;

async fn echo_once(frontend: &mut Connection, word: &[u8]) {
    frontend.write(word).await.unwrap();
    assert_eq!(frontend.read_count(word.len()).await.unwrap(), word);
}

#[tokio::test]
async fn an_agent_whose_udp_is_refused_comes_over_tcp_at_once() {
    within(async {
        let mut rig = DOOR.rig().agents(0).transport(Transport::Auto).start().await.unwrap();
        let path = Path::to(rig.server.tunnel, false).await;
        path.refuse_udp();
        let mut config = rig.agent_config("behind-a-firewall");
        config.servers.port = path.address.port();
        rig.add_agent_with(&config).unwrap();
        rig.until_joined(1).await.unwrap();
        assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (1, 0));
        let echo = targets::echo().await.unwrap();
        echo_once(&mut DOOR.dial(&rig, echo.address()).await.unwrap(), b"hello").await;
    })
    .await;
}

#[tokio::test]
async fn an_agent_whose_udp_is_swallowed_comes_over_tcp_and_says_why() {
    within(async {
        let behind = Behind::start(false).await;
        assert_eq!((tunnels(&behind.rig, "tcp"), tunnels(&behind.rig, "quic")), (1, 0));
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
        assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (0, 1));
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_moves_to_quic_when_udp_passes_again_and_its_streams_go_on_where_they_are() {
    within(async {
        let behind = Behind::start(false).await;
        let echo = targets::echo().await.unwrap();
        let mut old = DOOR.dial(&behind.rig, echo.address()).await.unwrap();
        echo_once(&mut old, b"over TCP").await;
        behind.path.set_udp_passes(true);
        behind.until(1, 1).await;
        behind.until_switched("tcp", "quic", "quic_works").await;
        echo_once(&mut old, b"still over TCP").await;
        let mut new = DOOR.dial(&behind.rig, echo.address()).await.unwrap();
        echo_once(&mut new, b"over QUIC").await;
        let answer = behind.readiness().await;
        assert!(answer.contains("(quic_silent), retired"), "{answer}");
        assert!(answer.contains("(quic_works), used"), "{answer}");
        // The old tunnel ends with its last stream, and the new one stays.
        old.close().await.unwrap();
        behind.until(0, 1).await;
        echo_once(&mut new, b"over QUIC").await;
    })
    .await;
}

/// Far sooner than the idle time-out, which is 25 s.
#[tokio::test]
async fn a_tunnel_whose_udp_is_swallowed_in_its_life_gives_way_to_one_over_tcp() {
    within(async {
        let behind = Behind::start(true).await;
        assert_eq!((tunnels(&behind.rig, "tcp"), tunnels(&behind.rig, "quic")), (0, 1));
        let echo = targets::echo().await.unwrap();
        let mut old = DOOR.dial(&behind.rig, echo.address()).await.unwrap();
        echo_once(&mut old, b"over QUIC").await;
        behind.path.set_udp_passes(false);
        old.write(b"into the dark").await.unwrap();
        timeout(Duration::from_secs(15), behind.until(1, 1)).await.unwrap();
        let mut new = DOOR.dial(&behind.rig, echo.address()).await.unwrap();
        echo_once(&mut new, b"over TCP").await;
        behind.until_switched("quic", "tcp", "quic_silent").await;
        // Nobody hears the old one any more: its frontend is cut off and not left hanging.
        behind.until(1, 0).await;
        old.read_to_end().await.unwrap();
        // And when UDP passes again, the agent goes back.
        behind.path.set_udp_passes(true);
        behind.until(1, 1).await;
        drop(new);
        behind.until(0, 1).await;
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_whose_udp_is_refused_in_its_life_gives_way_to_one_over_tcp() {
    within(async {
        let behind = Behind::start(true).await;
        let echo = targets::echo().await.unwrap();
        let mut old = DOOR.dial(&behind.rig, echo.address()).await.unwrap();
        echo_once(&mut old, b"over QUIC").await;
        behind.path.refuse_udp();
        let _ = old.write(b"refused").await;
        timeout(Duration::from_secs(15), behind.until(1, 0)).await.unwrap();
        let mut new = DOOR.dial(&behind.rig, echo.address()).await.unwrap();
        echo_once(&mut new, b"over TCP").await;
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
        let mut rig = DOOR.rig().agents(0).transport(Transport::Auto).start().await.unwrap();
        let proxy = proxy_to(rig.server.tunnel).await.to_string();
        let mut config = rig.agent_config("behind-a-proxy");
        (config.servers.host, config.servers.port) = ("server.test".into(), 8132);
        let environment = |name| (name == "HTTPS_PROXY").then(|| proxy.clone());
        config.proxies = Proxies::from_env(environment).unwrap();
        rig.add_agent_with(&config).unwrap();
        rig.until_joined(1).await.unwrap();
        assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (1, 0));
        let echo = targets::echo().await.unwrap();
        echo_once(&mut DOOR.dial(&rig, echo.address()).await.unwrap(), b"hello").await;
    })
    .await;
}
