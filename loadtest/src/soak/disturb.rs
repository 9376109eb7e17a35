//! How each disturbance is carried out.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpStream, UdpSocket},
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    schedule::Disturbance,
    stage::{
        RESTARTED_AGENT, RESTARTED_SERVER, ROUTE_OF_RESTARTED_AGENT, ROUTE_OF_RESTARTED_SERVER,
        RouteId, Stage,
    },
    windows::{MayFail, Windows},
};
use crate::link::{LinkSettings, Udp, settings::Direction};

/// Time after a disturbance in which its consequences may still show: a server notices that an agent
/// was killed by its silence.
const AFTERMATH: Duration = Duration::from_secs(2);
/// Connections that strangers open to each port.
const STRANGERS: usize = 3;
/// Time that a stranger stays.
const STAY: Duration = Duration::from_secs(1);

/// The link without a disturbance.
pub(super) const LINK: LinkSettings = LinkSettings {
    each_way: Direction {
        rate_mbit: Some(200.0),
        buffer_ms: Some(50.0),
        buffer_bytes: None,
        delay_ms: 5.0,
        jitter_ms: 0.0,
        reorder: 0.0,
        loss: 0.0,
        bursts: None,
        ecn_ms: None,
    },
    to_node: None,
    to_server: None,
    mtu: 1500,
};

/// Carries out a disturbance, which lasts about `span`, and opens the windows of what it may break.
pub(super) async fn disturb(
    stage: &Stage,
    windows: &Windows,
    disturbance: Disturbance,
    span: Duration,
    strict: bool,
) -> anyhow::Result<()> {
    let all: Vec<RouteId> = stage.routes.iter().map(|route| route.id).collect();
    let agent = async |signal| {
        windows.open(&[ROUTE_OF_RESTARTED_AGENT], MayFail::Dials);
        stage.member(RESTARTED_AGENT)?.restart(signal).await
    };
    let server = async |signal| {
        windows.open(&[ROUTE_OF_RESTARTED_SERVER], MayFail::Dials);
        stage.member(RESTARTED_SERVER)?.restart(signal).await
    };
    match disturbance {
        Disturbance::None => {}
        Disturbance::AgentTerminated => agent(Signal::SIGTERM).await?,
        Disturbance::AgentKilled => agent(Signal::SIGKILL).await?,
        Disturbance::ServerTerminated => server(Signal::SIGTERM).await?,
        Disturbance::ServerKilled => server(Signal::SIGKILL).await?,
        Disturbance::NatRebound => {
            windows.open(&all, MayFail::Streams);
            stage.link.rebind_nat();
        }
        Disturbance::AddressChanged => {
            windows.open(&all, MayFail::Streams);
            stage.link.change_node_address()?;
        }
        Disturbance::Loss => {
            let each_way = Direction { loss: 0.03, ..LINK.each_way };
            stage.link.set(&LinkSettings { each_way, ..LINK });
            sleep(span).await;
            stage.link.set(&LINK);
        }
        Disturbance::UdpDropped | Disturbance::UdpRejected => {
            windows.open(&all, if strict { MayFail::Streams } else { MayFail::Dials });
            let rejected = disturbance == Disturbance::UdpRejected;
            stage.link.udp(if rejected { Udp::Reject } else { Udp::Drop });
            sleep(span).await;
            stage.link.udp(Udp::Pass);
        }
        Disturbance::CertificatesRotated => {
            for name in ["server", "agent"] {
                stage.certificates.renew(name)?;
            }
            for member in &stage.members {
                member.reload()?;
            }
        }
        Disturbance::Strangers => strangers(stage).await,
    }
    stage.until_ready().await?;
    sleep(AFTERMATH).await;
    windows.close();
    Ok(())
}

/// Opens connections that prove nothing to every port: silent ones, and some with bytes of no
/// protocol.
async fn strangers(stage: &Stage) {
    let mut strangers = JoinSet::new();
    for (runtime, address) in stage.ports() {
        for number in 0..STRANGERS {
            let stranger = async move {
                let mut socket = TcpStream::connect(address).await?;
                if number > 0 {
                    socket.write_all(&vec![b'x'; number * 1000]).await?;
                }
                sleep(STAY).await;
                let datagrams = UdpSocket::bind("0.0.0.0:0").await?;
                datagrams.send_to(&[0xc0; 1200], address).await
            };
            // A refusal is what a stranger is to get.
            strangers.spawn_on(async move { drop(timeout(STAY * 5, stranger).await) }, &runtime);
        }
    }
    strangers.join_all().await;
}
