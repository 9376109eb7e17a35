//! Bytes that nobody should send: they cost their own stream or tunnel, and nothing else.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use bytes::Bytes;
use culvert_loadtest::{frontend::Door, rig::Running, targets};
use culvert_transport::TunnelLost;
use culvert_wire::frame;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket, UnixStream},
};

use common::{
    agent, eventually, metric,
    server::{self, FakeServer},
    within,
};

const SEED: u64 = 20_260_823;

fn random() -> fastrand::Rng {
    println!("seed {SEED}");
    fastrand::Rng::with_seed(SEED)
}

async fn still_works(door: Door, rig: &Running) {
    let echo = targets::echo().await.unwrap();
    let mut frontend = door.dial(rig, echo.address()).await.unwrap();
    frontend.write(b"still here").await.unwrap();
    assert_eq!(frontend.read_count(10).await.unwrap(), b"still here");
}

#[tokio::test(flavor = "multi_thread")]
async fn random_datagrams_on_the_tunnel_port_change_nothing() {
    within(async {
        let rig = Door::ConnectUnix.rig().start().await.unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut random = random();
        for _ in 0..20_000 {
            let mut datagram = vec![0; random.usize(0..1500)];
            random.fill(&mut datagram);
            if random.bool() && datagram.len() > 5 {
                // A QUIC long header of version 1, to come further.
                datagram[..5].copy_from_slice(&[0xc0 | random.u8(0..0x40), 0, 0, 0, 1]);
            }
            // A full queue of the kernel's is as good as a loss.
            let _ = socket.send_to(&datagram, rig.server.tunnel).await;
        }
        still_works(Door::ConnectUnix, &rig).await;
    })
    .await;
}

/// The same port number over TCP.
#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_on_the_tunnel_port_cost_their_own_connection() {
    within(async {
        let door = Door::ConnectUnixTunnelTcp;
        let rig = door.rig().start().await.unwrap();
        let mut random = random();
        for _ in 0..300 {
            let mut socket = TcpStream::connect(rig.server.tunnel).await.unwrap();
            let mut bytes = vec![0; random.usize(1..4000)];
            random.fill(&mut bytes);
            if random.bool() && bytes.len() > 5 {
                // The record of a ClientHello of so many bytes, to come further.
                let length = u16::try_from(bytes.len() - 5).unwrap().to_be_bytes();
                bytes[..5].copy_from_slice(&[22, 3, 1, length[0], length[1]]);
            }
            // The server may have hung up already.
            let _ = socket.write_all(&bytes).await;
            let _ = socket.shutdown().await;
            let _ = socket.read_to_end(&mut Vec::new()).await;
        }
        still_works(door, &rig).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_at_the_frontends_cost_their_own_connection() {
    for door in [Door::ConnectUnix, Door::GrpcUnix] {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let mut random = random();
            for round in 0..300 {
                let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
                let mut bytes = vec![0; random.usize(1..4000)];
                random.fill(&mut bytes);
                if round % 3 == 0 {
                    bytes.splice(..0, *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
                }
                if round % 3 == 1 {
                    bytes.splice(..0, *b"CONNECT 127.0.0.1:1 HTTP/1.1\r\n");
                }
                // The frontend may have hung up already.
                let _ = socket.write_all(&bytes).await;
                let _ = socket.shutdown().await;
                let _ = socket.read_to_end(&mut Vec::new()).await;
            }
            still_works(door, &rig).await;
        })
        .await;
    }
}

/// What the server says to an agent that begins like this.
async fn lost_after(rig: &Running, first: &[u8]) -> TunnelLost {
    let tunnel = agent::tunnel(rig).await;
    let (mut send, _recv) = tunnel.open().await.unwrap();
    send.write_chunk(Bytes::copy_from_slice(first)).await.unwrap();
    tunnel.closed().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_control_stream_ends_its_own_tunnel() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let hello = agent::hello("mad").encode().unwrap();
            let mut random = random();
            for round in 0..40 {
                let mut bytes = hello.to_vec();
                match round % 4 {
                    0 => bytes[0] = 0x10,                     // a dial's place is a data stream
                    1 => bytes[1] = 0xff,                     // longer than any frame
                    2 => bytes[2] = bytes[2].wrapping_sub(1), // shorter than its message
                    _ => {
                        bytes[0] = 0x02; // a welcome, of random bytes
                        let body = bytes.len() - 3;
                        random.fill(&mut bytes[3..3 + body]);
                    }
                }
                let lost = lost_after(&rig, &bytes).await;
                let label = lost.label();
                assert!(label == "protocol_violation", "round {round}: {lost}");
            }
            still_works(door, &rig).await;
            let scrape = rig.server.metrics.render(&rig.server.backends);
            let failures = "culvert_server_join_failures_total{reason=\"protocol_violation\"}";
            assert!(metric(&scrape, failures) > 39.5, "{scrape}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_answers_dials_with_nonsense_costs_those_dials() {
    for door in Door::GRPC_UNIX {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let (tunnel, _control) = agent::joined(&rig, "mad").await;
            rig.until_joined(1).await.unwrap();
            let mut random = random();
            for round in 0..100 {
                let answer = async {
                    let (mut send, recv) = tunnel.accept().await.unwrap();
                    let mut bytes = vec![0; random.usize(1..200)];
                    random.fill(&mut bytes);
                    // The kind of a reply or not, and a length that is a lie or not.
                    if round % 2 == 0 {
                        bytes[0] = 0x11;
                    }
                    send.write_chunk(bytes.into()).await.unwrap();
                    send.finish();
                    recv
                };
                let (dialed, _recv) = tokio::join!(door.dial(&rig, "127.0.0.1:9"), answer);
                let error = dialed.unwrap_err().to_string();
                assert!(error.contains("agent mad gave a malformed answer"), "{error}");
            }
            eventually("nothing is left", || {
                let scrape = rig.server.metrics.render(&rig.server.backends);
                metric(&scrape, "culvert_server_tunnel_open_streams{agent_id=\"mad\"}") < 0.5
            })
            .await;
        })
        .await;
    }
}

/// A server that sends nonsense at the head of a data stream loses that stream; the agent lives.
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_data_stream_costs_itself() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let fake = FakeServer::start(door, |_| {}).await;
            let (tunnel, _control, _hello) = fake.agent_joins().await;
            let mut random = random();
            for round in 0..200 {
                let (mut send, mut recv) = tunnel.open().await.unwrap();
                let mut bytes = vec![0; random.usize(3..300)];
                random.fill(&mut bytes);
                if round % 2 == 0 {
                    (bytes[0], bytes[1]) = (0x10, 0);
                }
                send.write_chunk(bytes.into()).await.unwrap();
                send.finish();
                let mut chunks = [Bytes::new()];
                recv.read_chunks(&mut chunks).await.unwrap_err();
            }
            // And an honest one still works.
            let echo = targets::echo().await.unwrap();
            let request = server::request(&echo.address().to_string());
            let (mut send, mut recv) = tunnel.open().await.unwrap();
            send.write_chunk(frame::encode(&request).unwrap()).await.unwrap();
            let reply: culvert_wire::dial::DialReply =
                recv.read_frame(4096).await.unwrap().message().unwrap();
            assert_eq!(reply.outcome, Ok(()));
        })
        .await;
    }
}
