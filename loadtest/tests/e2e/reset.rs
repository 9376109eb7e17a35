//! A reset is a reset on the other side too, never a clean end.

use std::io;

use crate::support::{
    Carrier::{self, Quic, Tcp},
    connected, within,
};
use culvert_loadtest::{
    frontend::{
        Connection,
        FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
    },
    rig::Running,
    targets,
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// A connection over which one byte has passed each way.
async fn connect(frontend: FrontendKind, carrier: Carrier) -> (Running, Connection, TcpStream) {
    let (rig, mut frontend, mut target) = connected(frontend, carrier).await;
    frontend.write(b"?").await.unwrap();
    assert_eq!(target.read_u8().await.unwrap(), b'?');
    target.write_all(b"!").await.unwrap();
    assert_eq!(frontend.read_count(1).await.unwrap(), b"!");
    (rig, frontend, target)
}

#[rstest]
#[tokio::test]
async fn reset_by_the_target_is_a_reset_at_the_frontend(
    #[values(ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, mut frontend, target) = connect(frontend, carrier).await;
        targets::reset(target);
        let error = frontend.read_to_end().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn reset_by_the_target_ends_a_frontend_on_a_unix_socket(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, mut frontend, target) = connect(ConnectUnix, carrier).await;
        targets::reset(target);
        assert_eq!(frontend.read_to_end().await.unwrap(), b"");
        // Both directions are over, as after a reset and unlike after a FIN.
        let error = frontend.write(b"more").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn reset_by_the_frontend_is_a_reset_at_the_target(
    #[values(ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, frontend, mut target) = connect(frontend, carrier).await;
        frontend.abort();
        let error = target.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn reset_reaches_a_frontend_that_has_stopped_reading(
    #[values(ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, mut frontend, mut target) = connect(frontend, carrier).await;
        // Fills every buffer, so that the agent itself is blocked in a write.
        let chunk = vec![0; 65_536];
        while let Ok(written) =
            tokio::time::timeout(std::time::Duration::from_millis(300), target.write(&chunk)).await
        {
            written.unwrap();
        }
        targets::reset(target);
        let mut read = Vec::new();
        let error = loop {
            match frontend.read(&mut read).await {
                Ok(0) => panic!("a clean end after {} bytes", read.len()),
                Ok(_) => read.clear(),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
    })
    .await;
}

/// The target has closed and the client only writes: its write has to fail.
#[rstest]
#[tokio::test]
async fn a_target_that_closed_stops_a_frontend_that_writes_on(
    #[values(ConnectUnix, ConnectTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, mut frontend, target) = connect(frontend, carrier).await;
        drop(target);
        let chunk = vec![0; 65_536];
        while frontend.write(&chunk).await.is_ok() {}
    })
    .await;
}

/// `kubectl logs -f` of a silent container, ended by Ctrl-C: the connection to the target ends.
#[rstest]
#[tokio::test]
async fn a_frontend_that_closed_ends_an_idle_target(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, frontend, mut target) = connect(frontend, carrier).await;
        frontend.close().await.unwrap();
        assert_eq!(target.read(&mut [0]).await.unwrap(), 0);
        // The client does not read any more.
        while target.write_all(b"another line\n").await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
