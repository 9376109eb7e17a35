use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use culvert_transport::{
    ReadError, ReadFrameError, TunnelLost,
    budget::{MemoryBudget, StreamRoom},
};
use culvert_wire::{
    CloseCode, StreamCode,
    bounded::List,
    dial::{DialErrorKind, DialFailure, DialReply},
    extension::{Extension, Extensions, UnknownExtension},
    frame,
};
use tokio::{
    join,
    time::{Instant, sleep, timeout},
};

use super::{
    dialer::{MAX_MOVES, MAX_PROCESSES},
    error::MalformedReply,
    exchange::{MOVE_AFTER, SUSPECT_AFTER},
    *,
};
use crate::{
    backends::{
        Backends, Strategy,
        departure::{LOST_RETURN_LIMIT, RETURN_LIMIT, START_LIMIT},
    },
    config::DialConfig,
    metrics::ServerMetrics,
    testing::{Asked, TestAgent, metric, target},
};

mod moves;
mod optimistic;

const LIMIT: Duration = Duration::from_secs(10);
const FAILURES: &str = "culvert_server_dial_failures_total";

/// A dialer, and what it dials through.
struct Dialing {
    dialer: Dialer,
    backends: Backends,
    metrics: Arc<ServerMetrics>,
}

impl Dialing {
    fn with(limit: Option<Duration>, optimistic: bool) -> Self {
        Self::with_memory(limit, optimistic, 0)
    }

    /// The same with this limit of memory.
    fn with_memory(limit: Option<Duration>, optimistic: bool, memory: u64) -> Self {
        let room = StreamRoom::new(&MemoryBudget::new(memory), 0);
        let backends = Backends::new(&[Strategy::Default]);
        let metrics = Arc::new(ServerMetrics::new().unwrap());
        let config = DialConfig { limit, optimistic };
        let dialer = Dialer::new(backends.clone(), config, metrics.clone(), room);
        Self { dialer, backends, metrics }
    }

    fn new() -> Self {
        Self::with(Some(LIMIT), false)
    }

    fn optimistic() -> Self {
        Self::with(Some(LIMIT), true)
    }

    async fn agent(&self, name: &str) -> TestAgent {
        TestAgent::join(&self.backends, name).await
    }

    async fn dial(&self) -> Result<Dialed, DialError> {
        self.dialer.dial(parameters()).await
    }

    /// The result of a dial, and how long it took.
    async fn timed(&self) -> (Result<Dialed, DialError>, Duration) {
        let started = Instant::now();
        let result = self.dial().await;
        (result, started.elapsed())
    }

    fn metric(&self, name: &str) -> f64 {
        metric(&self.metrics, &self.backends, name)
    }

    fn failures(&self, reason: &str) -> f64 {
        self.metric(&format!("{FAILURES}{{reason=\"{reason}\"}}"))
    }

    fn pending(&self) -> f64 {
        self.metric("konnectivity_network_proxy_server_pending_backend_dials")
    }
}

fn parameters() -> DialParameters {
    let target = target("10.0.0.9:10250");
    DialParameters { network: Network::Tcp, target, kind: StreamKind::LOGS, trace: None }
}

/// An agent that replies to one dial with success.
async fn accepting(agent: &TestAgent) -> Asked {
    let mut asked = agent.asked().await;
    asked.reply(Ok(())).await;
    asked
}

fn refusal() -> DialFailure {
    let text = "dial tcp 10.0.0.9:10250: connect: connection refused";
    DialFailure::new(DialErrorKind::REFUSED, text)
}

async fn read(recv: &mut RecvHalf) -> Bytes {
    let mut chunks = [Bytes::new()];
    recv.read_chunks(&mut chunks).await.unwrap();
    let [chunk] = chunks;
    chunk
}

/// The code with which the server ended both halves of a stream.
async fn ended(asked: &mut Asked) -> StreamCode {
    let ReadError::Reset(code) = asked.recv.failed().await else { panic!("the tunnel is lost") };
    assert_eq!(asked.send.stopped().await, Ok(Some(code)));
    code
}

#[tokio::test(start_paused = true)]
async fn a_dial_hands_over_a_stream_whose_other_end_is_the_target() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let (dialed, mut asked) = join!(dialing.dial(), accepting(&agent));
    let mut dialed = dialed.unwrap();
    assert_eq!(asked.request.id, dialed.id);
    assert_eq!(asked.request.target, parameters().target);
    assert_eq!(asked.request.kind, StreamKind::LOGS);
    assert_eq!(asked.request.timeout_millis, 10_000);
    assert_eq!(dialed.reply.timing().unwrap().connect_micros, 7);
    assert_eq!(agent.backend.open_streams(), 1);
    assert_eq!(dialing.pending(), 0.0);
    assert_eq!(
        dialing.metric("konnectivity_network_proxy_server_dial_duration_seconds_count"),
        1.0
    );

    asked.send.write_chunk(Bytes::from_static(b"from the target")).await.unwrap();
    assert_eq!(read(&mut dialed.stream.1).await, "from the target");
    dialed.stream.0.write_chunk(Bytes::from_static(b"to the target")).await.unwrap();
    assert_eq!(read(&mut asked.recv).await, "to the target");
    drop(dialed);
    assert_eq!(agent.backend.open_streams(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_without_a_limit_waits_and_asks_the_agent_for_none() {
    let dialing = Dialing::with(None, false);
    let agent = dialing.agent("a").await;
    let slow = async {
        let mut asked = agent.asked().await;
        assert_eq!(asked.request.timeout_millis, 0);
        assert_eq!(dialing.pending(), 1.0);
        sleep(LIMIT * 1000).await;
        asked.reply(Ok(())).await;
        asked
    };
    let (dialed, _asked) = join!(dialing.dial(), slow);
    dialed.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_takes_too_long_is_reset_with_its_code() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let silent = async { ended(&mut agent.asked().await).await };
    let ((result, took), code) = join!(dialing.timed(), silent);
    let error = result.unwrap_err();
    assert_eq!(
        error.to_string(),
        "timed out waiting for backend dial: nothing came from a over tcp meanwhile"
    );
    assert_eq!((took, code), (LIMIT, StreamCode::DIAL_TIMEOUT));
    assert_eq!(dialing.failures("backend_dial_timeout"), 1.0);
    assert_eq!((agent.backend.open_streams(), dialing.pending()), (0, 0.0));
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_its_frontend_gives_up_is_cancelled() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let gives_up = timeout(LIMIT / 2, dialing.dial());
    let silent = async { ended(&mut agent.asked().await).await };
    let (result, code) = join!(gives_up, silent);
    assert!(result.is_err());
    assert_eq!(code, StreamCode::CANCELLED);
    assert_eq!((agent.backend.open_streams(), dialing.pending()), (0, 0.0));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_reply_is_suspected_while_the_dial_goes_on() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let started = Instant::now();
    let slow = async {
        let mut asked = agent.asked().await;
        agent.backend.suspected().await;
        assert_eq!(started.elapsed(), SUSPECT_AFTER);
        assert!(timeout(LIMIT / 2, agent.backend.suspected()).await.is_err(), "only once");
        asked.reply(Ok(())).await;
        asked
    };
    let (dialed, _asked) = join!(dialing.dial(), slow);
    dialed.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_replies_in_time_is_not_suspected() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let nearly_slow = async {
        let mut asked = agent.asked().await;
        sleep(SUSPECT_AFTER - Duration::from_millis(1)).await;
        asked.reply(Ok(())).await;
        asked
    };
    let (dialed, _asked) = join!(dialing.dial(), nearly_slow);
    dialed.unwrap();
    assert!(timeout(LIMIT, agent.backend.suspected()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_carries_as_many_streams_as_it_may_is_not_asked() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let permits: Vec<_> = std::iter::from_fn(|| agent.backend.permit()).collect();
    assert_eq!((permits.len(), agent.backend.open_streams()), (10, 10));
    let result = dialing.dial().await;
    assert!(matches!(result, Err(DialError::Overloaded(_))), "{result:?}");
    assert_eq!(dialing.failures("overloaded"), 1.0);
    drop(permits);
    let (dialed, _asked) = join!(dialing.dial(), accepting(&agent));
    dialed.unwrap();
}

#[tokio::test(start_paused = true)]
async fn streams_that_cost_half_of_the_memory_leave_no_room_for_a_dial_until_one_ends() {
    let dialing = Dialing::with_memory(Some(LIMIT), false, 50 << 10);
    let agent = dialing.agent("a").await;
    let (first, _first) = join!(dialing.dial(), accepting(&agent));
    let (second, _second) = join!(dialing.dial(), accepting(&agent));
    let refused = dialing.dial().await;
    assert!(matches!(refused, Err(DialError::Memory)), "{refused:?}");
    assert_eq!(dialing.failures("overloaded"), 1.0);
    drop((first.unwrap(), second.unwrap()));
    let (dialed, _asked) = join!(dialing.dial(), accepting(&agent));
    dialed.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_the_agent_resets_is_a_refusal() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let refusing = async {
        let mut asked = agent.asked().await;
        asked.send.reset(StreamCode::OVERLOADED);
        asked.recv.stop(StreamCode::OVERLOADED);
    };
    let (result, ()) = join!(dialing.dial(), refusing);
    let error = result.unwrap_err();
    let DialError::Refused { agent_id, code } = &error else { panic!("{error:?}") };
    assert_eq!((agent_id.as_str(), *code), ("a", StreamCode::OVERLOADED));
    assert_eq!(dialing.failures("refused"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_reported_in_the_agents_words_and_the_stream_is_cancelled() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let failing = async {
        let mut asked = agent.asked().await;
        asked.reply(Err(refusal())).await;
        ended(&mut asked).await
    };
    let (result, code) = join!(dialing.dial(), failing);
    assert_eq!(result.unwrap_err().to_string(), refusal().to_string());
    assert_eq!(code, StreamCode::CANCELLED);
    assert_eq!(dialing.failures("error_response"), 1.0);
}

/// The error of a dial that is answered with these bytes and the end of the stream.
async fn answered_with(bytes: Bytes) -> DialError {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let answering = async {
        let mut asked = agent.asked().await;
        asked.send.write_chunk(bytes).await.unwrap();
        asked.send.finish();
        asked
    };
    let (result, _asked) = join!(dialing.dial(), answering);
    let error = result.unwrap_err();
    assert_eq!(dialing.failures(error.reason()), 1.0);
    error
}

#[tokio::test(start_paused = true)]
async fn a_malformed_reply_says_what_is_wrong_with_it() {
    let mandatory = Extension { kind: 0x8001, value: List::default() };
    let reply = |extensions: Vec<Extension>| DialReply {
        outcome: Ok(()),
        timing: DialTiming::default(),
        extensions: Extensions::try_from(extensions).unwrap(),
    };
    let whole = frame::encode(&reply(vec![])).unwrap();
    let unknown = frame::encode(&reply(vec![mandatory])).unwrap();
    type Check = fn(&MalformedReply) -> bool;
    let cases: [(Bytes, Check); 5] = [
        (Bytes::new(), |why| matches!(why, MalformedReply::Stream(ReadFrameError::End))),
        (whole.slice(..2), |why| matches!(why, MalformedReply::Stream(ReadFrameError::Truncated))),
        (whole.slice(..whole.len() - 1), |why| {
            matches!(why, MalformedReply::Stream(ReadFrameError::Truncated))
        }),
        (Bytes::from_static(&[0x7f, 0, 0]), |why| matches!(why, MalformedReply::Frame(_))),
        (unknown, |why| matches!(why, MalformedReply::Extension(UnknownExtension(0x8001)))),
    ];
    for (bytes, is_expected) in cases {
        let error = answered_with(bytes).await;
        let DialError::Malformed { agent_id, source } = &error else { panic!("{error:?}") };
        assert_eq!(agent_id.as_str(), "a");
        assert!(is_expected(source), "{source:?}");
        assert_eq!(error.to_string(), format!("agent a gave a malformed answer: {source}"));
        assert_eq!(error.reason(), "unrecognized_response");
    }
}
