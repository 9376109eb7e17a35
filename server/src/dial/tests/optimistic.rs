//! Dials that are answered before the agent replies.

use super::*;

/// A dialer whose agent has reached the target a moment ago.
async fn reached_recently() -> (Dialing, TestAgent) {
    let dialing = Dialing::optimistic();
    let agent = dialing.agent("a").await;
    let (first, _asked) = join!(dialing.dial(), accepting(&agent));
    assert!(first.unwrap().reply.timing().is_some(), "the first dial waits for the reply");
    (dialing, agent)
}

/// An optimistic dial, which is done before the agent has replied.
async fn expected(dialing: &Dialing, agent: &TestAgent) -> (Dialed, Asked) {
    let (dialed, asked) = join!(dialing.dial(), agent.asked());
    let dialed = dialed.unwrap();
    assert!(dialed.reply.timing().is_none());
    assert_eq!(dialing.pending(), 1.0);
    (dialed, asked)
}

#[tokio::test(start_paused = true)]
async fn an_expected_reply_that_is_positive_is_taken_off_the_stream() {
    let (dialing, agent) = reached_recently().await;
    let (mut dialed, mut asked) = expected(&dialing, &agent).await;
    asked.reply(Ok(())).await;
    asked.send.write_chunk(Bytes::from_static(b"target")).await.unwrap();
    dialed.reply.read(&mut dialed.stream.1).await.unwrap();
    assert_eq!(read(&mut dialed.stream.1).await, "target");
    assert_eq!(dialing.metric("culvert_server_optimistic_dials_total{result=\"kept\"}"), 1.0);
    assert_eq!(dialing.pending(), 0.0);
}

#[tokio::test(start_paused = true)]
async fn an_expected_reply_that_is_negative_cuts_the_connection_and_the_target_is_forgotten() {
    let (dialing, agent) = reached_recently().await;
    let (mut dialed, mut asked) = expected(&dialing, &agent).await;
    asked.reply(Err(refusal())).await;
    let cut = dialed.reply.read(&mut dialed.stream.1).await.unwrap_err();
    assert_eq!(cut.code(), StreamCode::DIAL_FAILED);
    assert_eq!(cut.to_string(), refusal().to_string());
    assert_eq!(dialing.metric("culvert_server_optimistic_dials_total{result=\"broken\"}"), 1.0);
    assert_eq!(dialing.failures("error_response"), 1.0);
    let (next, _asked) = join!(dialing.dial(), accepting(&agent));
    assert!(next.unwrap().reply.timing().is_some(), "the next dial waits for the reply");
}

#[tokio::test(start_paused = true)]
async fn an_expected_reply_that_is_late_cuts_the_connection() {
    let (dialing, agent) = reached_recently().await;
    let started = Instant::now();
    let (mut dialed, _asked) = expected(&dialing, &agent).await;
    let suspected = async {
        agent.backend.suspected().await;
        started.elapsed()
    };
    let (cut, suspected) = join!(dialed.reply.read(&mut dialed.stream.1), suspected);
    assert_eq!(cut.unwrap_err().code(), StreamCode::DIAL_TIMEOUT);
    assert_eq!((started.elapsed(), suspected), (LIMIT, SUSPECT_AFTER));
    assert_eq!(dialing.failures("backend_dial_timeout"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_expected_reply_that_is_lost_with_its_tunnel_cuts_the_connection() {
    let (dialing, agent) = reached_recently().await;
    let (mut dialed, _asked) = expected(&dialing, &agent).await;
    agent.tunnel.close(CloseCode::DONE, "");
    let cut = dialed.reply.read(&mut dialed.stream.1).await.unwrap_err();
    assert!(matches!(cut, Cut::Lost(_)), "{cut:?}");
    assert_eq!(dialing.failures("backend_close"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_optimistic_dial_moves_when_its_tunnel_is_lost_before_the_request() {
    let (dialing, agent) = reached_recently().await;
    agent.tunnel.close(CloseCode::DONE, "");
    agent.backend.tunnel.closed().await;
    let returning = async {
        let again = dialing.agent("a").await;
        (accepting(&again).await, again)
    };
    let (dialed, _kept) = join!(dialing.dial(), returning);
    assert!(dialed.unwrap().reply.timing().is_some());
    assert_eq!(dialing.failures("backend_close"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn an_optimistic_dial_fails_when_the_agent_is_overloaded() {
    let (dialing, agent) = reached_recently().await;
    let _permits: Vec<_> = std::iter::from_fn(|| agent.backend.permit()).collect();
    let result = dialing.dial().await;
    assert!(matches!(result, Err(DialError::Overloaded(_))), "{result:?}");
    assert_eq!(dialing.failures("overloaded"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn what_was_reached_long_ago_or_by_another_agent_is_not_expected() {
    let (dialing, agent) = reached_recently().await;
    sleep(Duration::from_secs(5 * 60)).await;
    let (dialed, _asked) = join!(dialing.dial(), accepting(&agent));
    assert!(dialed.unwrap().reply.timing().is_some());
    drop(agent);
    let other = dialing.agent("b").await;
    let (dialed, _asked) = join!(dialing.dial(), accepting(&other));
    assert!(dialed.unwrap().reply.timing().is_some());
}

#[tokio::test(start_paused = true)]
async fn a_dialer_that_is_not_optimistic_always_waits_for_the_reply() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    for _ in 0..2 {
        let (dialed, _asked) = join!(dialing.dial(), accepting(&agent));
        assert!(dialed.unwrap().reply.timing().is_some());
    }
}
