//! A FIN on one side is a FIN on the other; the other half stays open.

use crate::support::{
    Carrier::{self, Quic, Tcp},
    connected, noise, rig, within,
};
use culvert_loadtest::{
    frontend::FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
    targets,
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

async fn assert_received(mut target: TcpStream, sent: &[u8]) {
    let mut got = Vec::new();
    target.read_to_end(&mut got).await.unwrap();
    assert!(got == sent, "{} of {}", got.len(), sent.len());
}

#[rstest]
#[tokio::test]
async fn half_close_from_the_frontend_reaches_the_target_and_the_answer_comes_back(
    #[values(ConnectUnix, ConnectTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let (target, mut records) = targets::recorder("the answer").await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        let sent = noise(1, 100_000);
        frontend.write(&sent).await.unwrap();
        frontend.finish().await.unwrap();
        let record = records.recv().await.unwrap();
        assert_eq!(record.end, Ok(()));
        assert!(record.bytes == sent);
        assert_eq!(frontend.read_to_end().await.unwrap(), b"the answer");
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn half_close_from_the_target_reaches_the_frontend_and_more_can_be_sent(
    #[values(ConnectUnix, ConnectTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, mut frontend, mut target) = connected(frontend, carrier).await;
        target.write_all(b"banner").await.unwrap();
        target.shutdown().await.unwrap();
        assert_eq!(frontend.read_to_end().await.unwrap(), b"banner");
        let sent = noise(2, 100_000);
        frontend.write(&sent).await.unwrap();
        frontend.finish().await.unwrap();
        assert_received(target, &sent).await;
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn grpc_delivers_bytes_that_were_sent_before_the_targets_end(
    #[values(GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let (_rig, mut frontend, mut target) = connected(frontend, carrier).await;
        let sent = noise(3, 500_000);
        frontend.write(&sent).await.unwrap();
        target.shutdown().await.unwrap();
        // CLOSE_RSP ends both directions: the frontend closes, and the bytes that it sent arrive.
        assert_eq!(frontend.read_to_end().await.unwrap(), b"");
        frontend.close().await.unwrap();
        assert_received(target, &sent).await;
    })
    .await;
}
