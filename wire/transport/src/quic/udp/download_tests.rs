//! Downloads over paths that treat batches badly, by quinn's endpoints on sockets of ours.

use std::{
    io::{self, IoSliceMut},
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use quinn::{
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
    udp::{RecvMeta, Transmit},
};
use tokio::net::UdpSocket;

use super::{
    UdpHealth, UdpStats, WhenBroken,
    calls::{Calls, KernelCalls},
    intake::Intake,
    socket::{Abilities, Socket},
};
use crate::{
    Settings,
    quic::{
        path_config,
        rounds::{self, Rounds},
    },
    tls::{Identity, KeyExchange, authorities, tunnel_client, tunnel_server},
};

const SIZE: usize = 20 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// What a path does to what is sent on it.
#[derive(Debug)]
enum Path {
    /// It drops batches.
    DropsBatches,
    /// It drops each packet with this probability.
    Loses(f64, Mutex<fastrand::Rng>),
}

#[derive(Debug)]
struct OverPath {
    kernel: KernelCalls,
    path: Path,
}

impl Calls for OverPath {
    fn send(&self, socket: &UdpSocket, transmit: &Transmit<'_>) -> io::Result<()> {
        match &self.path {
            Path::DropsBatches => match transmit.segment_size {
                Some(_) => Ok(()),
                None => self.kernel.send(socket, transmit),
            },
            Path::Loses(loss, random) => {
                let size = transmit.segment_size.unwrap_or(transmit.contents.len());
                for contents in transmit.contents.chunks(size) {
                    if random.lock().f64() >= *loss {
                        let packet = Transmit { contents, segment_size: None, ..transmit.clone() };
                        // A full buffer loses packets as well.
                        let _ = self.kernel.send(socket, &packet);
                    }
                }
                Ok(())
            }
        }
    }

    fn receive_many(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<usize> {
        self.kernel.receive_many(socket, bufs, meta)
    }

    fn receive_one(
        &self,
        socket: &UdpSocket,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut RecvMeta,
    ) -> io::Result<()> {
        self.kernel.receive_one(socket, bufs, meta)
    }
}

/// Downloads [`SIZE`] bytes from a server whose packets take the path; the time, and what the
/// server's socket has found out.
async fn download(path: Path, settings: &Settings) -> (Duration, UdpStats) {
    let pair = rcgen::generate_simple_self_signed(["localhost".into()]).unwrap();
    let key = rustls_pki_types::PrivateKeyDer::try_from(pair.signing_key.serialize_der()).unwrap();
    let roots = authorities(&[pair.cert.der().clone()]).unwrap();
    let identity = Identity { chain: vec![pair.cert.into()], key };
    let server_tls = tunnel_server(identity, None, KeyExchange::Classic).unwrap();
    let client_tls = tunnel_client(roots, None, KeyExchange::Classic).unwrap();

    let health = Arc::new(UdpHealth::default());
    let client_address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let crypto = QuicServerConfig::try_from(server_tls).unwrap();
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(path_config(settings, client_address, &health)));
    let io = UdpSocket::bind(client_address).await.unwrap();
    let kernel = KernelCalls::new(&io).unwrap();
    let (segments, joined) = kernel.segments();
    let batch = if settings.gso { segments } else { 1 };
    let when_broken = WhenBroken::Stay;
    let abilities = Abilities { batch, joins: joined > 1, may_fragment: false, when_broken };
    let rounds = Arc::<Rounds>::default();
    let intake = Intake::new(rounds.clone(), settings.packet_backlog);
    let socket = Socket::new(io, OverPath { kernel, path }, abilities, health.clone(), intake);
    let endpoint = settings.endpoint(None);
    let server = rounds::endpoint(endpoint, Some(config), Arc::new(socket), rounds).unwrap();

    let client = quinn::Endpoint::client(client_address).unwrap();
    let crypto = QuicClientConfig::try_from(client_tls).unwrap();
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(settings.transport(None)));
    let connecting =
        client.connect_with(config, server.local_addr().unwrap(), "localhost").unwrap();
    let accept = async { server.accept().await.unwrap().await.unwrap() };
    let (accepted, connected) = tokio::join!(accept, connecting);
    let connected = connected.unwrap();

    let begun = Instant::now();
    let write = async {
        let (mut send, _recv) = accepted.open_bi().await.unwrap();
        send.write_all(&vec![7; SIZE]).await.unwrap();
        send.finish().unwrap();
        send.stopped().await.unwrap();
    };
    let read = async {
        let (_send, mut recv) = connected.accept_bi().await.unwrap();
        recv.read_to_end(SIZE).await.unwrap()
    };
    let both = async { tokio::join!(write, read).1 };
    let received = tokio::time::timeout(LIMIT, both).await.expect("the download ends");
    assert_eq!(received.len(), SIZE);
    (begun.elapsed(), health.stats())
}

#[tokio::test]
async fn a_download_over_a_path_that_drops_batches_finds_out_and_passes() {
    let (took, stats) = download(Path::DropsBatches, &Settings::default()).await;
    println!("{took:?} {stats:?}");
    assert!(took < Duration::from_secs(20), "{took:?}");
    assert_eq!((stats.gso_lost, stats.unsegmented_peers), (1, 1));
}

#[tokio::test]
async fn without_gso_such_a_path_is_like_any_other() {
    let settings = Settings { gso: false, ..Settings::default() };
    let (took, stats) = download(Path::DropsBatches, &settings).await;
    println!("{took:?} {stats:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!((stats.gso_lost, stats.unsegmented_peers), (0, 0));
}

#[tokio::test]
async fn a_path_that_loses_packets_keeps_its_batches() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    for loss in [0.01, 0.05] {
        let random = Mutex::new(fastrand::Rng::with_seed(seed));
        let (took, stats) = download(Path::Loses(loss, random), &Settings::default()).await;
        println!("{loss}: {took:?} {stats:?}");
        assert_eq!(stats.gso_lost, 0, "{loss}");
    }
}
