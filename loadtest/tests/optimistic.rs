//! Dials that are answered before the agent has answered.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::io;

use bytes::Bytes;
use culvert_loadtest::{
    frontend::{Connection, Door, connect::ConnectError},
    rig::Running,
};
use culvert_transport::{RecvHalf, SendHalf, Tunnel, control::ControlStream};
use culvert_wire::{
    dial::{DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message},
};

use common::{agent, metric, within};

const TARGET: &str = "10.0.0.9:10250";

/// A server, and an agent of which the test says when it answers.
struct Stage {
    rig: Running,
    tunnel: Tunnel,
    _control: ControlStream,
}

impl Stage {
    async fn new(door: Door, optimistic: bool) -> Self {
        let rig = if optimistic { door.rig().optimistic_dial() } else { door.rig() };
        let rig = rig.agents(0).start().await.unwrap();
        let (tunnel, control) = agent::joined(&rig, "slow").await;
        rig.until_joined(1).await.unwrap();
        Self { rig, tunnel, _control: control }
    }

    /// The next dial as the agent sees it.
    async fn request(&self) -> (SendHalf, RecvHalf) {
        let (send, mut recv) = self.tunnel.accept().await.unwrap();
        let request: DialRequest =
            recv.read_frame(DialRequest::MAX_LEN).await.unwrap().message().unwrap();
        assert_eq!(request.target.to_string(), TARGET);
        (send, recv)
    }

    /// A dial that the agent answers before the frontend hears of it.
    async fn dial(
        &self,
        door: Door,
        answer: Result<(), DialFailure>,
    ) -> (Result<Connection, ConnectError>, (SendHalf, RecvHalf)) {
        let answered = async {
            let (mut send, recv) = self.request().await;
            reply(&mut send, answer).await;
            (send, recv)
        };
        tokio::join!(door.dial(&self.rig, TARGET), answered)
    }

    fn counted(&self, result: &str) -> f64 {
        let scrape = self.rig.server.metrics.render(&self.rig.server.backends);
        let name = "culvert_server_optimistic_dials_total";
        metric(&scrape, &format!("{name}{{result=\"{result}\"}}"))
    }
}

async fn reply(send: &mut SendHalf, outcome: Result<(), DialFailure>) {
    let (timing, extensions) = (DialTiming::default(), Extensions::default());
    let reply = DialReply { outcome, timing, extensions };
    send.write_chunk(frame::encode(&reply).unwrap()).await.unwrap();
}

fn refused() -> DialFailure {
    DialFailure::new(DialErrorKind::REFUSED, "dial tcp 10.0.0.9:10250: connect: connection refused")
}

async fn read(recv: &mut RecvHalf) -> Bytes {
    let mut chunks = [Bytes::new()];
    recv.read_chunks(&mut chunks).await.unwrap();
    let [chunk] = chunks;
    chunk
}

#[tokio::test]
async fn a_target_reached_before_is_answered_at_once() {
    for door in Door::WITH_RESET {
        within(async {
            let stage = Stage::new(door, true).await;
            let _first = stage.dial(door, Ok(())).await;
            // Nobody answers this one before the frontend has sent something.
            let mut frontend = door.dial(&stage.rig, TARGET).await.unwrap();
            frontend.write(b"early").await.unwrap();
            let (mut send, mut recv) = stage.request().await;
            assert_eq!(read(&mut recv).await, "early");
            reply(&mut send, Ok(())).await;
            send.write_chunk(Bytes::from_static(b"answer")).await.unwrap();
            assert_eq!(frontend.read_count(6).await.unwrap(), b"answer");
            assert!(stage.counted("kept") > 0.9, "{door:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_dial_that_fails_after_all_is_a_reset_and_the_next_one_waits() {
    for door in Door::WITH_RESET {
        within(async {
            let stage = Stage::new(door, true).await;
            let _first = stage.dial(door, Ok(())).await;
            let mut frontend = door.dial(&stage.rig, TARGET).await.unwrap();
            frontend.write(b"early").await.unwrap();
            let (mut send, _recv) = stage.request().await;
            reply(&mut send, Err(refused())).await;
            send.finish();
            let error = frontend.read_to_end().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{door:?}: {error}");
            assert!(stage.counted("broken") > 0.9);
            let (dialed, _stream) = stage.dial(door, Err(refused())).await;
            let Err(ConnectError::Refused(refusal)) = dialed else {
                panic!("{door:?}: {dialed:?}")
            };
            assert!(refusal.answer.contains("connection refused"), "{door:?}");
        })
        .await;
    }
}

#[tokio::test]
async fn an_agent_that_is_lost_instead_of_answering_is_a_reset() {
    for door in Door::WITH_RESET {
        within(async {
            let stage = Stage::new(door, true).await;
            let _first = stage.dial(door, Ok(())).await;
            let mut frontend = door.dial(&stage.rig, TARGET).await.unwrap();
            stage.request().await;
            stage.tunnel.close(culvert_wire::CloseCode::ABANDONED, "");
            let error = frontend.read_to_end().await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{door:?}: {error}");
        })
        .await;
    }
}

#[tokio::test]
async fn without_the_flag_every_dial_waits_for_the_agent() {
    for door in Door::WITH_RESET {
        within(async {
            let stage = Stage::new(door, false).await;
            let _first = stage.dial(door, Ok(())).await;
            let (dialed, _stream) = stage.dial(door, Err(refused())).await;
            assert!(dialed.is_err(), "{door:?}");
        })
        .await;
    }
}
