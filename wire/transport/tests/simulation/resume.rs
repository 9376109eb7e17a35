//! Answers right after a connection, one tunnel after the other.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_transport::{
    Tunnel,
    congestion::{Congestion, KnownPaths, Resumption},
    test_util,
};
use quinn::Endpoint;
use tokio::{
    runtime::Builder,
    time::{Instant, sleep},
};

use super::{
    flow::{Flow, download, tunnel},
    pipe::Settings,
    socket::Network,
};

/// Length of an answer, in bytes.
const ANSWER: usize = 10_000_000;
/// Length of hello and welcome, in bytes.
const HELLO: usize = 200;

/// Result of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answer {
    /// From the first byte written to the last one read.
    pub(crate) took: Duration,
    /// Share of the packets that the buffer dropped.
    pub(crate) dropped: f64,
    /// Number of bytes that the flow beside it has brought through within ten seconds.
    pub(crate) beside: u64,
}

/// Agents that answer, each on a new tunnel, and what they know of paths.
pub(crate) struct Reconnecting {
    /// Time before each answer in which the agent sends keystrokes.
    pub(crate) keystrokes: Duration,
    known: Arc<KnownPaths>,
    seed: u64,
    runtime: tokio::runtime::Runtime,
}

impl Reconnecting {
    pub(crate) fn new(seed: u64) -> Self {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let (known, keystrokes) = (Arc::default(), Duration::ZERO);
        Self { keystrokes, known, seed, runtime: runtime.unwrap() }
    }

    /// Connects over this link and answers, with a flow of CUBIC beside it or alone.
    pub(crate) fn answer(&self, name: &str, link: Settings, beside_cubic: bool) -> Answer {
        let answer = self.runtime.block_on(self.perform(link, beside_cubic));
        println!("{name} (seed {}): {answer:?}", self.seed);
        answer
    }

    /// Connects over this link and answers twice on one tunnel; the times that both took.
    pub(crate) fn answer_twice(&self, name: &str, link: Settings) -> [Duration; 2] {
        let answers = self.runtime.block_on(async {
            let network = Network::new(link, link, self.seed);
            let (agent, server, _endpoints) = self.connect(&network, link).await;
            [self.once(&agent, &server).await, self.once(&agent, &server).await]
        });
        println!("{name} (seed {}): {answers:?}", self.seed);
        answers
    }

    /// Number of resumptions with this result.
    pub(crate) fn count(&self, result: Resumption) -> u64 {
        self.known.count(result)
    }

    async fn perform(&self, link: Settings, beside_cubic: bool) -> Answer {
        let network = Network::new(link, link, self.seed);
        let beside = Arc::new(AtomicU64::new(0));
        let mut kept = None;
        if beside_cubic {
            kept = Some(cubic(&network, &beside).await);
            // The seed chooses where in its cycle the answer meets it.
            sleep(Duration::from_secs(10) + Duration::from_millis(337) * self.seed as u32).await;
        }
        let (agent, server, _endpoints) = self.connect(&network, link).await;
        let before = beside.load(Ordering::Relaxed);
        let took = self.once(&agent, &server).await;
        sleep(Duration::from_secs(10).saturating_sub(took)).await;
        drop(kept);
        let packets = network.counters();
        let beside = beside.load(Ordering::Relaxed) - before;
        Answer { took, dropped: packets.dropped as f64 / packets.packets as f64, beside }
    }

    /// A tunnel whose sides have introduced themselves.
    async fn connect(
        &self,
        network: &Arc<Network>,
        link: Settings,
    ) -> (Tunnel, Tunnel, [Endpoint; 2]) {
        let flow = Flow::new(Congestion::Model);
        let (agent, server, endpoints) = tunnel(network, 0, &flow).await;
        agent.resume(self.known.to("server"));
        for side in [&agent, &server] {
            let (mut send, _recv) = side.open().await.unwrap();
            send.write_chunk(vec![0; HELLO].into()).await.unwrap();
            send.finish();
        }
        read(&server, &AtomicU64::new(0)).await;
        sleep(link.delay * 3).await;
        (agent, server, endpoints)
    }

    /// Sends keystrokes for their time, and then an answer; how long that took.
    async fn once(&self, agent: &Tunnel, server: &Tunnel) -> Duration {
        let bytes = AtomicU64::new(0);
        let typing = async {
            let (mut send, _recv) = agent.open().await.unwrap();
            let begun = Instant::now();
            while begun.elapsed() < self.keystrokes {
                send.write_chunk(Bytes::from_static(&[b'k'; 64])).await.unwrap();
                sleep(Duration::from_millis(300)).await;
            }
            send.write_chunk(Bytes::from_static(b".")).await.unwrap();
            send.finish();
        };
        tokio::join!(read(server, &bytes), typing);
        let start = Instant::now();
        let writing = async {
            let (mut send, _recv) = agent.open().await.unwrap();
            for _ in 0..ANSWER / 50_000 {
                send.write_chunk(vec![0; 50_000].into()).await.unwrap();
            }
            send.finish();
        };
        let (count, ()) = tokio::join!(read(server, &bytes), writing);
        assert_eq!(count, ANSWER);
        start.elapsed()
    }
}

/// A tunnel that sends without end with CUBIC, and counts what arrives.
async fn cubic(network: &Arc<Network>, bytes: &Arc<AtomicU64>) -> (Tunnel, [Endpoint; 2]) {
    let flow = Flow::new(Congestion::Cubic);
    let (agent, server, endpoints) = tunnel(network, 1, &flow).await;
    test_util::detached(download(agent.clone(), flow));
    let bytes = Arc::clone(bytes);
    test_util::detached(async move {
        read(&server, &bytes).await;
    });
    (agent, endpoints)
}

/// Reads the next stream to its end; its length.
async fn read(server: &Tunnel, bytes: &AtomicU64) -> usize {
    let (_send, mut recv) = server.accept().await.unwrap();
    let (mut chunks, mut read) = ([const { Bytes::new() }; 32], 0);
    while let Ok(Some(count)) = recv.read_chunks(&mut chunks).await {
        let length: usize = chunks[..count].iter().map(Bytes::len).sum();
        bytes.fetch_add(length as u64, Ordering::Relaxed);
        read += length;
    }
    read
}
