//! The gRPC frontend, packet by packet: it answers as Konnectivity does.

use culvert_konnectivity::packet::{CloseDial, Packet, PacketType, Payload};
use culvert_loadtest::{
    frontend::{
        FrontendKind::GrpcUnix,
        proxy::{Client, ProxyStream, close_request, data, dial_request},
    },
    rig::Running,
    targets,
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    agent, eventually, noise, rig, within,
};

async fn client(rig: &Running) -> Client {
    Client::connect(UnixStream::connect(rig.uds()).await.unwrap()).await.unwrap()
}

async fn stream(rig: &Running) -> (Client, ProxyStream) {
    let client = client(rig).await;
    let stream = client.proxy().await.unwrap();
    (client, stream)
}

/// The connection id of a dial's answer, or its error.
fn dial_response(packet: Option<Packet>, random: i64) -> Result<i64, String> {
    match packet.and_then(|packet| packet.payload) {
        Some(Payload::DialResponse(response)) if response.random == random => {
            match response.error.as_str() {
                "" => Ok(response.connect_id),
                error => Err(error.to_owned()),
            }
        }
        other => panic!("no answer to dial {random}: {other:?}"),
    }
}

async fn dialed(stream: &mut ProxyStream, random: i64, target: &targets::Target) -> i64 {
    stream.send(dial_request(random, &target.address().to_string())).await.unwrap();
    dial_response(stream.next().await.unwrap(), random).unwrap()
}

#[tokio::test]
async fn data_before_a_dial_is_answered_and_the_rest_ignored() {
    within(async {
        let rig = rig(GrpcUnix, Quic).start().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        stream.send(data(5, "too early")).await.unwrap();
        let answer = stream.next().await.unwrap().unwrap();
        assert_eq!(answer, Packet::close_response(5, "backend not initialized"));
        stream.send(dial_request(1, "127.0.0.1:9")).await.unwrap();
        assert_eq!(stream.half_close().await.unwrap(), []);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_close_before_a_dial_is_answered_and_a_dial_may_follow(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        stream.send(close_request(9)).await.unwrap();
        let answer = stream.next().await.unwrap().unwrap();
        assert_eq!(answer, Packet::close_response(9, "backend uninitialized"));
        assert!(dialed(&mut stream, 2, &echo).await >= 1);
    })
    .await;
}

#[tokio::test]
async fn a_failed_dial_does_not_end_the_stream() {
    within(async {
        let rig = rig(GrpcUnix, Quic)
            .agents(0)
            .server_flag("--backend-dial-timeout=300ms")
            .start()
            .await
            .unwrap();
        let (_client, mut stream) = stream(&rig).await;
        stream.send(dial_request(3, "127.0.0.1:9")).await.unwrap();
        let answer = dial_response(stream.next().await.unwrap(), 3);
        assert!(answer.unwrap_err().starts_with("No agent available: "));
        assert_eq!(stream.half_close().await.unwrap(), []);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn the_id_of_another_connection_ends_both(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        let id = dialed(&mut stream, 4, &target).await;
        let mut socket = accepted.recv().await.unwrap();
        stream.send(data(id, "x")).await.unwrap();
        assert_eq!(socket.read_u8().await.unwrap(), b'x');
        stream.send(data(id + 1000, "y")).await.unwrap();
        let text = "mismatched connection IDs";
        let answers = [stream.next().await.unwrap(), stream.next().await.unwrap()];
        let expected = [id + 1000, id].map(|id| Some(Packet::close_response(id, text)));
        assert_eq!(answers, expected);
        socket.read_u8().await.unwrap_err();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_unknown_id_is_answered_and_the_right_one_after_it_is_a_mismatch(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        let id = dialed(&mut stream, 5, &echo).await;
        stream.send(data(0, "without an id, dropped")).await.unwrap();
        stream.send(data(id + 7, "wrong")).await.unwrap();
        let answer = stream.next().await.unwrap().unwrap();
        assert_eq!(answer, Packet::close_response(id + 7, "unrecognized connectID"));
        stream.send(data(id, "right, too late")).await.unwrap();
        for id in [id, id + 7] {
            let answer = stream.next().await.unwrap().unwrap();
            assert_eq!(answer, Packet::close_response(id, "mismatched connection IDs"));
        }
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_close_with_an_unknown_id_is_answered_and_ends_the_stream(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        let id = dialed(&mut stream, 6, &target).await;
        let mut socket = accepted.recv().await.unwrap();
        stream.send(close_request(id + 1)).await.unwrap();
        let answer = stream.next().await.unwrap().unwrap();
        assert_eq!(answer, Packet::close_response(id + 1, "Unknown connectID"));
        assert_eq!(socket.read(&mut [0]).await.unwrap(), 0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_second_dial_on_a_stream_is_refused_and_the_first_goes_on(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        let id = dialed(&mut stream, 7, &echo).await;
        stream.send(dial_request(8, &echo.address().to_string())).await.unwrap();
        let answer = dial_response(stream.next().await.unwrap(), 8);
        assert_eq!(answer, Err("this stream carries another connection".into()));
        stream.send(data(id, "still here")).await.unwrap();
        let answer = stream.next().await.unwrap().unwrap();
        assert_eq!(answer, Packet::data(id, "still here".into()));
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_cancelled_dial_is_given_up_and_another_may_follow(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(GrpcUnix, carrier).agents(0).start().await.unwrap();
        let (tunnel, _control) = agent::joined(&rig, "silent").await;
        rig.until_joined(1).await.unwrap();
        let (_client, stream) = stream(&rig).await;
        for random in [1, 2] {
            stream.send(dial_request(random, "127.0.0.1:9")).await.unwrap();
            let (send, mut recv) = tunnel.accept().await.unwrap();
            recv.read_frame(4096).await.unwrap();
            let close = Payload::CloseDial(CloseDial { random });
            let cancel = Packet { r#type: PacketType::DialCls.into(), payload: Some(close) };
            stream.send(cancel).await.unwrap();
            recv.failed().await;
            send.stopped().await.unwrap().unwrap();
        }
        assert_eq!(rig.server.dial_failures("frontend_close"), 2.0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn packets_of_unknown_types_are_ignored(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        stream.send(Packet { r#type: 99, payload: None }).await.unwrap();
        let id = dialed(&mut stream, 1, &echo).await;
        stream.send(Packet { r#type: 6, payload: None }).await.unwrap();
        stream.send(data(id, "")).await.unwrap();
        stream.send(data(id, "x")).await.unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap(), Packet::data(id, "x".into()));
    })
    .await;
}

#[tokio::test]
async fn only_tcp_is_carried() {
    within(async {
        let rig = rig(GrpcUnix, Quic).start().await.unwrap();
        for protocol in ["unix", "udp", ""] {
            let (_client, mut stream) = stream(&rig).await;
            let mut request = dial_request(1, "/run/containerd/containerd.sock");
            if let Some(Payload::DialRequest(dial)) = &mut request.payload {
                dial.protocol = protocol.into();
            }
            stream.send(request).await.unwrap();
            let answer = dial_response(stream.next().await.unwrap(), 1);
            assert_eq!(answer, Err(format!("dial {protocol}: unknown network {protocol}")));
        }
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn one_connection_carries_many_proxy_streams(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let client = client(&rig).await;
        let mut streams = Vec::new();
        for random in 0..200 {
            let mut stream = client.proxy().await.unwrap();
            let id = dialed(&mut stream, random, &echo).await;
            streams.push((stream, id));
        }
        for (stream, id) in &streams {
            stream.send(data(*id, format!("hello {id}"))).await.unwrap();
        }
        for (stream, id) in &mut streams {
            let answer = stream.next().await.unwrap().unwrap();
            assert_eq!(answer, Packet::data(*id, format!("hello {id}").into()));
        }
        drop(streams);
        eventually("no stream is left", async || {
            let name = "konnectivity_network_proxy_server_grpc_connections";
            rig.server.metric(&format!("{name}{{service_method=\"Proxy\"}}")) == 0.0
        })
        .await;
    })
    .await;
}

/// grpc-go sends one write as one packet, up to its own limit.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_packet_of_4_mib_is_accepted_and_none_as_large_is_sent(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        let id = dialed(&mut stream, 1, &echo).await;
        let sent = noise(8, 4 << 20);
        stream.send(data(id, sent.clone())).await.unwrap();
        let mut got = Vec::new();
        while got.len() < sent.len() {
            match stream.next().await.unwrap().unwrap().payload {
                Some(Payload::Data(data)) => {
                    assert!(data.data.len() <= 64 << 10, "{}", data.data.len());
                    got.extend_from_slice(&data.data);
                }
                other => panic!("{other:?}"),
            }
        }
        assert!(got == sent);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn the_end_of_a_target_closes_the_connection(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(GrpcUnix, carrier).start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let (_client, mut stream) = stream(&rig).await;
        let id = dialed(&mut stream, 1, &target).await;
        let mut socket = accepted.recv().await.unwrap();
        socket.write_all(b"last words").await.unwrap();
        drop(socket);
        assert_eq!(stream.next().await.unwrap().unwrap(), Packet::data(id, "last words".into()));
        assert_eq!(stream.next().await.unwrap().unwrap(), Packet::close_response(id, ""));
    })
    .await;
}

#[tokio::test]
async fn another_method_is_unimplemented() {
    within(async {
        let rig = rig(GrpcUnix, Quic).start().await.unwrap();
        let client = client(&rig).await;
        let error = client.call("/AgentService/Connect").await.unwrap_err().to_string();
        assert!(error.contains("unknown method /AgentService/Connect"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_client_that_does_not_request_a_dial_is_disconnected() {
    within(async {
        let rig = rig(GrpcUnix, Quic).server_flag("--frontend-header-timeout=100ms");
        let rig = rig.start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        // Without a request, and without a packet in one.
        let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
        let (_client, mut silent) = stream(&rig).await;
        socket.read_to_end(&mut Vec::new()).await.unwrap();
        assert!(!matches!(silent.next().await, Ok(Some(_))));
        // A stream beside another that has dialed.
        let (client, mut used) = stream(&rig).await;
        let id = dialed(&mut used, 1, &echo).await;
        let mut silent = client.proxy().await.unwrap();
        assert!(!matches!(silent.next().await, Ok(Some(_))));
        used.send(data(id, "still open")).await.unwrap();
        let Some(Payload::Data(echoed)) = used.next().await.unwrap().unwrap().payload else {
            panic!("no echo")
        };
        assert_eq!(echoed.data, "still open");
    })
    .await;
}
