//! Dials that the server answers before the agent does.

use std::io;

use bytes::Bytes;
use culvert_loadtest::{
    frontend::{
        Connection,
        FrontendKind::{self, ConnectTls, GrpcTls, GrpcUnix},
        connect::ConnectError,
    },
    rig::Running,
};
use culvert_transport::{RecvHalf, SendHalf, Tunnel, control::ControlStream};
use culvert_wire::{
    dial::{DialErrorKind, DialFailure, DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message},
};

use rstest::rstest;

use crate::support::{
    Carrier::{self, Quic, Tcp},
    agent, rig, within,
};

const TARGET: &str = "10.0.0.9:10250";

/// A server, and an agent that answers dials when the test does.
struct Setup {
    rig: Running,
    tunnel: Tunnel,
    _control: ControlStream,
}

impl Setup {
    async fn new(frontend: FrontendKind, carrier: Carrier, optimistic: bool) -> Self {
        let mut rig = rig(frontend, carrier);
        if optimistic {
            rig = rig.server_flag("--optimistic-dial");
        }
        let rig = rig.agents(0).start().await.unwrap();
        let (tunnel, control) = agent::joined(&rig, "slow").await;
        rig.until_joined(1).await.unwrap();
        Self { rig, tunnel, _control: control }
    }

    /// With optimistic dials, and a target that was reached once.
    async fn reached(frontend: FrontendKind, carrier: Carrier) -> Self {
        let setup = Self::new(frontend, carrier, true).await;
        setup.dial(Ok(())).await.0.unwrap();
        setup
    }

    /// A dial that is answered before the agent replies, and its stream at the agent.
    async fn early(&self) -> (Connection, (SendHalf, RecvHalf)) {
        // The agent has not read the request yet.
        let frontend = self.rig.dial(TARGET).await.unwrap();
        (frontend, self.request().await)
    }

    /// The next dial as the agent sees it.
    async fn request(&self) -> (SendHalf, RecvHalf) {
        let (send, mut recv) = self.tunnel.accept().await.unwrap();
        let request: DialRequest =
            recv.read_frame(DialRequest::MAX_LEN).await.unwrap().message().unwrap();
        assert_eq!(request.target.to_string(), TARGET);
        (send, recv)
    }

    /// A dial that the agent answers before the frontend does.
    async fn dial(
        &self,
        answer: Result<(), DialFailure>,
    ) -> (Result<Connection, ConnectError>, (SendHalf, RecvHalf)) {
        let answered = async {
            let (mut send, recv) = self.request().await;
            reply(&mut send, answer).await;
            (send, recv)
        };
        tokio::join!(self.rig.dial(TARGET), answered)
    }

    fn counted(&self, result: &str) -> f64 {
        let name = "culvert_server_optimistic_dials_total";
        self.rig.server.metric(&format!("{name}{{result=\"{result}\"}}"))
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

async fn assert_reset(mut frontend: Connection) {
    let error = frontend.read_to_end().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}");
}

async fn read(recv: &mut RecvHalf) -> Bytes {
    let mut chunks = [Bytes::new()];
    recv.read_chunks(&mut chunks).await.unwrap();
    let [chunk] = chunks;
    chunk
}

#[rstest]
#[tokio::test]
async fn a_dial_to_a_target_that_was_reached_before_is_answered_at_once(
    #[values(ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let setup = Setup::reached(frontend, carrier).await;
        let (mut frontend, (mut send, mut recv)) = setup.early().await;
        frontend.write(b"early").await.unwrap();
        assert_eq!(read(&mut recv).await, "early");
        reply(&mut send, Ok(())).await;
        send.write_chunk(Bytes::from_static(b"answer")).await.unwrap();
        assert_eq!(frontend.read_count(6).await.unwrap(), b"answer");
        assert_eq!(setup.counted("kept"), 1.0);
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_dial_that_fails_after_its_answer_is_reset_and_the_next_one_waits(
    #[values(ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let setup = Setup::reached(frontend, carrier).await;
        let (mut frontend, (mut send, _recv)) = setup.early().await;
        frontend.write(b"early").await.unwrap();
        reply(&mut send, Err(refused())).await;
        send.finish();
        assert_reset(frontend).await;
        assert_eq!(setup.counted("broken"), 1.0);
        let (dialed, _stream) = setup.dial(Err(refused())).await;
        let Err(ConnectError::Refused(refusal)) = dialed else { panic!("{dialed:?}") };
        assert!(refusal.answer.contains("connection refused"));
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_dial_is_reset_when_the_agent_is_lost_before_it_answers(
    #[values(ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let setup = Setup::reached(frontend, carrier).await;
        let (frontend, _stream) = setup.early().await;
        setup.tunnel.close(culvert_wire::CloseCode::ABANDONED, "");
        assert_reset(frontend).await;
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn without_the_flag_every_dial_waits_for_the_agent(
    #[values(ConnectTls, GrpcUnix, GrpcTls)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let setup = Setup::new(frontend, carrier, false).await;
        let _first = setup.dial(Ok(())).await;
        let (dialed, _stream) = setup.dial(Err(refused())).await;
        assert!(dialed.is_err());
    })
    .await;
}
