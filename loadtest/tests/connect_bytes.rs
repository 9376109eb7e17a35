//! The HTTP CONNECT frontend, byte by byte. Tests that reach an agent do so over each carrier.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::time::Duration;

use common::{eventually, metric, within};
use culvert_loadtest::{
    frontend::{self, Door, connect::ESTABLISHED},
    rig::Running,
    targets,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// Everything that comes back for these bytes.
async fn answer(rig: &Running, request: &[u8]) -> String {
    let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
    socket.write_all(request).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_request_may_come_byte_by_byte_and_bring_early_data() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
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
}

#[tokio::test]
async fn other_methods_get_405_as_konnectivity_words_it() {
    within(async {
        let rig = Door::ConnectUnix.rig().start().await.unwrap();
        let answer = answer(&rig, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"), "{answer}");
        assert!(answer.contains("X-Content-Type-Options: nosniff\r\n"), "{answer}");
        assert!(answer.ends_with("\r\n\r\nthis proxy only supports CONNECT passthrough\n"));
    })
    .await;
}

#[tokio::test]
async fn what_is_no_request_gets_400_and_costs_its_own_connection() {
    within(async {
        let rig = Door::ConnectUnix.rig().start().await.unwrap();
        let endless = vec![b'x'; 64 * 1024];
        for request in [&b"\x16\x03\x01\x00\x05hello\r\n\r\n"[..], b"\r\n\r\n\r\n\r\n"] {
            let answer = answer(&rig, request).await;
            assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer:?}");
        }
        // A head without an end is refused once it is too long; its writer may see a broken pipe.
        let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
        let _ = socket.write_all(&endless).await;
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer).await;
        assert!(answer.starts_with(b"HTTP/1.1 400 Bad Request\r\n"));
        let echo = targets::echo().await.unwrap();
        Door::ConnectUnix.dial(&rig, echo.address()).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_name_and_an_ipv6_address_are_targets_too() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let echo = targets::echo().await.unwrap();
            let port = echo.address().port();
            door.dial(&rig, format!("localhost:{port}")).await.unwrap();
            door.dial(&rig, format!("[::ffff:127.0.0.1]:{port}")).await.unwrap();
        })
        .await;
    }
}

#[tokio::test]
async fn a_frontend_without_a_client_certificate_is_refused() {
    within(async {
        for door in [Door::ConnectTls, Door::GrpcTls] {
            let rig = door.rig().start().await.unwrap();
            frontend::tls_without_certificate(&rig).await.unwrap_err();
            let echo = targets::echo().await.unwrap();
            door.dial(&rig, echo.address()).await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn an_idle_connection_costs_nothing_but_its_place() {
    within(async {
        let rig = Door::ConnectUnix.rig().start().await.unwrap();
        let sockets: Vec<_> = {
            let mut sockets = Vec::new();
            for _ in 0..100 {
                sockets.push(UnixStream::connect(rig.uds()).await.unwrap());
            }
            sockets
        };
        let gauge = "konnectivity_network_proxy_server_http_connections";
        let open = |rig: &Running| metric(&rig.server.metrics.render(&rig.server.backends), gauge);
        eventually("all are counted", || open(&rig) > 99.5).await;
        drop(sockets);
        eventually("none is left", || open(&rig) < 0.5).await;
        assert!(rig.server.metrics.meter.to_tunnel() == 0);
    })
    .await;
}

#[tokio::test]
async fn a_frontend_that_says_nothing_is_let_go() {
    within(async {
        let rig = Door::ConnectUnix.rig().header_timeout(Duration::from_millis(100));
        let rig = rig.start().await.unwrap();
        let mut socket = UnixStream::connect(rig.uds()).await.unwrap();
        socket.write_all(b"CONNECT 127.0").await.unwrap();
        assert_eq!(socket.read(&mut [0]).await.unwrap(), 0);
    })
    .await;
}
