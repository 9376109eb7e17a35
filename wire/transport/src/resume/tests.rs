//! Streams that go on over another tunnel, in virtual time, on schedules of lost tunnels that a seed
//! decides.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_wire::{
    CloseCode, DialId, StreamCode,
    dial::{DialRequest, Network, StreamKind},
    extension::Extensions,
    frame::{self, Message},
    resume::{Received, ResumeRequest, Resumed},
};
use parking_lot::Mutex;
use tokio::{
    select,
    sync::mpsc::{UnboundedSender, unbounded_channel},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{Observer, Session, SessionTunnel};
use crate::{
    Carrier, ReadError, RecvHalf, SendHalf, Settings, TunnelLost, WriteError,
    qmux::Peer,
    test_util::{Pair, Side},
};

/// Time for which a stream waits for a tunnel.
const TIMEOUT: Duration = Duration::from_secs(30);

type Halves = (SendHalf, RecvHalf);

/// Numbers of streams that were resumed, that were given up, and that wait.
#[derive(Debug, Default)]
struct Counts(Mutex<(u64, u64, i64)>);

impl Observer for Counts {
    fn resumed(&self, reason: &'static str, _gap: Duration, _sent_again: u64) {
        assert!(TunnelLost::labels().any(|label| label == reason), "{reason}");
        self.0.lock().0 += 1;
    }

    fn given_up(&self) {
        self.0.lock().1 += 1;
    }

    fn waiting(&self, change: i64) {
        self.0.lock().2 += change;
    }
}

/// One server process and one agent process, and the tunnels between them.
struct World {
    server: Arc<Session>,
    agent: Arc<Session>,
    /// Those of the server and of the agent.
    counts: [Arc<Counts>; 2],
    tunnels: u64,
    tasks: JoinSet<()>,
    /// The streams that the agent was asked to dial.
    dialed: UnboundedSender<(DialId, Halves)>,
}

/// A tunnel, and what each side knows it by.
struct Connected {
    pair: Pair,
    at_server: Arc<SessionTunnel>,
}

/// What crosses a control stream.
enum Told {
    Received(Received),
    Resumed(Resumed),
    Lost(u64),
}

impl World {
    fn new(dialed: UnboundedSender<(DialId, Halves)>) -> Self {
        let counts = [Arc::<Counts>::default(), Arc::default()];
        let [server, agent] = counts.clone().map(|counts| Session::new(TIMEOUT, counts));
        Self { server, agent, counts, tunnels: 0, tasks: JoinSet::new(), dialed }
    }

    /// Adds a tunnel, and both sides' tasks that serve it.
    async fn connect(&mut self) -> Connected {
        let settings = Settings::default();
        let pair = Pair::new(Peer::local(Carrier::Tcp), &settings, &settings).await.unwrap();
        self.tunnels += 1;
        let at_server = self.server.join(pair.server.clone(), self.tunnels);
        let at_agent = self.agent.join(pair.agent.clone(), self.tunnels);
        let (to_agent, from_server) = unbounded_channel();
        let (to_server, from_agent) = unbounded_channel();
        let server = serve_at_server(at_server.clone(), pair.server.clone(), to_agent, from_agent);
        let agent = serve_at_agent(
            at_agent,
            pair.agent.clone(),
            self.dialed.clone(),
            to_server,
            from_server,
        );
        self.tasks.spawn(server);
        self.tasks.spawn(agent);
        Connected { pair, at_server }
    }
}

async fn serve_at_server(
    joined: Arc<SessionTunnel>,
    tunnel: crate::Tunnel,
    to_agent: UnboundedSender<Told>,
    mut from_agent: tokio::sync::mpsc::UnboundedReceiver<Told>,
) {
    let mut resuming = JoinSet::new();
    loop {
        select! {
            lost = tunnel.closed() => break joined.leave(&lost),
            report = joined.report() => drop(to_agent.send(Told::Received(report))),
            (messages, resumptions) = joined.next_to_resume() => {
                messages.into_iter().for_each(|it| drop(to_agent.send(Told::Resumed(it))));
                for resumption in resumptions {
                    resuming.spawn(resumption.run(Box::new(())));
                }
            }
            Some(told) = from_agent.recv() => match told {
                Told::Received(report) => assert!(joined.session().received(&report)),
                Told::Lost(number) => joined.on_peer_lost(number),
                Told::Resumed(_) => unreachable!("only servers say so"),
            },
        }
    }
}

async fn serve_at_agent(
    joined: Arc<SessionTunnel>,
    tunnel: crate::Tunnel,
    dialed: UnboundedSender<(DialId, Halves)>,
    to_server: UnboundedSender<Told>,
    mut from_server: tokio::sync::mpsc::UnboundedReceiver<Told>,
) {
    let (mut streams, mut named) = (JoinSet::new(), HashSet::new());
    loop {
        select! {
            lost = tunnel.closed() => break joined.leave(&lost),
            Ok(stream) = tunnel.accept() => {
                streams.spawn(accept(joined.clone(), stream, dialed.clone()));
            }
            report = joined.report() => drop(to_server.send(Told::Received(report))),
            lost = joined.next_lost() => drop(to_server.send(Told::Lost(lost))),
            Some(told) = from_server.recv() => match told {
                Told::Received(report) => assert!(joined.session().received(&report)),
                Told::Resumed(Resumed { tunnel, streams, more }) => {
                    named.extend(streams.iter().copied());
                    if !more {
                        joined.session().resumed(tunnel, &std::mem::take(&mut named));
                    }
                }
                Told::Lost(_) => unreachable!("only agents say so"),
            },
        }
    }
}

/// Serves a stream that the server opened.
async fn accept(
    joined: Arc<SessionTunnel>,
    (mut send, mut recv): Halves,
    dialed: UnboundedSender<(DialId, Halves)>,
) {
    let Ok(head) = recv.read_frame(4096).await else { return };
    if head.kind == ResumeRequest::KIND {
        let request = head.message().unwrap();
        let _ = joined.answer(&request, (send, recv), Box::new(())).await;
        return;
    }
    let DialRequest { id, .. } = head.message().unwrap();
    let mut kept = joined.keep(id).unwrap();
    kept.keep_received(&mut recv);
    kept.keep_sent(&mut send);
    let _ = dialed.send((id, (send, recv)));
}

/// Dials a stream on a tunnel, as the server does.
async fn dial(on: &Connected, id: u64) -> Result<Halves, WriteError> {
    let (mut send, mut recv) = on.pair.server.open().await.map_err(WriteError::Lost)?;
    let request = DialRequest {
        id: DialId(id),
        network: Network::Tcp,
        target: "10.0.0.1:80".parse().unwrap(),
        kind: StreamKind::UNKNOWN,
        timeout_millis: 0,
        trace: None,
        extensions: Extensions::default(),
    };
    send.write_chunk(frame::encode(&request).unwrap()).await?;
    let mut kept = on.at_server.keep(DialId(id)).unwrap();
    kept.keep_sent(&mut send);
    kept.keep_received(&mut recv);
    Ok((send, recv))
}

/// The byte at an offset of a stream's direction.
fn byte(of: u64, at: u64) -> u8 {
    (of.wrapping_mul(0x9e37_79b9) ^ at.wrapping_mul(0x85eb_ca6b) >> 7) as u8
}

fn bytes(of: u64, at: u64, count: u64) -> Bytes {
    (at..at + count).map(|at| byte(of, at)).collect()
}

/// How a direction ended for its reader.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Finished(u64),
    Failed(u64, ReadError),
    /// By the reader.
    Stopped,
}

/// Reads to the end or, now and then, until it has enough, and checks each byte.
async fn read(mut recv: RecvHalf, of: u64, mut rng: fastrand::Rng) -> End {
    let (mut at, mut chunks) = (0, [const { Bytes::new() }; 4]);
    let enough = if rng.u8(..) < 30 { rng.u64(..300_000) } else { u64::MAX };
    loop {
        if at >= enough {
            recv.stop(StreamCode::CLOSED);
            return End::Stopped;
        }
        let count = match recv.read_chunks(&mut chunks).await {
            Ok(Some(count)) => count,
            Ok(None) => return End::Finished(at),
            Err(error) => return End::Failed(at, error),
        };
        for chunk in &chunks[..count] {
            assert_eq!(*chunk, bytes(of, at, chunk.len() as u64), "of {of} at {at}");
            at += chunk.len() as u64;
        }
        if rng.u8(..) < 40 {
            sleep(Duration::from_millis(rng.u64(..400))).await;
        }
    }
}

/// Writes `count` bytes and finishes, or resets after them. Whether the peer has the end.
async fn write(
    mut send: SendHalf,
    of: u64,
    count: u64,
    reset: bool,
    mut rng: fastrand::Rng,
) -> Result<(), WriteError> {
    let stopped = send.stopped();
    let mut at = 0;
    while at < count {
        let length = rng.u64(1..20_000).min(count - at);
        send.write_chunk(bytes(of, at, length)).await?;
        at += length;
        if rng.u8(..) < 60 {
            sleep(Duration::from_millis(rng.u64(..300))).await;
        }
    }
    if reset {
        send.reset(StreamCode::PEER_RESET);
        return Ok(());
    }
    send.finish();
    match stopped.await {
        Ok(None) => Ok(()),
        Ok(Some(code)) => Err(WriteError::Stopped(code)),
        Err(lost) => Err(WriteError::Lost(lost)),
    }
}

/// What became of one stream: both ends of both directions.
#[derive(Debug)]
struct Outcome {
    sent: [u64; 2],
    resets: [bool; 2],
    written: [Result<(), WriteError>; 2],
    read: [End; 2],
}

/// Both sides of a stream at work.
async fn exchange(id: u64, at_server: Halves, at_agent: Halves, mut rng: fastrand::Rng) -> Outcome {
    let sent = [rng.u64(..400_000), rng.u64(..400_000)];
    let resets = [rng.u8(..) < 20, rng.u8(..) < 20];
    let (down, up) = (2 * id, 2 * id + 1);
    let ((s_send, s_recv), (a_send, a_recv)) = (at_server, at_agent);
    let (w0, w1, r0, r1) = tokio::join!(
        write(s_send, down, sent[0], resets[0], rng.fork()),
        write(a_send, up, sent[1], resets[1], rng.fork()),
        read(a_recv, down, rng.fork()),
        read(s_recv, up, rng.fork()),
    );
    Outcome { sent, resets, written: [w0, w1], read: [r0, r1] }
}

/// Loses tunnels and makes new ones for a while; with the last one, which lives.
async fn disturb(world: &mut World, mut current: Connected, rng: &mut fastrand::Rng) -> Connected {
    for _ in 0..rng.usize(1..8) {
        sleep(Duration::from_millis(rng.u64(..1500))).await;
        match rng.u8(..6) {
            0 => current.pair.line.cut(),
            1 => current.pair.server.close(CloseCode::UNRESPONSIVE, ""),
            2 => current.pair.agent.close(CloseCode::UNRESPONSIVE, ""),
            3 => {
                current.pair.line.silence(Side::Agent);
                current.pair.line.silence(Side::Server);
                sleep(Duration::from_millis(rng.u64(..800))).await;
                current.pair.agent.close(CloseCode::UNRESPONSIVE, "");
            }
            4 => {
                current.pair.line.silence(Side::Server);
                sleep(Duration::from_millis(rng.u64(..800))).await;
                current.pair.server.close(CloseCode::UNRESPONSIVE, "");
            }
            // A second tunnel beside it.
            _ => {}
        }
        sleep(Duration::from_millis(rng.u64(..500))).await;
        let older = std::mem::replace(&mut current, world.connect().await);
        if rng.bool() {
            older.pair.line.cut();
        } else {
            // It lives on without new streams, if it lives.
            std::mem::forget(older);
        }
    }
    current
}

/// Runs a world with this seed, and checks what became of all streams.
async fn run(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (dialed, mut of_agent) = unbounded_channel();
    let mut world = World::new(dialed);
    let first = world.connect().await;
    let mut exchanges = JoinSet::new();
    for id in 0..rng.u64(1..12) {
        let at_server = dial(&first, id).await.unwrap();
        let (dialed, at_agent) = of_agent.recv().await.unwrap();
        assert_eq!(dialed, DialId(id));
        exchanges.spawn(exchange(id, at_server, at_agent, rng.fork()));
    }
    let current = disturb(&mut world, first, &mut rng).await;
    let outcomes = timeout(Duration::from_secs(300), exchanges.join_all()).await.unwrap();
    for outcome in outcomes {
        for (direction, end) in outcome.read.iter().enumerate() {
            let (sent, reset) = (outcome.sent[direction], outcome.resets[direction]);
            match end {
                End::Finished(count) => {
                    assert!(!reset && *count == sent, "seed {seed}: {outcome:?}");
                    assert_eq!(outcome.written[direction], Ok(()), "seed {seed}: {outcome:?}");
                }
                End::Stopped => {}
                End::Failed(count, _) => {
                    assert!(reset && *count <= sent, "seed {seed}: {outcome:?}")
                }
            }
        }
    }
    // What the last reports release.
    sleep(Duration::from_secs(2)).await;
    assert_eq!((world.server.streams(), world.agent.streams()), (0, 0), "seed {seed}");
    let waiting = world.counts.each_ref().map(|counts| counts.0.lock().2);
    assert_eq!(waiting, [0, 0], "seed {seed}");
    drop(current);
}

/// Number of seeds of one run of the test; more by hand, with `CULVERT_SEEDS`.
fn seeds() -> u64 {
    std::env::var("CULVERT_SEEDS").ok().and_then(|count| count.parse().ok()).unwrap_or(100)
}

#[tokio::test(start_paused = true)]
async fn every_byte_and_every_end_arrives_once_whatever_tunnels_are_lost() {
    for seed in 0..seeds() {
        run(seed).await;
    }
}

/// Two sides with one tunnel and one stream on it.
async fn one_stream() -> (World, Connected, Halves, Halves) {
    let (dialed, mut of_agent) = unbounded_channel();
    let mut world = World::new(dialed);
    let connected = world.connect().await;
    let at_server = dial(&connected, 1).await.unwrap();
    let (_, at_agent) = of_agent.recv().await.unwrap();
    (world, connected, at_server, at_agent)
}

async fn next(recv: &mut RecvHalf) -> Result<Option<Bytes>, ReadError> {
    let mut chunk = [Bytes::new()];
    let count = recv.read_chunks(&mut chunk).await?;
    let [chunk] = chunk;
    Ok(count.map(|_| chunk))
}

#[tokio::test(start_paused = true)]
async fn a_stream_without_a_tunnel_is_cut_after_its_time() {
    let (world, connected, (mut send, mut recv), _at_agent) = one_stream().await;
    let began = Instant::now();
    connected.pair.line.cut();
    let lost = next(&mut recv).await.unwrap_err();
    assert!(matches!(lost, ReadError::Lost(TunnelLost::Transport(_))), "{lost:?}");
    assert_eq!(began.elapsed(), TIMEOUT);
    assert!(matches!(send.write_chunk(Bytes::from_static(b"x")).await, Err(WriteError::Lost(_))));
    drop((send, recv));
    assert_eq!(world.server.streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_was_closed_in_order_takes_its_streams_with_it() {
    let (_world, connected, (_send, mut recv), (_, mut at_agent)) = one_stream().await;
    let began = Instant::now();
    connected.pair.server.close(CloseCode::SHUTDOWN, "");
    assert!(matches!(next(&mut recv).await, Err(ReadError::Lost(_))));
    assert!(matches!(next(&mut at_agent).await, Err(ReadError::Lost(_))));
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_gives_a_tunnel_up_has_its_streams_go_on_at_once() {
    let (mut world, connected, (mut send, mut recv), (mut at_send, mut at_recv)) =
        one_stream().await;
    connected.pair.line.silence(Side::Agent);
    connected.pair.line.silence(Side::Server);
    send.write_chunk(Bytes::from_static(b"down")).await.unwrap();
    at_send.write_chunk(Bytes::from_static(b"up")).await.unwrap();
    let _second = world.connect().await;
    let began = Instant::now();
    // The server does not hear of it, but on the second tunnel.
    connected.pair.agent.close(CloseCode::UNRESPONSIVE, "silent");
    assert_eq!(next(&mut at_recv).await, Ok(Some(Bytes::from_static(b"down"))));
    assert_eq!(next(&mut recv).await, Ok(Some(Bytes::from_static(b"up"))));
    assert!(began.elapsed() < Duration::from_millis(100), "{:?}", began.elapsed());
    let counts = world.counts.each_ref().map(|counts| *counts.0.lock());
    assert_eq!(counts, [(1, 0, 0), (1, 0, 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_the_server_does_not_know_any_more_is_cut_at_the_agent() {
    let (mut world, connected, at_server, (_at_send, mut at_recv)) = one_stream().await;
    connected.pair.line.silence(Side::Server);
    connected.pair.line.silence(Side::Agent);
    // Its reset does not arrive, nor its last report.
    drop(at_server);
    sleep(Duration::from_secs(1)).await;
    connected.pair.server.close(CloseCode::UNRESPONSIVE, "");
    let _second = world.connect().await;
    let began = Instant::now();
    connected.pair.agent.close(CloseCode::UNRESPONSIVE, "");
    assert!(matches!(next(&mut at_recv).await, Err(ReadError::Lost(_))));
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn what_the_peer_has_reported_is_retained_no_longer() {
    let (_world, _connected, (mut send, _recv), (_at_send, at_recv)) = one_stream().await;
    let live = Arc::new(AtomicUsize::new(0));
    struct Chunk(Arc<AtomicUsize>);
    impl AsRef<[u8]> for Chunk {
        fn as_ref(&self) -> &[u8] {
            &[7; 1000]
        }
    }
    impl Drop for Chunk {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let read = Arc::new(Mutex::new(0));
    let _reader = crate::task::owned({
        let (read, mut at_recv) = (read.clone(), at_recv);
        async move {
            while let Ok(Some(chunk)) = next(&mut at_recv).await {
                *read.lock() += chunk.len();
            }
        }
    });
    let mut most = 0;
    for _ in 0..5000 {
        live.fetch_add(1, Ordering::Relaxed);
        send.write_chunk(Bytes::from_owner(Chunk(live.clone()))).await.unwrap();
        sleep(Duration::from_micros(100)).await;
        most = most.max(live.load(Ordering::Relaxed));
    }
    // The bytes after which the peer reports, and what is on its way.
    assert!(most * 1000 <= 2 * 256 * 1024, "{most}");
    sleep(Duration::from_secs(1)).await;
    assert_eq!((live.load(Ordering::Relaxed), *read.lock()), (0, 5_000_000));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_is_kept_after_its_tunnel_was_lost_is_resumed() {
    let (dialed, _of_agent) = unbounded_channel();
    let world = World::new(dialed);
    let settings = Settings::default();
    let tunnel = async || {
        let pair = Pair::new(Peer::local(Carrier::Tcp), &settings, &settings).await;
        pair.unwrap().server
    };
    let first = world.server.join(tunnel().await, 1);
    let second = world.server.join(tunnel().await, 2);
    let moment = Duration::from_millis(1);
    timeout(moment, second.next_to_resume()).await.unwrap_err();
    first.leave(&TunnelLost::TimedOut);
    timeout(moment, second.next_to_resume()).await.unwrap_err();
    let _kept = first.keep(DialId(7)).unwrap();
    let (messages, resumptions) = timeout(moment, second.next_to_resume()).await.unwrap();
    assert_eq!((messages.len(), resumptions.len()), (1, 1));
    assert_eq!((messages[0].tunnel, resumptions[0].id()), (1, DialId(7)));
}
