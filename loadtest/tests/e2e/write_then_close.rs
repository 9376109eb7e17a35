//! Bytes that were written before a close arrive, all of them.

use crate::support::{
    Carrier::{self, Quic, Tcp},
    noise, rig, within,
};
use culvert_loadtest::{
    frontend::FrontendKind::{self, ConnectTls, ConnectUnix, GrpcTls, GrpcUnix},
    targets,
};
use rstest::rstest;
use tokio::io::AsyncWriteExt;

const SIZES: [usize; 5] = [1, 1000, 65_536, 1 << 20, 16 << 20];

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn from_the_frontend_to_a_target_that_reads(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    let rig = rig(frontend, carrier).start().await.unwrap();
    let (target, mut records) = targets::recorder("").await.unwrap();
    for size in SIZES {
        within(async {
            let mut frontend = rig.dial(target.address()).await.unwrap();
            let sent = noise(size as u64, size);
            frontend.write(&sent).await.unwrap();
            frontend.close().await.unwrap();
            let record = records.recv().await.unwrap();
            assert_eq!(record.end, Ok(()), "{size} bytes");
            assert_eq!(record.bytes.len(), size);
            assert!(record.bytes == sent, "{size} bytes");
        })
        .await;
    }
}

/// The target echoes every byte and the client reads nothing, which must not hold up the target.
/// (A client on TCP would itself reset a connection that it closes with unread bytes.)
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn from_the_frontend_to_a_target_that_echoes(
    #[values(ConnectUnix, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        let target = accepted.recv().await.unwrap();
        let sent = noise(4, 1 << 20);
        let receive = async {
            let (mut reader, mut writer) = target.into_split();
            let mut got = 0;
            let mut buffer = vec![0; 65_536];
            loop {
                match tokio::io::AsyncReadExt::read(&mut reader, &mut buffer).await.unwrap() {
                    0 => return got,
                    count => got += count,
                }
                // Fails once the connection is closed.
                let _ = writer.write_all(&buffer).await;
            }
        };
        let send = async {
            frontend.write(&sent).await.unwrap();
            frontend.close().await.unwrap();
        };
        let ((), got) = tokio::join!(send, receive);
        assert_eq!(got, sent.len());
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn from_the_target_to_the_frontend(
    #[values(ConnectUnix, ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    let rig = rig(frontend, carrier).start().await.unwrap();
    let (target, mut accepted) = targets::handed_over().await.unwrap();
    for size in SIZES {
        within(async {
            let mut frontend = rig.dial(target.address()).await.unwrap();
            let mut target = accepted.recv().await.unwrap();
            let sent = noise(size as u64, size);
            let expected = sent.clone();
            let sending = culvert_transport::task::owned(async move {
                target.write_all(&sent).await.unwrap();
                drop(target);
            });
            let got = frontend.read_to_end().await.unwrap();
            assert_eq!(got.len(), size);
            assert!(got == expected, "{size} bytes");
            sending.await.unwrap();
        })
        .await;
    }
}
