//! Copies and repair shards of short writes, over real QUIC on a loopback path that loses packets.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod carriers;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use culvert_transport::{
    RecvHalf, SendHalf, Settings, Tunnel, TunnelLost,
    quic::{Listener, connect},
    tls::{KeyExchange, tunnel_client, tunnel_server},
};
use culvert_wire::CloseCode;
use quinn::crypto::rustls::QuicClientConfig;
use tokio::{net::UdpSocket, task::JoinSet};

use carriers::{Authority, within};

/// Bytes per second that may be sent twice: no limit for what is sent here.
const RATE: u32 = 10 << 20;

/// A server, and what a client needs to know it.
struct Server {
    listener: Listener,
    address: SocketAddr,
    client_tls: Arc<rustls::ClientConfig>,
}

impl Server {
    fn new() -> Self {
        let authority = Authority::new();
        let tls = tunnel_server(authority.identity(), None, KeyExchange::Classic).unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let listener = Listener::bind(address, tls.into(), &Settings::default(), None).unwrap();
        let client_tls =
            tunnel_client(authority.roots(), None, KeyExchange::Classic).unwrap().into();
        Self { address: listener.local_addr().unwrap(), listener, client_tls }
    }

    /// A tunnel to this server through `path`; the server's end first.
    async fn tunnel(&self, path: SocketAddr) -> (Tunnel, Tunnel) {
        let tls = self.client_tls.clone();
        let settings = Settings::default();
        let health = Arc::default();
        let (server, agent) =
            tokio::join!(self.accept(), connect(path, "127.0.0.1", tls, &settings, &health));
        (server, agent.unwrap().0.into())
    }

    async fn accept(&self) -> Tunnel {
        self.listener.accept().await.unwrap().complete().await.unwrap().into()
    }
}

/// Forwards UDP between one client and a server, and loses packets on request.
struct Path {
    address: SocketAddr,
    lossy: Arc<AtomicBool>,
    _tasks: JoinSet<()>,
}

impl Path {
    async fn to(server: SocketAddr, seed: u64) -> Self {
        let lossy = Arc::new(AtomicBool::new(false));
        let near = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let far = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        far.connect(server).await.unwrap();
        let address = near.local_addr().unwrap();
        let mut tasks = JoinSet::new();
        let (client_known, client) = tokio::sync::watch::channel(None);
        tasks.spawn({
            let (near, far, mut draw) = (near.clone(), far.clone(), Draw::new(&lossy, seed));
            async move {
                let mut packet = vec![0; 65_536];
                while let Ok((length, from)) = near.recv_from(&mut packet).await {
                    client_known.send_replace(Some(from));
                    if !draw.loses() {
                        let _ = far.send(&packet[..length]).await;
                    }
                }
            }
        });
        tasks.spawn({
            let mut draw = Draw::new(&lossy, seed + 1);
            async move {
                let mut packet = vec![0; 65_536];
                while let Ok(length) = far.recv(&mut packet).await {
                    let to = *client.borrow();
                    if let (Some(to), false) = (to, draw.loses()) {
                        let _ = near.send_to(&packet[..length], to).await;
                    }
                }
            }
        });
        Self { address, lossy, _tasks: tasks }
    }
}

/// Decides which packets are lost: one in five.
struct Draw {
    lossy: Arc<AtomicBool>,
    random: fastrand::Rng,
}

impl Draw {
    fn new(lossy: &Arc<AtomicBool>, seed: u64) -> Self {
        Self { lossy: lossy.clone(), random: fastrand::Rng::with_seed(seed) }
    }

    fn loses(&mut self) -> bool {
        self.lossy.load(Ordering::Relaxed) && self.random.u8(..5) == 0
    }
}

/// Sends back what comes.
async fn echo((mut send, mut recv): (SendHalf, RecvHalf)) {
    let mut chunks = [const { Bytes::new() }; 4];
    while let Some(count) = recv.read_chunks(&mut chunks).await.unwrap() {
        for chunk in &chunks[..count] {
            // Chunks are handed on as they came, so that thin ones stay thin.
            send.write_chunk(chunk.clone()).await.unwrap();
        }
    }
    send.finish();
    send.stopped().await.unwrap();
}

/// Sends `count` keystrokes of random bytes, each after the echo of the one before.
async fn type_keys((mut send, mut recv): (SendHalf, RecvHalf), count: usize, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut chunks = [Bytes::new()];
    for _ in 0..count {
        let keys: Vec<u8> = (0..random.usize(1..300)).map(|_| random.u8(..)).collect();
        send.write_chunk(keys.clone().into()).await.unwrap();
        let mut echoed = Vec::new();
        while echoed.len() < keys.len() {
            recv.read_chunks(&mut chunks).await.unwrap().expect("the echo goes on");
            echoed.extend_from_slice(&chunks[0]);
        }
        assert_eq!(echoed, keys, "each byte once and in order");
    }
    send.finish();
    assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), None);
}

/// Sends back bursts as a whole, once all of one is there.
async fn return_bursts((mut send, mut recv): (SendHalf, RecvHalf), lengths: Vec<usize>) {
    let mut chunks = [const { Bytes::new() }; 16];
    for length in lengths {
        let mut burst = Vec::new();
        while burst.len() < length {
            let count = recv.read_chunks(&mut chunks).await.unwrap().expect("the burst goes on");
            chunks[..count].iter().for_each(|chunk| burst.extend_from_slice(chunk));
        }
        send.write_chunk(burst.into()).await.unwrap();
    }
    assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), None);
    send.finish();
    send.stopped().await.unwrap();
}

/// Sends bursts of random bytes, each after the one before has come back.
async fn send_bursts((mut send, mut recv): (SendHalf, RecvHalf), lengths: Vec<usize>, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut chunks = [const { Bytes::new() }; 16];
    for length in lengths {
        let burst: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
        for part in burst.chunks(random.usize(1000..70_000)) {
            send.write_chunk(Bytes::copy_from_slice(part)).await.unwrap();
        }
        let mut returned = Vec::new();
        while returned.len() < burst.len() {
            let count = recv.read_chunks(&mut chunks).await.unwrap().expect("it is returned");
            chunks[..count].iter().for_each(|chunk| returned.extend_from_slice(chunk));
        }
        assert!(returned == burst, "each byte once and in order");
    }
    send.finish();
    assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), None);
}

#[tokio::test]
async fn bursts_that_lose_packets_are_rebuilt_and_read_once_and_in_order() {
    within(async {
        let seed = fastrand::u64(..1 << 32);
        println!("seed {seed}");
        let server = Server::new();
        let path = Path::to(server.address, seed).await;
        let (near, far) = server.tunnel(path.address).await;
        near.hedge(RATE, true);
        far.hedge(RATE, true);
        path.lossy.store(true, Ordering::Relaxed);
        let mut random = fastrand::Rng::with_seed(seed);
        let lengths: Vec<_> = (0..12).map(|_| random.usize(2_000..90_000)).collect();
        let mut exchanges = JoinSet::new();
        for stream in 0..8 {
            let (near, far, lengths) = (near.clone(), far.clone(), lengths.clone());
            exchanges.spawn(async move {
                let send = async {
                    send_bursts(near.open().await.unwrap(), lengths.clone(), seed + stream).await;
                };
                let give_back = async {
                    return_bursts(far.accept().await.unwrap(), lengths.clone()).await;
                };
                tokio::join!(send, give_back);
            });
        }
        exchanges.join_all().await;
        for tunnel in [&near, &far] {
            let stats = tunnel.stats();
            assert!(stats.repairs_sent > 0, "no repair shards were sent: {stats:?}");
            assert!(stats.bursts_rebuilt > 0, "nothing was rebuilt: {stats:?}");
        }
    })
    .await;
}

/// Types on eight streams of a tunnel over a path that loses a fifth of its packets, where one side
/// sends `rate` bytes per second twice; that side's end and the other one.
async fn type_over_a_bad_path(rate: u32) -> (Tunnel, Tunnel) {
    let seed = fastrand::u64(..1 << 32);
    println!("seed {seed}");
    let server = Server::new();
    let path = Path::to(server.address, seed).await;
    let (near, far) = server.tunnel(path.address).await;
    near.hedge(rate, true);
    far.hedge(RATE, true);
    path.lossy.store(true, Ordering::Relaxed);
    let mut typing = JoinSet::new();
    for stream in 0..8 {
        let (near, far) = (near.clone(), far.clone());
        typing.spawn(async move { type_keys(near.open().await.unwrap(), 60, seed + stream).await });
        typing.spawn(async move { echo(far.accept().await.unwrap()).await });
    }
    typing.join_all().await;
    (near, far)
}

#[tokio::test]
async fn what_is_sent_twice_is_read_once_and_in_order() {
    within(async {
        let (near, far) = type_over_a_bad_path(RATE).await;
        for tunnel in [&near, &far] {
            let stats = tunnel.stats();
            assert!(stats.copies_sent > 0, "nothing was sent twice: {stats:?}");
            assert!(stats.copies_used > 0, "no copy was of use: {stats:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_rate_of_nothing_sends_nothing_twice_and_takes_what_the_peer_does() {
    within(async {
        let (near, far) = type_over_a_bad_path(0).await;
        assert_eq!((near.stats().copies_sent, far.stats().copies_used), (0, 0));
        assert!(near.stats().copies_used > 0);
    })
    .await;
}

/// A QUIC connection that speaks for itself, to a server that takes copies.
async fn raw_client(server: &Server) -> (Tunnel, quinn::Connection, quinn::Endpoint) {
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let tls = QuicClientConfig::try_from(server.client_tls.clone()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(tls));
    let connecting = endpoint.connect_with(config, server.address, "127.0.0.1").unwrap();
    let (tunnel, client) = tokio::join!(server.accept(), connecting);
    tunnel.hedge(RATE, true);
    (tunnel, client.unwrap(), endpoint)
}

#[tokio::test]
async fn a_datagram_that_is_malformed_costs_the_tunnel() {
    let no_size = [&[0x21][..], &[0; 16], &[0, 9], &[0], &[0, 1], &[0, 0], &[0; 64]].concat();
    for malformed in [b"\x20short".to_vec(), no_size] {
        within(async {
            let server = Server::new();
            let (tunnel, client, _endpoint) = raw_client(&server).await;
            client.send_datagram(malformed.into()).unwrap();
            let TunnelLost::ClosedHere { code, reason } = tunnel.closed().await else {
                panic!("not closed by this side")
            };
            assert_eq!(code, CloseCode::PROTOCOL_VIOLATION, "{reason}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_copy_opens_its_stream_and_ends_it() {
    within(async {
        let server = Server::new();
        let (tunnel, client, _endpoint) = raw_client(&server).await;
        let stream = [0; 8];
        client.send_datagram([&[0x20][..], &stream, &[0; 8], b"dial"].concat().into()).unwrap();
        let (_send, mut recv) = tunnel.accept().await.unwrap();
        let mut chunks = [Bytes::new()];
        recv.read_chunks(&mut chunks).await.unwrap();
        assert_eq!(chunks[0], "dial");
        let end = [&[0x22][..], &stream, &4_u64.to_be_bytes(), b"ed"].concat();
        client.send_datagram(end.into()).unwrap();
        recv.read_chunks(&mut chunks).await.unwrap();
        assert_eq!(chunks[0], "ed");
        assert_eq!(recv.read_chunks(&mut chunks).await.unwrap(), None);
    })
    .await;
}

#[tokio::test]
async fn a_copy_beyond_the_window_of_its_stream_costs_the_tunnel() {
    within(async {
        let server = Server::new();
        let (tunnel, client, _endpoint) = raw_client(&server).await;
        let offset = (1_u64 << 40).to_be_bytes();
        client.send_datagram([&[0x20][..], &[0; 8], &offset, b"far"].concat().into()).unwrap();
        let lost = tunnel.closed().await;
        assert!(matches!(lost, TunnelLost::Transport(_)), "{lost:?}");
    })
    .await;
}

#[tokio::test]
async fn copies_for_unknown_streams_and_datagrams_of_later_revisions_are_ignored() {
    within(async {
        let server = Server::new();
        let (tunnel, client, _endpoint) = raw_client(&server).await;
        let no_such_stream = [&[0x20][..], &[0; 8], &[0xff; 8], b"late"].concat();
        client.send_datagram(no_such_stream.into()).unwrap();
        client.send_datagram(Bytes::from_static(b"\x21 of a later revision")).unwrap();
        let (mut send, _recv) = client.open_bi().await.unwrap();
        send.write_all(b"still here").await.unwrap();
        let (_send, mut recv) = tunnel.accept().await.unwrap();
        let mut chunks = [Bytes::new()];
        recv.read_chunks(&mut chunks).await.unwrap();
        assert_eq!(chunks[0], "still here");
    })
    .await;
}
