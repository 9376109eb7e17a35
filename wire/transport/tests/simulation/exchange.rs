//! Requests and their answers on a path that loses packets: how long they take.

use std::time::Duration;

use bytes::Bytes;
use culvert_transport::{RecvHalf, SendHalf, Tunnel, congestion::Congestion, test_util};
use tokio::{
    runtime::Builder,
    task::JoinSet,
    time::{interval, sleep},
};

use super::{
    flow::{Flow, quantile, tunnel},
    pipe::Settings,
    socket::Network,
};

/// Number of sessions that exchange at one time, and time of an exchange of each.
const SESSIONS: u32 = 10;
/// Exchanges of a session, and how many of them are not measured.
const EXCHANGES: u32 = 60;
const WARMUP: u32 = 4;

/// Seed of the network.
const SEED: u64 = 1;

/// A request of so many bytes, and its answer.
type Turn = (usize, usize);

/// What each session does.
#[derive(Clone, Copy, Debug)]
struct Load {
    turns: &'static [Turn],
    /// Whether all exchanges of a session are on one stream.
    is_kept: bool,
    interval: Duration,
}

impl Load {
    /// Exchanges on one stream.
    fn kept(turns: &'static [Turn], millis: u64) -> Self {
        Self { turns, is_kept: true, interval: Duration::from_millis(millis) }
    }
}

/// Writes so many bytes, in chunks as a splice has them.
async fn write(send: &mut SendHalf, length: usize) {
    for start in (0..length).step_by(16_384) {
        let chunk = vec![b'x'; (length - start).min(16_384)];
        send.write_chunk(chunk.into()).await.unwrap();
    }
}

/// Reads so many bytes.
async fn read(recv: &mut RecvHalf, length: usize) {
    let (mut chunks, mut read) = ([const { Bytes::new() }; 16], 0);
    while read < length {
        let count = recv.read_chunks(&mut chunks).await.unwrap().expect("the stream goes on");
        read += chunks[..count].iter().map(Bytes::len).sum::<usize>();
    }
}

/// Answers the turns of every stream, again and again.
async fn answer(agent: Tunnel, load: Load) {
    while let Ok((mut send, mut recv)) = agent.accept().await {
        test_util::detached(async move {
            let count = if load.is_kept { EXCHANGES } else { 1 };
            for _ in 0..count {
                for (request, answer) in load.turns {
                    read(&mut recv, *request).await;
                    write(&mut send, *answer).await;
                }
            }
            let _ = recv.read_chunks(&mut [Bytes::new()]).await;
            send.finish();
            let _ = send.stopped().await;
        });
    }
}

/// Takes turns on a stream.
async fn exchange((send, recv): &mut (SendHalf, RecvHalf), turns: &[Turn]) {
    for (request, answer) in turns {
        write(send, *request).await;
        read(recv, *answer).await;
    }
}

/// Exchanges every interval, on one stream or on a stream each; how long each took.
async fn session(server: Tunnel, load: Load) -> Vec<Duration> {
    let (mut taken, mut ticks) = (Vec::new(), interval(load.interval));
    let mut kept = None;
    for number in 0..EXCHANGES {
        let due = ticks.tick().await;
        let mut stream = match kept.take() {
            Some(stream) => stream,
            None => server.open().await.unwrap(),
        };
        exchange(&mut stream, load.turns).await;
        taken.extend((number >= WARMUP).then(|| due.elapsed()));
        if load.is_kept {
            kept = Some(stream);
        } else {
            stream.0.finish();
            assert_eq!(stream.1.read_chunks(&mut [Bytes::new()]).await.unwrap(), None);
        }
    }
    taken
}

/// What a simulation has shown.
#[derive(Clone, Copy, Debug)]
struct Measured {
    /// Half of the exchanges take so many milliseconds, and 99 of 100.
    half: f64,
    most: f64,
    /// Congestion window of the answering side at the end, in bytes.
    window: u64,
}

/// Exchanges on a path of 50 ms.
fn measure(mbit: f64, loss: f64, load: Load, repaired: bool) -> Measured {
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(async {
        let link = Settings { loss, ..Settings::new(mbit, 50, 1.0) };
        let network = Network::new(link, link, SEED);
        let flow = Flow { hedged: true, repaired, ..Flow::new(Congestion::Model) };
        let (agent, server, _endpoints) = tunnel(&network, 0, &flow).await;
        test_util::detached(answer(agent.clone(), load));
        let mut sessions = JoinSet::new();
        for _ in 0..SESSIONS {
            sessions.spawn(session(server.clone(), load));
            sleep(load.interval / SESSIONS).await;
        }
        let mut taken = sessions.join_all().await.concat();
        taken.sort();
        let [half, most] = [0.5, 0.99].map(|share| quantile(&taken, share));
        let stats = agent.stats();
        println!(
            "{load:?}, {mbit} Mbit/s, loss {loss}, repaired {repaired} (seed {SEED}): {half:.1} / {most:.1} ms, \
             {} of {} packets with shards, {} bursts rebuilt, window {}",
            stats.repairs_sent,
            stats.sent_packets,
            server.stats().bursts_rebuilt,
            stats.cwnd,
        );
        Measured { half, most, window: stats.cwnd }
    })
}

const SHORT: &[Turn] = &[(512, 16_384)];
const LONG: &[Turn] = &[(512, 65_536)];

#[test]
fn answers_of_several_packets_do_not_wait_for_a_retransmission() {
    for (turns, millis, loss, half, most) in [
        (SHORT, 750, 0.01, 54.5, 62.0),
        (SHORT, 750, 0.05, 57.0, 72.0),
        (LONG, 1500, 0.01, 62.0, 80.0),
        (LONG, 1500, 0.05, 70.0, 80.0),
    ] {
        let load = Load::kept(turns, millis);
        let plain = measure(100.0, loss, load, false);
        let repaired = measure(100.0, loss, load, true);
        assert!(repaired.half < half && repaired.most < most, "{repaired:?}");
        assert!(repaired.half < plain.half + 3.0 && repaired.most < plain.most * 0.5);
    }
}

/// A dial, a TLS handshake, and a request, each a round trip.
#[test]
fn an_exchange_on_a_new_connection_takes_its_round_trips() {
    const TURNS: &[Turn] = &[(60, 20), (300, 3000), (1500, 4000)];
    for (loss, most) in [(0.01, 166.0), (0.05, 180.0)] {
        let load = Load { is_kept: false, ..Load::kept(TURNS, 1000) };
        let repaired = measure(100.0, loss, load, true);
        assert!(repaired.half < 158.0 && repaired.most < most, "{repaired:?}");
    }
}

/// What an application sends now and then is sent at once where the path carries it, and paced where
/// it does not.
#[test]
fn bursts_of_an_application_leave_as_fast_as_the_path_is() {
    let fast = measure(100.0, 0.0, Load::kept(LONG, 1500), false);
    assert!(fast.most < 62.0, "{fast:?}");
    let slow = measure(10.0, 0.0, Load::kept(LONG, 1500), false);
    assert!(slow.window < 160 * 1024, "{slow:?}");
}
