//! Reports of the network that are not true, on a path that loses packets.

use std::time::Duration;

use culvert_transport::{
    Tunnel, Unreachable, congestion::Congestion, control::ControlStream, test_util,
};
use tokio::{
    runtime::Builder,
    time::{interval, timeout},
};

use super::{
    flow::{Flow, tunnel},
    pipe::Settings,
    socket::Network,
};

/// Both ends' control streams.
async fn controls(server: &Tunnel, agent: &Tunnel) -> (ControlStream, ControlStream) {
    let mut opened = agent.open().await.unwrap();
    // The stream exists for the server once something was sent on it.
    opened.0.write_chunk(vec![0xff, 0, 0].into()).await.unwrap();
    let accepted = server.accept().await.unwrap();
    (ControlStream::new(server.clone(), accepted), ControlStream::new(agent.clone(), opened))
}

#[test]
fn a_server_loses_no_healthy_agent_for_forged_icmp_on_a_path_that_loses_packets() {
    for seed in 1..=3 {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.unwrap().block_on(async {
            let link = Settings { loss: 0.05, ..Settings::new(100.0, 60, 2.0) };
            let network = Network::new(link, link, seed);
            let flow = Flow::new(Congestion::Model);
            let (agent, server, _endpoints) = tunnel(&network, 0, &flow).await;
            let (mut near, mut far) = controls(&server, &agent).await;
            near.set_report_limit(Duration::from_millis(1500));
            test_util::detached(async move { while far.event().await.is_ok() {} });
            test_util::detached(async move {
                // Slow enough that each report causes a question.
                let mut ticks = interval(Duration::from_millis(1100));
                loop {
                    ticks.tick().await;
                    test_util::report_unreachable(&server, Unreachable::Port);
                }
            });
            let lost = timeout(Duration::from_secs(600), near.next()).await;
            assert!(lost.is_err(), "seed {seed}: {lost:?}");
        });
    }
}
