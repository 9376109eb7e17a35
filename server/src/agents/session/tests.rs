use std::io;

use bytes::Bytes;
use culvert_transport::{
    RecvHalf, SendHalf,
    control::Event,
    test_util::{Line, Pair, Side},
};
use culvert_wire::{
    bounded::List,
    control::{Hello, Ping, Welcome},
    extension::{Extension, Extensions},
    version::Features,
};
use k8s_openapi::api::authentication::v1::TokenReviewStatus;
use parking_lot::Mutex;
use tokio::{
    task::yield_now,
    time::{Instant, sleep, timeout},
};

use super::{super::unadmitted::JOIN_TIMEOUT, *};
use crate::{
    agents::admission::Authenticator,
    backends::{Backends, Strategy},
    config::{AgentIdentity, ClaimRules},
    server_set::tests::lease,
    testing::{
        TestAgent, accepted, authenticator, context, context_with, context_with_room_for, hello,
        identity, metric, pair, token,
    },
};

const CONFLICTS: &str = "culvert_server_identity_conflicts_total";

/// A server's side of one tunnel, and the agent's end of it.
struct Served {
    context: Arc<AgentContext>,
    tunnel: Tunnel,
    line: Line,
    arrived: Instant,
}

impl Served {
    /// Serves a tunnel whose agent has done nothing yet.
    async fn new(context: Arc<AgentContext>) -> Self {
        let Pair { agent: tunnel, server, line } = pair().await;
        let arrived = Instant::now();
        let attempt = Attempt::of_stranger(&context.unadmitted).await;
        let serving = serve(server, None, attempt, context.clone());
        context.tasks.spawn(serving);
        Self { context, tunnel, line, arrived }
    }

    /// Serves a tunnel whose agent has opened its control stream.
    async fn with_control() -> (Self, ControlStream) {
        let served = Self::new(context()).await;
        let control = ControlStream::new(served.tunnel.clone(), served.open().await);
        (served, control)
    }

    /// Serves an agent that has joined.
    async fn joined() -> (Self, ControlStream) {
        let (served, mut control) = Self::with_control().await;
        let hello = ControlMessage::Hello(Box::new(hello("a", &[])));
        control.send(&hello).await.unwrap();
        let ControlMessage::Welcome(_) = control.next().await.unwrap() else { panic!("welcome") };
        served.context.backends.until(1).await;
        (served, control)
    }

    async fn open(&self) -> (SendHalf, RecvHalf) {
        self.tunnel.open().await.unwrap()
    }

    /// The code with which the server closes the tunnel.
    async fn closed(&self) -> CloseCode {
        let lost = self.tunnel.closed().await;
        let TunnelLost::ClosedByPeer { code, .. } = lost else { panic!("{lost:?}") };
        code
    }

    fn metric(&self, name: &str, reason: &str) -> f64 {
        let name = format!("{name}{{reason=\"{reason}\"}}");
        metric(&self.context.metrics, &self.context.backends, &name)
    }

    fn join_failures(&self, reason: &str) -> f64 {
        self.metric("culvert_server_join_failures_total", reason)
    }

    fn tunnels_lost(&self, reason: &str) -> f64 {
        self.metric("culvert_server_tunnels_lost_total", reason)
    }

    /// Asserts that the agent is refused with this code, and counted under this reason.
    async fn assert_refused(&self, code: CloseCode, reason: &str) {
        assert_eq!(self.closed().await, code);
        self.context.tasks.close();
        self.context.tasks.wait().await;
        assert_eq!(self.join_failures(reason), 1.0, "{reason}");
        assert!(self.context.backends.all().is_empty());
    }
}

/// The server's answer to this hello.
async fn welcome(hello: Hello) -> Welcome {
    let (_served, mut control) = Served::with_control().await;
    control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
    match control.next().await.unwrap() {
        ControlMessage::Welcome(welcome) => *welcome,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_says_hello_is_welcomed_and_registered() {
    let welcome = welcome(hello("a", &[])).await;
    assert_eq!((welcome.server_id.as_str(), welcome.server_count), ("server", 3));
    assert_eq!(welcome.max_streams, 10);
    let (served, _control) = Served::joined().await;
    let all = served.context.backends.all();
    assert_eq!(all[0].agent_id().as_str(), "a");
    assert_eq!(served.tunnels_lost("done"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn the_features_that_both_sides_offer_are_agreed_on() {
    assert_eq!(welcome(hello("a", &[])).await.features, Features::default());
    let offers_all = Hello { features: Features::supported(), ..hello("a", &[]) };
    assert_eq!(welcome(offers_all).await.features, Features::supported());
}

#[tokio::test(start_paused = true)]
async fn the_set_of_servers_and_its_changes_are_sent_to_agents_that_offered_the_feature() {
    for offered in [true, false] {
        let (served, mut control) = Served::with_control().await;
        lease(&served.context.server_set, &[("b", Some("10.0.0.2:8132"))]);
        let features = if offered { Features::SERVER_SET } else { Features::NONE };
        let hello = Hello { features, ..hello("a", &[]) };
        control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
        let ControlMessage::Welcome(welcome) = control.next().await.unwrap() else { panic!() };
        assert_eq!((welcome.server_count, welcome.servers.len()), (3, if offered { 2 } else { 0 }));
        let others: Vec<_> = ["b", "c", "d"].map(|id| (id, Some("10.0.0.2:8132"))).into();
        lease(&served.context.server_set, &others);
        match timeout(Duration::from_secs(60), control.next()).await {
            Ok(Ok(ControlMessage::ServerSet(set))) if offered => {
                assert_eq!((set.server_count, set.servers.len()), (4, 4));
            }
            Err(_) if !offered => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_nothing_is_closed_at_the_deadline() {
    let served = Served::new(context()).await;
    served.assert_refused(CloseCode::UNRESPONSIVE, "timed_out").await;
    assert_eq!(served.arrived.elapsed(), JOIN_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn an_agent_gets_no_more_time_with_each_step() {
    let served = Served::new(context()).await;
    sleep(JOIN_TIMEOUT * 9 / 10).await;
    let (mut send, _recv) = served.open().await;
    let hello = ControlMessage::Hello(Box::new(hello("a", &[]))).encode().unwrap();
    send.write_chunk(hello.slice(..hello.len() - 1)).await.unwrap();
    served.assert_refused(CloseCode::UNRESPONSIVE, "timed_out").await;
    assert_eq!(served.arrived.elapsed(), JOIN_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_joins_just_before_the_deadline_stays() {
    let (served, mut control) = Served::with_control().await;
    sleep(JOIN_TIMEOUT - Duration::from_millis(1)).await;
    control.send(&ControlMessage::Hello(Box::new(hello("a", &[])))).await.unwrap();
    let next = control.next().await.unwrap();
    assert!(matches!(next, ControlMessage::Welcome(_)), "{next:?}");
    assert!(timeout(JOIN_TIMEOUT * 10, served.tunnel.closed()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_begins_with_another_message_is_refused() {
    let (served, mut control) = Served::with_control().await;
    control.send(&ControlMessage::Drain(Drain { deadline_millis: 1 })).await.unwrap();
    served.assert_refused(CloseCode::PROTOCOL_VIOLATION, "protocol_violation").await;
}

#[tokio::test(start_paused = true)]
async fn a_ping_before_the_hello_is_not_answered_and_ends_the_attempt() {
    let served = Served::new(context()).await;
    let (mut send, mut recv) = served.open().await;
    let ping = ControlMessage::Ping(Ping { echo: 7 }).encode().unwrap();
    let hello = ControlMessage::Hello(Box::new(hello("a", &[]))).encode().unwrap();
    send.write_chunk([ping, hello].concat().into()).await.unwrap();
    assert!(recv.read_chunks(&mut [Bytes::new()]).await.is_err(), "a pong");
    served.assert_refused(CloseCode::PROTOCOL_VIOLATION, "protocol_violation").await;
}

#[tokio::test(start_paused = true)]
async fn a_message_of_a_later_revision_before_the_hello_ends_the_attempt() {
    let served = Served::new(context()).await;
    let (mut send, _recv) = served.open().await;
    send.write_chunk(Bytes::from_static(&[0x7f, 0, 0])).await.unwrap();
    served.assert_refused(CloseCode::PROTOCOL_VIOLATION, "protocol_violation").await;
}

#[tokio::test(start_paused = true)]
async fn what_kube_apiserver_says_is_not_sent_to_a_stranger() {
    const SECRET: &str = "tokenreviews is forbidden: user \"server\"";
    let authenticator = authenticator(|_| async {
        Ok(TokenReviewStatus { error: Some(SECRET.into()), ..accepted() })
    });
    let served = Served::new(context_with(authenticator)).await;
    let mut control = ControlStream::new(served.tunnel.clone(), served.open().await);
    let hello = Hello { token: Some(token("a")), ..hello("a", &[]) };
    control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
    let lost = served.tunnel.closed().await;
    let TunnelLost::ClosedByPeer { code, reason } = lost else { panic!("{lost:?}") };
    assert_eq!(code, CloseCode::UNAUTHENTICATED);
    assert_eq!(*reason, *"the token was refused: see the server's log");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_gives_way_to_another_is_sent_the_reason() {
    let context = context_with_room_for(1);
    let first = Served::new(context.clone()).await;
    sleep(JOIN_TIMEOUT / 2).await;
    let second = Served::new(context).await;
    assert_eq!(first.closed().await, CloseCode::OVERLOADED);
    assert_eq!(first.join_failures("evicted"), 1.0);
    let hello = ControlMessage::Hello(Box::new(hello("a", &[])));
    let mut control = ControlStream::new(second.tunnel.clone(), second.open().await);
    control.send(&hello).await.unwrap();
    assert!(matches!(control.next().await.unwrap(), ControlMessage::Welcome(_)));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_was_admitted_gives_way_to_none() {
    let context = context_with_room_for(1);
    let joined = Served::new(context.clone()).await;
    let mut control = ControlStream::new(joined.tunnel.clone(), joined.open().await);
    control.send(&ControlMessage::Hello(Box::new(hello("a", &[])))).await.unwrap();
    control.next().await.unwrap();
    let _stranger = Served::new(context.clone()).await;
    sleep(JOIN_TIMEOUT / 2).await;
    let _other = Served::new(context).await;
    assert!(timeout(JOIN_TIMEOUT * 2, joined.tunnel.closed()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_begins_with_no_message_is_refused() {
    let served = Served::new(context()).await;
    let (mut send, _recv) = served.open().await;
    send.write_chunk(Bytes::from_static(&[0x01, 0xff, 0xff])).await.unwrap();
    served.assert_refused(CloseCode::PROTOCOL_VIOLATION, "protocol_violation").await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_demands_an_unknown_extension_is_refused() {
    let (served, mut control) = Served::with_control().await;
    let mandatory = Extension { kind: 0x8001, value: List::default() };
    let extensions = Extensions::try_from(vec![mandatory]).unwrap();
    let hello = Hello { extensions, ..hello("a", &[]) };
    control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
    served.assert_refused(CloseCode::INCOMPATIBLE, "incompatible").await;
}

/// Serves an agent that says hello with a token, whose review takes so long, at this time.
async fn with_token(review: Duration, hello_after: Duration) -> Served {
    let authenticator = authenticator(move |_| async move {
        sleep(review).await;
        Ok(accepted())
    });
    let served = Served::new(context_with(authenticator)).await;
    sleep(hello_after).await;
    let mut control = ControlStream::new(served.tunnel.clone(), served.open().await);
    let hello = Hello { token: Some(token("good")), ..hello("a", &[]) };
    control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
    culvert_transport::test_util::detached(async move { while control.next().await.is_ok() {} });
    served
}

#[tokio::test(start_paused = true)]
async fn a_slow_review_takes_no_more_time_than_is_left() {
    let served = with_token(Duration::from_secs(4), JOIN_TIMEOUT / 2).await;
    served.context.backends.until(1).await;
    assert_eq!(served.arrived.elapsed(), JOIN_TIMEOUT * 9 / 10);

    let served = with_token(Duration::from_secs(4), JOIN_TIMEOUT * 7 / 10).await;
    served.assert_refused(CloseCode::UNAUTHENTICATED, "token_not_reviewed").await;
    assert_eq!(served.arrived.elapsed(), JOIN_TIMEOUT);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_leaves_during_its_review_is_counted() {
    let served = with_token(Duration::from_secs(4), Duration::ZERO).await;
    sleep(Duration::from_secs(1)).await;
    served.tunnel.close(CloseCode::DONE, "");
    served.context.tasks.close();
    served.context.tasks.wait().await;
    assert_eq!(served.join_failures("lost"), 1.0);
    assert_eq!(served.arrived.elapsed(), Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_leaves_before_its_hello_is_counted() {
    let served = Served::new(context()).await;
    served.tunnel.close(CloseCode::DONE, "");
    served.context.tasks.close();
    served.context.tasks.wait().await;
    assert_eq!(served.join_failures("lost"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_leaves_in_the_midst_of_its_hello_breaks_no_protocol() {
    let served = Served::new(context()).await;
    let (mut send, _recv) = served.open().await;
    let hello = ControlMessage::Hello(Box::new(hello("a", &[]))).encode().unwrap();
    send.write_chunk(hello.slice(..hello.len() - 1)).await.unwrap();
    // The server waits for the last byte.
    sleep(JOIN_TIMEOUT / 2).await;
    served.tunnel.close(CloseCode::DONE, "");
    served.context.tasks.close();
    served.context.tasks.wait().await;
    assert_eq!(served.join_failures("protocol_violation"), 0.0);
    assert_eq!(served.join_failures("lost"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_drains_or_says_goodbye_gets_no_new_dials_and_keeps_its_tunnel() {
    let goodbye = Goodbye { code: 0, reason: Text::truncated("for now".into()) };
    let drain = Drain { deadline_millis: 1 };
    for message in [ControlMessage::Drain(drain), ControlMessage::Goodbye(goodbye)] {
        let (served, mut control) = Served::joined().await;
        let backend = served.context.backends.all()[0].clone();
        assert!(!backend.is_draining());
        control.send(&message).await.unwrap();
        served.context.backends.until_left(backend.agent_id()).await;
        assert!(backend.is_draining());
        assert!(timeout(JOIN_TIMEOUT, served.tunnel.closed()).await.is_err(), "{message:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_introduces_itself_again_is_closed() {
    let (served, mut control) = Served::joined().await;
    control.send(&ControlMessage::Hello(Box::new(hello("a", &[])))).await.unwrap();
    assert_eq!(served.closed().await, CloseCode::PROTOCOL_VIOLATION);
    served.context.backends.until(0).await;
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_is_lost_is_no_backend_any_more() {
    let (served, _control) = Served::joined().await;
    served.tunnel.close(CloseCode::DONE, "");
    served.context.backends.until(0).await;
    served.context.tasks.close();
    served.context.tasks.wait().await;
    assert_eq!(served.tunnels_lost("done"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_suspected_agent_that_is_alive_keeps_its_tunnel() {
    let (served, mut control) = Served::joined().await;
    served.context.backends.all()[0].suspect();
    // It answers pings while it reads.
    assert!(timeout(SUSPECT_LIMIT * 10, control.event()).await.is_err());
    assert_eq!(served.context.backends.all().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_suspected_agent_that_is_silent_is_closed_after_its_limit() {
    let (served, _control) = Served::joined().await;
    served.line.silence(Side::Agent);
    let backend = served.context.backends.all()[0].clone();
    assert!(timeout(SUSPECT_LIMIT * 10, served.context.backends.until(0)).await.is_err());
    let suspected = Instant::now();
    backend.suspect();
    let limit = backend.tunnel.stats().rtt * 3 + SUSPECT_LIMIT;
    served.context.backends.until(0).await;
    assert_eq!(suspected.elapsed().as_millis(), limit.as_millis());
    served.context.tasks.close();
    served.context.tasks.wait().await;
    assert_eq!(served.tunnels_lost("unresponsive"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_drains_says_so_once_and_goes_on() {
    let (served, mut control) = Served::joined().await;
    served.context.draining.cancel();
    let Event::Message(ControlMessage::Drain(drain)) = control.event().await.unwrap() else {
        panic!("a drain")
    };
    assert_eq!(drain.deadline_millis, 30_000);
    let nothing = timeout(JOIN_TIMEOUT, control.event());
    assert!(nothing.await.is_err(), "neither another drain nor the end");
    assert_eq!(served.context.backends.all().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_stops_says_goodbye_and_closes_the_tunnel() {
    let (served, mut control) = Served::joined().await;
    served.context.closing.cancel();
    // The close, which has the same code, may overtake the goodbye.
    match control.next().await {
        Ok(ControlMessage::Goodbye(goodbye)) => {
            assert_eq!(goodbye.code, CloseCode::SHUTDOWN.as_u32());
        }
        Ok(other) => panic!("{other:?}"),
        Err(error) => assert!(matches!(error, ControlError::Read(_)), "{error:?}"),
    }
    assert_eq!(served.closed().await, CloseCode::SHUTDOWN);
    served.context.backends.until(0).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_id_is_not_proven_is_refused() {
    let rules = ClaimRules { identity: AgentIdentity::Node, allowed: Vec::new() };
    let by_node = Authenticator::open().with_rules(rules, None);
    let served = Served::new(context_with(by_node)).await;
    let mut control = ControlStream::new(served.tunnel.clone(), served.open().await);
    control.send(&ControlMessage::Hello(Box::new(hello("a", &[])))).await.unwrap();
    served.assert_refused(CloseCode::UNAUTHENTICATED, "id_not_proven").await;
    assert_eq!(served.metric(CONFLICTS, "id_not_proven"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_id_another_identity_has_is_refused() {
    let served = Served::new(context()).await;
    let backends = served.context.backends.clone();
    let victim = TestAgent::join_by(&backends, identity("victim"), "a", &[]).await;
    let mut control = ControlStream::new(served.tunnel.clone(), served.open().await);
    control.send(&ControlMessage::Hello(Box::new(hello("a", &["node-1"])))).await.unwrap();
    assert_eq!(served.closed().await, CloseCode::UNAUTHENTICATED);
    assert_eq!(served.join_failures("id_held"), 1.0);
    assert_eq!(served.metric(CONFLICTS, "id_held"), 1.0);
    drop(victim);
}

#[tokio::test(start_paused = true)]
async fn identifiers_that_an_agent_does_not_get_are_counted() {
    let context = Arc::new(AgentContext {
        backends: Backends::new(&[Strategy::DestHost]),
        ..Arc::into_inner(context()).unwrap()
    });
    let served = Served::new(context).await;
    let backends = served.context.backends.clone();
    let _victim = TestAgent::join_by(&backends, identity("victim"), "a", &["node-1"]).await;
    let mut control = ControlStream::new(served.tunnel.clone(), served.open().await);
    let hosts = ["node-1", "node-2"];
    control.send(&ControlMessage::Hello(Box::new(hello("b", &hosts)))).await.unwrap();
    backends.until(2).await;
    control.next().await.unwrap();
    assert_eq!(served.metric(CONFLICTS, "identifier_held"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_backend_that_is_dismissed_is_closed_with_the_reason() {
    let (served, mut control) = Served::joined().await;
    served.context.backends.all()[0].dismiss(Dismissal::Crowded);
    while control.next().await.is_ok() {}
    assert_eq!(served.closed().await, CloseCode::SUPERSEDED);
    served.context.tasks.close();
    served.context.tasks.wait().await;
    assert_eq!(served.tunnels_lost("superseded"), 1.0);
}

/// Lines of the log.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_met_again_and_again_does_not_fill_the_log() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
    // With one dispatcher in the process, an event that another test logs first is off for all.
    let _second = tracing::Dispatch::new(tracing_subscriber::fmt().with_writer(io::sink).finish());
    let _guard = tracing::subscriber::set_default(subscriber);
    let logged = |event: &str| {
        let text = String::from_utf8(lines.0.lock().clone()).unwrap();
        text.lines().filter(|line| line.contains(event)).count()
    };
    let context = context();
    let join = async || {
        let served = Served::new(context.clone()).await;
        let mut control = ControlStream::new(served.tunnel.clone(), served.open().await);
        control.send(&ControlMessage::Hello(Box::new(hello("a", &[])))).await.unwrap();
        let ControlMessage::Welcome(_) = control.next().await.unwrap() else { panic!("welcome") };
        (served, control)
    };
    let tunnels = async |count| {
        while context.backends.all().len() != count {
            yield_now().await;
        }
    };
    let (_first, _control) = join().await;
    for _ in 0..3 {
        let (again, _control) = join().await;
        tunnels(2).await;
        again.tunnel.close(CloseCode::DONE, "a duplicate");
        tunnels(1).await;
    }
    assert_eq!((logged("agent connected"), logged("agent gone")), (1, 0));
    // A tunnel that replaces another one stays.
    let (replacing, _control) = join().await;
    sleep(MEETING_TIME + Duration::from_millis(1)).await;
    assert_eq!(logged("agent connected"), 2);
    replacing.tunnel.close(CloseCode::DONE, "");
    tunnels(1).await;
    yield_now().await;
    assert_eq!(logged("agent gone"), 1);
}

mod expiry;
