//! Tunnels over the network: downloads, and keystrokes beside them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_transport::{
    self as transport, SendHalf, Tunnel,
    congestion::Congestion,
    test_util,
    tls::{Identity, KeyExchange, authorities, tunnel_client, tunnel_server},
};
use parking_lot::Mutex;
use quinn::{Endpoint, EndpointConfig, TokioRuntime};
use rcgen::{CertificateParams, KeyPair};
use tokio::{
    runtime::Builder,
    time::{Instant, interval, sleep},
};

use super::{
    pipe::{Counters, Settings},
    socket::Network,
};

/// Length of a keystroke, in bytes.
const KEYSTROKE: usize = 64;
/// Number of bytes per second that copies and repair shards may take: the default.
const HEDGE_RATE: u32 = 512 * 1024;
/// Interval at which a typist sends keystrokes.
const KEYSTROKE_INTERVAL: Duration = Duration::from_millis(50);
/// Length of a short answer, in bytes.
const ANSWER: usize = 64 * 1024;
/// Interval at which they are sent.
const ANSWER_INTERVAL: Duration = Duration::from_millis(500);

/// Length of what [`Outcome::slices`] divides the time into.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

/// One tunnel whose agent sends downloads to its server.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flow {
    pub(crate) congestion: Congestion,
    pub(crate) downloads: usize,
    /// When the downloads begin.
    pub(crate) begin: Duration,
    /// Bytes per second of each download, if it cannot fill the path.
    pub(crate) limit: Option<f64>,
    /// Number of typists.
    pub(crate) typists: usize,
    /// Whether thin writes are sent twice.
    pub(crate) hedged: bool,
    /// Whether bursts have repair shards.
    pub(crate) repaired: bool,
    /// Whether short answers are sent beside the keystrokes, so that acknowledgements never cease.
    pub(crate) answers: bool,
    /// Whether streams have priorities by the service they have attained.
    pub(crate) scheduled: bool,
}

impl Flow {
    pub(crate) fn new(congestion: Congestion) -> Self {
        Self {
            congestion,
            downloads: 4,
            begin: Duration::ZERO,
            limit: None,
            typists: 1,
            hedged: false,
            repaired: false,
            answers: true,
            scheduled: true,
        }
    }
}

impl Flow {
    /// Gives a stream the priority of all others, unless streams have priorities of their own.
    fn mark(&self, send: &mut SendHalf) {
        if !self.scheduled {
            send.set_priority(0);
        }
    }
}

/// A network, the flows over it, and for how long they are measured.
#[derive(Clone, Debug)]
pub(crate) struct Simulation {
    /// Both directions.
    pub(crate) link: Settings,
    pub(crate) flows: Vec<Flow>,
    pub(crate) warmup: Duration,
    pub(crate) measured: Duration,
    pub(crate) seed: u64,
}

/// Results of a simulation.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Mbit/s of each flow's downloads.
    pub(crate) rates: Vec<f64>,
    /// The first flow's echoes of keystrokes, sorted.
    pub(crate) echoes: Vec<Duration>,
    /// Times of its answers from the first byte written to the last one read, sorted.
    pub(crate) answers: Vec<Duration>,
    /// When packets of agents came into the path's queue, since the warm-up, and how long each waited.
    pub(crate) waits: Vec<(Duration, Duration)>,
    /// Bytes of the first flow's downloads that arrived in each [`SLICE`] since the warm-up.
    pub(crate) slices: Vec<u64>,
    /// Packets that agents sent, including the warm-up.
    pub(crate) packets: Counters,
}

impl Outcome {
    /// Time that this share of the keystrokes' echoes did not exceed, in milliseconds.
    ///
    /// # Panics
    /// When no echo arrived.
    pub(crate) fn echo(&self, share: f64) -> f64 {
        quantile(&self.echoes, share)
    }

    /// Time that this share of the answers did not exceed, in milliseconds.
    ///
    /// # Panics
    /// When no answer arrived.
    pub(crate) fn answer(&self, share: f64) -> f64 {
        quantile(&self.answers, share)
    }

    /// Time that this share of the agents' packets did not wait longer in the path's queue, in
    /// milliseconds.
    ///
    /// # Panics
    /// When no packet was sent.
    pub(crate) fn queue(&self, share: f64) -> f64 {
        let mut waits: Vec<_> = self.waits.iter().map(|(_, wait)| *wait).collect();
        waits.sort();
        quantile(&waits, share)
    }

    pub(crate) fn total(&self) -> f64 {
        self.rates.iter().sum()
    }

    /// Share of packets that the buffer or the policer dropped.
    pub(crate) fn dropped(&self) -> f64 {
        self.packets.dropped as f64 / self.packets.packets as f64
    }
}

/// The value that this share of the values does not exceed, in milliseconds.
///
/// # Panics
/// Without values: a test in which nothing arrived must not pass.
pub(super) fn quantile(sorted: &[Duration], share: f64) -> f64 {
    let last = sorted.len().checked_sub(1).expect("something was measured");
    let index = (sorted.len() as f64 * share) as usize;
    sorted[index.min(last)].as_secs_f64() * 1000.0
}

/// As [`quantile`], for a line of text.
fn shown(sorted: &[Duration], share: f64) -> String {
    if sorted.is_empty() { "none".into() } else { format!("{:.1}", quantile(sorted, share)) }
}

impl Simulation {
    /// One flow of the model over `link`, 15 seconds.
    pub(crate) fn new(link: Settings) -> Self {
        Self {
            link,
            flows: vec![Flow::new(Congestion::Model)],
            warmup: Duration::from_secs(3),
            measured: Duration::from_secs(12),
            seed: 1,
        }
    }

    /// Runs it in virtual time, and prints the results.
    pub(crate) fn run(&self, name: &str) -> Outcome {
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build();
        let outcome = runtime.unwrap().block_on(self.perform());
        let rates: Vec<_> = outcome.rates.iter().map(|rate| format!("{rate:.1}")).collect();
        println!(
            "{name} (seed {}): {} Mbit/s, echo {} / {} / {} ms, answers {} / {} ms, \
             dropped {:.2} %, lost {}",
            self.seed,
            rates.join(" + "),
            shown(&outcome.echoes, 0.5),
            shown(&outcome.echoes, 0.99),
            shown(&outcome.echoes, 1.0),
            shown(&outcome.answers, 0.5),
            shown(&outcome.answers, 0.99),
            outcome.dropped() * 100.0,
            outcome.packets.lost,
        );
        outcome
    }

    async fn perform(&self) -> Outcome {
        let network = Network::new(self.link, self.link, self.seed);
        let mut received = Vec::new();
        let mut echoes = None;
        let mut kept = Vec::new();
        for (number, flow) in self.flows.iter().enumerate() {
            let (agent, server, endpoints) = tunnel(&network, number, flow).await;
            let bytes = Arc::new(AtomicU64::new(0));
            let answers = Arc::new(Mutex::new(Vec::new()));
            test_util::detached(receive_all(
                server.clone(),
                Arc::clone(&bytes),
                Arc::clone(&answers),
            ));
            for _ in 0..flow.downloads {
                test_util::detached(download(agent.clone(), *flow));
            }
            if number == 0 {
                if flow.answers {
                    test_util::detached(answer(agent.clone(), *flow));
                }
                test_util::detached(echo(agent, *flow));
                let (warmup, measured) = (self.warmup, self.measured);
                let typists = (0..flow.typists).map(|number| {
                    let typing = keystrokes(server.clone(), *flow, warmup, measured);
                    // One after another, so that each keystroke is a packet of its own.
                    let begin = KEYSTROKE_INTERVAL.mul_f64(number as f64 / flow.typists as f64);
                    culvert_transport::task::owned(async move {
                        sleep(begin).await;
                        typing.await
                    })
                });
                echoes = Some((typists.collect::<Vec<_>>(), answers));
            }
            received.push(bytes);
            kept.push((server, endpoints));
        }
        sleep(self.warmup).await;
        let read = |bytes: &Arc<AtomicU64>| bytes.load(Ordering::Relaxed);
        let before: Vec<_> = received.iter().map(read).collect();
        let begun = Instant::now();
        let (mut slices, mut last) = (Vec::new(), before[0]);
        while begun.elapsed() < self.measured {
            sleep(SLICE.min(self.measured - begun.elapsed())).await;
            let total = read(&received[0]);
            slices.push(total - std::mem::replace(&mut last, total));
        }
        let after: Vec<_> = received.iter().map(read).collect();
        let seconds = self.measured.as_secs_f64();
        let rates = before.iter().zip(&after);
        let rates = rates.map(|(before, after)| (after - before) as f64 * 8e-6 / seconds).collect();
        let (typists, answers) = echoes.unwrap();
        let mut echoes = Vec::new();
        for typist in typists {
            echoes.extend(typist.await.unwrap());
        }
        echoes.sort();
        let mut answers = answers.lock().clone();
        answers.sort();
        let waits = network.waits().into_iter();
        let waits = waits.filter_map(|(at, wait)| Some((at.checked_duration_since(begun)?, wait)));
        Outcome {
            rates,
            echoes,
            answers,
            waits: waits.filter(|(at, _)| *at < self.measured).collect(),
            slices,
            packets: network.counters(),
        }
    }
}

/// A tunnel's two ends; the agent's sends with the flow's congestion control.
pub(super) async fn tunnel(
    network: &Arc<Network>,
    number: usize,
    flow: &Flow,
) -> (Tunnel, Tunnel, [Endpoint; 2]) {
    // Its signatures have one length, so that equal seeds give equal handshakes.
    let key = KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let certificate = params.self_signed(&key).unwrap().der().clone();
    let roots = authorities(std::slice::from_ref(&certificate)).unwrap();
    let key = key.serialize_der().try_into().unwrap();
    let identity = Identity { chain: vec![certificate], key };
    let server_tls = Arc::new(tunnel_server(identity, None, KeyExchange::Classic).unwrap());
    let client_tls = Arc::new(tunnel_client(roots, None, KeyExchange::Classic).unwrap());

    let settings =
        transport::Settings { congestion: flow.congestion, ..transport::Settings::default() };
    let transport = Arc::new(test_util::quic_transport(&settings, Some(1472)));
    let crypto = test_util::quic_server(server_tls, &settings).unwrap();
    let mut server = quinn::ServerConfig::with_crypto(crypto);
    server.transport_config(Arc::clone(&transport));
    let crypto = test_util::quic_client(client_tls, &settings).unwrap();
    let mut client = quinn::ClientConfig::new(crypto);
    client.transport_config(transport);

    let address =
        |host: u8| -> SocketAddr { (Ipv4Addr::new(10, 0, host, number as u8 + 1), 8132).into() };
    let endpoint = |address, server: Option<quinn::ServerConfig>| {
        let socket = network.socket(address, server.is_some());
        let mut config = EndpointConfig::default();
        config.rng_seed(Some([number as u8; 32])).max_udp_payload_size(1472).unwrap();
        Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime)).unwrap()
    };
    let servers = endpoint(address(1), Some(server));
    let agents = endpoint(address(2), None);
    let connecting = agents.connect_with(client, address(1), "127.0.0.1").unwrap();
    let accept = async { servers.accept().await.unwrap().await.unwrap() };
    let (server, agent) = tokio::join!(accept, async { connecting.await.unwrap() });
    let agent = test_util::adopt(agent, agents.clone()).unwrap();
    let server = test_util::adopt(server, servers.clone()).unwrap();
    if flow.hedged {
        agent.hedge(HEDGE_RATE, flow.repaired);
        server.hedge(HEDGE_RATE, flow.repaired);
    }
    (agent, server, [agents, servers])
}

/// Sends without end on a stream that the agent opens.
pub(super) async fn download(agent: Tunnel, flow: Flow) {
    sleep(flow.begin).await;
    let (mut send, _recv) = agent.open().await.unwrap();
    flow.mark(&mut send);
    let chunk = Bytes::from(vec![b'D'; 64 * 1024]);
    let mut ticks = flow.limit.map(|rate| interval(Duration::from_secs_f64(65_536.0 / rate)));
    loop {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        if send.write_chunk(chunk.clone()).await.is_err() {
            return;
        }
    }
}

/// Sends short answers now and then, each on a stream of its own.
async fn answer(agent: Tunnel, flow: Flow) {
    let start = Instant::now();
    let mut ticks = interval(ANSWER_INTERVAL);
    loop {
        let begun = ticks.tick().await - start;
        let (mut send, _recv) = agent.open().await.unwrap();
        flow.mark(&mut send);
        let mut answer = vec![b'A'; ANSWER];
        answer[..8].copy_from_slice(&(begun.as_micros() as u64).to_be_bytes());
        // Tunnels begin at the same moment, so both ends have one clock.
        if send.write_chunk(answer.into()).await.is_err() {
            return;
        }
        send.finish();
    }
}

/// Reads every stream that the agent opens, and notes how long those took that ended.
async fn receive_all(server: Tunnel, bytes: Arc<AtomicU64>, answers: Arc<Mutex<Vec<Duration>>>) {
    let start = Instant::now();
    while let Ok((_send, mut recv)) = server.accept().await {
        let (bytes, answers) = (Arc::clone(&bytes), Arc::clone(&answers));
        test_util::detached(async move {
            let mut chunks = [const { Bytes::new() }; 32];
            let mut begun = None;
            while let Ok(Some(count)) = recv.read_chunks(&mut chunks).await {
                let length: usize = chunks[..count].iter().map(Bytes::len).sum();
                bytes.fetch_add(length as u64, Ordering::Relaxed);
                begun = begun.or_else(|| chunks[0].first_chunk().copied());
            }
            let begun = Duration::from_micros(u64::from_be_bytes(begun.unwrap()));
            answers.lock().push(start.elapsed() - begun);
        });
    }
}

/// Sends back what arrives on the streams that the server opens.
async fn echo(agent: Tunnel, flow: Flow) {
    while let Ok((mut send, mut recv)) = agent.accept().await {
        flow.mark(&mut send);
        test_util::detached(async move {
            let mut chunks = [Bytes::new()];
            while let Ok(Some(_)) = recv.read_chunks(&mut chunks).await {
                if send.write_chunk(std::mem::take(&mut chunks[0])).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Sends a keystroke every interval, open loop; how long the echoes of those took that were sent
/// after the warm-up.
async fn keystrokes(
    server: Tunnel,
    flow: Flow,
    warmup: Duration,
    measured: Duration,
) -> Vec<Duration> {
    let (mut send, mut recv) = server.open().await.unwrap();
    flow.mark(&mut send);
    let start = Instant::now();
    let (due, mut answered) = tokio::sync::mpsc::unbounded_channel();
    test_util::detached(async move {
        let mut ticks = interval(KEYSTROKE_INTERVAL);
        loop {
            due.send(ticks.tick().await).unwrap_or_default();
            if send.write_chunk(Bytes::from_static(&[b'k'; KEYSTROKE])).await.is_err() {
                return;
            }
        }
    });
    let mut echoes = Vec::new();
    let (mut chunks, mut echoed, mut typed) = ([Bytes::new()], 0, 0);
    while let Some(due) = answered.recv().await {
        typed += KEYSTROKE;
        while echoed < typed {
            recv.read_chunks(&mut chunks).await.unwrap().unwrap();
            echoed += chunks[0].len();
        }
        if due - start > warmup + measured {
            break;
        }
        if due - start > warmup {
            echoes.push(due.elapsed());
        }
    }
    echoes.sort();
    echoes
}
