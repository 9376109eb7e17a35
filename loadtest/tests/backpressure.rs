//! A peer that stops reading holds back its own stream and nothing else.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::{Duration, Instant};

use common::{echo, noise, within};
use culvert_loadtest::{
    frontend::{Connection, Door},
    rig::Running,
    targets,
};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::mpsc, time::timeout};

/// How long a write may be stuck before it counts as held back.
const STUCK: Duration = Duration::from_millis(500);
/// How long one reader is stalled while everybody else goes on.
const STALL: Duration = Duration::from_secs(60);

/// Has a target write until every buffer up to the frontend is full; how much it took.
async fn fill_from_target(target: &mut TcpStream) -> usize {
    let chunk = vec![7; 65_536];
    let mut taken = 0;
    while let Ok(written) = timeout(STUCK, target.write(&chunk)).await {
        taken += written.unwrap();
    }
    taken
}

/// Has a frontend write until every buffer up to the target is full; how much it took.
async fn fill_from_frontend(frontend: &mut Connection) -> usize {
    let chunk = vec![7; 65_536];
    let mut taken = 0;
    while timeout(STUCK, frontend.write(&chunk)).await.is_ok() {
        taken += chunk.len();
    }
    taken
}

async fn stalled(
    door: Door,
    rig: &Running,
    target: &targets::Target,
    accepted: &mut mpsc::UnboundedReceiver<TcpStream>,
) -> (Connection, TcpStream) {
    let frontend = door.dial(rig, target.address()).await.unwrap();
    (frontend, accepted.recv().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frontend_that_stops_reading_holds_back_its_own_stream() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let echo_target = targets::echo().await.unwrap();
            let mut other = door.dial(&rig, echo_target.address()).await.unwrap();
            let (_frontend, mut socket) = stalled(door, &rig, &target, &mut accepted).await;
            let taken = fill_from_target(&mut socket).await;
            // Two windows and the sockets' buffers, and not one byte without bound.
            assert!(taken < 32 << 20, "{door:?}: {taken} bytes in flight");
            echo(&mut other, &noise(5, 1 << 20)).await.unwrap();
            let mut fresh = door.dial(&rig, echo_target.address()).await.unwrap();
            echo(&mut fresh, b"still here").await.unwrap();
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_stops_reading_holds_back_its_own_stream() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let echo_target = targets::echo().await.unwrap();
            let mut other = door.dial(&rig, echo_target.address()).await.unwrap();
            let (mut frontend, _socket) = stalled(door, &rig, &target, &mut accepted).await;
            let taken = fill_from_frontend(&mut frontend).await;
            assert!(taken < 32 << 20, "{door:?}: {taken} bytes in flight");
            echo(&mut other, &noise(6, 1 << 20)).await.unwrap();
            let mut fresh = door.dial(&rig, echo_target.address()).await.unwrap();
            echo(&mut fresh, b"still here").await.unwrap();
        })
        .await;
    }
}

/// For a whole minute one reader of each door is stalled while others transfer at full speed and
/// type; afterwards the stalled one gets every byte.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_stalled_for_a_minute_delays_nobody_and_loses_nothing() {
    tokio::join!(
        stall_for_a_minute(Door::ConnectUnix),
        stall_for_a_minute(Door::GrpcUnix),
        stall_for_a_minute(Door::ConnectTlsTunnelTcp),
    );
}

async fn stall_for_a_minute(door: Door) {
    let rig = door.rig().start().await.unwrap();
    let (target, mut accepted) = targets::handed_over().await.unwrap();
    let echo_target = targets::echo().await.unwrap();
    let (mut frontend, mut socket) = stalled(door, &rig, &target, &mut accepted).await;
    let taken = fill_from_target(&mut socket).await;

    let started = Instant::now();
    let bulk = async {
        let block = noise(7, 1 << 20);
        let mut connection = door.dial(&rig, echo_target.address()).await.unwrap();
        let mut bytes = 0;
        while started.elapsed() < STALL {
            echo(&mut connection, &block).await.unwrap();
            bytes += block.len();
        }
        bytes
    };
    let typing = async {
        let mut connection = door.dial(&rig, echo_target.address()).await.unwrap();
        let (mut count, mut slowest) = (0, Duration::ZERO);
        while started.elapsed() < STALL {
            let sent = Instant::now();
            echo(&mut connection, b"k").await.unwrap();
            slowest = slowest.max(sent.elapsed());
            count += 1;
        }
        (count, slowest)
    };
    let (bytes, (keys, slowest)) = tokio::join!(bulk, typing);
    println!(
        "{door:?}: {bytes} bytes and {keys} keys beside the stalled reader, slowest {slowest:?}"
    );
    assert!(slowest < Duration::from_secs(5), "{door:?}: a key took {slowest:?}");
    assert!(bytes > 64 << 20, "{door:?}: only {bytes} bytes in {STALL:?}");

    socket.shutdown().await.unwrap();
    let got = frontend.read_to_end().await.unwrap();
    assert_eq!(got.len(), taken, "{door:?}");
    assert!(got.iter().all(|byte| *byte == 7));
}
