//! A tunnel beside a TCP flow of the kernel, with CUBIC, on one link.
//!
//! They take half a minute of a machine that does nothing else, so they run when asked for:
//! `cargo test --release -p culvert-loadtest --test fairness -- --ignored --nocapture --test-threads=1`.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use culvert_loadtest::{
    certificates::Certificates,
    link::{Link, LinkError, LinkSettings, NODE, SERVER, settings::Direction},
};
use culvert_transport::{
    Settings, Tunnel,
    quic::{Listener, connect},
    tls::{Identity, KeyExchange, authorities, certificates, tunnel_client, tunnel_server},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket},
    time::sleep,
};

/// Time for both flows to find their share, and time in which it is measured.
const WARM_UP: Duration = Duration::from_secs(5);
const MEASURED: Duration = Duration::from_secs(15);

/// Bytes that have arrived at the server.
#[derive(Clone, Default)]
struct Arrived(Arc<AtomicU64>);

impl Arrived {
    fn add(&self, bytes: usize) {
        self.0.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn mbit(&self, before: u64) -> f64 {
        (self.0.load(Ordering::Relaxed) - before) as f64 * 8e-6 / MEASURED.as_secs_f64()
    }
}

/// Mbit/s of the tunnel and of TCP, on 100 Mbit/s and 50 ms with a buffer of so much time.
fn share(buffer_ms: f64) -> Option<(f64, f64)> {
    let each_way = Direction {
        rate_mbit: Some(100.0),
        delay_ms: 25.0,
        buffer_ms: Some(buffer_ms),
        ..Direction::default()
    };
    let settings = LinkSettings { each_way, ..LinkSettings::default() };
    let link = match Link::start(&settings, 1) {
        Ok(link) => link,
        Err(LinkError::NotPermitted(error)) => {
            eprintln!("skipped: no right to make network namespaces ({error})");
            return None;
        }
        Err(error) => panic!("{error}"),
    };
    for host in [&link.server, &link.node] {
        host.set_congestion_control("cubic").unwrap();
    }
    let (server, node) = (link.server.runtime(1).unwrap(), link.node.runtime(1).unwrap());
    let (ours, cubic) = (Arrived::default(), Arrived::default());
    // Tasks that are spawned are on the host; this thread is not.
    let address = server.block_on(server.spawn(serve_tcp(cubic.clone()))).unwrap();
    node.spawn(async move {
        let socket = TcpSocket::new_v4().unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        while stream.write_all(&[7; 65_536]).await.is_ok() {}
    });
    let (listener, tls) = server.block_on(server.spawn(async { bind() })).unwrap();
    let address = listener.local_addr().unwrap();
    server.spawn(serve_tunnel(listener, ours.clone()));
    node.spawn(async move {
        let name = SERVER.to_string();
        let settings = Settings::default();
        let (connection, _) = connect(address, &name, tls, &settings).await.unwrap();
        let tunnel = Tunnel::from(connection);
        let (mut send, _recv) = tunnel.open().await.unwrap();
        while send.write_chunk(Bytes::from_static(&[7; 65_536])).await.is_ok() {}
    });
    let rates = server.block_on(async {
        sleep(WARM_UP).await;
        let before = [&ours, &cubic].map(|arrived| arrived.0.load(Ordering::Relaxed));
        sleep(MEASURED).await;
        (ours.mbit(before[0]), cubic.mbit(before[1]))
    });
    node.shutdown_background();
    server.shutdown_background();
    println!("{buffer_ms} ms of buffer: ours {:.1}, CUBIC {:.1} Mbit/s", rates.0, rates.1);
    Some(rates)
}

async fn serve_tcp(arrived: Arrived) -> SocketAddr {
    let listener = TcpListener::bind((SERVER, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
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

#[test]
#[ignore = "takes twenty seconds of a machine that does nothing else"]
fn a_buffer_of_one_product_leaves_cubic_a_quarter() {
    let Some((ours, cubic)) = share(50.0) else { return };
    assert!(cubic > 0.25 * (ours + cubic));
}

#[test]
#[ignore = "takes twenty seconds of a machine that does nothing else"]
fn a_buffer_of_four_products_leaves_ours_a_quarter() {
    let Some((ours, cubic)) = share(200.0) else { return };
    assert!(ours > 0.25 * (ours + cubic));
}
