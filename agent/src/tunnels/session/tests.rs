use std::pin::pin;

use bytes::Bytes;
use culvert_transport::{
    Carrier, ReadError, RecvHalf, SendHalf, Settings, test_util::Side, tls::Replace,
};
use culvert_wire::{bounded::PeerText, control::Ping, dial::DialRequest, frame::Message as _};
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::*;
use crate::{
    test_support::{ServerEnd, connect, connect_to, context, entries, welcome},
    tunnels::{AddOutcome, NewTunnel, Rank},
};

/// Joins on a new tunnel; `answer` is the server's part.
async fn join_with<T>(
    context: &SessionContext,
    answer: impl AsyncFnOnce(ServerEnd) -> T,
) -> (Result<Joined, JoinError>, T) {
    join_to(&Settings::default(), context, answer).await
}

/// The same with these settings of the server.
async fn join_to<T>(
    server: &Settings,
    context: &SessionContext,
    answer: impl AsyncFnOnce(ServerEnd) -> T,
) -> (Result<Joined, JoinError>, T) {
    let (connected, end) = connect_to(Carrier::Quic, server).await;
    tokio::join!(join(connected, context), answer(end))
}

/// A session that is served, and the server's end of it.
struct Serving {
    end: ServerEnd,
    control: ControlStream,
    context: Arc<SessionContext>,
    tunnels: Arc<ServerTunnels>,
    entry: Arc<ServerTunnel>,
    session: AbortOnDropHandle<TunnelLost>,
}

async fn serve(context: SessionContext) -> Serving {
    serve_to(&Settings::default(), context).await
}

/// The same with these settings of the server.
async fn serve_to(server: &Settings, context: SessionContext) -> Serving {
    let (joined, (end, control)) = join_to(server, &context, async |end: ServerEnd| {
        let (mut control, _) = end.hello().await;
        control.send(&welcome("server-0", 1)).await.unwrap();
        (end, control)
    })
    .await;
    serve_joined(joined.unwrap(), end, control, context)
}

fn serve_joined(
    joined: Joined,
    end: ServerEnd,
    control: ControlStream,
    context: SessionContext,
) -> Serving {
    let (context, tunnels) = (Arc::new(context), Arc::new(ServerTunnels::default()));
    let entry = add(&tunnels, joined.tunnel(), Rank::Quic);
    let task = {
        let (entry, tunnels, context) = (entry.clone(), tunnels.clone(), context.clone());
        culvert_transport::task::owned(async move { joined.serve(&entry, &tunnels, context).await })
    };
    Serving { end, control, context, tunnels, entry, session: task }
}

fn add(tunnels: &ServerTunnels, tunnel: &Tunnel, rank: Rank) -> Arc<ServerTunnel> {
    let new = NewTunnel {
        server_id: "server-0".parse().unwrap(),
        tunnel: tunnel.clone(),
        buffers: None,
        rank,
        reason: "first_choice",
        version: crate::tunnels::PeerVersion::default(),
        servers: Default::default(),
    };
    match tunnels.add(new, Instant::now()) {
        AddOutcome::New(added) | AddOutcome::Replaced { added, .. } => added,
        AddOutcome::Duplicate => panic!("not added"),
    }
}

impl Serving {
    /// Opens a stream whose dial request never comes to its end: it stays open for ten seconds.
    async fn open(&self) -> (SendHalf, RecvHalf) {
        let (mut send, recv) = self.end.tunnel.open().await.unwrap();
        send.write_chunk(Bytes::from_static(&[DialRequest::KIND])).await.unwrap();
        (send, recv)
    }

    async fn drain(&mut self) -> Drain {
        match self.control.next().await.unwrap() {
            ControlMessage::Drain(drain) => drain,
            other => panic!("expected drain, got {other:?}"),
        }
    }

    /// The code with which the agent closes the tunnel.
    async fn closed(&self) -> CloseCode {
        match self.end.tunnel.closed().await {
            TunnelLost::ClosedByPeer { code, .. } => code,
            other => panic!("not closed by the agent: {other}"),
        }
    }
}

async fn read(recv: &mut RecvHalf) -> Result<Option<usize>, ReadError> {
    recv.read_chunks(&mut [Bytes::new()]).await
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[tokio::test(start_paused = true)]
async fn hello_carries_the_agents_name_process_and_token() {
    let context = context(Some("secret"));
    let (joined, (_end, _control, hello)) = join_with(&context, async |end: ServerEnd| {
        let (mut control, hello) = end.hello().await;
        control.send(&welcome("server-0", 3)).await.unwrap();
        (end, control, hello)
    })
    .await;
    let joined = joined.unwrap();
    assert_eq!(joined.welcome.server_id.as_str(), "server-0");
    assert_eq!(joined.welcome.server_count, 3);
    assert_eq!((hello.agent_id.as_str(), hello.instance), ("node-1", context.instance));
    assert_eq!(hello.token, Some(Secret::new("secret").unwrap()));
    assert_eq!((hello.revision, hello.features), (REVISION, Features::supported()));
}

#[tokio::test(start_paused = true)]
async fn another_answer_than_welcome_closes_the_tunnel() {
    let (joined, lost) = join_with(&context(None), async |end: ServerEnd| {
        let (mut control, _) = end.hello().await;
        control.send(&ControlMessage::Drain(Drain { deadline_millis: 0 })).await.unwrap();
        end.tunnel.closed().await
    })
    .await;
    let error = joined.unwrap_err();
    assert!(matches!(error, JoinError::NotWelcome) && error.is_refusal(), "{error}");
    let reason = PeerText::truncated(error.to_string());
    assert_eq!(lost, TunnelLost::ClosedByPeer { code: CloseCode::PROTOCOL_VIOLATION, reason });
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_reported_with_the_servers_reason() {
    let (joined, ()) = join_with(&context(None), async |end: ServerEnd| {
        let (control, _) = end.hello().await;
        // The end of the control stream arrives first.
        drop(control);
        sleep(secs(1)).await;
        end.tunnel.close(CloseCode::UNAUTHENTICATED, "no token");
        end.tunnel.flushed(secs(1)).await;
    })
    .await;
    let error = joined.unwrap_err();
    assert!(error.is_refusal());
    assert_eq!(error.to_string(), "closed by the peer: unauthenticated: no token");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_is_lost_before_the_welcome_is_no_refusal() {
    let (joined, _) = join_with(&context(None), async |end: ServerEnd| {
        let _ = end.hello().await;
        end.line.cut();
    })
    .await;
    assert!(!joined.unwrap_err().is_refusal());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_gives_up_its_join_breaks_no_protocol() {
    let (connected, end) = connect(Carrier::Quic).await;
    let context = context(None);
    let mut control = {
        let joining = pin!(join(connected, &context));
        tokio::select! {
            joined = joining => panic!("{joined:?}"),
            (control, _) = end.hello() => control,
        }
    };
    let lost = TunnelLost::ClosedByPeer { code: CloseCode::ABANDONED, reason: PeerText::default() };
    assert_eq!(control.event().await.unwrap_err().lost(), Some(&lost));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_that_is_lost_while_the_hello_is_sent_is_no_refusal() {
    let (connected, end) = connect(Carrier::Quic).await;
    let context = context(None);
    end.line.silence(Side::Agent);
    // The control stream opens, and then there is no tunnel to send the hello on.
    let opened = connected.tunnel.open().await.unwrap();
    let mut session = Session {
        control: ControlStream::new(connected.tunnel.clone(), opened),
        tunnel: connected.tunnel,
        token: None,
    };
    end.line.cut();
    session.tunnel.closed().await;
    let error = introduce(&mut session, &context).await.unwrap_err();
    assert!(matches!(error, JoinError::Lost(_)) && !error.is_refusal(), "{error}");
}

#[tokio::test(start_paused = true)]
async fn draining_waits_for_streams_and_then_closes_the_tunnel() {
    let mut serving = serve(context(None)).await;
    let (mut send, _recv) = serving.open().await;
    sleep(secs(1)).await;
    let begun = Instant::now();
    serving.context.draining.cancel();
    assert_eq!(serving.drain().await.deadline_millis, 20_000);
    // A dial that the server sent before it received the drain is still served.
    let (mut late, mut answer) = serving.end.tunnel.open().await.unwrap();
    late.write_chunk(Bytes::from_static(&[0x7f, 0, 0])).await.unwrap();
    assert_eq!(read(&mut answer).await, Err(ReadError::Reset(StreamCode::MALFORMED)));
    sleep(secs(3)).await;
    send.reset(StreamCode::CANCELLED);
    assert_eq!(serving.closed().await, CloseCode::DONE);
    assert_eq!(begun.elapsed().as_secs(), 3);
    let lost = serving.session.await.unwrap();
    assert!(matches!(lost, TunnelLost::ClosedHere { code: CloseCode::DONE, .. }), "{lost}");
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_without_streams_stays_for_a_moment_when_it_drains() {
    let mut serving = serve(context(None)).await;
    let begun = Instant::now();
    serving.context.draining.cancel();
    serving.drain().await;
    assert_eq!(serving.closed().await, CloseCode::DONE);
    let elapsed = begun.elapsed();
    assert!((DRAIN_LINGER..DRAIN_LINGER * 2).contains(&elapsed), "{elapsed:?}");
}

#[tokio::test(start_paused = true)]
async fn streams_that_outlast_the_time_for_draining_are_cut() {
    let mut serving = serve(SessionContext { drain_timeout: secs(2), ..context(None) }).await;
    let _stream = serving.open().await;
    sleep(secs(1)).await;
    let begun = Instant::now();
    serving.context.draining.cancel();
    assert_eq!(serving.drain().await.deadline_millis, 2_000);
    assert_eq!(serving.closed().await, CloseCode::SHUTDOWN);
    assert_eq!(begun.elapsed().as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_retired_tunnel_has_no_limit_until_the_agent_drains() {
    let context = SessionContext { drain_timeout: secs(2), ..context(None) };
    let mut serving = serve(context).await;
    let _stream = serving.open().await;
    sleep(secs(1)).await;
    serving.tunnels.set_suspicion(&serving.entry, Some(Suspicion::Refused));
    add(&serving.tunnels, &serving.entry.tunnel, Rank::Tcp);
    assert_eq!(serving.drain().await.deadline_millis, u32::MAX);
    assert!(timeout(secs(5), serving.end.tunnel.closed()).await.is_err());
    let begun = Instant::now();
    serving.context.draining.cancel();
    assert_eq!(serving.closed().await, CloseCode::SHUTDOWN);
    assert_eq!(begun.elapsed().as_secs(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_retired_tunnel_is_closed_as_superseded_once_its_streams_have_ended() {
    let mut serving = serve(context(None)).await;
    let (mut send, _recv) = serving.open().await;
    sleep(secs(1)).await;
    serving.tunnels.set_suspicion(&serving.entry, Some(Suspicion::Refused));
    add(&serving.tunnels, &serving.entry.tunnel, Rank::Tcp);
    serving.drain().await;
    send.reset(StreamCode::CANCELLED);
    assert_eq!(serving.closed().await, CloseCode::SUPERSEDED);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_does_not_belong_after_the_welcome_closes_the_tunnel() {
    let mut serving = serve(context(None)).await;
    serving.control.send(&welcome("server-0", 1)).await.unwrap();
    assert_eq!(serving.closed().await, CloseCode::PROTOCOL_VIOLATION);
}

#[tokio::test(start_paused = true)]
async fn the_list_of_a_server_that_does_not_offer_server_sets_is_ignored() {
    let context = context(None);
    let list = [("b".to_owned(), "192.0.2.2:8132".to_owned())];
    for (features, expected) in [(Features::NONE, 0), (Features::SERVER_SET, 1)] {
        let (joined, _end) = join_with(&context, async |end: ServerEnd| {
            let (mut control, hello) = end.hello().await;
            assert!(hello.features.contains(Features::SERVER_SET));
            let ControlMessage::Welcome(mut answer) = welcome("server-0", 1) else { panic!() };
            (answer.features, answer.servers) = (features, entries(&list));
            control.send(&ControlMessage::Welcome(answer)).await.unwrap();
            (end, control)
        })
        .await;
        assert_eq!(joined.unwrap().welcome.servers.len(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn the_servers_drain_and_goodbye_leave_the_tunnel_open() {
    let mut serving = serve(context(None)).await;
    serving.control.send(&ControlMessage::Drain(Drain { deadline_millis: 9 })).await.unwrap();
    let goodbye = Goodbye { code: 0, reason: Text::truncated("later".into()) };
    serving.control.send(&ControlMessage::Goodbye(goodbye)).await.unwrap();
    assert!(timeout(secs(60), serving.end.tunnel.closed()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn streams_beyond_the_maximum_are_refused() {
    let serving = serve(SessionContext { max_streams: 2, ..context(None) }).await;
    let _first = serving.open().await;
    let second = serving.open().await;
    let (_send, mut third) = serving.open().await;
    assert_eq!(read(&mut third).await, Err(ReadError::Reset(StreamCode::OVERLOADED)));
    drop(second);
    sleep(secs(1)).await;
    let (_send, mut again) = serving.open().await;
    assert!(timeout(secs(1), read(&mut again)).await.is_err(), "the stream waits for its dial");
}

#[tokio::test(start_paused = true)]
async fn streams_that_cost_half_of_the_memory_leave_no_room_for_another_until_one_ends() {
    let memory = MemoryBudget::new(50 << 10);
    let serving = serve(SessionContext { memory, ..context(None) }).await;
    let _first = serving.open().await;
    let second = serving.open().await;
    let (_send, mut third) = serving.open().await;
    assert_eq!(read(&mut third).await, Err(ReadError::Reset(StreamCode::OVERLOADED)));
    drop(second);
    sleep(secs(1)).await;
    let (_send, mut again) = serving.open().await;
    assert!(timeout(secs(1), read(&mut again)).await.is_err(), "the stream waits for its dial");
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_streams_grows_as_they_are_used() {
    let serving = serve(context(None)).await;
    let mut streams = Vec::new();
    let opened = timeout(secs(5), async {
        for _ in 0..600 {
            streams.push(serving.open().await);
        }
    });
    opened.await.unwrap();
    assert_eq!(streams.len(), 600);
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_becomes_suspect_and_is_not_once_it_answers() {
    let serving = serve(context(None)).await;
    let _stream = serving.open().await;
    sleep(secs(1)).await;
    let begun = Instant::now();
    serving.end.line.silence(Side::Server);
    serving.tunnels.changed().await;
    assert_eq!(serving.entry.suspicion(), Some(Suspicion::Silent));
    let elapsed = begun.elapsed();
    assert!((secs(1)..=secs(3)).contains(&elapsed), "{elapsed:?}");
    serving.end.line.restore(Side::Server);
    let Serving { mut control, tunnels, entry, session: _session, end: _end, .. } = serving;
    let answer =
        culvert_transport::task::owned(async move { while control.next().await.is_ok() {} });
    timeout(secs(1), tunnels.changed()).await.unwrap();
    assert_eq!(entry.suspicion(), None);
    answer.abort();
}

/// A dial waits at most 10 s for another tunnel.
#[tokio::test(start_paused = true)]
async fn the_silence_of_a_server_over_tcp_is_noticed_before_a_dial_has_failed() {
    for (rank, streams, limit) in [
        (Rank::Tcp, 0, Some(secs(7))),
        (Rank::Tcp, 1, Some(secs(4))),
        // The bridge to a Konnectivity server is in this process.
        (Rank::Grpc, 1, None),
    ] {
        let context = SessionContext { keep_alive_interval: Some(secs(5)), ..context(None) };
        let (connected, end) = connect_to(Carrier::Tcp, &Settings::default()).await;
        let (joined, (end, _control)) = tokio::join!(join(connected, &context), async {
            let (mut control, _) = end.hello().await;
            control.send(&welcome("server-0", 1)).await.unwrap();
            (end, control)
        });
        let joined = joined.unwrap();
        let tunnels = Arc::new(ServerTunnels::default());
        let entry = add(&tunnels, joined.tunnel(), rank);
        let serving = {
            let (entry, tunnels) = (entry.clone(), tunnels.clone());
            async move { joined.serve(&entry, &tunnels, Arc::new(context)).await }
        };
        let _serving = culvert_transport::task::owned(serving);
        for _ in 0..streams {
            let (mut send, recv) = end.tunnel.open().await.unwrap();
            send.write_chunk(Bytes::from_static(&[DialRequest::KIND])).await.unwrap();
            mem::forget((send, recv));
        }
        sleep(secs(1)).await;
        let begun = Instant::now();
        end.line.silence(Side::Server);
        let noticed = timeout(secs(20), tunnels.changed()).await.is_ok();
        assert_eq!(noticed, limit.is_some(), "{rank:?}");
        let expected = limit.map(|_| Suspicion::Silent);
        assert_eq!(entry.suspicion(), expected, "{rank:?}, {streams} streams");
        let elapsed = begun.elapsed();
        assert!(limit.is_none_or(|limit| elapsed <= limit), "{elapsed:?}, {streams} streams");
    }
}

#[tokio::test(start_paused = true)]
async fn the_silence_of_a_server_on_an_idle_tunnel_is_noticed_before_a_dial_has_failed() {
    let keep_alive_interval = Some(secs(5));
    let serving = serve(SessionContext { keep_alive_interval, ..context(None) }).await;
    serving.end.line.silence(Side::Server);
    let begun = Instant::now();
    serving.tunnels.changed().await;
    assert_eq!(serving.entry.suspicion(), Some(Suspicion::Silent));
    let elapsed = begun.elapsed();
    assert!((secs(5)..=secs(7)).contains(&elapsed), "{elapsed:?}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_takes_no_message_does_not_hold_up_the_drain() {
    /// Number of answers to pings, of 12 bytes, that fill the carrier's buffer of 128 KiB and leave
    /// some waiting in the control stream.
    const ANSWERS: usize = 10_950;
    // Credit for less than one message, unless the server reads.
    let server = Settings { stream_receive_window: 4, ..Settings::default() };
    for (drain_timeout, limit) in [(secs(1), secs(1)), (secs(20), secs(2))] {
        let context = SessionContext { drain_timeout, ..context(None) };
        let mut serving = serve_to(&server, context).await;
        let ping = ControlMessage::Ping(Ping { echo: u64::MAX });
        for _ in 0..ANSWERS {
            serving.control.send(&ping).await.unwrap();
            // As often as a peer may ping.
            sleep(Duration::from_millis(50)).await;
        }
        sleep(Duration::from_millis(10)).await;
        let begun = Instant::now();
        serving.context.draining.cancel();
        let closed = timeout(secs(60), serving.closed()).await.unwrap();
        assert!([CloseCode::SHUTDOWN, CloseCode::UNRESPONSIVE].contains(&closed), "{closed}");
        // The goodbye has a second more.
        let elapsed = begun.elapsed();
        assert!((secs(1)..=limit + FLUSH_TIMEOUT).contains(&elapsed), "{elapsed:?}");
    }
}

/// Serves a session to a server with these features whose agent has a token; the server was sent
/// the first one.
async fn serve_with_token(features: Features) -> (Serving, Replace<Secret>) {
    let secret = |text| Secret::new(text).unwrap();
    let (replace, token) = Current::replaceable(secret("first"));
    let context = SessionContext { token: Some(token), ..context(None) };
    let (joined, (end, control)) = join_with(&context, async |end: ServerEnd| {
        let (mut control, hello) = end.hello().await;
        assert_eq!(hello.token.unwrap().expose(), "first");
        // A token that is replaced before the welcome is sent after it.
        replace.with(secret("second"));
        let ControlMessage::Welcome(mut answer) = welcome("server-0", 1) else { unreachable!() };
        answer.features = features;
        control.send(&ControlMessage::Welcome(answer)).await.unwrap();
        (end, control)
    })
    .await;
    (serve_joined(joined.unwrap(), end, control, context), replace)
}

async fn renewed(serving: &mut Serving) -> String {
    match serving.control.next().await.unwrap() {
        ControlMessage::Renewal(Renewal { token }) => token.expose().to_owned(),
        other => panic!("expected renewal, got {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn the_server_is_sent_each_new_token_also_while_the_tunnel_drains() {
    let (mut serving, replace) = serve_with_token(Features::RENEWAL).await;
    assert_eq!(renewed(&mut serving).await, "second");
    replace.with(Secret::new("third").unwrap());
    assert_eq!(renewed(&mut serving).await, "third");
    let _open = serving.open().await;
    serving.entry.retire();
    serving.drain().await;
    replace.with(Secret::new("fourth").unwrap());
    assert_eq!(renewed(&mut serving).await, "fourth");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_ask_for_new_tokens_is_sent_none() {
    let (mut serving, replace) = serve_with_token(Features::NONE).await;
    replace.with(Secret::new("third").unwrap());
    assert!(timeout(secs(3600), serving.control.next()).await.is_err());
}
