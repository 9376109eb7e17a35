//! Tunnels over TCP: the whole way from a frontend to a target, and who falls back to it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{io, net::SocketAddr};

use common::{noise, within};
use culvert_agent::config::Transport;
use culvert_loadtest::{frontend::Door, rig::Running, targets};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream, UdpSocket},
    task::AbortHandle,
};

async fn rig(door: Door) -> Running {
    door.rig().transport(Transport::Tcp).start().await.unwrap()
}

/// Tunnels of this carrier that the server has.
fn tunnels(rig: &Running, transport: &str) -> usize {
    let scrape = rig.server.metrics.render(&rig.server.backends);
    let family = "culvert_server_tunnel_rtt_seconds{";
    let label = format!("transport=\"{transport}\"");
    scrape.lines().filter(|line| line.starts_with(family) && line.contains(&label)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_cross_both_ways_and_all_that_was_written_before_a_close_arrives() {
    for door in Door::ALL {
        within(async {
            let rig = rig(door).await;
            assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (1, 0));
            let echo = targets::echo().await.unwrap();
            let mut frontend = door.dial(&rig, echo.address()).await.unwrap();
            let bytes = noise(3, 1 << 20);
            for part in bytes.chunks(64 << 10) {
                frontend.write(part).await.unwrap();
                assert!(frontend.read_count(part.len()).await.unwrap() == part, "{door:?}");
            }
            let (recorder, mut recorded) = targets::recorder("").await.unwrap();
            let mut frontend = door.dial(&rig, recorder.address()).await.unwrap();
            frontend.write(&bytes[..64 << 10]).await.unwrap();
            frontend.close().await.unwrap();
            assert!(recorded.recv().await.unwrap().bytes == bytes[..64 << 10], "{door:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_reset_and_a_refusal_are_told_as_over_quic() {
    for door in [Door::ConnectTls, Door::GrpcUnix] {
        within(async {
            let rig = rig(door).await;
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            targets::reset(accepted.recv().await.unwrap());
            let error = frontend.read_to_end().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{door:?}: {error}");
            let address = target.address();
            drop(target);
            let error = door.dial(&rig, address).await.unwrap_err();
            assert!(error.to_string().contains("connection refused"), "{door:?}: {error}");
        })
        .await;
    }
}

/// Passes TCP on to a server, and is no server itself.
async fn tcp_only(listener: TcpListener, server: SocketAddr) {
    while let Ok((mut near, _)) = listener.accept().await {
        let mut far = TcpStream::connect(server).await.unwrap();
        tokio::spawn(async move { copy_bidirectional(&mut near, &mut far).await });
    }
}

/// An agent that comes to the rig's server through a path that passes TCP alone.
async fn come_through_tcp_only(rig: &mut Running, listener: TcpListener) -> AbortHandle {
    let mut config = rig.agent_config("behind-a-firewall");
    config.servers.port = listener.local_addr().unwrap().port();
    config.transport = Transport::Auto;
    let path = tokio::spawn(tcp_only(listener, rig.server.tunnel)).abort_handle();
    rig.add_agent_with(&config).unwrap();
    rig.until_joined(1).await.unwrap();
    path
}

#[tokio::test]
async fn an_agent_whose_udp_is_refused_comes_over_tcp_at_once() {
    within(async {
        let mut rig = Door::ConnectUnix.rig().agents(0).start().await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let path = come_through_tcp_only(&mut rig, listener).await;
        assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (1, 0));
        let echo = targets::echo().await.unwrap();
        let mut frontend = Door::ConnectUnix.dial(&rig, echo.address()).await.unwrap();
        frontend.write(b"hello").await.unwrap();
        assert_eq!(frontend.read_count(5).await.unwrap(), b"hello");
        path.abort();
    })
    .await;
}

#[tokio::test]
async fn an_agent_whose_udp_is_swallowed_comes_over_tcp() {
    within(async {
        let mut rig = Door::ConnectUnix.rig().agents(0).start().await.unwrap();
        // Somebody takes the packets and never answers.
        let (listener, _silence) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            if let Ok(silence) = UdpSocket::bind(address).await {
                break (listener, silence);
            }
        };
        let path = come_through_tcp_only(&mut rig, listener).await;
        assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (1, 0));
        path.abort();
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_may_choose_takes_quic_where_it_gets_through() {
    within(async {
        let door = Door::ConnectUnix;
        let rig = door.rig().transport(Transport::Auto).start().await.unwrap();
        assert_eq!((tunnels(&rig, "tcp"), tunnels(&rig, "quic")), (0, 1));
    })
    .await;
}
