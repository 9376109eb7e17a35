//! Frontends over gRPC that have the server hold as much as they can. HTTP/2 has windows of its own,
//! whose bytes count as well.

use std::time::Duration;

use culvert_loadtest::frontend::Protocol;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    forge::Forgery,
    memory::{assert_bounded, greedy, held, streams},
    support::{eventually, within},
    victim::{MIB, Proof::Certificate, Victim},
};

const LIMIT: u64 = 64;
const FLAG: &str = "--memory-limit=64Mi";
const STREAMS: u64 = 400;
/// Time for which frontends and targets send.
const SENDING: Duration = Duration::from_secs(6);

/// Frontends upload, and the peer acknowledges nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_grpc_frontends_upload_ahead_of_targets_stays_within_the_limit() {
    within(async {
        let mut victim = Victim::start_serving(Protocol::Grpc, Certificate, &[FLAG]).await;
        let (peer, forger) = greedy(&victim, Some(Forgery::Unacknowledged)).await;
        let (frontends, _streams) = streams(&victim, &peer, STREAMS).await;
        forger.unwrap().begin();
        let mut sending = JoinSet::new();
        for mut frontend in frontends {
            sending.spawn(async move {
                let chunk = vec![7; 64 << 10];
                let mut taken = 0;
                let _ = timeout(SENDING, async {
                    while frontend.write(&chunk).await.is_ok() {
                        taken += chunk.len();
                    }
                })
                .await;
                (frontend, taken)
            });
        }
        let (frontends, taken): (Vec<_>, Vec<_>) = sending.join_all().await.into_iter().unzip();
        let held = held(&victim).await;
        let waits = victim.deployment.server_metric("culvert_server_memory_waits_total").await;
        let cuts = victim.deployment.server_metric("culvert_server_memory_cuts_total").await;
        println!("{} MiB written, {waits} waits, {cuts} cuts", taken.iter().sum::<usize>() >> 20);
        assert!(waits > 0.0);
        assert_bounded(&mut victim, LIMIT, STREAMS, held);
        drop((frontends, peer));
    })
    .await;
}

/// Targets send, and no frontend reads.
#[tokio::test(flavor = "multi_thread")]
async fn what_waits_for_grpc_frontends_that_do_not_read_stays_within_the_limit() {
    const STREAMS: u64 = 100;
    within(async {
        let mut victim = Victim::start_serving(Protocol::Grpc, Certificate, &[FLAG]).await;
        let (peer, _) = greedy(&victim, None).await;
        let (frontends, streams) = streams(&victim, &peer, STREAMS).await;
        let mut sending = JoinSet::new();
        for (mut send, recv) in streams {
            sending.spawn(async move {
                let chunk = vec![7; 16 << 10];
                while send.write_all(&chunk).await.is_ok() {}
                drop(recv);
            });
        }
        let received = async || {
            let series = "culvert_server_memory_held_bytes{kind=\"receive\"}";
            victim.deployment.server_metric(series).await > (2 * MIB) as f64
        };
        eventually("it is counted", received).await;
        sleep(SENDING).await;
        let held = held(&victim).await;
        let cuts = victim.deployment.server_metric("culvert_server_memory_cuts_total").await;
        println!("{cuts} cuts");
        assert_bounded(&mut victim, LIMIT, STREAMS, held);
        drop((frontends, peer));
    })
    .await;
}
