//! FIN on one side is FIN on the other, and the other half stays open as long as it likes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use common::{noise, within};
use culvert_loadtest::{frontend::Door, targets};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn half_close_from_the_frontend_reaches_the_target_and_the_answer_comes_back() {
    for door in Door::WITH_HALF_CLOSE {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut records) = targets::recorder("the answer").await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            let sent = noise(1, 100_000);
            frontend.write(&sent).await.unwrap();
            frontend.finish().await.unwrap();
            let record = records.recv().await.unwrap();
            assert_eq!(record.end, Ok(()), "{door:?}");
            assert!(record.bytes == sent, "{door:?}");
            assert_eq!(frontend.read_to_end().await.unwrap(), b"the answer", "{door:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn half_close_from_the_target_reaches_the_frontend_and_more_can_be_sent() {
    for door in Door::WITH_HALF_CLOSE {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            let mut target = accepted.recv().await.unwrap();
            target.write_all(b"banner").await.unwrap();
            target.shutdown().await.unwrap();
            assert_eq!(frontend.read_to_end().await.unwrap(), b"banner", "{door:?}");
            let sent = noise(2, 100_000);
            frontend.write(&sent).await.unwrap();
            frontend.finish().await.unwrap();
            let mut got = Vec::new();
            target.read_to_end(&mut got).await.unwrap();
            assert!(got == sent, "{door:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn grpc_delivers_what_was_sent_before_the_targets_end_was_told() {
    for door in Door::GRPC {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            let mut target = accepted.recv().await.unwrap();
            let sent = noise(3, 500_000);
            frontend.write(&sent).await.unwrap();
            target.shutdown().await.unwrap();
            // CLOSE_RSP is full: the frontend leaves, and what it had sent must still arrive.
            assert_eq!(frontend.read_to_end().await.unwrap(), b"");
            frontend.close().await.unwrap();
            let mut got = Vec::new();
            target.read_to_end(&mut got).await.unwrap();
            assert!(got == sent, "{door:?}: {} of {}", got.len(), sent.len());
        })
        .await;
    }
}
