//! Peers that have joined, and make the server hold as much as they can. What it holds stays within
//! its limit and a fixed cost of each stream.

use std::{sync::Arc, time::Duration};

use culvert_loadtest::frontend::Connection;
use culvert_wire::{
    dial::{DialReply, DialTiming},
    extension::Extensions,
    frame,
};
use rstest::rstest;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    forge::{Forger, Forgery},
    quic::{self, EVERYTHING},
    strangers::hello,
    support::{eventually, within},
    victim::{MIB, Proof::Certificate, Victim},
};

/// Memory of a stream that holds nothing, at most: tasks, sockets, what quinn has for it. About
/// half of it is measured.
const STREAM: u64 = 24 << 10;
/// Packets that are on the way between quinn's endpoint and the connection's task, at most: a busy
/// machine lets more of them wait.
const PACKETS: u64 = 16 * MIB;

/// The cost of the attack stays within the limit and 5 %, and each stream's own.
fn assert_bounded(victim: &mut Victim, limit: u64, streams: u64, held: f64) {
    let peak = victim.cost().peak_memory;
    let bound = limit * MIB / 100 * 105 + streams * STREAM + PACKETS;
    println!("{streams} streams: {} MiB of {}, {held} counted", peak / MIB, bound / MIB);
    assert!(peak < bound, "{} MiB of {}", peak / MIB, bound / MIB);
}

async fn held(victim: &Victim) -> f64 {
    let mut held = 0.0;
    for kind in ["send", "receive"] {
        let series = format!("culvert_server_memory_held_bytes{{kind=\"{kind}\"}}");
        held += victim.deployment.server_metric(&series).await;
    }
    held / MIB as f64
}

/// A peer that has joined and answers each dial.
async fn greedy(victim: &Victim, forgery: Option<Forgery>) -> (quic::Peer, Option<Arc<Forger>>) {
    let forger = forgery.map(Forger::new);
    let mut peer = quic::Peer::connect_forging(victim, EVERYTHING, forger.clone()).await;
    peer.send.write_all(&hello("")).await.unwrap();
    victim.deployment.until_joined(1).await;
    (peer, forger)
}

type Stream = (quinn::SendStream, quinn::RecvStream);

/// Dials `count` targets; the frontends and the peer's streams.
async fn streams(victim: &Victim, peer: &quic::Peer, count: u64) -> (Vec<Connection>, Vec<Stream>) {
    let (timing, extensions) = (DialTiming::default(), Extensions::default());
    let reply = frame::encode(&DialReply { outcome: Ok(()), timing, extensions }).unwrap();
    let (mut frontends, mut streams) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let answer = async {
            let (mut send, recv) = peer.connection.accept_bi().await.unwrap();
            send.write_all(&reply).await.unwrap();
            (send, recv)
        };
        let (frontend, stream) = tokio::join!(victim.deployment.dial("10.0.0.9:10250"), answer);
        frontends.push(frontend.unwrap());
        streams.push(stream);
    }
    (frontends, streams)
}

/// No frontend reads. The peer sends what it may, in frames of every kind.
#[rstest]
#[case::full_frames(None, 64, 1000)]
#[ignore = "takes more than a minute"]
#[case::ten_thousand(None, 64, 10_000)]
#[case::a_gap(Some(Forgery::Gap), 64, 400)]
#[case::frames_of_one_byte(Some(Forgery::OneByte), 8, 60)]
#[case::packets_of_one_byte(Some(Forgery::Padded), 8, 60)]
#[tokio::test(flavor = "multi_thread")]
async fn what_a_peer_sends_ahead_of_readers_stays_within_the_limit(
    #[case] forgery: Option<Forgery>,
    #[case] limit: u64,
    #[case] count: u64,
) {
    within(async {
        let flag = format!("--memory-limit={limit}Mi");
        let mut victim = Victim::start_with(Certificate, &[&flag]).await;
        let (peer, forger) = greedy(&victim, forgery).await;
        let (frontends, streams) = streams(&victim, &peer, count).await;
        println!("without bytes {count} streams cost {} KiB", victim.cost().peak_memory >> 10);
        if let Some(forger) = &forger {
            forger.begin();
        }
        let mut sending = JoinSet::new();
        for (mut send, recv) in streams {
            sending.spawn(async move {
                let chunk = vec![7; 16 << 10];
                while send.write_all(&chunk).await.is_ok() {}
                drop(recv);
            });
        }
        let mut most = 0.0_f64;
        let looks = async {
            loop {
                most = most.max(held(&victim).await);
                sleep(Duration::from_millis(200)).await;
            }
        };
        let _ = timeout(Duration::from_secs(8 + count / 200), looks).await;
        let series = "culvert_server_memory_cuts_total";
        let cuts = victim.deployment.server_metric(series).await;
        println!("{forgery:?}: {cuts} cut");
        assert_bounded(&mut victim, limit, count, most);
        drop((frontends, peer));
    })
    .await;
}

/// Frontends send, and the peer acknowledges nothing.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_sent_to_a_peer_that_acknowledges_nothing_stays_within_the_limit() {
    const LIMIT: u64 = 64;
    const STREAMS: u64 = 400;
    within(async {
        let mut victim = Victim::start_with(Certificate, &["--memory-limit=64Mi"]).await;
        let (peer, forger) = greedy(&victim, Some(Forgery::Unacknowledged)).await;
        let (frontends, _streams) = streams(&victim, &peer, STREAMS).await;
        forger.unwrap().begin();
        let mut sending = JoinSet::new();
        for mut frontend in frontends {
            sending.spawn(async move {
                let chunk = vec![7; 64 << 10];
                let _ = timeout(Duration::from_secs(8), async {
                    while frontend.write(&chunk).await.is_ok() {}
                })
                .await;
                frontend
            });
        }
        eventually("it waits", async || {
            victim.deployment.server_metric("culvert_server_memory_waits_total").await > 0.0
        })
        .await;
        let frontends = sending.join_all().await;
        let held = held(&victim).await;
        assert_bounded(&mut victim, LIMIT, STREAMS, held);
        drop((frontends, peer));
    })
    .await;
}
