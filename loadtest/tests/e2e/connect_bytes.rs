//! The HTTP CONNECT frontend, byte by byte.

use crate::support::{
    Carrier::{self, Quic, Tcp},
    eventually, rig, within,
};
use culvert_loadtest::{
    frontend::{
        self,
        FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls},
        connect::ESTABLISHED,
    },
    rig::Running,
    targets,
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// The whole answer to these bytes.
async fn answer(rig: &Running, request: &[u8]) -> String {
    let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
    socket.write_all(request).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

#[rstest]
#[tokio::test]
async fn a_request_may_come_byte_by_byte_and_bring_early_data(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
        let request = format!("CONNECT {} HTTP/1.0\r\n\r\nearly", echo.address());
        for byte in request.bytes() {
            socket.write_all(&[byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        socket.write_all(b" and late").await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, format!("{ESTABLISHED}early and late"));
    })
    .await;
}

#[tokio::test]
async fn other_methods_get_405_with_konnectivitys_text() {
    within(async {
        let rig = rig(ConnectUnix, Quic).start().await.unwrap();
        let answer = answer(&rig, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{answer}");
        assert!(answer.contains("X-Content-Type-Options: nosniff\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nthis proxy only supports CONNECT passthrough\n"));
    })
    .await;
}

#[tokio::test]
async fn bytes_that_are_no_request_get_400_and_end_their_own_connection_only() {
    within(async {
        let rig = rig(ConnectUnix, Quic).start().await.unwrap();
        let endless = vec![b'x'; 64 * 1024];
        for request in [&b"\x16\x03\x01\x00\x05hello\r\n\r\n"[..], b"\r\n\r\n\r\n\r\n"] {
            let answer = answer(&rig, request).await;
            assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer:?}");
        }
        // A head without an end is refused when it is too long; its writer may see a broken pipe.
        let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
        let _ = socket.write_all(&endless).await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        assert!(answer.starts_with(b"HTTP/1.1 400 Bad Request\r\n"));
        let echo = targets::echo().await.unwrap();
        rig.dial(echo.address()).await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_name_and_an_ipv6_address_are_targets_too(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let echo = targets::echo().await.unwrap();
        let port = echo.address().port();
        rig.dial(format!("localhost:{port}")).await.unwrap();
        rig.dial(format!("[::ffff:127.0.0.1]:{port}")).await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_frontend_without_a_client_certificate_is_refused(
    #[values(ConnectTls, GrpcTls)] frontend: FrontendKind,
) {
    within(async {
        let rig = rig(frontend, Quic).start().await.unwrap();
        frontend::tls_without_certificate(&rig).await.unwrap_err();
        let echo = targets::echo().await.unwrap();
        rig.dial(echo.address()).await.unwrap();
    })
    .await;
}

/// A connection is counted, and nothing of it reaches an agent before its request.
#[tokio::test]
async fn an_idle_connection_is_counted_and_opens_no_stream() {
    within(async {
        let rig = rig(ConnectUnix, Quic).start().await.unwrap();
        let mut sockets = Vec::new();
        for _ in 0..100 {
            sockets.push(UnixStream::connect(rig.uds()).await.unwrap());
        }
        let open = || rig.server.metric("konnectivity_network_proxy_server_http_connections");
        eventually("all are counted", async || open() == 100.0).await;
        assert_eq!(rig.server.open_streams("agent-0"), 0.0);
        assert_eq!(rig.server.pending_dials(), 0.0);
        // The 101st is served meanwhile, and its stream is counted.
        let echo = targets::echo().await.unwrap();
        let _used = rig.dial(echo.address()).await.unwrap();
        assert_eq!(rig.server.open_streams("agent-0"), 1.0);
        drop(sockets);
        eventually("one is left", async || open() == 1.0).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_does_not_finish_its_request_is_disconnected() {
    within(async {
        let rig = rig(ConnectUnix, Quic).server_flag("--frontend-header-timeout=100ms");
        let rig = rig.start().await.unwrap();
        let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
        socket.write_all(b"CONNECT 127.0").await.unwrap();
        assert_eq!(socket.read(&mut [0]).await.unwrap(), 0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_client_is_permitted_by_a_name_of_its_certificate(
    #[values(ConnectTls, GrpcTls)] frontend: FrontendKind,
) {
    within(async {
        let echo = targets::echo().await.unwrap();
        for (names, permitted) in [("kube-apiserver", false), ("x,culvert loadtest frontend", true)]
        {
            let flag = format!("--server-client-names={names}");
            let rig = rig(frontend, Quic).server_flag(flag).start().await.unwrap();
            assert_eq!(rig.dial(echo.address()).await.is_ok(), permitted, "{names}");
            let refused =
                rig.server.metric("culvert_server_frontends_refused_total{reason=\"client_name\"}");
            assert_eq!(refused, f64::from(u8::from(!permitted)), "{names}");
        }
    })
    .await;
}
