//! A tunnel and a TCP flow of the kernel, with CUBIC, on one link: neither starves the other.
//!
//! The exact shares are tested in virtual time, against a CUBIC of our own, by
//! `wire/transport/tests/congestion.rs`. This shows that the kernel's behaves like that one.

use std::{
    net::SocketAddr,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use culvert_loadtest::{
    certificates::Certificates,
    link::{LinkSettings, NODE, SERVER, settings::Direction},
};
use culvert_transport::{
    Settings, Tunnel,
    quic::{Listener, connect},
    tls::{Identity, KeyExchange, authorities, certificates, tunnel_client, tunnel_server},
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket},
};

use crate::support::{eventually, network};

/// Rate of the link, low enough for a busy machine.
const RATE_MBIT: f64 = 20.0;
/// Bytes of both flows together while they find their shares, and while they are measured: about
/// 4 s and 12 s of the link.
const WARM_UP: u64 = 10_000_000;
const MEASURED: u64 = 30_000_000;

/// Bytes that have arrived at the server.
#[derive(Clone, Default)]
struct Arrived(Arc<AtomicU64>);

impl Arrived {
    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// CUBIC keeps a quarter of the link with a buffer of one bandwidth-delay product, and the tunnel
/// does with one of four; the other flow keeps a tenth.
#[rstest]
#[case::one_bdp(50.0, 0.1..0.75)]
#[case::four_bdps(200.0, 0.25..0.9)]
fn neither_flow_starves_the_other(#[case] buffer_ms: f64, #[case] shares: Range<f64>) {
    let each_way = Direction {
        rate_mbit: Some(RATE_MBIT),
        delay_ms: 25.0,
        buffer_ms: Some(buffer_ms),
        ..Direction::default()
    };
    let settings = LinkSettings { each_way, ..LinkSettings::default() };
    let Some(link) = network::link(&settings) else { return };
    for host in [&link.server, &link.node] {
        if let Err(error) = host.set_congestion_control("cubic") {
            eprintln!("SKIPPED: namespaces of this kernel may not use CUBIC ({error})");
            return;
        }
    }
    let (server, node) = (link.server.runtime(1).unwrap(), link.node.runtime(1).unwrap());
    let (tunnel_bytes, cubic) = (Arrived::default(), Arrived::default());
    // Tasks that are spawned are on the host; this thread is not.
    let address = server.block_on(server.spawn(serve_tcp(cubic.clone()))).unwrap();
    node.spawn(async move {
        let socket = TcpSocket::new_v4().unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        while stream.write_all(&[7; 65_536]).await.is_ok() {}
    });
    let (listener, tls) = server.block_on(server.spawn(async { bind() })).unwrap();
    let address = listener.local_addr().unwrap();
    server.spawn(serve_tunnel(listener, tunnel_bytes.clone()));
    node.spawn(async move {
        let name = SERVER.to_string();
        let settings = Settings::default();
        let (connection, _) =
            connect(address, &name, tls, &settings, &Arc::default()).await.unwrap();
        let tunnel = Tunnel::from(connection);
        let (mut send, _recv) = tunnel.open().await.unwrap();
        while send.write_chunk(Bytes::from_static(&[7; 65_536])).await.is_ok() {}
    });
    let total = || tunnel_bytes.bytes() + cubic.bytes();
    let share = server.block_on(async {
        eventually("the warm-up is over", async || total() >= WARM_UP).await;
        let (total_before, tunnel_before) = (total(), tunnel_bytes.bytes());
        eventually("enough is measured", async || total() >= total_before + MEASURED).await;
        (tunnel_bytes.bytes() - tunnel_before) as f64 / (total() - total_before) as f64
    });
    node.shutdown_background();
    server.shutdown_background();
    println!("{buffer_ms} ms of buffer: the tunnel has {share:.2} of the link");
    assert!(shares.contains(&share), "{share}");
}

async fn serve_tcp(arrived: Arrived) -> SocketAddr {
    let listener = TcpListener::bind((SERVER, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    culvert_transport::test_util::detached(async move {
        let (mut stream, from) = listener.accept().await.unwrap();
        assert_eq!(from.ip(), NODE);
        let mut buffer = vec![0; 65_536];
        while let Ok(length @ 1..) = stream.read(&mut buffer).await {
            arrived.add(length);
        }
    });
    address
}

/// A listener for tunnels, and what a client needs to know it.
fn bind() -> (Listener, Arc<rustls::ClientConfig>) {
    let files = Certificates::generate().unwrap();
    let pair = files.server();
    let identity = Identity::from_pem_files(&pair.certificate, &pair.key).unwrap();
    let tls = tunnel_server(identity, None, KeyExchange::Hybrid).unwrap();
    let address = (SERVER, 0).into();
    let listener = Listener::bind(address, tls.into(), &Settings::default(), None).unwrap();
    let roots = authorities(&certificates(&files.ca()).unwrap()).unwrap();
    (listener, tunnel_client(roots, None, KeyExchange::Hybrid).unwrap().into())
}

async fn serve_tunnel(listener: Listener, arrived: Arrived) {
    let connection = listener.accept().await.unwrap().complete().await.unwrap();
    let tunnel = Tunnel::from(connection);
    let (_send, mut recv) = tunnel.accept().await.unwrap();
    let mut chunks = [const { Bytes::new() }; 32];
    while let Ok(Some(count)) = recv.read_chunks(&mut chunks).await {
        arrived.add(chunks[..count].iter().map(Bytes::len).sum());
    }
}
