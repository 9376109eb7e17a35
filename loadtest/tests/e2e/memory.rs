//! What a server holds for peers that do not read or acknowledge.

use std::time::Duration;

use culvert_loadtest::{
    frontend::{Connection, FrontendKind::ConnectUnix},
    rig::Running,
    targets,
};
use culvert_transport::Settings;
use culvert_wire::{
    dial::{DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message},
};
use rstest::rstest;
use tokio::{io::AsyncWriteExt, join, time::timeout};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    agent, echo, eventually, rig,
    shaped_path::ShapedPath,
    within,
};

const MIB: usize = 1024 * 1024;
/// Time after which a pending write counts as held back.
const HELD_BACK: Duration = Duration::from_millis(500);
/// Bytes in the kernel's buffers of the frontend's socket, at most.
const KERNEL: usize = MIB;

fn held(rig: &Running, kind: &str) -> f64 {
    rig.server.metric(&format!("culvert_server_memory_held_bytes{{kind=\"{kind}\"}}"))
}

/// Writes until no more is taken; how much was taken, at most 64 MiB.
async fn fill(frontend: &mut Connection) -> usize {
    let chunk = vec![7; 65_536];
    let mut taken = 0;
    while taken < 64 * MIB && timeout(HELD_BACK, frontend.write(&chunk)).await.is_ok() {
        taken += chunk.len();
    }
    taken
}

/// The agent acknowledges nothing after its answer to the dial, and allows 1 GiB on each stream.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn little_is_held_for_a_peer_that_allows_much_and_acknowledges_nothing(
    #[values(("--memory-limit=16Mi", 4), ("--memory-limit=0", 16))] (limit, share): (&str, usize),
) {
    within(async {
        let rig = rig(ConnectUnix, Quic).agents(0).server_flag(limit).start().await.unwrap();
        let path = ShapedPath::to(rig.server.tunnel, true).await;
        let settings = Settings { stream_receive_window: 1 << 30, ..Settings::default() };
        let tunnel = agent::quic_handshake_with(&rig, path.address, &settings).await.unwrap();
        let (tunnel, _control) = agent::join(tunnel, "greedy").await;
        rig.until_joined(1).await.unwrap();
        let answer = async {
            let (mut send, mut recv) = tunnel.accept().await.unwrap();
            recv.read_frame(DialRequest::MAX_LEN).await.unwrap();
            let (timing, extensions) = (DialTiming::default(), Extensions::default());
            let reply = DialReply { outcome: Ok(()), timing, extensions };
            send.write_chunk(frame::encode(&reply).unwrap()).await.unwrap();
            (send, recv)
        };
        let (frontend, _stream) = join!(rig.dial("10.0.0.9:10250"), answer);
        let mut frontend = frontend.unwrap();
        path.set_udp_passes(false);
        let taken = fill(&mut frontend).await;
        assert!(taken <= share * MIB + KERNEL, "{taken}");
        let held = held(&rig, "send");
        assert!(held <= (share * MIB + 65_536) as f64, "{held}");
        assert!(rig.server.metric("culvert_server_memory_waits_total") > 0.0);
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn frontends_that_do_not_read_use_up_their_part_and_the_others_go_on(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    const READERS: usize = 100;
    within(async {
        // Windows of 32 KiB, of which the memory holds fifty.
        let rig = rig(ConnectUnix, carrier).server_flag("--memory-limit=4Mi").start().await;
        let rig = rig.unwrap();
        let echo_target = targets::echo().await.unwrap();
        let mut other = rig.dial(echo_target.address()).await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let mut stalled = Vec::new();
        for _ in 0..READERS {
            stalled.push(rig.dial(target.address()).await.unwrap());
            let mut socket = accepted.recv().await.unwrap();
            culvert_transport::test_util::detached(async move {
                let chunk = vec![7; 65_536];
                while socket.write_all(&chunk).await.is_ok() {}
            });
        }
        let cuts = || rig.server.metric("culvert_server_memory_cuts_total");
        eventually("the largest are cut", async || cuts() > 0.0).await;
        let limit = (3 * MIB) as f64;
        eventually("they give their memory back", async || held(&rig, "receive") < limit).await;
        assert!(cuts() < READERS as f64, "only as many as it takes");
        echo(&mut other, b"still here").await.unwrap();
    })
    .await;
}
