//! A hundred of everything that comes and goes leave nothing behind. `scale` does the same for
//! streams.
//!
//! A binary of its own: the tests count what the whole process holds.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{sync::Arc, time::Duration};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    agent, echo, eventually, rig, within,
};
use culvert_konnectivity::ALPN_H2;
use culvert_loadtest::{
    frontend::FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
    http,
    rig::{Rig, Running},
    soak::sample::{self, Sample},
    targets,
};
use culvert_transport::tls::{Identity, KeyExchange};
use rstest::rstest;
use rustls::ServerConfig;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpStream, UdpSocket, UnixStream},
    sync::Mutex,
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Number of each thing that is made and dropped.
const COUNT: usize = 100;
/// Those before the first look, so that everything that is made once was made.
const WARM_UP: usize = 5;
/// Time for everything to be given back: strangers have 10 s to authenticate.
const PATIENCE: Duration = Duration::from_secs(60);

/// Held by the one test that runs: each counts what the whole process holds.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Descriptors, tasks, UDP sockets, TCP sockets and metric series.
fn held(rig: &Running) -> [u64; 5] {
    let agents = rig.agents().iter().map(|agent| agent.scrape());
    let scrape = std::iter::once(rig.server.scrape()).chain(agents).collect::<String>();
    let pid = i32::try_from(std::process::id()).unwrap();
    let [descriptors, _, tasks, _, udp, tcp, series]: Sample = sample::read(pid, &scrape).unwrap();
    [descriptors, tasks, udp, tcp, series]
}

/// Runs `make` some times, and then a hundred times: nothing more is held after that.
async fn leaves_nothing(rig: &mut Running, mut make: impl AsyncFnMut(&mut Running, usize)) {
    for number in 0..WARM_UP {
        make(rig, number).await;
    }
    let mut before = held(rig);
    eventually("nothing changes any more", async || {
        let earlier = std::mem::replace(&mut before, held(rig));
        earlier == before
    })
    .await;
    for number in WARM_UP..WARM_UP + COUNT {
        make(rig, number).await;
    }
    let mut now = held(rig);
    let given_back = timeout(PATIENCE, async {
        eventually("everything is given back", async || {
            now = held(rig);
            // Something of the warm-up may have been given back later.
            now.iter().zip(&before).all(|(now, before)| now <= before)
        })
        .await;
    });
    let given_back = given_back.await.is_ok();
    assert!(given_back, "descriptors, tasks, UDP, TCP, series: before {before:?}, now {now:?}");
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn tunnels_leave_nothing_behind(#[values(Quic, Tcp)] carrier: Carrier) {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = rig(ConnectUnix, carrier).start().await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            drop(agent::joined(rig, &format!("other-{number}")).await);
            rig.until_joined(1).await.unwrap();
        })
        .await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn agents_leave_nothing_behind(#[values(Quic, Tcp)] carrier: Carrier) {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = rig(ConnectUnix, carrier).start().await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            rig.add_agent(&format!("other-{number}")).unwrap();
            rig.until_joined(2).await.unwrap();
            match number % 2 {
                0 => rig.abort_agent(1),
                _ => rig.drain_agent(1).await.unwrap(),
            }
            rig.until_joined(1).await.unwrap();
        })
        .await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn frontends_leave_nothing_behind(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
) {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = rig(frontend, Quic).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            let mut connection = rig.dial(target.address()).await.unwrap();
            connection.write(b"x").await.unwrap();
            match number % 2 {
                0 => connection.abort(),
                _ => drop(connection.close().await),
            }
            // A client that asks for nothing.
            if !frontend.is_tls() {
                let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
                socket.write_all(b"CONN").await.unwrap();
            }
        })
        .await;
    })
    .await;
}

/// With both carriers allowed, an agent that no UDP reaches tries QUIC first and goes on trying.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_over_quic_leave_nothing_behind() {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = Rig::new().any_carrier().start().await.unwrap();
        let server = rig.server.tunnel;
        let tcp_only = targets::Target::start(move |mut socket| async move {
            let mut server = TcpStream::connect(server).await?;
            tokio::io::copy_bidirectional(&mut socket, &mut server).await.map(drop)
        });
        let tcp_only = tcp_only.await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            let mut config = rig.agent_config(&format!("other-{number}")).unwrap();
            config.servers.port = tcp_only.address().port();
            config.quic_retry_interval = Duration::from_millis(1);
            rig.add_agent_with(&config).unwrap();
            rig.until_joined(2).await.unwrap();
            rig.abort_agent(1);
            rig.until_joined(1).await.unwrap();
        })
        .await;
    })
    .await;
}

/// What a probe of QUIC does within an agent whose tunnel is over TCP.
#[tokio::test(flavor = "multi_thread")]
async fn handshakes_over_quic_leave_nothing_behind() {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = Rig::new().start().await.unwrap();
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            // A port that was free a moment ago answers with ICMP.
            let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
            let refused = agent::quic_handshake(rig, closed).await;
            assert!(refused.is_err(), "{refused:?}");
            let unanswered = agent::quic_handshake(rig, silent.local_addr().unwrap());
            assert!(timeout(Duration::from_millis(5), unanswered).await.is_err());
            let server = rig.server.tunnel;
            match number % 2 {
                0 => drop(agent::quic_handshake(rig, server).await.unwrap()),
                // Abandoned somewhere within the handshake.
                _ => drop(
                    timeout(Duration::from_millis(1), agent::quic_handshake(rig, server)).await,
                ),
            }
        })
        .await;
    })
    .await;
}

/// A relay to the server that lets both sides speak gRPC alone: the server takes its agents for
/// Konnectivity agents, and they take it for a Konnectivity server.
async fn grpc_relay(rig: &Running) -> targets::Target {
    let pair = rig.certificates().server();
    let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
    let mut tls = ServerConfig::builder_with_provider(KeyExchange::Classic.provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(identity.chain, identity.key)
        .unwrap();
    tls.alpn_protocols = vec![ALPN_H2.to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let mut tls = agent::tls(rig);
    tls.alpn_protocols = vec![ALPN_H2.to_vec()];
    let connector = TlsConnector::from(Arc::new(tls));
    let server = rig.server.tunnel;
    let relay = targets::Target::start(move |socket| {
        let (acceptor, connector) = (acceptor.clone(), connector.clone());
        async move {
            let mut agent = acceptor.accept(socket).await?;
            let socket = TcpStream::connect(server).await?;
            let mut server = connector.connect(server.ip().into(), socket).await?;
            tokio::io::copy_bidirectional(&mut agent, &mut server).await.map(drop)
        }
    });
    relay.await.unwrap()
}

/// An agent's bridge to a Konnectivity server, and the server's bridge to a Konnectivity agent.
#[tokio::test(flavor = "multi_thread")]
async fn bridges_to_konnectivity_leave_nothing_behind() {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = rig(ConnectUnix, Tcp).agents(0).start().await.unwrap();
        let relay = grpc_relay(&rig).await;
        let target = targets::echo().await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            let mut config = rig.agent_config(&format!("agent-{number}")).unwrap();
            config.servers.port = relay.address().port();
            rig.add_agent_with(&config).unwrap();
            rig.until_joined(1).await.unwrap();
            assert_eq!(rig.server.tunnels(Carrier::Grpc), 1);
            let mut closed = rig.dial(target.address()).await.unwrap();
            echo(&mut closed, b"x").await.unwrap();
            drop(closed.close().await);
            // One that is open while its agent leaves or is lost.
            let mut open = rig.dial(target.address()).await.unwrap();
            echo(&mut open, b"x").await.unwrap();
            match number % 2 {
                0 => rig.abort_agent(0),
                _ => rig.drain_agent(0).await.unwrap(),
            }
            rig.until_joined(0).await.unwrap();
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_for_health_and_metrics_leave_nothing_behind() {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = Rig::new().start().await.unwrap();
        let server = [rig.server.health, rig.server.admin];
        leaves_nothing(&mut rig, async |rig, _| {
            for address in server.into_iter().chain([rig.agents()[0].health]) {
                assert_eq!(http::get(address, "/metrics").await.unwrap().status, 200);
                // A client that asks for nothing.
                TcpStream::connect(address).await.unwrap();
            }
        })
        .await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn agents_with_another_ca_leave_nothing_behind(#[values(Quic, Tcp)] carrier: Carrier) {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let others = Rig::new().carrier(carrier).agents(0).start().await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            let mut config = others.agent_config(&format!("other-{number}")).unwrap();
            config.servers.port = rig.server.tunnel.port();
            rig.add_agent_with(&config).unwrap();
            let failed = "culvert_agent_connect_attempts_total{result=\"connect_failed\"}";
            let attempted = async || rig.agents()[1].metric(failed) >= 1.0;
            eventually("an attempt has failed", attempted).await;
            rig.abort_agent(1);
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_leave_nothing_behind() {
    let _alone = ALONE.lock().await;
    within(async {
        let mut rig = Rig::new().start().await.unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        leaves_nothing(&mut rig, async |rig, number| {
            let mut stranger = TcpStream::connect(rig.server.tunnel).await.unwrap();
            if number % 2 == 0 {
                stranger.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
            }
            socket.send_to(&[0xc0; 1200], rig.server.tunnel).await.unwrap();
            // A tunnel without a hello.
            drop(agent::tunnel(rig).await);
        })
        .await;
    })
    .await;
}
