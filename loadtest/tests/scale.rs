//! Many streams at once, and many one after another, leave nothing behind.
//!
//! A binary of its own: the tests count what the whole process holds.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod support;

use std::{sync::Arc, time::Duration};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    eventually, rig, within,
};
use culvert_loadtest::{
    frontend::FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
    rig::Running,
    targets,
};
use rstest::rstest;
use tokio::{sync::Mutex, task::JoinSet, time::timeout};

/// Time for everything to be given back.
const PATIENCE: Duration = Duration::from_secs(60);

/// Held by the one test that runs: each counts what the whole process holds.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Everything that a connection may leave behind in the process.
#[derive(Debug, PartialEq)]
struct Held {
    descriptors: usize,
    tasks: usize,
    gauges: Vec<String>,
}

fn held(rig: &Running) -> Held {
    let gauges = [
        "konnectivity_network_proxy_server_established_connections",
        "konnectivity_network_proxy_server_pending_backend_dials",
        "konnectivity_network_proxy_server_http_connections",
        "konnectivity_network_proxy_server_grpc_connections{service_method=\"Proxy\"}",
        "culvert_server_tunnel_open_streams{agent_id=\"agent-0\"}",
    ];
    let mut gauges: Vec<_> =
        gauges.iter().map(|name| format!("{name} {}", rig.server.metric(name))).collect();
    let name = "konnectivity_network_proxy_agent_open_endpoint_connections";
    gauges.push(format!("{name} {}", rig.agents()[0].metric(name)));
    Held {
        descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
        gauges,
    }
}

async fn touch(rig: &Running, target: &targets::Target) {
    let mut frontend = rig.dial(target.address()).await.unwrap();
    frontend.write(b"x").await.unwrap();
    assert_eq!(frontend.read_count(1).await.unwrap(), b"x");
    frontend.close().await.unwrap();
}

/// Dials until everything that is made once was made; what is held then.
async fn settled(rig: &Running, target: &targets::Target) -> Held {
    for _ in 0..20 {
        touch(rig, target).await;
    }
    let mut before = held(rig);
    eventually("nothing changes any more", async || {
        let now = held(rig);
        let quiet = now == before && now.gauges.iter().all(|gauge| gauge.ends_with(" 0"));
        before = now;
        quiet
    })
    .await;
    before
}

async fn returns_to(rig: &Running, before: &Held) {
    let mut last = String::new();
    let looked = timeout(PATIENCE, async {
        eventually("everything is given back", async || {
            let now = held(rig);
            last = format!("{now:?}");
            now.descriptors <= before.descriptors
                && now.tasks <= before.tasks
                && now.gauges == before.gauges
        })
        .await;
    })
    .await;
    assert!(looked.is_ok(), "before: {before:?}\nnow: {last}");
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_streams_at_once(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    let _alone = ALONE.lock().await;
    within(async {
        // Handshakes of a thousand connections take longer than a dial may on a busy machine.
        let patient = rig(frontend, carrier).server_flag("--backend-dial-timeout=60s");
        let rig = patient.start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let before = settled(&rig, &target).await;
        let rig = Arc::new(rig);
        let mut dials = JoinSet::new();
        for index in 0_u32..1000 {
            let (rig, address) = (rig.clone(), target.address());
            dials.spawn(async move {
                let mut frontend = rig.dial(address).await.unwrap();
                frontend.write(&index.to_be_bytes()).await.unwrap();
                (frontend, index)
            });
        }
        let mut frontends = dials.join_all().await;
        // A client may have its answer a moment before it is counted.
        let lost = "culvert_server_stream_ends_total\
            {direction=\"both\",manner=\"reset\",code=\"tunnel_lost\"}";
        eventually("a thousand are open", async || {
            assert_eq!(rig.server.metric(lost), 0.0, "the tunnel was lost");
            rig.server.established() == 1000.0
        })
        .await;
        for (frontend, index) in &mut frontends {
            assert_eq!(frontend.read_count(4).await.unwrap(), index.to_be_bytes());
        }
        drop(frontends);
        returns_to(&rig, &before).await;
    })
    .await;
}

#[rstest]
#[case(ConnectUnix, Quic)]
#[case(GrpcUnix, Quic)]
#[case(GrpcUnix, Tcp)]
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_dials_in_a_row_leave_nothing_behind(
    #[case] frontend: FrontendKind,
    #[case] carrier: Carrier,
) {
    let _alone = ALONE.lock().await;
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let before = settled(&rig, &target).await;
        for _ in 0..10_000 {
            touch(&rig, &target).await;
        }
        returns_to(&rig, &before).await;
    })
    .await;
}
