//! Peers that have joined and misbehave.

use std::time::Duration;

use rstest::rstest;
use tokio::time::timeout;

use crate::{
    qmux,
    quic::{self, EVERYTHING},
    strangers::hello,
    support::{Carrier, eventually, within},
    victim::{Proof::Certificate, Victim},
};

/// A drain of one minute.
const DRAIN: [u8; 8] = [5, 0, 5, 0xfc, 0x60, 0xea, 0, 0];

/// Each drain after the first is ignored: no line of the log, no work.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn drains_that_are_repeated_cost_nothing(
    #[values(Carrier::Quic, Carrier::Tcp)] carrier: Carrier,
) {
    let drains = DRAIN.repeat(40_000);
    within(async {
        let mut victim = Victim::start(Certificate).await;
        let hello = hello("");
        match carrier {
            Carrier::Quic => {
                let mut peer = quic::Peer::connect(&victim, EVERYTHING).await;
                peer.send.write_all(&hello).await.unwrap();
                victim.deployment.until_joined(1).await;
                let _ = peer.send.write_all(&drains).await;
                let _ = peer.send.finish();
                let closed = timeout(Duration::from_secs(30), peer.connection.closed()).await;
                closed.expect("the end of the control stream closes the tunnel");
                drop(peer);
            }
            _ => {
                let mut peer = qmux::Peer::connect(&victim).await;
                peer.send(0, &hello, hello.len()).await.unwrap();
                victim.deployment.until_joined(1).await;
                let _ = peer.send(hello.len() as u64, &drains, 16_000).await;
            }
        }
        victim.deployment.until_joined(0).await;
        let gone = async || victim.deployment.server_log().contains("agent gone");
        eventually("the server has read everything", gone).await;
        assert!(victim.cost().log < 16 << 10, "the log grows with the drains");
    })
    .await;
}
