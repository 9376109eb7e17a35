//! A peer that stops reading holds back its own stream and nothing else.

use std::time::{Duration, Instant};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    echo, noise, rig, within,
};
use culvert_loadtest::{
    frontend::{
        Connection,
        FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
    },
    rig::Running,
    targets,
};
use rstest::rstest;
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::mpsc,
    time::{interval, timeout},
};

/// Time after which a pending write counts as held back.
const HELD_BACK: Duration = Duration::from_millis(500);
/// Maximum number of bytes in all buffers between two ends: windows of the stream and buffers of
/// the sockets are a few MiB.
const MAX_BUFFERED: usize = 32 << 20;

/// Has a target write until every buffer up to the frontend is full; how much was taken.
async fn fill_from_target(target: &mut TcpStream) -> usize {
    let chunk = vec![7; 65_536];
    let mut taken = 0;
    while let Ok(written) = timeout(HELD_BACK, target.write(&chunk)).await {
        taken += written.unwrap();
    }
    taken
}

/// Has a frontend write until every buffer up to the target is full; how much was taken.
async fn fill_from_frontend(frontend: &mut Connection) -> usize {
    let chunk = vec![7; 65_536];
    let mut taken = 0;
    while timeout(HELD_BACK, frontend.write(&chunk)).await.is_ok() {
        taken += chunk.len();
    }
    taken
}

/// Both ends of a connection.
async fn connected(
    rig: &Running,
    target: &targets::Target,
    accepted: &mut mpsc::UnboundedReceiver<TcpStream>,
) -> (Connection, TcpStream) {
    let frontend = rig.dial(target.address()).await.unwrap();
    (frontend, accepted.recv().await.unwrap())
}

/// The side that stops reading.
#[derive(Clone, Copy, Debug)]
enum Stalled {
    Frontend,
    Target,
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_side_that_stops_reading_holds_back_its_own_stream(
    #[values(Stalled::Frontend, Stalled::Target)] stalled: Stalled,
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let echo_target = targets::echo().await.unwrap();
        let mut other = rig.dial(echo_target.address()).await.unwrap();
        let (mut frontend, mut socket) = connected(&rig, &target, &mut accepted).await;
        let taken = match stalled {
            Stalled::Frontend => fill_from_target(&mut socket).await,
            Stalled::Target => fill_from_frontend(&mut frontend).await,
        };
        assert!(taken < MAX_BUFFERED, "{taken} bytes in flight");
        echo(&mut other, &noise(5, 1 << 20)).await.unwrap();
        let mut fresh = rig.dial(echo_target.address()).await.unwrap();
        echo(&mut fresh, b"still here").await.unwrap();
    })
    .await;
}

/// One reader is stalled for twice the idle time-out of its tunnel, and for as long as others
/// transfer and type. Nothing of this delays the others, and the stalled reader gets every byte
/// in the end.
#[rstest]
#[case(ConnectUnix, Quic)]
#[case(GrpcUnix, Quic)]
#[case(ConnectTls, Tcp)]
#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_reader_delays_no_other_and_loses_nothing(
    #[case] frontend: FrontendKind,
    #[case] carrier: Carrier,
) {
    const IDLE_TIMEOUT: Duration = Duration::from_secs(2);
    const BLOCKS: usize = 64;
    const KEYS: u32 = 200;
    let mut rig = rig(frontend, carrier);
    for flag in ["--tunnel-idle-timeout=2s", "--tunnel-keep-alive-interval=300ms"] {
        rig = rig.server_flag(flag).agent_flag(flag);
    }
    within(async {
        let rig = rig.start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let echo_target = targets::echo().await.unwrap();
        let (mut frontend, mut socket) = connected(&rig, &target, &mut accepted).await;
        let taken = fill_from_target(&mut socket).await;
        let stalled = Instant::now();

        let transfer = async {
            let block = noise(7, 1 << 20);
            let mut connection = rig.dial(echo_target.address()).await.unwrap();
            for _ in 0..BLOCKS {
                echo(&mut connection, &block).await.unwrap();
            }
        };
        let typing = async {
            let mut connection = rig.dial(echo_target.address()).await.unwrap();
            let mut keys = interval(2 * IDLE_TIMEOUT / KEYS);
            for _ in 0..KEYS {
                keys.tick().await;
                echo(&mut connection, b"k").await.unwrap();
            }
        };
        tokio::join!(transfer, typing);
        println!("stalled for {:?}", stalled.elapsed());
        rig.until_joined(1).await.unwrap();

        socket.shutdown().await.unwrap();
        let got = frontend.read_to_end().await.unwrap();
        assert_eq!(got.len(), taken);
        assert!(got.iter().all(|byte| *byte == 7));
    })
    .await;
}
