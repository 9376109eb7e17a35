use std::time::Duration;

use tokio::{
    join,
    time::{sleep, timeout},
};

use super::*;
use crate::testing::{TestAgent, target};

const WHILE: Duration = Duration::from_secs(1);

fn backends() -> Backends {
    Backends::new(&[Strategy::Default])
}

/// Whether the future completes without time passing.
async fn is_ready(future: impl Future) -> bool {
    timeout(Duration::ZERO, future).await.is_ok()
}

#[tokio::test(start_paused = true)]
async fn a_wait_for_a_target_ends_when_an_agent_joins() {
    let backends = backends();
    let target = target("x:1");
    let joining = async {
        sleep(WHILE).await;
        TestAgent::join(&backends, "a").await
    };
    let (appeared, agent) = join!(backends.appears(&target), joining);
    assert!(Arc::ptr_eq(&appeared.unwrap(), &agent.backend));
    assert!(is_ready(backends.appears(&target)).await, "it is still there");
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_drains_does_not_end_a_wait_for_a_target() {
    let backends = backends();
    let draining = TestAgent::join(&backends, "a").await;
    backends.drain(&draining.backend);
    assert!(!is_ready(backends.appears(&target("x:1"))).await);
    let chosen = backends.choose(&target("x:1"));
    assert!(chosen.is_some(), "a dial that cannot wait takes it");
}

#[tokio::test(start_paused = true)]
async fn an_agent_of_another_host_does_not_end_a_wait_for_a_target() {
    let backends = Backends::new(&[Strategy::DestHost]);
    let _one = TestAgent::join_for(&backends, "a", &["node-1"]).await;
    assert!(is_ready(backends.appears(&target("node-1:80"))).await);
    assert!(!is_ready(backends.appears(&target("node-2:80"))).await);
}

#[tokio::test(start_paused = true)]
async fn every_wait_for_a_target_ends_when_the_server_stops() {
    let backends = backends();
    let target = target("x:1");
    let closing = async {
        sleep(WHILE).await;
        backends.close();
    };
    let (first, second, ()) = join!(backends.appears(&target), backends.appears(&target), closing);
    assert!(first.is_none() && second.is_none());
    assert!(backends.appears(&target).await.is_none(), "one that begins later");
}

#[tokio::test(start_paused = true)]
async fn an_agent_has_left_once_none_of_its_tunnels_takes_dials() {
    let backends = backends();
    let first = TestAgent::join(&backends, "a").await;
    let second = TestAgent::join(&backends, "a").await;
    let _other = TestAgent::join(&backends, "b").await;
    let agent_id = first.backend.agent_id().clone();
    let leaving = async {
        sleep(WHILE).await;
        backends.drain(&first.backend);
        sleep(WHILE).await;
        assert!(backends.is_here(&agent_id));
        drop(second);
    };
    let started = Instant::now();
    join!(backends.until_left(&agent_id), leaving);
    assert_eq!(started.elapsed(), WHILE * 2);
    assert!(!backends.is_here(&agent_id));
}

#[tokio::test(start_paused = true)]
async fn the_count_that_is_waited_for_is_reached_from_below_and_from_above() {
    let backends = backends();
    assert!(is_ready(backends.until(0)).await);
    let joining = async {
        sleep(WHILE).await;
        let first = TestAgent::join(&backends, "a").await;
        sleep(WHILE).await;
        (first, TestAgent::join(&backends, "b").await)
    };
    let ((), agents) = join!(backends.until(2), joining);
    assert!(!is_ready(backends.until(1)).await);
    let leaving = async {
        sleep(WHILE).await;
        drop(agents.0);
    };
    join!(backends.until(1), leaving);
    assert_eq!(backends.counts(), [(Strategy::Default, 1)]);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_joins_again_makes_its_older_tunnels_suspect_and_no_others() {
    let backends = backends();
    let older = TestAgent::join(&backends, "a").await;
    let other = TestAgent::join(&backends, "b").await;
    assert!(!is_ready(older.backend.suspected()).await);
    let newer = TestAgent::join(&backends, "a").await;
    assert!(is_ready(older.backend.suspected()).await);
    assert!(!is_ready(other.backend.suspected()).await);
    assert!(!is_ready(newer.backend.suspected()).await);
}

#[tokio::test(start_paused = true)]
async fn every_tunnel_is_registered_once_for_as_long_as_its_registration_lives() {
    // Under several keys of one strategy, and under none of the other.
    let backends = Backends::new(&[Strategy::DestHost, Strategy::DefaultRoute]);
    assert!(!backends.is_ready());
    let one = TestAgent::join_for(&backends, "a", &["node-1", "node-2"]).await;
    let two = TestAgent::join(&backends, "b").await;
    let names = || {
        let all = backends.all();
        all.iter().map(|backend| backend.agent_id().to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(), ["a", "b"]);
    assert!(backends.is_ready());
    assert_eq!(backends.counts(), [(Strategy::DestHost, 2), (Strategy::DefaultRoute, 0)]);
    drop(one);
    assert_eq!(names(), ["b"]);
    assert!(!backends.is_ready(), "the other agent has no key");
    drop(two);
    assert_eq!(names(), [""; 0]);
}
