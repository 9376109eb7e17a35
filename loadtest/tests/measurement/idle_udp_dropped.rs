//! Dials on an idle tunnel whose UDP has stopped passing, in both directions and without a report
//! of the network: no packet is in flight when it happens, so each side has to find out by itself.

use std::time::{Duration, Instant};

use culvert_loadtest::{
    frontend::FrontendKind::{self, ConnectUnix, GrpcUnix},
    rig::{Rig, Running},
    targets::{self, Target},
};
use rstest::rstest;
use tokio::time::sleep;

use crate::support::{Carrier, echo, eventually, shaped_path::ShapedPath, within};

/// Times of the dials, in milliseconds after the loss.
const DIALED_AFTER: [u64; 5] = [50, 300, 1000, 2000, 4000];
/// Time without a packet after which the tunnel is idle.
const QUIET: Duration = Duration::from_millis(500);
/// Time for such a dial: less than `--backend-dial-timeout`, which is 10 s.
const LIMIT: Duration = Duration::from_secs(8);

/// A rig whose one agent has come by QUIC, and the path between both.
async fn behind_path(rig: Rig) -> (Running, ShapedPath) {
    let mut rig = rig.agents(0).start().await.unwrap();
    let path = ShapedPath::to(rig.server.tunnel, true).await;
    let mut config = rig.agent_config("agent").unwrap();
    config.servers.port = path.address.port();
    rig.add_agent_with(&config).unwrap();
    rig.until_joined(1).await.unwrap();
    assert_eq!(rig.server.tunnels(Carrier::Quic), 1);
    (rig, path)
}

async fn use_once(rig: &Running, target: &Target) {
    let mut connection = rig.dial(target.address()).await.unwrap();
    echo(&mut connection, b"hello").await.unwrap();
    connection.close().await.unwrap();
}

/// What the server has sent and received on its tunnels.
fn traffic(rig: &Running) -> Vec<(u64, u64)> {
    let backends = rig.server.backends.all();
    let stats = backends.iter().map(|backend| backend.tunnel.stats());
    stats.map(|stats| (stats.sent_packets, stats.received_bytes)).collect()
}

/// Waits until neither side has sent a packet for a while: nothing waits for an acknowledgement.
async fn until_idle(rig: &Running) {
    let mut quiet = (traffic(rig), Instant::now());
    eventually("an idle tunnel", async || {
        let now = traffic(rig);
        if now != quiet.0 {
            quiet = (now, Instant::now());
        }
        quiet.1.elapsed() >= QUIET
    })
    .await;
}

/// Waits until a keep-alive has passed on an idle tunnel: the next one is most of its interval away,
/// however long the tunnel took to become idle.
async fn until_kept_alive(rig: &Running) {
    until_idle(rig).await;
    let before = traffic(rig);
    eventually("a keep-alive", async || traffic(rig) != before).await;
    until_idle(rig).await;
}

/// Whether a dial that begins this long after the loss succeeds in time.
async fn dial_after_loss(frontend: FrontendKind, delay: Duration) -> bool {
    let (rig, path) = behind_path(Rig::new().frontend(frontend).any_carrier()).await;
    let target = targets::echo().await.unwrap();
    use_once(&rig, &target).await;
    until_idle(&rig).await;
    path.set_udp_passes(false);
    sleep(delay).await;
    let begun = Instant::now();
    let dialed = rig.dial(target.address()).await;
    let took = begun.elapsed();
    println!("{frontend:?}, dialed {delay:?} after the loss: took {took:.1?}");
    let Ok(mut connection) = dialed.inspect_err(|error| println!("{error}")) else { return false };
    echo(&mut connection, b"hello again").await.unwrap();
    took < LIMIT
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_dial_on_an_idle_tunnel_succeeds_although_its_udp_is_dropped(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
) {
    within(async {
        let dial = |millis| dial_after_loss(frontend, Duration::from_millis(millis));
        let [a, b, c, d, e] = DIALED_AFTER.map(dial);
        let in_time = tokio::join!(a, b, c, d, e);
        assert_eq!(in_time, (true, true, true, true, true));
    })
    .await;
}

/// The server gives the tunnel up because of a dial, and its close is dropped like all packets.
/// The agent learns of it when its next packet passes, long before the idle time-out, and the dial
/// has waited for it.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_learns_from_its_next_packet_that_the_server_gave_its_tunnel_up() {
    within(async {
        // Longer than the server takes to give up, however busy the machine is.
        let rig = Rig::new()
            .carrier(Carrier::Quic)
            .agent_flag("--tunnel-keep-alive-interval=10s")
            .server_flag("--tunnel-keep-alive-interval=10s")
            .server_flag("--backend-dial-timeout=60s");
        let (rig, path) = behind_path(rig).await;
        let target = targets::echo().await.unwrap();
        until_kept_alive(&rig).await;
        path.set_udp_passes(false);
        let returning = async {
            eventually("the server gives up", async || rig.server.backends.all().is_empty()).await;
            path.set_udp_passes(true);
        };
        let (dialed, ()) = tokio::join!(rig.dial(target.address()), returning);
        echo(&mut dialed.unwrap(), b"hello").await.unwrap();
        let lost = "culvert_agent_tunnels_lost_total{reason=\"peer_restarted\"}";
        assert_eq!(rig.agents()[0].metric(lost), 1.0);
    })
    .await;
}
