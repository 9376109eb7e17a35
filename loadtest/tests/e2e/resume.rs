//! Streams that outlive their tunnels: no session is cut, and no byte is lost, doubled or moved, when
//! the tunnel that carries them dies.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use culvert_loadtest::{
    frontend::{
        Connection,
        FrontendKind::{self, ConnectUnix, GrpcUnix},
    },
    rig::{Rig, Running},
    targets::{self, Target},
};
use culvert_wire::CloseCode;
use rstest::rstest;
use tokio::{
    io::AsyncWriteExt as _,
    select,
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use crate::support::{
    Carrier::{Quic, Tcp},
    eventually,
    shaped_path::ShapedPath,
    within,
};

/// Number of sessions of echo.
const SESSIONS: u64 = 20;
/// Interval between two messages of a session, and between two blocks of the download.
const PACE: Duration = Duration::from_millis(10);
/// Maximum size of a message, in bytes.
const MESSAGE: usize = 4096;
/// Size of a block of the download, in bytes.
const BLOCK: usize = 65_536;
/// Steps that a session has to make before it counts as going on: more than were in flight.
const STEPS: u64 = 10;

/// Sessions of echo and a download, each of which checks every byte.
struct Load {
    /// Steps of each: messages that came back, and blocks.
    steps: Vec<Arc<AtomicU64>>,
    sessions: JoinSet<io::Error>,
    _targets: [Target; 2],
}

impl Load {
    async fn start(rig: &Running, seed: u64) -> Self {
        println!("seed {seed}");
        let echo = targets::echo().await.unwrap();
        let source = noise_source(seed).await.unwrap();
        let (mut steps, mut sessions) = (Vec::new(), JoinSet::new());
        for session in 0..SESSIONS {
            let step = Arc::new(AtomicU64::new(0));
            steps.push(Arc::clone(&step));
            let connection = rig.dial(echo.address()).await.unwrap();
            sessions.spawn(async move {
                let (Ok(never) | Err(never)) =
                    exchange(connection, seed + 1 + session, &step).await.map(never);
                never
            });
        }
        let step = Arc::new(AtomicU64::new(0));
        steps.push(Arc::clone(&step));
        let connection = rig.dial(source.address()).await.unwrap();
        sessions.spawn(async move {
            let (Ok(never) | Err(never)) = download(connection, seed, &step).await.map(never);
            never
        });
        Self { steps, sessions, _targets: [echo, source] }
    }

    fn steps(&self) -> Vec<u64> {
        self.steps.iter().map(|step| step.load(Ordering::Relaxed)).collect()
    }

    /// Waits until each session has made some more steps, and fails when one ends.
    async fn until_all_go_on(&mut self, when: &str) {
        let (before, steps) = (self.steps(), self.steps.clone());
        let all = eventually(when, async || {
            let steps = steps.iter().map(|step| step.load(Ordering::Relaxed));
            steps.zip(&before).all(|(now, before)| now >= before + STEPS)
        });
        select! {
            biased;
            Some(ended) = self.sessions.join_next() => panic!("{when}: {}", ended.unwrap()),
            () = all => {}
        }
    }
}

fn never(never: std::convert::Infallible) -> io::Error {
    match never {}
}

/// Sends messages and compares what comes back, until the session is cut or a byte is another.
async fn exchange(
    mut connection: Connection,
    seed: u64,
    step: &AtomicU64,
) -> io::Result<std::convert::Infallible> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        pace.tick().await;
        let mut message = vec![0; random.usize(1..=MESSAGE)];
        random.fill(&mut message);
        connection.write(&message).await?;
        let back = connection.read_count(message.len()).await?;
        if back.len() < message.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if back != message {
            let step = step.load(Ordering::Relaxed);
            return Err(io::Error::other(format!("the echo of message {step} differs")));
        }
        step.fetch_add(1, Ordering::Relaxed);
    }
}

/// A target that sends random blocks, at a pace.
async fn noise_source(seed: u64) -> io::Result<Target> {
    Target::start(move |mut socket| async move {
        let (mut random, mut block) = (fastrand::Rng::with_seed(seed), vec![0; BLOCK]);
        let mut pace = interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            pace.tick().await;
            random.fill(&mut block);
            socket.write_all(&block).await?;
        }
    })
    .await
}

/// Compares the blocks of the source, until the session is cut or a byte is another.
async fn download(
    mut connection: Connection,
    seed: u64,
    step: &AtomicU64,
) -> io::Result<std::convert::Infallible> {
    let (mut random, mut block) = (fastrand::Rng::with_seed(seed), vec![0; BLOCK]);
    let mut bytes = Vec::new();
    loop {
        while bytes.len() < BLOCK {
            if connection.read(&mut bytes).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        random.fill(&mut block);
        if let Some(at) = bytes.iter().zip(&block).position(|(got, sent)| got != sent) {
            let at = step.load(Ordering::Relaxed) * BLOCK as u64 + at as u64;
            return Err(io::Error::other(format!("byte {at} of the download differs")));
        }
        bytes.drain(..BLOCK);
        step.fetch_add(1, Ordering::Relaxed);
    }
}

/// A rig whose one agent has come through the path, by the carrier that UDP allows.
async fn behind_path(frontend: FrontendKind, udp_passes: bool) -> (Running, ShapedPath) {
    let rig = Rig::new().frontend(frontend).any_carrier().agent_flag("--quic-retry-interval=200ms");
    let mut rig = rig.agents(0).start().await.unwrap();
    let path = ShapedPath::to(rig.server.tunnel, udp_passes).await;
    let mut config = rig.agent_config("agent").unwrap();
    config.servers.port = path.address.port();
    rig.add_agent_with(&config).unwrap();
    rig.until_joined(1).await.unwrap();
    let carrier = if udp_passes { Quic } else { Tcp };
    assert_eq!(rig.server.tunnels(carrier), 1);
    (rig, path)
}

/// Waits until nothing of the load is left on the server.
async fn until_all_closed(rig: &Running, load: Load) {
    drop(load);
    eventually("no connection is left", async || rig.server.established() == 0.0).await;
    eventually("no stream is left", async || rig.server.open_streams("agent") == 0.0).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_on_when_udp_is_dropped(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
) {
    within(async {
        let (rig, path) = behind_path(frontend, true).await;
        let mut load = Load::start(&rig, 11).await;
        load.until_all_go_on("over QUIC").await;
        path.set_udp_passes(false);
        load.until_all_go_on("after UDP was dropped").await;
        assert_eq!(rig.server.tunnels(Tcp), 1);
        eventually("the tunnel over QUIC is gone", async || rig.server.tunnels(Quic) == 0).await;
        load.until_all_go_on("after the tunnel over QUIC is gone").await;
        until_all_closed(&rig, load).await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_on_when_the_tunnel_is_closed_by_the_server(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
    #[values(true, false)] over_quic: bool,
) {
    within(async {
        let (rig, _path) = behind_path(frontend, over_quic).await;
        let mut load = Load::start(&rig, 12).await;
        load.until_all_go_on("before the tunnel is closed").await;
        for backend in rig.server.backends.all() {
            backend.tunnel.close(CloseCode::UNRESPONSIVE, "a test of sessions");
            backend.tunnel.closed().await;
        }
        // What came over the old tunnel is not counted any more: it has ended.
        load.until_all_go_on("after the tunnel was closed").await;
        until_all_closed(&rig, load).await;
    })
    .await;
}

/// A tunnel over QUIC takes the place of one over TCP, and then loses its UDP.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn sessions_go_on_when_udp_comes_back(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
) {
    within(async {
        let (rig, path) = behind_path(frontend, false).await;
        let mut load = Load::start(&rig, 13).await;
        load.until_all_go_on("over TCP").await;
        for round in 0..2 {
            path.set_udp_passes(true);
            eventually("a tunnel over QUIC", async || rig.server.tunnels(Quic) == 1).await;
            load.until_all_go_on(&format!("after UDP came back, round {round}")).await;
            path.set_udp_passes(false);
            eventually("no tunnel over QUIC", async || rig.server.tunnels(Quic) == 0).await;
            load.until_all_go_on(&format!("after UDP went, round {round}")).await;
        }
        until_all_closed(&rig, load).await;
    })
    .await;
}
