//! Tunnels over TCP, and agents that change between QUIC and TCP.

use std::{io, time::Duration};

use culvert_loadtest::{
    frontend::{
        Connection,
        FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
    },
    http,
    rig::{Rig, Running},
    targets::{self, Target},
};
use culvert_transport::tcp::Proxies;
use rstest::rstest;
use tokio::time::timeout;

use crate::support::{
    Carrier::{Quic, Tcp},
    echo, eventually, noise,
    proxy::proxy,
    rig,
    shaped_path::ShapedPath,
    within,
};

/// Idle time-out of a tunnel, by default. A silent carrier has to be replaced before it.
const IDLE_TIMEOUT: Duration = Duration::from_secs(25);

/// Number of a server's tunnels, by carrier.
#[derive(Debug, PartialEq, Eq)]
struct Tunnels {
    tcp: usize,
    quic: usize,
}

impl Tunnels {
    fn of(rig: &Running) -> Self {
        Self { tcp: rig.server.tunnels(Tcp), quic: rig.server.tunnels(Quic) }
    }
}

/// A server, and an agent that may choose its carrier and is configured by `configure`. It has
/// joined.
async fn rig_with_agent(
    configure: impl AsyncFnOnce(&Running, &mut culvert_agent::Config),
) -> Running {
    let rig = Rig::new().agents(0).any_carrier().agent_flag("--quic-retry-interval=200ms");
    let mut rig = rig.start().await.unwrap();
    let mut config = rig.agent_config("agent").unwrap();
    configure(&rig, &mut config).await;
    rig.add_agent_with(&config).unwrap();
    rig.until_joined(1).await.unwrap();
    rig
}

/// A connection to an echo that has been used.
async fn used(rig: &Running, target: &Target) -> Connection {
    let mut frontend = rig.dial(target.address()).await.unwrap();
    echo(&mut frontend, b"hello").await.unwrap();
    frontend
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn bytes_cross_both_ways_and_all_that_was_written_before_a_close_arrives(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
) {
    within(async {
        let rig = rig(frontend, Tcp).start().await.unwrap();
        assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 1, quic: 0 });
        let target = targets::echo().await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        let bytes = noise(3, 1 << 20);
        for part in bytes.chunks(64 << 10) {
            echo(&mut frontend, part).await.unwrap();
        }
        let (recorder, mut recorded) = targets::recorder("").await.unwrap();
        let mut frontend = rig.dial(recorder.address()).await.unwrap();
        frontend.write(&bytes[..64 << 10]).await.unwrap();
        frontend.close().await.unwrap();
        assert!(recorded.recv().await.unwrap().bytes == bytes[..64 << 10]);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_reset_and_a_refusal_are_reported_as_over_quic(
    #[values(ConnectTls, GrpcUnix)] frontend: FrontendKind,
) {
    within(async {
        let rig = rig(frontend, Tcp).start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        targets::reset(accepted.recv().await.unwrap());
        let error = frontend.read_to_end().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
        let address = target.address();
        drop(target);
        let error = rig.dial(address).await.unwrap_err();
        assert!(error.to_string().contains("connection refused"), "{error}");
    })
    .await;
}

/// What the path to a server does with UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Udp {
    Passes,
    Dropped,
    Refused,
}

/// A rig whose one agent connects through a path, and may choose its carrier.
struct RigBehindPath {
    rig: Running,
    path: ShapedPath,
}

impl RigBehindPath {
    async fn start(udp: Udp) -> Self {
        let mut kept = None;
        let rig = rig_with_agent(async |rig, config| {
            let path = ShapedPath::to(rig.server.tunnel, udp == Udp::Passes).await;
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
        eventually(&format!("{expected:?}"), async || Tunnels::of(&self.rig) == expected).await;
    }

    /// The agent's report of its tunnels.
    async fn readiness(&self) -> String {
        let address = self.rig.agents()[0].health;
        http::get(address, "/readyz?verbose").await.unwrap().body
    }

    /// Waits until the agent has counted this switch; the server may see it earlier.
    async fn until_switched(&self, from: &str, to: &str, reason: &str) {
        let agent = &self.rig.agents()[0];
        let labels = format!("from=\"{from}\",to=\"{to}\",reason=\"{reason}\"");
        let name = format!("culvert_agent_transport_switches_total{{{labels}}}");
        eventually(&name, async || agent.metric(&name) == 1.0).await;
    }
}

#[tokio::test]
async fn an_agent_whose_udp_is_refused_connects_over_tcp() {
    within(async {
        let RigBehindPath { rig, path: _path } = RigBehindPath::start(Udp::Refused).await;
        assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 1, quic: 0 });
        used(&rig, &targets::echo().await.unwrap()).await;
    })
    .await;
}

#[tokio::test]
async fn an_agent_whose_udp_is_dropped_connects_over_tcp_and_reports_why() {
    within(async {
        let behind = RigBehindPath::start(Udp::Dropped).await;
        assert_eq!(Tunnels::of(&behind.rig), Tunnels { tcp: 1, quic: 0 });
        behind.until_switched("none", "tcp", "quic_silent").await;
        let answer = behind.readiness().await;
        assert!(answer.contains("[+]tunnel server-0: tcp for 0."), "{answer}");
        assert!(answer.contains("s (quic_silent), used\n"), "{answer}");
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_may_choose_uses_quic_where_udp_passes() {
    within(async {
        let rig = Rig::new().any_carrier().start().await.unwrap();
        assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 0, quic: 1 });
    })
    .await;
}

#[tokio::test]
async fn a_new_tunnel_is_quic_when_udp_passes_again_and_streams_stay_on_the_old_one() {
    within(async {
        let behind = RigBehindPath::start(Udp::Dropped).await;
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

#[tokio::test]
async fn a_tunnel_whose_udp_is_dropped_later_is_replaced_by_one_over_tcp() {
    within(async {
        let behind = RigBehindPath::start(Udp::Passes).await;
        assert_eq!(Tunnels::of(&behind.rig), Tunnels { tcp: 0, quic: 1 });
        let target = targets::echo().await.unwrap();
        let mut old = used(&behind.rig, &target).await;
        behind.path.set_udp_passes(false);
        old.write(b"late").await.unwrap();
        timeout(IDLE_TIMEOUT, behind.until(Tunnels { tcp: 1, quic: 0 })).await.unwrap();
        let new = used(&behind.rig, &target).await;
        behind.until_switched("quic", "tcp", "quic_silent").await;
        // Its streams go on over the new one, and nothing of them is lost.
        assert_eq!(old.read_count(4).await.unwrap(), b"late");
        echo(&mut old, b"and more").await.unwrap();
        // When UDP passes again, the agent goes back to QUIC.
        behind.path.set_udp_passes(true);
        behind.until(Tunnels { tcp: 1, quic: 1 }).await;
        drop((old, new));
        behind.until(Tunnels { tcp: 0, quic: 1 }).await;
    })
    .await;
}

#[tokio::test]
async fn a_tunnel_whose_udp_is_refused_later_is_replaced_by_one_over_tcp() {
    within(async {
        let behind = RigBehindPath::start(Udp::Passes).await;
        let target = targets::echo().await.unwrap();
        let mut old = used(&behind.rig, &target).await;
        behind.path.refuse_udp();
        old.write(b"late").await.unwrap();
        // Meanwhile no dial fails, on either tunnel.
        let replaced = timeout(IDLE_TIMEOUT, behind.until(Tunnels { tcp: 1, quic: 0 }));
        let dials = async {
            loop {
                drop(behind.rig.dial(target.address()).await.unwrap());
            }
        };
        tokio::select! {
            replaced = replaced => replaced.unwrap(),
            () = dials => {}
        }
        assert_eq!(old.read_count(4).await.unwrap(), b"late");
        used(&behind.rig, &target).await;
    })
    .await;
}

#[tokio::test]
async fn an_agent_behind_a_proxy_connects_through_it_to_a_name_that_it_cannot_resolve() {
    within(async {
        let mut used_proxy = None;
        let rig = rig_with_agent(async |rig, config| {
            let proxy = proxy(Ok(rig.server.tunnel)).await;
            (config.servers.host, config.servers.port) = ("server.test".into(), 8132);
            let environment = |name| (name == "HTTPS_PROXY").then(|| proxy.address.to_string());
            config.proxies = Proxies::from_env(environment).unwrap();
            used_proxy = Some(proxy);
        });
        let rig = rig.await;
        let asked = used_proxy.as_mut().unwrap().requests.recv().await.unwrap();
        assert_eq!(asked, "CONNECT server.test:8132 HTTP/1.1");
        assert_eq!(Tunnels::of(&rig), Tunnels { tcp: 1, quic: 0 });
        let target = targets::echo().await.unwrap();
        used(&rig, &target).await;
    })
    .await;
}
