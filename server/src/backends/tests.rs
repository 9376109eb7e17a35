use std::time::Duration;

use tokio::{
    join,
    time::{sleep, timeout},
};

use culvert_process::kubernetes::Timestamp;
use culvert_transport::{Carrier, Settings, qmux::Peer, test_util::Pair};

use super::*;
use crate::agents::identity::ServiceAccount;
use crate::config::{AgentIdentity, ClaimRules};
use crate::testing::{TestAgent, hello, identity, pair, target};

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

/// The backend of an agent of this identity, which is not registered.
async fn backend(by: &str, name: &str) -> Arc<Backend> {
    let hello = hello(name, &[]);
    let rules = ClaimRules { identity: AgentIdentity::Any, allowed: Vec::new() };
    let (identity, agent_id) = (Arc::new(identity(by)), hello.agent_id.clone());
    let claims = Claims::new(identity, &rules, None, agent_id, &hello.identifiers).unwrap();
    Arc::new(Backend::new(pair().await.server, hello, claims, 10))
}

#[tokio::test(start_paused = true)]
async fn an_id_is_not_taken_over_by_another_identity_whose_claims_do_not_disturb_the_holder() {
    let backends = backends();
    let victim = TestAgent::join_by(&backends, identity("victim"), "a", &[]).await;
    let stranger = backend("stranger", "a").await;
    for _ in 0..2 {
        let holder = "certificate \"CN=victim\"".to_owned();
        let expected = RegisterError::IdHeld { holder };
        assert_eq!(backends.admit(&stranger.claims), Err(expected.clone()));
        assert_eq!(backends.register(stranger.clone()).unwrap_err(), expected);
    }
    let is_suspected = is_ready(victim.backend.suspected()).await;
    assert!(!is_suspected, "each pause of its path would end its tunnel");
    assert_eq!(backends.all().len(), 1);
    let renewed = TestAgent::join_by(&backends, identity("victim"), "a", &[]).await;
    assert_eq!(backends.all().len(), 2);
    backends.drain(&victim.backend);
    assert!(backends.admit(&stranger.claims).is_err(), "the newer tunnel has the id");
    drop((victim, renewed));
    let _registration = backends.register(stranger).unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_id_whose_holder_drains_is_free() {
    let backends = backends();
    let old = TestAgent::join_by(&backends, identity("old"), "a", &[]).await;
    backends.drain(&old.backend);
    let new = TestAgent::join_by(&backends, identity("new"), "a", &[]).await;
    let chosen = backends.choose(&target("x:1")).unwrap();
    assert!(Arc::ptr_eq(&chosen, &new.backend));
}

#[tokio::test(start_paused = true)]
async fn identifiers_that_another_identity_has_are_known_of_a_backend() {
    let backends = Backends::new(&[Strategy::DestHost]);
    let victim = TestAgent::join_by(&backends, identity("victim"), "a", &["node-1"]).await;
    let both = ["node-1", "node-2"];
    let stranger = TestAgent::join_by(&backends, identity("stranger"), "b", &both).await;
    assert_eq!(stranger.registration.held(), ["node-1"]);
    assert_eq!(backends.waits_for(&stranger.backend), ["node-1"]);
    drop(victim);
    assert_eq!(backends.waits_for(&stranger.backend), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn there_are_no_more_tunnels_than_allowed() {
    let backends = Backends::limited(&[Strategy::Default], 2);
    let first = TestAgent::join(&backends, "a").await;
    let _second = TestAgent::join(&backends, "b").await;
    let third = backend("c", "c").await;
    let expected = RegisterError::TooManyTunnels(2);
    assert_eq!(backends.admit(&third.claims), Err(expected.clone()));
    assert_eq!(backends.register(third.clone()).unwrap_err(), expected);
    drop(first);
    let _registration = backends.register(third).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_oldest_of_too_many_tunnels_of_a_process_is_dismissed() {
    let backends = backends();
    let mut tunnels = Vec::new();
    for _ in 0..MAX_TUNNELS_PER_PROCESS {
        tunnels.push(TestAgent::join(&backends, "a").await);
    }
    let _other = TestAgent::join(&backends, "b").await;
    let _restarted = TestAgent::join_as(&backends, "a", 8).await;
    assert!(!is_ready(tunnels[0].backend.dismissed()).await);
    let _newest = TestAgent::join(&backends, "a").await;
    assert_eq!(tunnels[0].backend.dismissed().await, Dismissal::Crowded);
    assert!(!is_ready(tunnels[1].backend.dismissed()).await);
}

#[tokio::test(start_paused = true)]
async fn each_tunnel_beyond_the_limit_of_a_process_dismisses_another_one() {
    let backends = backends();
    let mut tunnels = Vec::new();
    // Those that were dismissed are still there: their agent does not read the goodbye.
    for _ in 0..MAX_TUNNELS_PER_PROCESS + 5 {
        tunnels.push(TestAgent::join(&backends, "a").await);
    }
    assert_eq!(dismissed(&tunnels).await, 5);
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_id_is_proven_has_few_tunnels_in_however_many_processes() {
    for (rule, expected) in [(AgentIdentity::Certificate, 5), (AgentIdentity::Any, 0)] {
        let backends = backends();
        let mut tunnels = Vec::new();
        for number in 0..MAX_TUNNELS_PER_ID + 5 {
            let instance = u8::try_from(number).unwrap();
            tunnels.push(TestAgent::join_by_rule(&backends, rule, "a", instance).await);
        }
        assert_eq!(dismissed(&tunnels).await, expected, "{rule:?}");
    }
}

/// Number of tunnels that were dismissed, which are the oldest.
async fn dismissed(tunnels: &[TestAgent]) -> usize {
    let mut count = 0;
    for tunnel in tunnels {
        if !is_ready(tunnel.backend.dismissed()).await {
            break;
        }
        count += 1;
    }
    count
}

#[tokio::test(start_paused = true)]
async fn a_backend_is_empty_once_its_last_stream_has_ended() {
    let backends = backends();
    let agent = TestAgent::join(&backends, "a").await;
    assert!(is_ready(agent.backend.emptied()).await);
    let permits = (agent.backend.permit().unwrap(), agent.backend.permit().unwrap());
    let ending = async {
        sleep(WHILE).await;
        drop(permits.0);
        sleep(WHILE).await;
        drop(permits.1);
    };
    let begun = Instant::now();
    join!(agent.backend.emptied(), ending);
    assert_eq!(begun.elapsed(), WHILE * 2);
}

/// The identity of an agent with a token of this service account, which expires in this time.
fn of_account(name: &str, expires: Duration) -> Identity {
    let expiry = Some(Timestamp::now() + expires);
    let account = ServiceAccount { name: name.into(), expiry, ..ServiceAccount::default() };
    Identity { account: Some(account), ..Identity::default() }
}

#[tokio::test(start_paused = true)]
async fn a_process_is_one_of_an_identity_an_id_and_an_instance() {
    const HOUR: Duration = Duration::from_secs(3600);
    let backends = backends();
    let join = async |name, expires| {
        TestAgent::join_by(&backends, of_account(name, expires), "a", &[]).await
    };
    let owner = join("owner", HOUR).await;
    let expiry = || *owner.backend.expiry().borrow();
    let before = expiry();
    // It gives way to another identity, which announces the same id and instance.
    backends.drain(&owner.backend);
    let other = join("other", HOUR * 2).await;
    assert_ne!(owner.backend.process(), other.backend.process());
    assert_eq!(expiry(), before, "another identity's join renews nothing");
    assert!(!is_ready(owner.backend.superseded()).await);
    assert!(backends.renew(&other.backend, &of_account("other", HOUR * 3), None));
    assert!(!backends.renew(&other.backend, &of_account("owner", HOUR * 3), None));
    assert_eq!(expiry(), before, "another identity's token renews nothing");
    let mut tunnels = Vec::new();
    for _ in 0..MAX_TUNNELS_PER_PROCESS {
        tunnels.push(join("other", HOUR).await);
    }
    assert!(!is_ready(owner.backend.dismissed()).await, "it is no tunnel of that process");
    assert!(is_ready(other.backend.dismissed()).await);
}

/// Lets this many dials through the agent time out, each to another target, or until it is ejected.
/// Returns for how long.
fn time_out(backends: &Backends, agent: &TestAgent, dials: u16) -> Option<Duration> {
    let mut targets = (1..=dials).map(|port| target(&format!("x:{port}")));
    targets.find_map(|target| backends.dial_timed_out(&agent.backend, &target))
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_dials_time_out_is_ejected_while_others_reply_and_there_are_others() {
    let backends = backends();
    let broken = TestAgent::join(&backends, "broken").await;
    assert_eq!(time_out(&backends, &broken, 100), None, "it is alone");
    let well = TestAgent::join(&backends, "well").await;
    assert_eq!(time_out(&backends, &broken, 100), None, "no dial through another has a reply");
    backends.dial_replied(&well.backend);
    backends.dial_replied(&broken.backend);
    sleep(WHILE).await;
    assert_eq!(time_out(&backends, &broken, 100), None, "those replies were before");
    backends.dial_replied(&well.backend);
    let time = time_out(&backends, &broken, 3).unwrap();
    let chosen = || backends.choose(&target("x:1")).unwrap();
    for _ in 0..100 {
        assert!(Arc::ptr_eq(&chosen(), &well.backend));
    }
    assert_eq!(time_out(&backends, &well, 100), None, "half of the agents are ejected");
    drop(well);
    assert!(Arc::ptr_eq(&chosen(), &broken.backend), "no other one will do");
    sleep(time).await;
    assert!(!broken.backend.is_avoided());
}

#[tokio::test(start_paused = true)]
async fn an_agent_outlives_the_arrival_of_another_once_something_comes_from_it() {
    let backends = Backends::new(&[Strategy::DestHost]);
    let interval = Duration::from_secs(5);
    let settings = Settings { keep_alive_interval: Some(interval), ..Settings::default() };
    let pair = Pair::new(Peer::local(Carrier::Tcp), &settings, &settings).await.unwrap();
    let older = TestAgent::join_on_for(&backends, "a", &["vip"], pair);
    let _watch = culvert_transport::task::owned(silence::watch(backends.clone(), Some(interval)));
    sleep(WHILE).await;
    let newer = TestAgent::join_for(&backends, "b", &["vip"]).await;
    let chosen_of_many = |agent: &TestAgent| {
        (0..100)
            .filter(|_| {
                let chosen = backends.choose(&target("vip:80")).unwrap();
                Arc::ptr_eq(&chosen, &agent.backend)
            })
            .count()
    };
    assert_eq!(chosen_of_many(&newer), 100);
    sleep(interval + WHILE * 2).await;
    let (of_older, of_newer) = (chosen_of_many(&older), chosen_of_many(&newer));
    assert!(of_older > 20 && of_newer > 20, "{of_older} {of_newer}");
}
