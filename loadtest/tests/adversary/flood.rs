//! Peers that send packets faster than the server opens them, and heed no congestion window.

use std::{
    io::{self, IoSliceMut},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use bytes::Bytes;
use culvert_loadtest::targets;
use parking_lot::Mutex;
use quinn::{
    AsyncUdpSocket, Endpoint, EndpointConfig, Runtime as _, SendStream, TokioRuntime, UdpPoller,
    udp::{RecvMeta, Transmit, UdpSocketState},
};
use rstest::rstest;
use tokio::{
    task::{JoinSet, yield_now},
    time::{Instant, sleep, timeout},
};

use crate::{
    forge::{Forger, Forgery},
    quic::{self, EVERYTHING},
    strangers::hello,
    support::{eventually, within},
    victim::{MIB, Proof::Certificate, Victim},
};

/// Length of the packets of a flood, in bytes, at least.
const LENGTH: usize = 1200;
/// Time that a flood lasts.
const FLOOD: Duration = Duration::from_secs(3);
/// Growth of the server's memory by a flood, beyond the limit: what the honest agents and the dials
/// of the test cost, and what the allocator keeps.
const MARGIN: u64 = 8 * MIB;
/// Longest time of a dial during a flood. Packets that the kernel drops are sent again.
const DIAL_TIME: Duration = Duration::from_secs(5);
/// Time for an honest agent to join during a flood, with the start of its process.
const JOIN_TIME: Duration = Duration::from_secs(8);

/// The packets of a flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packets {
    /// New ones full of pings, which are slow to process.
    Pings,
    /// One that the peer has sent, again and again: each is decrypted and found to be a duplicate.
    Repeated,
    /// With the peer's connection id, which decrypt to nothing.
    Junk,
    /// With random connection ids.
    Unknown,
}

/// A socket that remembers the last large packet of an established connection.
#[derive(Debug)]
struct Recorder {
    socket: Arc<dyn AsyncUdpSocket>,
    packet: Mutex<Vec<u8>>,
}

impl AsyncUdpSocket for Recorder {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let packet = transmit.contents;
        if packet[0] & 0x80 == 0 && packet.len() >= LENGTH && transmit.segment_size.is_none() {
            *self.packet.lock() = packet.to_vec();
        }
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn may_fragment(&self) -> bool {
        false
    }
}

/// A peer whose handshake is complete, and which can flood.
struct Flooder {
    connection: quinn::Connection,
    forger: Arc<Forger>,
    recorder: Arc<Recorder>,
    socket: std::net::UdpSocket,
    server: SocketAddr,
    _endpoint: Endpoint,
}

impl Flooder {
    async fn connect(victim: &Victim) -> Self {
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let own = TokioRuntime.wrap_udp_socket(socket.try_clone().unwrap()).unwrap();
        let recorder = Arc::new(Recorder { socket: own, packet: Mutex::default() });
        let endpoint = Endpoint::new_with_abstract_socket(
            EndpointConfig::default(),
            None,
            recorder.clone(),
            Arc::new(TokioRuntime),
        )
        .unwrap();
        let server = victim.deployment.tunnel();
        let forger = Forger::new(Forgery::Pings);
        let config = quic::forging(victim, EVERYTHING, Some(forger.clone()));
        let connecting = endpoint.connect_with(config, server, &quic::name(server)).unwrap();
        let connection = connecting.await.unwrap();
        // The search for the path's MTU sends one.
        eventually("a large packet is sent", async || !recorder.packet.lock().is_empty()).await;
        Self { connection, forger, recorder, socket, server, _endpoint: endpoint }
    }

    /// Sends packets as fast as it can until the result is dropped. What is written to the control
    /// stream is sent as pings.
    fn begin(&self, packets: Packets, mut control: SendStream) -> Flood {
        if packets != Packets::Pings {
            return Flood::Raw(self.flood(packets));
        }
        self.forger.begin();
        let mut writing = JoinSet::new();
        writing.spawn(async move {
            let chunk = Bytes::from(vec![7; 64 << 10]);
            // A write does not wait before a gigabyte is unsent. The task that sends it was woken by
            // this one, and no other thread runs it while this one is busy.
            while control.write_chunk(chunk.clone()).await.is_ok() {
                yield_now().await;
            }
        });
        Flood::Written(writing)
    }

    /// Number of packets that quinn has sent, and why the connection is closed.
    fn outcome(&self) -> (u64, Option<quinn::ConnectionError>) {
        (self.connection.stats().udp_tx.datagrams, self.connection.close_reason())
    }

    fn flood(&self, packets: Packets) -> RawFlood {
        /// Packets of one call.
        const BATCH: usize = 40;
        let packet = self.recorder.packet.lock().clone();
        let (length, mut random) = (packet.len(), fastrand::Rng::with_seed(7));
        let (socket, destination) = (self.socket.try_clone().unwrap(), self.server);
        let (stop, sent) = <(Arc<AtomicBool>, Arc<AtomicU64>)>::default();
        let (stopped, count) = (stop.clone(), sent.clone());
        let thread = thread::spawn(move || {
            let state = UdpSocketState::new((&socket).into()).unwrap();
            let mut batch = packet.repeat(BATCH);
            for packet in batch.chunks_mut(length) {
                match packets {
                    Packets::Pings | Packets::Repeated => {}
                    Packets::Junk => random.fill(&mut packet[9..]),
                    Packets::Unknown => random.fill(&mut packet[1..]),
                }
            }
            while !stopped.load(Relaxed) {
                let transmit = Transmit {
                    destination,
                    ecn: None,
                    contents: &batch,
                    segment_size: Some(length),
                    src_ip: None,
                };
                match state.try_send((&socket).into(), &transmit) {
                    Ok(()) => drop(count.fetch_add(BATCH as u64, Relaxed)),
                    Err(_) => thread::yield_now(),
                }
            }
        });
        RawFlood { stop, sent, thread: Some(thread) }
    }
}

/// A flood that goes on until this is dropped.
#[expect(dead_code, reason = "they are dropped")]
enum Flood {
    Written(JoinSet<()>),
    Raw(RawFlood),
}

struct RawFlood {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for RawFlood {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let _ = self.thread.take().unwrap().join();
        println!("{} packets were sent", self.sent.load(Relaxed));
    }
}

/// The server's memory stays within its limit, and an honest agent's dials and another's handshake
/// pass.
#[rstest]
#[case::of_an_agent(Packets::Pings, true, 8)]
#[case::of_an_agent_with_more_memory(Packets::Pings, true, 64)]
#[case::of_a_stranger(Packets::Pings, false, 8)]
#[case::repeated(Packets::Repeated, true, 8)]
#[case::junk(Packets::Junk, true, 8)]
#[case::junk_of_a_stranger(Packets::Junk, false, 8)]
#[case::of_no_connection(Packets::Unknown, false, 8)]
#[tokio::test(flavor = "multi_thread")]
async fn packets_that_come_faster_than_they_are_processed_are_dropped(
    #[case] packets: Packets,
    #[case] is_admitted: bool,
    #[case] limit: u64,
) {
    within(async {
        let flag = format!("--memory-limit={limit}Mi");
        let flags = [&*flag, "--proxy-strategies=destHost,default"];
        let mut victim = Victim::start_with(Certificate, &flags).await;
        let here = ["--agent-identifiers=ipv4=127.0.0.1"];
        let (_agent, _) = victim.honest_agent_joins_with("here", &here).await;
        let echo = targets::echo().await.unwrap();
        victim.deployment.until_dials_work(&echo).await;
        let flooder = Flooder::connect(&victim).await;
        let (mut control, _recv) = flooder.connection.open_bi().await.unwrap();
        if is_admitted {
            control.write_all(&hello("")).await.unwrap();
            victim.deployment.until_joined(2).await;
        }
        let flood = flooder.begin(packets, control);
        let mut dials = Vec::new();
        let _ = timeout(FLOOD, async {
            loop {
                let begun = Instant::now();
                victim.deployment.touch(&echo).await.unwrap();
                dials.push(begun.elapsed());
                sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
        let (_other, joined) = victim.honest_agent_joins("honest").await;
        let peak = victim.cost().peak_memory;
        let dropped =
            victim.deployment.server_metric("culvert_server_udp_receive_drops_total").await;
        let (sent, closed) = flooder.outcome();
        println!("{dropped} packets of {sent} were dropped; closed: {closed:?}");
        drop(flood);
        dials.sort_unstable();
        let (half, most) = (dials[dials.len() / 2], dials[dials.len() - 1]);
        println!(
            "{packets:?}, admitted {is_admitted}, limit {limit}: {} MiB; {} dials took {half:?}, \
             {most:?} at most; joined after {joined:?}",
            peak / MIB,
            dials.len(),
        );
        if packets == Packets::Pings {
            assert!(sent > 10_000 && dropped > 0.0, "it is no flood: {closed:?}");
        }
        assert!(peak < limit * MIB + MARGIN, "{} MiB", peak / MIB);
        assert!(most < DIAL_TIME, "{most:?}");
        assert!(joined < JOIN_TIME, "{joined:?}");
    })
    .await;
}
