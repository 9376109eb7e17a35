//! A reset is a reset on the other side too, never a clean end.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io;

use common::within;
use culvert_loadtest::{
    frontend::{Connection, Door},
    rig::Running,
    targets,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
};

/// A connection through `door` over which one byte has passed each way.
async fn connect(
    door: Door,
    rig: &Running,
    target: &targets::Target,
    accepted: &mut mpsc::UnboundedReceiver<TcpStream>,
) -> (Connection, TcpStream) {
    let mut frontend = door.dial(rig, target.address()).await.unwrap();
    let mut target = accepted.recv().await.unwrap();
    frontend.write(b"?").await.unwrap();
    assert_eq!(target.read_u8().await.unwrap(), b'?');
    target.write_all(b"!").await.unwrap();
    assert_eq!(frontend.read_count(1).await.unwrap(), b"!");
    (frontend, target)
}

#[tokio::test]
async fn reset_by_the_target_is_a_reset_at_the_frontend() {
    for door in Door::WITH_RESET {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (mut frontend, socket) = connect(door, &rig, &target, &mut accepted).await;
            targets::reset(socket);
            let error = frontend.read_to_end().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{door:?}: {error}");
        })
        .await;
    }
}

#[tokio::test]
async fn reset_by_the_target_ends_a_frontend_on_a_unix_socket() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (mut frontend, socket) = connect(door, &rig, &target, &mut accepted).await;
            targets::reset(socket);
            assert_eq!(frontend.read_to_end().await.unwrap(), b"");
            // Both directions are over, as after a reset and unlike after an end.
            let error = frontend.write(b"more").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        })
        .await;
    }
}

#[tokio::test]
async fn reset_by_the_frontend_is_a_reset_at_the_target() {
    for door in Door::WITH_RESET {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (frontend, mut socket) = connect(door, &rig, &target, &mut accepted).await;
            frontend.abort();
            let error = socket.read_u8().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{door:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn reset_reaches_a_frontend_that_has_stopped_reading() {
    for door in Door::WITH_RESET {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (mut frontend, mut socket) = connect(door, &rig, &target, &mut accepted).await;
            // Fill every buffer on the way, so that the agent itself is blocked in writing.
            let chunk = vec![0; 65_536];
            while let Ok(written) =
                tokio::time::timeout(std::time::Duration::from_millis(300), socket.write(&chunk))
                    .await
            {
                written.unwrap();
            }
            targets::reset(socket);
            let mut read = Vec::new();
            let error = loop {
                match frontend.read(&mut read).await {
                    Ok(0) => panic!("{door:?}: a clean end after {} bytes", read.len()),
                    Ok(_) => read.clear(),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{door:?}: {error}");
        })
        .await;
    }
}

/// The target is gone for good and the frontend writes on: it must learn of it, though it
/// reads nothing.
#[tokio::test]
async fn a_target_that_closed_stops_a_frontend_that_writes_on() {
    for door in Door::WITH_HALF_CLOSE {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (mut frontend, socket) = connect(door, &rig, &target, &mut accepted).await;
            drop(socket);
            let chunk = vec![0; 65_536];
            while frontend.write(&chunk).await.is_ok() {}
        })
        .await;
    }
}

/// `kubectl logs -f` of a silent container, ended by Ctrl-C: the target must not be kept.
#[tokio::test]
async fn a_frontend_that_closed_ends_an_idle_target() {
    for door in Door::ALL {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (frontend, mut socket) = connect(door, &rig, &target, &mut accepted).await;
            frontend.close().await.unwrap();
            assert_eq!(socket.read(&mut [0]).await.unwrap(), 0, "{door:?}");
            // Nobody reads any more.
            while socket.write_all(b"another line\n").await.is_ok() {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}
