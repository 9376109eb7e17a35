//! Many streams at once, and many one after another, leave nothing behind.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{eventually, metric, within};
use culvert_loadtest::{frontend::Door, rig::Running, targets};
use tokio::{sync::Mutex, task::JoinSet};

/// One test at a time: each counts what the whole process holds.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What a process holds that a connection may have left behind.
#[derive(Debug, PartialEq)]
struct Held {
    descriptors: usize,
    tasks: usize,
    gauges: Vec<String>,
}

fn held(rig: &Running) -> Held {
    let server = rig.server.metrics.render(&rig.server.backends);
    let gauges = [
        "konnectivity_network_proxy_server_established_connections",
        "konnectivity_network_proxy_server_pending_backend_dials",
        "konnectivity_network_proxy_server_http_connections",
        "konnectivity_network_proxy_server_grpc_connections{service_method=\"Proxy\"}",
        "culvert_server_tunnel_open_streams{agent_id=\"agent-0\"}",
    ];
    let mut gauges: Vec<_> =
        gauges.iter().map(|name| format!("{name} {}", metric(&server, name))).collect();
    let agent = rig.agents()[0].metrics.render(&rig.agents()[0].servers);
    let name = "konnectivity_network_proxy_agent_open_endpoint_connections";
    gauges.push(format!("{name} {}", metric(&agent, name)));
    Held {
        descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        tasks: tokio::runtime::Handle::current().metrics().num_alive_tasks(),
        gauges,
    }
}

async fn touch(door: Door, rig: &Running, target: &targets::Target) {
    let mut frontend = door.dial(rig, target.address()).await.unwrap();
    frontend.write(b"x").await.unwrap();
    assert_eq!(frontend.read_count(1).await.unwrap(), b"x");
    frontend.close().await.unwrap();
}

/// Dials until whatever is made once has been made; what is held then.
async fn settled(door: Door, rig: &Running, target: &targets::Target) -> Held {
    for _ in 0..20 {
        touch(door, rig, target).await;
    }
    let mut before = held(rig);
    eventually("nothing changes any more", || {
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
    let looked = tokio::time::timeout(std::time::Duration::from_secs(30), async {
        eventually("everything is given back", || {
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

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_streams_at_once_through_each_door() {
    let _alone = ALONE.lock().await;
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let target = targets::echo().await.unwrap();
            let before = settled(door, &rig, &target).await;
            let rig = std::sync::Arc::new(rig);
            let mut dials = JoinSet::new();
            for index in 0_u32..1000 {
                let (rig, address) = (rig.clone(), target.address());
                dials.spawn(async move {
                    let mut frontend = door.dial(&rig, address).await.unwrap();
                    frontend.write(&index.to_be_bytes()).await.unwrap();
                    (frontend, index)
                });
            }
            let mut frontends = dials.join_all().await;
            let open = "konnectivity_network_proxy_server_established_connections";
            // A frontend may have its answer a moment before it is counted.
            eventually("a thousand are open", || {
                metric(&rig.server.metrics.render(&rig.server.backends), open) > 999.5
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
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_dials_in_a_row_leave_nothing_behind() {
    let _alone = ALONE.lock().await;
    for door in [Door::ConnectUnix, Door::GrpcUnix, Door::GrpcUnixTunnelTcp] {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let target = targets::echo().await.unwrap();
            let before = settled(door, &rig, &target).await;
            for _ in 0..10_000 {
                touch(door, &rig, &target).await;
            }
            returns_to(&rig, &before).await;
        })
        .await;
    }
}
