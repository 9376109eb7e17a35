//! Konnectivity agents at Culvert's server: isolation of the connections that share their one
//! stream, choice among agents, and agents that hang.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use culvert_loadtest::{
    frontend::{
        Connection,
        Protocol::{self, Connect, Grpc},
    },
    process::{Process, Signal},
    targets,
};
use rstest::rstest;
use tokio::time::timeout;

use crate::support::{
    at_once,
    deployment::{
        Combination, Deployment,
        Implementation::{Culvert, Konnectivity},
        Joined, KNOWN_SERVERS, OPEN_SERVERS, OPEN_TARGETS, can_run, with_joined,
    },
    echo, eventually, within,
};

/// Longest time that an echo may take while another connection of the same agent misbehaves. One
/// that waits for the other waits for ever, or for the 10 s of a time-out.
const UNDISTURBED: Duration = Duration::from_secs(8);

/// A Konnectivity agent at Culvert's server.
fn konnectivity_at_culvert(frontend: Protocol) -> Combination {
    Combination { agent: Konnectivity, server: Culvert, frontend }
}

/// CLOSE_REQ packets that a Konnectivity agent has received.
fn close_requests(agent: &Process) -> usize {
    agent.log().matches("\"received CLOSE_REQ\"").count()
}

/// Echoes until `done`; the time of the slowest echo.
async fn slowest_echo(
    connection: &mut Connection,
    mut done: impl AsyncFnMut() -> bool,
) -> Duration {
    let mut slowest = Duration::ZERO;
    eventually("the end of the echoes", async || {
        let begun = Instant::now();
        echo(connection, b"key").await.unwrap();
        slowest = slowest.max(begun.elapsed());
        done().await
    })
    .await;
    slowest
}

/// One stream carries all connections of a Konnectivity agent, so it must not wait for one of them.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_is_cut_off_and_delays_no_other(
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    with_joined(konnectivity_at_culvert(frontend), async |Joined { deployment, agent, .. }| {
        let (endless, idle) = (targets::source(u64::MAX), targets::echo());
        let (endless, idle) = (endless.await.unwrap(), idle.await.unwrap());
        let mut other = deployment.dial(idle.address()).await.unwrap();
        let mut stalled = deployment.dial(endless.address()).await.unwrap();
        let is_cut_off = async || agent.metric(OPEN_TARGETS).await.unwrap() == 1.0;
        let slowest = slowest_echo(&mut other, is_cut_off).await;
        println!("the slowest echo took {slowest:?}");
        assert!(slowest < UNDISTURBED, "{slowest:?}");
        let mut bytes = Vec::new();
        let end = loop {
            match stalled.read(&mut bytes).await {
                Ok(0) => break Ok(()),
                Ok(_) => bytes.clear(),
                Err(error) => break Err(error.to_string()),
            }
        };
        match frontend {
            Grpc => assert!(end.unwrap_err().contains("overloaded")),
            // A Unix socket has no reset.
            Connect => end.unwrap(),
        }
        let log = deployment.server_log();
        assert!(log.contains("16777216 bytes wait and are not read"), "no reason is logged");
        assert_eq!(close_requests(&agent), 1);
    })
    .await;
}

/// A client may abandon a dial while its answer is on the way: each waits for about as long as a
/// dial takes.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn abandoned_dials_leave_nothing(#[values(Grpc, Connect)] frontend: Protocol) {
    const DIALERS: usize = 8;
    const DIALS: usize = 500;
    with_joined(konnectivity_at_culvert(frontend), async |Joined { deployment, agent, .. }| {
        let shared = Arc::new((deployment, targets::echo().await.unwrap()));
        let (answered, abandoned) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        at_once(DIALERS, || {
            let (shared, answered, abandoned) =
                (shared.clone(), answered.clone(), abandoned.clone());
            async move {
                let mut patience = Duration::from_millis(1);
                for _ in 0..DIALS {
                    let dial = shared.0.dial(shared.1.address());
                    if let Ok(dialed) = timeout(patience, dial).await {
                        dialed.unwrap();
                        answered.fetch_add(1, Ordering::Relaxed);
                        patience = patience * 3 / 4;
                    } else {
                        abandoned.fetch_add(1, Ordering::Relaxed);
                        patience = patience * 5 / 4;
                    }
                }
            }
        })
        .await;
        let none = async || agent.metric(OPEN_TARGETS).await.unwrap() == 0.0;
        eventually("the agent has none", none).await;
        println!("{answered:?} answered, {abandoned:?} abandoned");
        assert!(answered.load(Ordering::Relaxed) > 0, "every dial was abandoned");
        assert!(abandoned.load(Ordering::Relaxed) > 0, "no dial was abandoned");
    })
    .await;
}

/// `kubectl logs -f` of busy containers, ended by Ctrl-C: data on the way then has no reader.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn closing_busy_connections_delays_no_other(#[values(Grpc, Connect)] frontend: Protocol) {
    with_joined(konnectivity_at_culvert(frontend), async |Joined { deployment, agent, .. }| {
        let (endless, idle) = (targets::source(u64::MAX), targets::echo());
        let (endless, idle) = (endless.await.unwrap(), idle.await.unwrap());
        let mut other = deployment.dial(idle.address()).await.unwrap();
        let mut busy = Vec::new();
        for _ in 0..20 {
            let mut connection = deployment.dial(endless.address()).await.unwrap();
            connection.read_count(100_000).await.unwrap();
            busy.push(connection);
        }
        for connection in busy {
            connection.abort();
        }
        let are_gone = async || agent.metric(OPEN_TARGETS).await.unwrap() == 1.0;
        let slowest = slowest_echo(&mut other, are_gone).await;
        println!("the slowest echo took {slowest:?}");
        assert!(slowest < UNDISTURBED, "{slowest:?}");
        assert_eq!(close_requests(&agent), 20);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agent_gets_the_name_and_the_number_of_servers() {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(Culvert, Grpc, &["--server-count=3"]).await;
        let token = deployment.certificates.folder().join("token");
        std::fs::write(&token, "a.b.c").unwrap();
        let token = format!("--service-account-token-path={}", token.display());
        let agent = deployment.start_agent(Konnectivity, "agent", &[&token]).await;
        deployment.until_joined(1).await;
        assert_eq!(agent.metric(OPEN_SERVERS).await.unwrap(), 1.0);
        eventually("3 servers are known", async || {
            agent.metric(KNOWN_SERVERS).await.unwrap() == 3.0
        })
        .await;
        let named = async || agent.log().contains("serverID=\"the-server\"");
        eventually("the server's name is logged", named).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agent_is_chosen_for_its_host() {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let flags = ["--proxy-strategies=destHost"];
        let deployment = Deployment::start(Culvert, Connect, &flags).await;
        let target = targets::echo().await.unwrap();
        let elsewhere = ["--agent-identifiers=ipv4=127.0.0.2&host=elsewhere"];
        let _elsewhere = deployment.start_agent(Konnectivity, "elsewhere", &elsewhere).await;
        let here = ["--agent-identifiers=ipv4=127.0.0.1&default-route=true"];
        let here = deployment.start_agent(Konnectivity, "here", &here).await;
        eventually("a dial works", async || deployment.touch(&target).await.is_ok()).await;
        let _open = deployment.dial(target.address()).await.unwrap();
        // The agent closes the connection of the first dial a moment later.
        let carries_it = async || here.metric(OPEN_TARGETS).await.unwrap() == 1.0;
        eventually("the agent of the host carries it", carries_it).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agent_without_a_certificate_is_refused() {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(Culvert, Grpc, &[]).await;
        let stranger =
            deployment.spawn_agent_without_certificate(Konnectivity, "stranger", Vec::new()).await;
        let refused = async || stranger.log().contains("certificate required");
        eventually("the stranger logs the reason", refused).await;
        assert_eq!(stranger.metric(OPEN_SERVERS).await.unwrap(), 0.0);
        assert_eq!(deployment.ready_backends().await, 0.0);
        assert!(
            deployment.server_log().contains("an agent did not join"),
            "{}",
            deployment.server_log()
        );
        let _known = deployment.start_agent(Konnectivity, "known", &[]).await;
        deployment.until_joined(1).await;
        assert_eq!(stranger.metric(OPEN_SERVERS).await.unwrap(), 0.0);
    })
    .await;
}

/// A Konnectivity agent that misses a server connects again and again, and leaves when it finds
/// that it has reached one that it knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agents_search_for_more_servers_fails_no_dial() {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(Culvert, Connect, &["--server-count=3"]).await;
        let flags = ["--sync-interval=10ms", "--sync-interval-cap=10ms"];
        let agent = deployment.start_agent(Konnectivity, "agent", &flags).await;
        deployment.until_joined(1).await;
        let (target, mut open) = deployment.open_echo().await;
        eventually("the agent has searched ten times", async || {
            deployment.touch(&target).await.unwrap();
            agent.log().matches("duplicate").count() > 10
        })
        .await;
        echo(&mut open, b"undisturbed").await.unwrap();
    })
    .await;
}

/// Flags of a server that gives up an agent after a second of silence.
const IMPATIENT: [&str; 2] = ["--tunnel-keep-alive-interval=300ms", "--tunnel-idle-timeout=1s"];
/// Time for such a server to give up an agent: below the 25 s of the default flags.
const GIVEN_UP: Duration = Duration::from_secs(20);

/// Asserts that the connection is cut off, which differs from an end.
async fn is_cut_off(frontend: Protocol, mut connection: Connection) {
    let end = timeout(GIVEN_UP, connection.read_to_end()).await.expect("the connection hangs");
    match frontend {
        Grpc => drop(end.unwrap_err()),
        // A Unix socket has no reset: both directions are over, unlike after a FIN.
        Connect => {
            assert_eq!(end.unwrap(), b"");
            let error = connection.write(b"more").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }
}

/// SIGSTOP: the kernel keeps the connection, and the process does not answer.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_dials_of_a_frozen_agent_are_repeated_at_another(
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    /// Dials are spread at random: one in a million runs has none at the frozen agent.
    const DIALS: usize = 20;
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(Culvert, frontend, &IMPATIENT).await;
        let mut frozen = deployment.start_agent(Konnectivity, "frozen", &[]).await;
        deployment.until_joined(1).await;
        let (target, open) = deployment.open_echo().await;
        let mut other = deployment.start_agent(Konnectivity, "other", &[]).await;
        deployment.until_joined(2).await;
        frozen.freeze().await.unwrap();
        let begun = Instant::now();
        let deployment = Arc::new(deployment);
        at_once(DIALS, || {
            let (deployment, address) = (deployment.clone(), target.address());
            async move {
                let mut connection = deployment.dial(address).await.unwrap();
                echo(&mut connection, b"repeated").await.unwrap();
            }
        })
        .await;
        is_cut_off(frontend, open).await;
        assert!(begun.elapsed() < GIVEN_UP, "{:?}", begun.elapsed());
        deployment.until_joined(1).await;
        deployment.until_dials_work(&target).await;
        frozen.signal(Signal::Thaw).await.unwrap();
        deployment.until_joined(2).await;
        other.kill().await.unwrap();
        deployment.until_joined(1).await;
        deployment.until_dials_work(&target).await;
    })
    .await;
}

/// With Culvert's flags, and with Konnectivity's own.
#[rstest]
#[case(Grpc, &IMPATIENT)]
#[case(
    Connect,
    &["--keepalive-time=300ms", "--tunnel-keep-alive-interval=0", "--tunnel-idle-timeout=1s"]
)]
#[tokio::test(flavor = "multi_thread")]
async fn dials_of_the_only_agent_fail_while_it_is_frozen_and_succeed_afterwards(
    #[case] frontend: Protocol,
    #[case] flags: &[&str],
) {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    within(async {
        let deployment = Deployment::start(Culvert, frontend, flags).await;
        let mut agent = deployment.start_agent(Konnectivity, "agent", &[]).await;
        deployment.until_joined(1).await;
        let (target, open) = deployment.open_echo().await;
        agent.freeze().await.unwrap();
        let begun = Instant::now();
        let failed = deployment.dial(target.address()).await.unwrap_err().to_string();
        assert!(begun.elapsed() < GIVEN_UP, "{:?}", begun.elapsed());
        assert!(failed.contains("agent agent was lost while dialing"), "{failed}");
        is_cut_off(frontend, open).await;
        let failed = deployment.dial(target.address()).await.unwrap_err().to_string();
        assert!(failed.contains("No agent available"), "{failed}");
        agent.signal(Signal::Thaw).await.unwrap();
        deployment.until_joined(1).await;
        deployment.until_dials_work(&target).await;
    })
    .await;
}
