//! Malformed bytes end their own stream, connection or tunnel, and nothing else.

use std::time::Duration;

use bytes::Bytes;
use culvert_loadtest::{
    frontend::FrontendKind::{self, ConnectUnix, GrpcUnix},
    rig::Running,
    targets,
};
use culvert_transport::TunnelLost;
use culvert_wire::frame;
use rstest::rstest;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket, UnixStream},
    time::timeout,
};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    agent, echo, eventually, rig,
    server::{self, FakeServer},
    within,
};

const SEED: u64 = 20_260_823;
/// Time for the server to end a connection. It gives a client 10 s for a request or a handshake.
const PATIENCE: Duration = Duration::from_secs(60);

fn random() -> fastrand::Rng {
    println!("seed {SEED}");
    fastrand::Rng::with_seed(SEED)
}

/// Dials a target and uses the connection.
async fn use_once(rig: &Running) {
    let target = targets::echo().await.unwrap();
    let mut frontend = rig.dial(target.address()).await.unwrap();
    echo(&mut frontend, b"still here").await.unwrap();
}

/// Waits for the end of a connection, whose peer has hung up or reset it, and returns what was
/// read.
async fn read_to_the_end(mut socket: impl AsyncRead + Unpin) -> Vec<u8> {
    let mut read = Vec::new();
    let end = timeout(PATIENCE, socket.read_to_end(&mut read)).await;
    // A reset is an end too.
    let _ = end.expect("the connection does not end");
    read
}

#[tokio::test(flavor = "multi_thread")]
async fn random_datagrams_to_the_tunnel_port_are_dropped() {
    within(async {
        let rig = rig(ConnectUnix, Quic).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut open = rig.dial(target.address()).await.unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut random = random();
        for _ in 0..20_000 {
            let mut datagram = vec![0; random.usize(0..1500)];
            random.fill(&mut datagram);
            if random.bool() && datagram.len() > 5 {
                // A QUIC long header of version 1, which is parsed further.
                datagram[..5].copy_from_slice(&[0xc0 | random.u8(0..0x40), 0, 0, 0, 1]);
            }
            // The kernel's queue may be full.
            let _ = socket.send_to(&datagram, rig.server.tunnel).await;
        }
        echo(&mut open, b"undisturbed").await.unwrap();
        use_once(&rig).await;
        assert_eq!(rig.server.tunnels(Quic), 1);
    })
    .await;
}

/// The same port over TCP: every connection ends, and none becomes a tunnel.
#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_to_the_tunnel_port_end_their_own_connection() {
    within(async {
        let rig = rig(ConnectUnix, Tcp).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut open = rig.dial(target.address()).await.unwrap();
        let mut random = random();
        for _ in 0..300 {
            let mut socket = TcpStream::connect(rig.server.tunnel).await.unwrap();
            let mut bytes = vec![0; random.usize(1..4000)];
            random.fill(&mut bytes);
            if random.bool() && bytes.len() > 5 {
                // The record of a ClientHello of this length, which is parsed further.
                let length = u16::try_from(bytes.len() - 5).unwrap().to_be_bytes();
                bytes[..5].copy_from_slice(&[22, 3, 1, length[0], length[1]]);
            }
            // The server may have hung up already.
            let _ = socket.write_all(&bytes).await;
            let _ = socket.shutdown().await;
            read_to_the_end(socket).await;
        }
        echo(&mut open, b"undisturbed").await.unwrap();
        use_once(&rig).await;
        assert_eq!(rig.server.tunnels(Tcp), 1);
    })
    .await;
}

/// Every connection ends, no request is taken from it, and no connection is left.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn random_bytes_to_a_frontend_end_their_own_connection(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
) {
    const CONNECT_ERROR: &[u8] = b"HTTP/1.1 400 Bad Request\r\n";
    within(async {
        let rig = rig(frontend, Quic).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut open = rig.dial(target.address()).await.unwrap();
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
            let answer = read_to_the_end(socket).await;
            if frontend == ConnectUnix && !answer.is_empty() {
                assert!(answer.starts_with(CONNECT_ERROR), "{}", answer.escape_ascii());
            }
        }
        echo(&mut open, b"undisturbed").await.unwrap();
        use_once(&rig).await;
        drop(open);
        eventually("no connection is left", async || {
            rig.server.metric("konnectivity_network_proxy_server_http_connections") == 0.0
                && rig.server.established() == 0.0
                && rig.server.pending_dials() == 0.0
        })
        .await;
    })
    .await;
}

/// Why the server closes a tunnel whose control stream begins like this.
async fn lost_after(rig: &Running, first: &[u8]) -> TunnelLost {
    let tunnel = agent::tunnel(rig).await;
    let (mut send, _recv) = tunnel.open().await.unwrap();
    send.write_chunk(Bytes::copy_from_slice(first)).await.unwrap();
    tunnel.closed().await
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_control_stream_ends_its_own_tunnel(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let hello = agent::hello("mad").encode().unwrap();
        let mut random = random();
        for round in 0..40 {
            let mut bytes = hello.to_vec();
            match round % 4 {
                0 => bytes[0] = 0x10, // a dial, which belongs on a data stream
                1 => bytes[1] = 0xff, // longer than any frame
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
        use_once(&rig).await;
        let failures = "culvert_server_join_failures_total{reason=\"protocol_violation\"}";
        assert_eq!(rig.server.metric(failures), 40.0);
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_answer_fails_its_dial(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(GrpcUnix, carrier).agents(0).start().await.unwrap();
        let (tunnel, _control) = agent::joined(&rig, "mad").await;
        rig.until_joined(1).await.unwrap();
        let mut random = random();
        for round in 0..100 {
            let answer = async {
                let (mut send, recv) = tunnel.accept().await.unwrap();
                let mut bytes = vec![0; random.usize(1..200)];
                random.fill(&mut bytes);
                // Half have the kind of a reply; the length is random.
                if round % 2 == 0 {
                    bytes[0] = 0x11;
                }
                send.write_chunk(bytes.into()).await.unwrap();
                send.finish();
                recv
            };
            let (dialed, _recv) = tokio::join!(rig.dial("127.0.0.1:9"), answer);
            let error = dialed.unwrap_err().to_string();
            assert!(error.contains("agent mad gave a malformed answer"), "{error}");
        }
        eventually("nothing is left", async || rig.server.open_streams("mad") == 0.0).await;
    })
    .await;
}

/// Random bytes at the start of a data stream reset that stream; the agent goes on.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_data_stream_is_reset(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let fake = FakeServer::start(carrier, |_| {}).await;
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
        // A valid request still works.
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
