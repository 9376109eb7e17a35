//! Dials that wait for an agent, and dials that move to another tunnel.

use super::*;

#[tokio::test(start_paused = true)]
async fn without_an_agent_a_dial_fails_at_once() {
    let dialing = Dialing::new();
    let (result, took) = dialing.timed().await;
    assert!(matches!(result, Err(DialError::NoAgent(_))), "{result:?}");
    assert_eq!(took, Duration::ZERO);
    assert_eq!(dialing.failures("no_agent"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_of_a_server_that_has_just_started_waits_for_an_agent() {
    let dialing = Dialing::new();
    dialing.backends.expect_first();
    let joining = async {
        sleep(Duration::from_secs(4)).await;
        assert_eq!(dialing.pending(), 1.0);
        let agent = dialing.agent("a").await;
        (accepting(&agent).await, agent)
    };
    let (dialed, _kept) = join!(dialing.dial(), joining);
    dialed.unwrap();
    assert_eq!(dialing.metric("culvert_server_dials_waited_total{result=\"came\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_waits_for_the_first_agents_until_they_had_time_to_join() {
    // No dial has a deadline that ends the wait.
    let dialing = Dialing::with(None, false);
    dialing.backends.expect_first();
    let (result, took) = dialing.timed().await;
    assert!(matches!(result, Err(DialError::NoAgent(_))), "{result:?}");
    assert_eq!(took, START_LIMIT);
    assert_eq!(dialing.metric("culvert_server_dials_waited_total{result=\"failed\"}"), 1.0);
    assert_eq!(dialing.timed().await.1, Duration::ZERO, "a later dial does not wait");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_has_left_in_order_is_not_expected_for_longer_after_a_start() {
    let dialing = Dialing::with(None, false);
    dialing.backends.expect_first();
    dialing.lose("a", &stopped()).await;
    assert_eq!(dialing.timed().await.1, RETURN_LIMIT);
}

/// Why an agent is gone that left in order.
fn stopped() -> TunnelLost {
    TunnelLost::ClosedByPeer {
        code: CloseCode::SHUTDOWN,
        reason: culvert_wire::bounded::PeerText::default(),
    }
}

impl Dialing {
    /// Ends the tunnel of the only agent for this reason.
    async fn lose(&self, name: &str, lost: &TunnelLost) {
        let agent = self.agent(name).await;
        self.backends.remove(&agent.backend, lost);
    }
}

#[tokio::test(start_paused = true)]
async fn a_dial_without_an_agent_says_who_has_left_and_how() {
    for (lost, cause) in [
        (stopped(), "it was stopped over tcp"),
        (TunnelLost::TimedOut, "timed out over tcp"),
        (TunnelLost::PeerRestarted, "it was restarted over tcp"),
    ] {
        let dialing = Dialing::new();
        dialing.lose("a", &lost).await;
        sleep(Duration::from_secs(42)).await;
        let error = dialing.dial().await.unwrap_err();
        let text = format!(
            "No agent available: a left 42 s ago ({cause}); no agent is connected; \
             this server started 42 s ago"
        );
        assert_eq!(error.to_string(), text);
    }
}

#[tokio::test(start_paused = true)]
async fn a_dial_without_an_agent_for_its_host_says_whether_one_was_there() {
    let backends = &Backends::new(&[Strategy::DestHost]);
    let _other = TestAgent::join_for(backends, "other", &["node-2"]).await;
    let absence = |host: &str| backends.absence(&target(host)).to_string();
    let never = "no agent has announced node-1; 1 other agent is connected; \
                 this server started 0.0 s ago";
    assert_eq!(absence("node-1:80"), never);
    let agent = TestAgent::join_for(backends, "one", &["node-1"]).await;
    backends.remove(&agent.backend, &TunnelLost::TimedOut);
    sleep(Duration::from_secs(7200)).await;
    let left = "one left 2 h ago (timed out over tcp); 1 other agent is connected";
    assert_eq!(absence("node-1:80"), left);
}

#[tokio::test(start_paused = true)]
async fn a_dial_waits_for_an_agent_that_has_just_left_and_gives_up() {
    for (lost, limit) in [(stopped(), RETURN_LIMIT), (TunnelLost::TimedOut, LOST_RETURN_LIMIT)] {
        // No dial has a deadline that ends the wait.
        let dialing = Dialing::with(None, false);
        dialing.lose("a", &lost).await;
        let (result, took) = dialing.timed().await;
        assert!(matches!(result, Err(DialError::NoAgent(_))), "{result:?}");
        assert_eq!(took, limit, "{lost}");
        assert_eq!(dialing.metric("culvert_server_dials_waited_total{result=\"failed\"}"), 1.0);
        assert_eq!(dialing.timed().await.1, Duration::ZERO, "a later dial does not wait");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dial_goes_to_an_agent_that_comes_back_in_time() {
    let dialing = Dialing::new();
    drop(dialing.agent("a").await);
    let returning = async {
        sleep(LIMIT - Duration::from_millis(1)).await;
        assert_eq!(dialing.pending(), 1.0);
        let agent = dialing.agent("a").await;
        (accepting(&agent).await, agent)
    };
    let (dialed, _kept) = join!(dialing.dial(), returning);
    dialed.unwrap();
    assert_eq!(dialing.metric("culvert_server_dials_waited_total{result=\"came\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_waits_for_an_agent_no_longer_than_its_own_limit() {
    let limit = RETURN_LIMIT / 3;
    let dialing = Dialing::with(Some(limit), false);
    drop(dialing.agent("a").await);
    let (result, took) = dialing.timed().await;
    assert!(matches!(result, Err(DialError::NoAgent(_))), "{result:?}");
    assert_eq!(took, limit);
}

#[tokio::test(start_paused = true)]
async fn a_dial_does_not_wait_for_an_agent_once_the_server_stops() {
    let dialing = Dialing::new();
    drop(dialing.agent("a").await);
    let stopping = async {
        sleep(RETURN_LIMIT / 2).await;
        dialing.backends.close();
    };
    let ((result, took), ()) = join!(dialing.timed(), stopping);
    assert!(matches!(result, Err(DialError::NoAgent(_))), "{result:?}");
    assert_eq!(took, RETURN_LIMIT / 2);
}

#[tokio::test(start_paused = true)]
async fn a_dial_moves_to_another_agent_when_its_tunnel_is_lost() {
    let dialing = Dialing::new();
    let (a, b) = (dialing.agent("a").await, dialing.agent("b").await);
    let agents = async {
        let (_asked, lost, other) = tokio::select! {
            asked = a.asked() => (asked, &a, &b),
            asked = b.asked() => (asked, &b, &a),
        };
        lost.tunnel.close(CloseCode::DONE, "");
        (accepting(other).await, other.backend.clone())
    };
    let (dialed, (_asked, other)) = join!(dialing.dial(), agents);
    assert!(Arc::ptr_eq(dialed.unwrap().permit.backend(), &other));
    assert_eq!(dialing.metric("culvert_server_dials_moved_total"), 1.0);
    assert_eq!(dialing.failures("backend_close"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_was_refused_is_not_asked_again() {
    let dialing = Dialing::new();
    let (a, b) = (dialing.agent("a").await, dialing.agent("b").await);
    let agents = async {
        let (mut asked, other) = tokio::select! {
            asked = a.asked() => (asked, &b),
            asked = b.asked() => (asked, &a),
        };
        asked.reply(Err(refusal())).await;
        assert!(timeout(LIMIT * 2, other.tunnel.accept()).await.is_err());
    };
    let (result, ()) = join!(dialing.dial(), agents);
    assert!(matches!(result, Err(DialError::Failed(_))), "{result:?}");
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_ends_each_process_that_it_reaches_ends_only_so_many() {
    let dialing = Dialing::new();
    let mut agents = Vec::new();
    for number in 0..2 * MAX_PROCESSES {
        agents.push(dialing.agent(&format!("agent-{number}")).await);
    }
    let asked: Vec<_> = agents
        .into_iter()
        .map(|agent| {
            culvert_transport::task::owned(async move {
                let asked = timeout(LIMIT, agent.asked()).await;
                agent.tunnel.close(CloseCode::DONE, "");
                // Registered until all have been asked.
                sleep(LIMIT).await;
                asked.is_ok()
            })
        })
        .collect();
    let result = dialing.dial().await;
    assert!(matches!(result, Err(DialError::Lost { .. })), "{result:?}");
    let mut count = 0;
    for asked in asked {
        count += usize::from(asked.await.unwrap());
    }
    assert_eq!(count, MAX_PROCESSES);
    let moved = dialing.metric("culvert_server_dials_moved_total");
    assert_eq!(moved, (MAX_PROCESSES - 1) as f64);
    assert_eq!(dialing.failures("backend_close"), 1.0, "one dial has failed");
}

#[tokio::test(start_paused = true)]
async fn a_dial_moves_to_each_next_tunnel_of_its_agents_process_until_its_deadline() {
    const LOSSES: usize = 3 * MAX_PROCESSES;
    let dialing = Dialing::new();
    let joined = || TestAgent::join_as(&dialing.backends, "a", 1);
    let losing = async {
        for _ in 0..LOSSES {
            let agent = joined().await;
            let _asked = agent.asked().await;
            sleep(LIMIT / 40).await;
            agent.tunnel.close(CloseCode::ABANDONED, "");
            dialing.backends.until(0).await;
            sleep(LIMIT / 40).await;
        }
        let agent = joined().await;
        (accepting(&agent).await, agent)
    };
    let dial = async {
        dialing.backends.until(1).await;
        dialing.dial().await
    };
    let (dialed, _kept) = join!(dial, losing);
    dialed.unwrap();
    assert_eq!(dialing.metric("culvert_server_dials_moved_total"), LOSSES as f64);
}

#[tokio::test(start_paused = true)]
async fn a_dial_whose_tunnel_is_lost_waits_for_the_next_one_until_its_deadline() {
    let dialing = Dialing::new();
    let first = dialing.agent("a").await;
    let agent = async {
        let _asked = first.asked().await;
        sleep(LIMIT / 2).await;
        first.tunnel.close(CloseCode::ABANDONED, "");
        sleep(LIMIT / 2 - Duration::from_millis(1)).await;
        let second = dialing.agent("a").await;
        (accepting(&second).await, second)
    };
    let (dialed, _kept) = join!(dialing.dial(), agent);
    dialed.unwrap();
    assert_eq!(dialing.metric("culvert_server_dials_moved_total"), 1.0);
    assert_eq!(dialing.metric("culvert_server_dials_waited_total{result=\"came\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_whose_tunnel_was_lost_fails_at_its_deadline_and_says_how_long_it_waited() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let losing = async {
        let _asked = agent.asked().await;
        sleep(LIMIT * 3 / 10).await;
        agent.tunnel.close(CloseCode::ABANDONED, "the path failed");
    };
    let ((result, took), ()) = join!(dialing.timed(), losing);
    let error = result.unwrap_err();
    assert_eq!(
        error.to_string(),
        "agent a was lost while dialing: closed by the peer: abandoned: the path failed; no other \
         tunnel within 7.0s"
    );
    assert_eq!((took, error.reason()), (LIMIT, "backend_close"));
    assert_eq!(dialing.metric("culvert_server_dials_waited_total{result=\"failed\"}"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_dial_without_a_deadline_waits_for_the_next_tunnel_for_as_long_as_it_is_expected() {
    let limits = [(CloseCode::DONE, RETURN_LIMIT), (CloseCode::ABANDONED, LOST_RETURN_LIMIT)];
    for (code, limit) in limits {
        let dialing = Dialing::with(None, false);
        let agent = dialing.agent("a").await;
        let losing = async {
            let _asked = agent.asked().await;
            sleep(LIMIT * 100).await;
            agent.tunnel.close(code, "");
        };
        let ((result, took), ()) = join!(dialing.timed(), losing);
        assert!(matches!(result, Err(DialError::Lost { .. })), "{result:?}");
        assert_eq!(took, LIMIT * 100 + limit, "{code}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_dial_that_did_not_wait_for_another_tunnel_names_no_time() {
    // At once, and shortly before the deadline.
    for (lost_after, closes) in [(LIMIT / 2, true), (LIMIT - Duration::from_millis(49), false)] {
        let dialing = Dialing::new();
        let agent = dialing.agent("a").await;
        let losing = async {
            let _asked = agent.asked().await;
            sleep(lost_after).await;
            agent.tunnel.close(CloseCode::ABANDONED, "the path failed");
            if closes {
                dialing.backends.close();
            }
        };
        let ((result, _took), ()) = join!(dialing.timed(), losing);
        assert_eq!(
            result.unwrap_err().to_string(),
            "agent a was lost while dialing: closed by the peer: abandoned: the path failed"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_dial_moves_only_so_many_times() {
    let dialing = Dialing::with(None, false);
    let losing = async {
        for _ in 0..=MAX_MOVES {
            let agent = TestAgent::join_as(&dialing.backends, "a", 1).await;
            let _asked = agent.asked().await;
            agent.tunnel.close(CloseCode::ABANDONED, "");
            dialing.backends.until(0).await;
        }
    };
    let dial = async {
        dialing.backends.until(1).await;
        dialing.timed().await
    };
    let ((result, took), ()) = join!(dial, losing);
    assert!(matches!(result, Err(DialError::Lost { .. })), "{result:?}");
    assert_eq!(took, Duration::ZERO);
    assert_eq!(dialing.metric("culvert_server_dials_moved_total"), MAX_MOVES as f64);
}

#[tokio::test(start_paused = true)]
async fn a_dial_whose_tunnel_was_lost_does_not_wait_once_the_server_stops() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    let losing = async {
        let _asked = agent.asked().await;
        agent.tunnel.close(CloseCode::DONE, "");
        sleep(LIMIT / 10).await;
        dialing.backends.close();
    };
    let ((result, took), ()) = join!(dialing.timed(), losing);
    assert!(matches!(result, Err(DialError::Lost { .. })), "{result:?}");
    assert_eq!(took, LIMIT / 10);
}

#[tokio::test(start_paused = true)]
async fn a_silent_agent_is_suspected_as_soon_as_it_is_dialed() {
    let dialing = Dialing::new();
    let agent = dialing.agent("a").await;
    dialing.backends.set_silent(&agent.backend, true);
    let begun = Instant::now();
    let suspected = async {
        agent.backend.suspected().await;
        begun.elapsed()
    };
    let dialed = timeout(LIMIT / 2, dialing.dial());
    let (_dialed, after) = join!(dialed, suspected);
    assert_eq!(after, Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn one_limit_holds_for_all_moves_of_a_dial() {
    let dialing = Dialing::new();
    let (a, b) = (dialing.agent("a").await, dialing.agent("b").await);
    let agents = async {
        let (asked, lost, other) = tokio::select! {
            asked = a.asked() => (asked, &a, &b),
            asked = b.asked() => (asked, &b, &a),
        };
        sleep(LIMIT * 6 / 10).await;
        lost.tunnel.close(CloseCode::DONE, "");
        drop(asked);
        let mut asked = other.asked().await;
        ended(&mut asked).await
    };
    let ((result, took), code) = join!(dialing.timed(), agents);
    assert!(matches!(result, Err(DialError::TimedOut(_))), "{result:?}");
    assert_eq!((took, code), (LIMIT, StreamCode::DIAL_TIMEOUT));
}

/// The agent hears no more of its old tunnel, and the server still does.
#[tokio::test(start_paused = true)]
async fn a_dial_moves_to_a_newer_tunnel_of_the_same_process_without_the_loss_of_the_older() {
    let dialing = Dialing::new();
    let _older = dialing.agent("a").await;
    let newer = async {
        sleep(Duration::from_millis(700)).await;
        let agent = dialing.agent("a").await;
        (accepting(&agent).await, agent)
    };
    let ((dialed, took), _kept) = join!(dialing.timed(), newer);
    dialed.unwrap();
    assert_eq!(took, MOVE_AFTER);
    assert_eq!(dialing.metric("culvert_server_dials_moved_total"), 1.0);
    assert_eq!(dialing.metric("culvert_server_tunnels"), 2.0, "the older tunnel is not lost");
}

/// A target may need time, and the tunnel that was replaced works.
#[tokio::test(start_paused = true)]
async fn an_answer_on_a_tunnel_that_was_superseded_is_taken() {
    let dialing = Dialing::new();
    let older = dialing.agent("a").await;
    let answering = async {
        let mut asked = older.asked().await;
        sleep(Duration::from_millis(700)).await;
        let newer = dialing.agent("a").await;
        sleep(Duration::from_secs(1)).await;
        asked.reply(Ok(())).await;
        (asked, newer)
    };
    let ((dialed, took), _kept) = join!(dialing.timed(), answering);
    dialed.unwrap();
    assert_eq!(took, Duration::from_millis(1700));
    assert_eq!(dialing.metric("culvert_server_dials_moved_total"), 0.0);
}
