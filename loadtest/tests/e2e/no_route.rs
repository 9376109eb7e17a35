//! Nodes that cannot send to their server: no route, or a packet filter of their own.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use culvert_loadtest::{
    rig::{Rig, Running},
    targets,
};

use tokio::time::interval;

use crate::support::{
    Carrier::{Quic, Tcp},
    echo, has_program, network, within,
};

/// Below the time-out of a handshake, 10 s, with room for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Waits until this many attempts of the agent have failed, of which no event is sent.
async fn until_failed(rig: &Running, attempts: f64) {
    let series = "culvert_agent_connect_attempts_total{result=\"connect_failed\"}";
    let mut looks = interval(Duration::from_millis(5));
    while rig.agents()[0].metric(series) < attempts {
        looks.tick().await;
    }
}

#[test]
fn an_agent_without_a_route_fails_at_once_over_both_carriers_and_backs_off() {
    let Some(host) = network::namespace() else { return };
    let runtime = host.runtime(2).unwrap();
    let test = runtime.spawn(within(async {
        for carrier in [None, Some(Quic), Some(Tcp)] {
            let rig = carrier.map_or_else(|| Rig::new().any_carrier(), |c| Rig::new().carrier(c));
            let mut rig = rig.agents(0).start().await.unwrap();
            let mut config = rig.agent_config("agent").unwrap();
            // For documentation (RFC 5737); a namespace with loopback alone has no route there.
            config.servers.host = "192.0.2.1".into();
            rig.add_agent_with(&config).unwrap();
            let begun = Instant::now();
            until_failed(&rig, 1.0).await;
            assert!(begun.elapsed() < AT_ONCE, "{carrier:?}: {:?}", begun.elapsed());
            // The intervals grow to the cap, which is half a second in tests.
            until_failed(&rig, 3.0).await;
            assert!(begun.elapsed() > Duration::from_millis(100), "{:?}", begun.elapsed());
        }
    }));
    runtime.block_on(test).unwrap();
}

#[test]
fn an_agent_whose_node_forbids_udp_is_over_tcp_at_once() {
    if !has_program("nft") {
        return;
    }
    let Some(host) = network::namespace() else { return };
    host.run(|| {
        let rules = "add table inet t; \
                     add chain inet t out { type filter hook output priority 0; }; \
                     add rule inet t out meta l4proto udp drop";
        let status = Command::new("nft").arg(rules).status()?;
        assert!(status.success(), "nft: {status}");
        Ok(())
    })
    .unwrap();
    let runtime = host.runtime(2).unwrap();
    let test = runtime.spawn(within(async {
        let rig = Rig::new().any_carrier().start().await.unwrap();
        assert_eq!(rig.server.tunnels(Tcp), 1);
        let scrape = rig.agents()[0].scrape();
        let switched = scrape.lines().find(|line| line.contains("transport_switches_total{"));
        assert!(scrape.contains("reason=\"quic_refused\""), "{switched:?}");
        let target = targets::echo().await.unwrap();
        let mut connection = rig.dial(target.address()).await.unwrap();
        echo(&mut connection, b"over TCP").await.unwrap();
    }));
    runtime.block_on(test).unwrap();
}
