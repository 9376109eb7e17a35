//! Control streams in paused time, on a tunnel within this process.

use std::{
    pin::pin,
    task::{Context, Waker},
};

use bytes::Bytes;
use culvert_wire::{
    InstanceId, StreamCode,
    control::{Drain, Hello},
    extension::Extensions,
    frame::{self, Frame},
    identifiers::{Identifier, MAX_IDENTIFIERS},
    version::Features,
};
use tokio::time::{sleep, timeout};

use super::*;
use crate::{
    Carrier, Settings, TransportFault, TunnelLost,
    qmux::Peer,
    test_util::{Pair, Side},
};

const LIMIT: Duration = Duration::from_secs(2);
/// Longer than any ping of these tests may stay unanswered.
const LONG: Duration = Duration::from_secs(3600);

fn drain(deadline_millis: u32) -> ControlMessage {
    ControlMessage::Drain(Drain { deadline_millis })
}

fn ping(echo: u64) -> ControlMessage {
    ControlMessage::Ping(Ping { echo })
}

/// An agent that answers nothing by itself.
struct ScriptedAgent {
    pair: Pair,
    send: SendHalf,
    recv: RecvHalf,
}

impl ScriptedAgent {
    async fn send(&mut self, message: &ControlMessage) {
        self.send_bytes(&message.encode().unwrap()).await;
    }

    async fn send_bytes(&mut self, bytes: &[u8]) {
        self.send.write_chunk(Bytes::copy_from_slice(bytes)).await.unwrap();
    }

    async fn receive(&mut self) -> ControlMessage {
        ControlMessage::decode(&self.recv.read_frame(MAX_BODY_LEN).await.unwrap()).unwrap()
    }

    /// The server's last ping, after which it sent nothing.
    async fn only_ping(&mut self) -> u64 {
        let ControlMessage::Ping(Ping { echo }) = self.receive().await else {
            panic!("a ping was due")
        };
        timeout(LIMIT / 100, self.recv.read_frame(MAX_BODY_LEN)).await.unwrap_err();
        echo
    }
}

/// A server's control stream, and the agent that it was opened by. The tunnel is silent by itself.
async fn scripted() -> (ControlStream, ScriptedAgent) {
    let settings = Settings::default();
    let peer = Peer::local(Carrier::Tcp);
    scripted_on(Pair::without_idle_timeout(peer, &settings, &settings).await.unwrap()).await
}

async fn scripted_on(pair: Pair) -> (ControlStream, ScriptedAgent) {
    let (send, recv) = pair.agent.open().await.unwrap();
    let mut agent = ScriptedAgent { pair, send, recv };
    // A stream exists for the peer from its first byte.
    agent.send(&drain(1)).await;
    let halves = agent.pair.server.accept().await.unwrap();
    let mut server = ControlStream::new(agent.pair.server.clone(), halves);
    assert_eq!(server.next().await, Ok(drain(1)));
    (server, agent)
}

/// The control streams of both ends.
async fn both() -> (ControlStream, ControlStream, Pair) {
    let (server, ScriptedAgent { pair, send, recv }) = scripted().await;
    (server, ControlStream::new(pair.agent.clone(), (send, recv)), pair)
}

/// How long the stream takes to find the peer unresponsive, and the time that it says.
async fn unresponsive(control: &mut ControlStream) -> (Duration, Duration) {
    let start = Instant::now();
    match timeout(LONG, control.next()).await {
        Ok(Err(error @ ControlError::Unresponsive(said))) => {
            assert_eq!(error.close_code(), CloseCode::UNRESPONSIVE);
            (start.elapsed(), said)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_ping_is_answered_with_its_own_echo() {
    let (mut server, mut agent) = scripted().await;
    let talk = async {
        for echo in [7, u64::MAX] {
            agent.send(&ping(echo)).await;
            assert_eq!(agent.receive().await, ControlMessage::Pong(Pong { echo }));
        }
    };
    select! {
        () = talk => {}
        event = server.event() => panic!("{event:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_is_never_unresponsive() {
    let (mut server, mut agent, _pair) = both().await;
    let answer = crate::task::owned(async move { agent.next().await });
    for _ in 0..10 {
        server.ask(LIMIT).await.unwrap();
        // Ten limits and all their renewals pass without an event.
        timeout(LIMIT * 100, server.next()).await.unwrap_err();
    }
    assert!(!answer.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_unresponsive_after_exactly_the_limit() {
    let (mut server, agent) = scripted().await;
    agent.pair.line.silence(Side::Agent);
    server.ask(LIMIT).await.unwrap();
    assert_eq!(unresponsive(&mut server).await, (LIMIT, LIMIT));
}

#[tokio::test(start_paused = true)]
async fn a_peer_is_not_unresponsive_because_this_process_did_not_run() {
    let (mut server, agent) = scripted().await;
    agent.pair.line.silence(Side::Agent);
    server.ask(LIMIT).await.unwrap();
    // The process is suspended until long after the deadline; then a silent peer has a new one.
    tokio::time::advance(LIMIT * 10).await;
    assert_eq!(unresponsive(&mut server).await, (LIMIT, LIMIT * 2));
}

#[tokio::test(start_paused = true)]
async fn a_distant_peer_gets_three_round_trips_more() {
    let rtt = Duration::from_millis(300);
    let keep_alive_interval = Some(LIMIT * 2);
    let settings = Settings { keep_alive_interval, ..Settings::default() };
    let pair = Pair::new(Peer::local(Carrier::Tcp), &settings, &settings).await.unwrap();
    let (mut server, agent) = scripted_on(pair).await;
    // The carrier's keep-alive is answered after one round trip.
    let line = &agent.pair.line;
    line.silence(Side::Agent);
    sleep(LIMIT * 2 + rtt).await;
    line.restore(Side::Agent);
    sleep(LIMIT / 100).await;
    assert_eq!(agent.pair.server.stats().rtt, rtt);
    line.silence(Side::Agent);
    server.ask(LIMIT).await.unwrap();
    assert_eq!(unresponsive(&mut server).await, (LIMIT + rtt * 3, LIMIT + rtt * 3));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_is_heard_and_does_not_answer_gets_every_renewal() {
    let (mut server, mut agent) = scripted().await;
    server.ask(LIMIT).await.unwrap();
    let chatter = crate::task::owned(async move {
        loop {
            agent.send_bytes(&[0x40, 0, 0]).await;
            sleep(LIMIT / 2).await;
        }
    });
    let whole = LIMIT * (1 + MAX_RENEWALS);
    assert_eq!(unresponsive(&mut server).await, (whole, whole));
    chatter.abort();
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_falls_silent_is_unresponsive_one_limit_after_the_renewal() {
    let (mut server, mut agent) = scripted().await;
    server.ask(LIMIT).await.unwrap();
    agent.send_bytes(&[0x40, 0, 0]).await;
    assert_eq!(unresponsive(&mut server).await, (LIMIT * 2, LIMIT * 2));
}

/// Bytes of streams that this side does not read count as well.
#[tokio::test(start_paused = true)]
async fn a_peer_is_heard_by_what_it_sends_on_other_streams() {
    let (mut server, agent) = scripted().await;
    let (mut send, _recv) = agent.pair.agent.open().await.unwrap();
    server.ask(LIMIT).await.unwrap();
    send.write_chunk(Bytes::from_static(b"unread")).await.unwrap();
    assert_eq!(unresponsive(&mut server).await, (LIMIT * 2, LIMIT * 2));
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_another_ping_is_no_answer() {
    let (mut server, mut agent) = scripted().await;
    server.ask(LIMIT).await.unwrap();
    let echo = agent.only_ping().await;
    agent.send(&ControlMessage::Pong(Pong { echo: echo + 1 })).await;
    unresponsive(&mut server).await;
}

#[tokio::test(start_paused = true)]
async fn a_ping_that_was_answered_has_no_deadline_and_the_next_one_does() {
    let (mut server, mut agent) = scripted().await;
    server.ask(LIMIT).await.unwrap();
    let first = agent.only_ping().await;
    agent.send(&ControlMessage::Pong(Pong { echo: first })).await;
    timeout(LONG, server.next()).await.unwrap_err();
    server.ask(LIMIT).await.unwrap();
    assert_ne!(agent.only_ping().await, first);
    // The first answer once more answers nothing.
    agent.send(&ControlMessage::Pong(Pong { echo: first })).await;
    unresponsive(&mut server).await;
}

#[tokio::test(start_paused = true)]
async fn of_two_deadlines_the_nearer_one_counts_and_one_ping_is_sent() {
    let (near, far) = (LIMIT, LIMIT * 10);
    for (first, second, whole) in [(near, far, near), (far, near, near + LIMIT / 4)] {
        let (mut server, mut agent) = scripted().await;
        agent.pair.line.silence(Side::Agent);
        let start = Instant::now();
        server.ask(first).await.unwrap();
        timeout(LIMIT / 4, server.next()).await.unwrap_err();
        server.ask(second).await.unwrap();
        assert_eq!(unresponsive(&mut server).await.1, near);
        assert_eq!(start.elapsed(), whole);
        agent.only_ping().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_nudge_needs_no_answer() {
    let (mut server, mut agent) = scripted().await;
    server.nudge().await.unwrap();
    agent.only_ping().await;
    timeout(LONG, server.next()).await.unwrap_err();
}

#[tokio::test(start_paused = true)]
async fn messages_of_later_revisions_are_ignored() {
    let (mut server, mut agent) = scripted().await;
    for kind in [0x00, 0x0c, 0x0f, 0x20, 0xff] {
        agent.send_bytes(&[kind, 0, 2, 1, 2]).await;
    }
    agent.send(&drain(9)).await;
    assert_eq!(server.next().await, Ok(drain(9)));
}

#[tokio::test(start_paused = true)]
async fn frames_that_break_the_protocol_end_the_stream() {
    type Check = fn(&FrameError) -> bool;
    let long = u16::try_from(MAX_BODY_LEN + 1).unwrap().to_be_bytes();
    let cases: [(&[u8], Check); 3] = [
        // A body that is too long, of a kind that would be ignored.
        (&[0x40, long[0], long[1]], |e| matches!(e, FrameError::Oversized { .. })),
        // The head of a data stream.
        (&[0x10, 0, 0], |e| matches!(e, FrameError::UnexpectedKind { .. })),
        // A ping without its echo.
        (&[0x03, 0, 0], |e| matches!(e, FrameError::Body { .. })),
    ];
    for (bytes, is_expected) in cases {
        let (mut server, mut agent) = scripted().await;
        agent.send_bytes(bytes).await;
        match server.next().await {
            Err(error @ ControlError::Frame(_)) => {
                assert_eq!(error.close_code(), CloseCode::PROTOCOL_VIOLATION);
                let ControlError::Frame(fault) = error else { unreachable!() };
                assert!(is_expected(&fault), "{bytes:?}: {fault}");
            }
            other => panic!("{bytes:?}: {other:?}"),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn the_largest_frame_is_taken() {
    let (mut server, mut agent) = scripted().await;
    let [high, low] = u16::try_from(MAX_BODY_LEN).unwrap().to_be_bytes();
    agent.send_bytes(&[&[0x40, high, low][..], &[0; MAX_BODY_LEN]].concat()).await;
    agent.send(&drain(2)).await;
    assert_eq!(server.next().await, Ok(drain(2)));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_stream_is_a_fault_wherever_it_comes() {
    for bytes in [&[][..], &[0x05, 0], &[0x05, 0, 9, 1]] {
        let (mut server, mut agent) = scripted().await;
        agent.send_bytes(bytes).await;
        agent.send.finish();
        assert_eq!(server.next().await, Err(ControlError::Ended), "{bytes:?}");
        assert_eq!(ControlError::Ended.close_code(), CloseCode::PROTOCOL_VIOLATION);
    }
    let (mut server, mut agent) = scripted().await;
    agent.send.reset(StreamCode::SHUTDOWN);
    let reset = ReadError::Reset(StreamCode::SHUTDOWN);
    assert_eq!(server.next().await, Err(ControlError::Read(reset)));
}

#[tokio::test(start_paused = true)]
async fn a_lost_tunnel_ends_the_stream_with_its_cause() {
    let (mut server, agent) = scripted().await;
    agent.pair.line.cut();
    let error = server.next().await.unwrap_err();
    match error.lost() {
        Some(TunnelLost::Transport(TransportFault::Io(io))) => {
            assert_eq!(io.kind, std::io::ErrorKind::ConnectionReset);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(ControlError::Unexpected.lost(), None);
}

/// A caller waits for events beside others and starts to wait anew after each of those.
#[tokio::test(start_paused = true)]
async fn an_event_that_is_awaited_anew_after_each_byte_loses_none() {
    let (mut server, mut agent) = scripted().await;
    let messages = [ping(1), drain(2), ping(3), drain(4), drain(5)];
    let bytes: Vec<_> =
        messages.iter().flat_map(|message| message.encode().unwrap().to_vec()).collect();
    let mut received = Vec::new();
    for byte in bytes {
        agent.send_bytes(&[byte]).await;
        // Everything in flight arrives before the time-out: the clock stands still until then.
        if let Ok(message) = timeout(LIMIT / 1000, server.next()).await {
            received.push(message.unwrap());
        }
        // Polled once and dropped.
        let _ = pin!(server.event()).poll(&mut Context::from_waker(Waker::noop()));
    }
    assert_eq!(received, [drain(2), drain(4), drain(5)]);
    for echo in [1, 3] {
        assert_eq!(agent.receive().await, ControlMessage::Pong(Pong { echo }));
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_has_no_frame_is_not_sent() {
    let (mut server, mut agent) = scripted().await;
    server.send(&ControlMessage::Unknown { kind: 0x40 }).await.unwrap();
    server.send(&drain(3)).await.unwrap();
    let Frame { kind, body } = agent.recv.read_frame(MAX_BODY_LEN).await.unwrap();
    let expected = frame::encode(&Drain { deadline_millis: 3 }).unwrap();
    assert_eq!((kind, &body[..]), (0x05, &expected[frame::HEAD_LEN..]));
}

#[tokio::test(start_paused = true)]
async fn a_message_that_does_not_fit_its_frame_is_not_sent() {
    let (mut server, mut agent) = scripted().await;
    let longest = Identifier::new(&"k".repeat(32), &"v".repeat(255)).unwrap();
    let hello = Hello {
        revision: 1,
        features: Features::NONE,
        agent_id: "node-1".parse().unwrap(),
        instance: InstanceId([0; 16]),
        identifiers: vec![longest; MAX_IDENTIFIERS].try_into().unwrap(),
        token: None,
        software: "".try_into().unwrap(),
        extensions: Extensions::default(),
    };
    let error = server.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap_err();
    assert!(matches!(error, ControlError::Encode(_)), "{error:?}");
    assert_eq!(error.close_code(), CloseCode::ABANDONED);
    server.send(&drain(3)).await.unwrap();
    assert_eq!(agent.receive().await, drain(3));
}

/// A server whose agent reads nothing of the control stream, after it granted credit for a few
/// messages.
async fn unread() -> (ControlStream, ScriptedAgent) {
    let settings = Settings::default();
    let agent = Settings { stream_receive_window: 16, ..settings };
    let peer = Peer::local(Carrier::Tcp);
    scripted_on(Pair::without_idle_timeout(peer, &agent, &settings).await.unwrap()).await
}

#[tokio::test(start_paused = true)]
async fn a_message_that_the_peer_does_not_take_fails_after_the_limit() {
    let (mut server, _agent) = unread().await;
    let begun = Instant::now();
    let error = loop {
        if let Err(error) = server.send(&drain(1)).await {
            break error;
        }
        assert_eq!(begun.elapsed(), Duration::ZERO, "there is credit, or none");
    };
    assert_eq!(error, ControlError::NotReading(WRITE_LIMIT));
    assert_eq!(error.close_code(), CloseCode::UNRESPONSIVE);
    assert_eq!(begun.elapsed(), WRITE_LIMIT);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_takes_no_ping_is_unresponsive_within_the_pings_limit() {
    let (mut server, _agent) = unread().await;
    while timeout(Duration::ZERO, server.send(&drain(1))).await.is_ok() {}
    let begun = Instant::now();
    server.ask(WRITE_LIMIT / 3).await.unwrap();
    assert_eq!(unresponsive(&mut server).await.1, WRITE_LIMIT / 3);
    assert_eq!(begun.elapsed(), WRITE_LIMIT / 3);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_pings_and_takes_no_answer_is_given_up() {
    let (mut server, mut agent) = unread().await;
    let pinging = crate::task::owned(async move {
        let mut echo = 0;
        loop {
            echo += 1;
            agent.send(&ping(echo)).await;
            // As often as it may.
            sleep(ping_rate::INTERVAL).await;
        }
    });
    let error = timeout(LONG, server.next()).await.unwrap().unwrap_err();
    assert!(matches!(error, ControlError::NotReading(_)), "{error:?}");
    pinging.abort();
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_pings_too_often_is_given_up() {
    let (mut server, mut agent) = scripted().await;
    let pinging = async {
        for echo in 1.. {
            agent.send(&ping(echo)).await;
            agent.receive().await;
        }
    };
    let error = select! {
        event = server.next() => event.unwrap_err(),
        () = pinging => unreachable!(),
    };
    assert_eq!(error, ControlError::TooManyPings);
    assert_eq!(error.close_code(), CloseCode::TOO_MANY_PINGS);
}

/// A burst of dials that wait asks for each of them, and the agent answers within microseconds.
#[tokio::test(start_paused = true)]
async fn a_side_that_asks_without_end_pings_no_more_often_than_its_peer_admits() {
    let (mut server, mut agent, _pair) = both().await;
    let answering = crate::task::owned(async move { agent.next().await });
    let start = Instant::now();
    for _ in 0..10_000 {
        server.ask(LIMIT).await.unwrap();
        server.nudge().await.unwrap();
        timeout(Duration::from_millis(1), server.next()).await.unwrap_err();
    }
    assert!(!answering.is_finished(), "the peer gave this side up");
    let most = start.elapsed().div_duration_f64(ping_rate::INTERVAL) + 1.0;
    assert!((most * 0.9..=most).contains(&(server.next_echo as f64)), "{}", server.next_echo);
}

#[tokio::test(start_paused = true)]
async fn a_question_whose_ping_has_to_wait_has_the_whole_limit_for_its_answer() {
    let (mut server, mut agent) = scripted().await;
    server.nudge().await.unwrap();
    agent.only_ping().await;
    let asked = Instant::now();
    server.ask(LIMIT).await.unwrap();
    let (_, said) = unresponsive(&mut server).await;
    let waited = asked.elapsed();
    agent.only_ping().await;
    assert!(waited >= LIMIT, "{waited:?}");
    assert!(
        said <= LIMIT + ping_rate::INTERVAL && waited <= LIMIT + ping_rate::INTERVAL,
        "{said:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn messages_stay_whole_when_their_senders_are_cancelled() {
    let (mut server, mut agent) = unread().await;
    let messages: Vec<_> = (0..40).map(|number| drain(number * 100_000)).collect();
    for message in &messages {
        // Soon there is no credit, and the sender does not wait for it.
        let _ = timeout(Duration::ZERO, server.send(message)).await;
    }
    let reading = async {
        let mut received = Vec::new();
        for _ in &messages {
            received.push(agent.receive().await);
        }
        received
    };
    select! {
        received = reading => assert_eq!(received, messages),
        event = server.event() => panic!("{event:?}"),
    }
}
