use bytes::Bytes;
use culvert_process::operator::streams::{LiveStreams, Side};
use culvert_transport::{
    Carrier, ReadError, Settings, WriteError,
    qmux::Peer,
    test_util::{Pair, size_of_returned},
    tls::Current,
};
use culvert_wire::{
    DialId,
    dial::{Network, StreamKind},
};
use nix::errno::Errno;
use tokio_util::task::AbortOnDropHandle;

use super::{
    scripted::{Scripted, Step},
    *,
};
use crate::{
    config::{AddressRule, CountSource, Policy},
    lookups::scripted::ScriptedResolver,
    tunnels::ServerTunnels,
};

const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// An agent that serves one stream, and the server's halves of that stream.
struct Served {
    send: SendHalf,
    recv: RecvHalf,
    metrics: Arc<AgentMetrics>,
    _serving: AbortOnDropHandle<()>,
    _pair: Pair,
}

/// Opens a stream with `head` as its first bytes to an agent on `network`.
async fn serve(network: Scripted, head: Bytes) -> Served {
    serve_with((Policy::default(), false), network, head).await
}

/// The same with this policy, in audit mode or not.
async fn serve_with((policy, audit): (Policy, bool), network: Scripted, head: Bytes) -> Served {
    let settings = Settings::default();
    let peer = Peer::local(Carrier::Tcp);
    let pair = Pair::without_idle_timeout(peer, &settings, &settings).await.unwrap();
    let (mut send, recv) = pair.server.open().await.unwrap();
    send.write_chunk(head).await.unwrap();
    let stream = pair.agent.accept().await.unwrap();
    let metrics = Arc::new(AgentMetrics::new().unwrap());
    let network = TargetNetwork::Scripted(network);
    let gate = Gate::new(Current::fixed(policy), audit, metrics.clone());
    let egress = Egress {
        network,
        gate,
        dial_timeout: DIAL_TIMEOUT,
        metrics: metrics.clone(),
        streams: LiveStreams::new(Side::Agent),
    };
    let origin = Origin {
        server_id: "server".parse().unwrap(),
        tunnel: pair.agent.clone(),
        session: None,
        streams: TaskTracker::new(),
    };
    let serving = culvert_transport::task::owned(async move { egress.serve(stream, origin).await });
    Served { send, recv, metrics, _serving: serving, _pair: pair }
}

fn request() -> DialRequest {
    DialRequest {
        id: DialId(1),
        network: Network::Tcp,
        target: "node-1:10250".parse().unwrap(),
        kind: StreamKind::UNKNOWN,
        timeout_millis: 0,
        trace: None,
        extensions: Extensions::default(),
    }
}

async fn serve_request(network: Scripted, request: &DialRequest) -> Served {
    serve(network, frame::encode(request).unwrap()).await
}

impl Served {
    async fn reply(&mut self) -> DialReply {
        self.recv.read_frame(DialReply::MAX_LEN).await.unwrap().message().unwrap()
    }

    async fn read(&mut self) -> Result<Option<Bytes>, ReadError> {
        let mut chunks = [Bytes::new()];
        let count = self.recv.read_chunks(&mut chunks).await?;
        let [chunk] = chunks;
        Ok(count.map(|_| chunk))
    }
}

#[tokio::test(start_paused = true)]
async fn a_dialed_target_is_spliced_after_the_reply() {
    let network = Scripted::resolving(&["10.0.0.1:10250"])
        .lookup_takes(20)
        .connects(Step::after(5).connects());
    let mut served = serve_request(network, &request()).await;
    // Bytes may follow the request before the reply has come.
    served.send.write_chunk(Bytes::from_static(b"echo")).await.unwrap();
    let reply = served.reply().await;
    assert_eq!(reply.outcome, Ok(()));
    assert_eq!((reply.timing.resolve_micros, reply.timing.connect_micros), (20_000, 5_000));
    assert_eq!(served.read().await, Ok(Some(Bytes::from_static(b"echo"))));
    served.send.finish();
    assert_eq!(served.read().await, Ok(None));
    assert_eq!(served.metrics.meter.to_tunnel(), 4);
}

#[tokio::test(start_paused = true)]
async fn a_failed_dial_is_reported_with_its_text_and_timing() {
    let network = Scripted::resolving(&["10.0.0.1:10250"])
        .connects(Step::after(5).fails(Errno::ECONNREFUSED));
    let mut served = serve_request(network, &request()).await;
    let DialReply { outcome, timing, .. } = served.reply().await;
    let failure = outcome.unwrap_err();
    assert_eq!(failure.kind, DialErrorKind::REFUSED);
    assert_eq!(*failure.text, *"dial tcp 10.0.0.1:10250: connect: connection refused");
    assert_eq!(timing.connect_micros, 5_000);
    assert_eq!(served.read().await, Ok(None), "the stream ends cleanly");
    assert_eq!(served.send.stopped().await, Ok(Some(StreamCode::DIAL_FAILED)));
}

impl Served {
    /// The rows of the metric of denials that are not 0, without its name.
    fn denied(&self) -> Vec<String> {
        let text = self.metrics.render(&ServerTunnels::new(CountSource::Leases));
        let rows =
            text.lines().filter_map(|line| line.strip_prefix("culvert_agent_egress_denied_total"));
        let mut rows: Vec<_> = rows.filter(|row| !row.ends_with(" 0")).map(str::to_owned).collect();
        rows.sort_unstable();
        rows
    }
}

fn denying(list: &str) -> Policy {
    Policy { deny: AddressRule::parse_list(list).0, ..Policy::default() }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_the_policy_denies_is_not_connected_to() {
    // The name is fine; what it resolves to is not.
    let network = Scripted::resolving(&["169.254.169.254:10250", "10.0.0.1:10250"]);
    let head = frame::encode(&request()).unwrap();
    let mut served = serve_with((denying("10.0.0.0/8"), false), network, head).await;
    let failure = served.reply().await.outcome.unwrap_err();
    assert_eq!(failure.kind, DialErrorKind::FORBIDDEN);
    assert_eq!(
        *failure.text,
        *"dial tcp 169.254.169.254:10250: refused by the agent's egress policy (link-local)"
    );
    assert_eq!(served.send.stopped().await, Ok(Some(StreamCode::DIAL_FAILED)));
    let rows =
        ["{rule=\"deny\",result=\"refused\"} 1", "{rule=\"link_local\",result=\"refused\"} 1"];
    assert_eq!(served.denied(), rows);
}

#[tokio::test(start_paused = true)]
async fn denied_addresses_are_left_out_of_the_race() {
    let network = Scripted::resolving(&["169.254.169.254:10250", "10.0.0.1:10250"])
        .connects(Step::after(5).fails(Errno::ECONNREFUSED));
    let mut served = serve_request(network, &request()).await;
    let failure = served.reply().await.outcome.unwrap_err();
    assert_eq!(*failure.text, *"dial tcp 10.0.0.1:10250: connect: connection refused");
    assert_eq!(served.denied(), ["{rule=\"link_local\",result=\"refused\"} 1"]);
}

#[tokio::test(start_paused = true)]
async fn an_audit_counts_what_it_does_not_refuse() {
    let network = Scripted::resolving(&["10.0.0.1:10250"]).connects(Step::after(5).connects());
    let head = frame::encode(&request()).unwrap();
    let mut served = serve_with((denying("10.0.0.0/8:10250"), true), network, head).await;
    assert_eq!(served.reply().await.outcome, Ok(()));
    assert_eq!(served.denied(), ["{rule=\"deny\",result=\"audited\"} 1"]);
}

#[tokio::test(start_paused = true)]
async fn the_shorter_limit_of_agent_and_server_applies() {
    for (timeout_millis, limit) in
        [(0, DIAL_TIMEOUT), (2_000, Duration::from_secs(2)), (60_000, DIAL_TIMEOUT)]
    {
        let network =
            Scripted::resolving(&["10.0.0.1:10250"]).connects(Step::after(100_000).connects());
        let started = Instant::now();
        let request = DialRequest { timeout_millis, ..request() };
        let mut served = serve_request(network, &request).await;
        let failure = served.reply().await.outcome.unwrap_err();
        assert_eq!(failure.kind, DialErrorKind::TIMEOUT);
        assert_eq!(started.elapsed(), limit, "{timeout_millis}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_the_server_abandons_ends_at_once() {
    for by_reset in [true, false] {
        let mut network =
            Scripted::resolving(&["10.0.0.1:10250"]).connects(Step::after(100_000).connects());
        let mut abandoned = network.report_abandoned();
        let started = Instant::now();
        let mut served = serve_request(network, &request()).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        match by_reset {
            true => served.send.reset(StreamCode::CANCELLED),
            false => served.recv.stop(StreamCode::CANCELLED),
        }
        abandoned.recv().await.unwrap();
        assert_eq!(started.elapsed(), Duration::from_secs(1), "{by_reset}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_without_a_request_in_time_is_refused() {
    let started = Instant::now();
    let network = Scripted::unresolvable("not dialed");
    let mut served = serve(network, Bytes::from_static(&[DialRequest::KIND])).await;
    assert_eq!(served.read().await, Err(ReadError::Reset(StreamCode::MALFORMED)));
    assert_eq!(started.elapsed(), HEADER_TIMEOUT);
    let written = served.send.write_chunk(Bytes::from_static(b"more")).await;
    assert_eq!(written, Err(WriteError::Stopped(StreamCode::MALFORMED)));
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_begins_with_something_else_is_refused_at_once() {
    let started = Instant::now();
    let network = Scripted::unresolvable("not dialed");
    let mut served = serve(network, Bytes::from_static(&[0x7f, 0, 1, 9])).await;
    assert_eq!(served.read().await, Err(ReadError::Reset(StreamCode::MALFORMED)));
    assert_eq!(started.elapsed(), Duration::ZERO);
}

#[tokio::test]
async fn names_that_hang_leave_threads_for_a_name_that_does_not() {
    const HUNG: usize = 200;
    let metrics = AgentMetrics::new().unwrap();
    let (resolver, mut begun) = ScriptedResolver::new(&["127.0.0.1:0"]);
    let _release = scopeguard::guard(resolver.clone(), |resolver| resolver.release());
    let lookups = Lookups::new(resolver, LOOKUP_LIMITS, metrics.target_lookups.clone());
    let network = Arc::new(TargetNetwork::Host { lookups });
    let gate = Arc::new(Gate::open(Policy::default()));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let dial = |host: String| {
        let (network, gate) = (network.clone(), gate.clone());
        let target = format!("{host}:{port}").parse().unwrap();
        async move {
            let mut timing = DialTiming::default();
            // Longer than the test: nothing in it waits for time.
            let limit = Duration::from_secs(600);
            dial::dial((&network, &gate), Network::Tcp, &target, limit, &mut timing).await
        }
    };
    let mut hung = tokio::task::JoinSet::new();
    for number in 0..HUNG {
        hung.spawn(dial(format!("hang-{number}")));
    }
    for _ in 0..HUNG {
        begun.recv().await.unwrap();
    }
    dial("healthy".to_owned()).await.unwrap();
    assert_eq!(hung.len(), HUNG);
    assert!(hung.try_join_next().is_none(), "the others still hang");
}

/// Most streams are idle most of the time. The step that splices is on the heap.
#[test]
fn a_stream_has_no_room_for_what_it_rarely_does() {
    type Arguments = (&'static Egress, (SendHalf, RecvHalf), Origin);
    let size = size_of_returned(|(egress, halves, origin): Arguments| egress.serve(halves, origin));
    assert!(size <= 2200, "{size} bytes");
}
