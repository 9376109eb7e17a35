//! What was written and then closed arrives, every byte of it, however large.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{noise, within};
use culvert_loadtest::{frontend::Door, targets};
use tokio::io::AsyncWriteExt;

const SIZES: [usize; 5] = [1, 1000, 65_536, 1 << 20, 16 << 20];

#[tokio::test(flavor = "multi_thread")]
async fn from_the_frontend_to_a_target_that_reads() {
    for door in Door::ALL {
        let rig = door.rig().start().await.unwrap();
        let (target, mut records) = targets::recorder("").await.unwrap();
        for size in SIZES {
            within(async {
                let mut frontend = door.dial(&rig, target.address()).await.unwrap();
                let sent = noise(size as u64, size);
                frontend.write(&sent).await.unwrap();
                frontend.close().await.unwrap();
                let record = records.recv().await.unwrap();
                assert_eq!(record.end, Ok(()), "{door:?}, {size} bytes");
                assert_eq!(record.bytes.len(), size, "{door:?}");
                assert!(record.bytes == sent, "{door:?}, {size} bytes");
            })
            .await;
        }
    }
}

/// The target answers every byte, and nobody reads the answer: it must not be held up by that.
/// (A frontend on TCP would itself reset a connection that it closes with bytes unread.)
#[tokio::test(flavor = "multi_thread")]
async fn from_the_frontend_to_a_target_that_talks_back() {
    for door in Door::CONNECT_UNIX.into_iter().chain(Door::GRPC) {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
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
                    // Refused once everything has arrived and the connection is closed.
                    let _ = writer.write_all(&buffer).await;
                }
            };
            let send = async {
                frontend.write(&sent).await.unwrap();
                frontend.close().await.unwrap();
            };
            let ((), got) = tokio::join!(send, receive);
            assert_eq!(got, sent.len(), "{door:?}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_the_target_to_the_frontend() {
    for door in Door::ALL {
        let rig = door.rig().start().await.unwrap();
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        for size in SIZES {
            within(async {
                let mut frontend = door.dial(&rig, target.address()).await.unwrap();
                let mut target = accepted.recv().await.unwrap();
                let sent = noise(size as u64, size);
                let expected = sent.clone();
                let sending = tokio::spawn(async move {
                    target.write_all(&sent).await.unwrap();
                    drop(target);
                });
                let got = frontend.read_to_end().await.unwrap();
                assert_eq!(got.len(), size, "{door:?}");
                assert!(got == expected, "{door:?}, {size} bytes");
                sending.await.unwrap();
            })
            .await;
        }
    }
}
