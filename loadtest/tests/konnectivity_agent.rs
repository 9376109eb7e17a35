//! Konnectivity agents at our server: what one stream for all connections could do to them, what such an
//! agent is told and is chosen for, and what becomes of one that hangs. The agents are real; where
//! there is no Go to build them these say so and are skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_loadtest::{frontend::Connection, peer::Frontend, targets};
use culvert_server::backends::registry::RETURN_LIMIT;
use nix::sys::signal::Signal;
use tokio::time::timeout;

use common::{
    at_once, echo,
    mixed::{
        Daemon, FRONTENDS, KNOWN_SERVERS, Make, Met, Mix, OPEN_SERVERS, OPEN_TARGETS, Site, until,
        with_each,
    },
    within,
};

/// What a connection may wait while another one of its agent misbehaves, on a loaded machine.
const UNDISTURBED: Duration = Duration::from_secs(1);

/// How often a Konnectivity agent was told to close a connection.
fn close_requests(agent: &Daemon) -> usize {
    agent.log().matches("\"received CLOSE_REQ\"").count()
}

/// Echoes until `done`; how long the slowest one took.
async fn slowest_echo(
    connection: &mut Connection,
    mut done: impl AsyncFnMut() -> bool,
) -> Duration {
    let mut slowest = Duration::ZERO;
    until("what is waited for", async || {
        let begun = Instant::now();
        echo(connection, b"key").await.unwrap();
        slowest = slowest.max(begun.elapsed());
        done().await
    })
    .await;
    slowest
}

/// One stream carries all connections of a Konnectivity agent, so it must not wait for one of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_is_cut_off_and_delays_nobody() {
    with_each(Mix::konnectivity_agent(), async |Met { mix, site, agent }| {
        let (endless, idle) = (targets::source(u64::MAX), targets::echo());
        let (endless, idle) = (endless.await.unwrap(), idle.await.unwrap());
        let mut other = site.dial(idle.address()).await.unwrap();
        let mut stalled = site.dial(endless.address()).await.unwrap();
        let is_cut_off = async || agent.metric(OPEN_TARGETS).await == 1.0;
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
        match mix.frontend {
            Frontend::Grpc => assert!(end.unwrap_err().contains("overloaded")),
            // A Unix socket knows no reset.
            Frontend::Connect => end.unwrap(),
        }
        let log = site.server.log();
        assert!(log.contains("16777216 bytes wait and are not read"), "no reason is logged");
        assert_eq!(close_requests(&agent), 1);
    })
    .await;
}

/// Whoever gives up may do so while the answer is on its way.
#[tokio::test(flavor = "multi_thread")]
async fn dials_that_are_given_up_leave_nothing() {
    const DIALERS: usize = 8;
    const DIALS: usize = 500;
    with_each(Mix::konnectivity_agent(), async |Met { site, agent, .. }| {
        let shared = Arc::new((site, targets::echo().await.unwrap()));
        at_once(DIALERS, || {
            let shared = shared.clone();
            async move {
                for _ in 0..DIALS {
                    let patience = Duration::from_millis(fastrand::u64(0..6));
                    let _ = timeout(patience, shared.0.dial(shared.1.address())).await;
                }
            }
        })
        .await;
        until("the agent has none", async || agent.metric(OPEN_TARGETS).await == 0.0).await;
        println!("{} connections were closed", close_requests(&agent));
    })
    .await;
}

/// `kubectl logs -f` of busy containers, ended by Ctrl-C: what is under way then has no reader.
#[tokio::test(flavor = "multi_thread")]
async fn closing_busy_connections_delays_nobody() {
    with_each(Mix::konnectivity_agent(), async |Met { site, agent, .. }| {
        let (endless, idle) = (targets::source(u64::MAX), targets::echo());
        let (endless, idle) = (endless.await.unwrap(), idle.await.unwrap());
        let mut other = site.dial(idle.address()).await.unwrap();
        let mut busy = Vec::new();
        for _ in 0..20 {
            let mut connection = site.dial(endless.address()).await.unwrap();
            connection.read_count(100_000).await.unwrap();
            busy.push(connection);
        }
        for connection in busy {
            connection.abort();
        }
        let are_gone = async || agent.metric(OPEN_TARGETS).await == 1.0;
        let slowest = slowest_echo(&mut other, are_gone).await;
        println!("the slowest echo took {slowest:?}");
        assert!(slowest < UNDISTURBED, "{slowest:?}");
        assert_eq!(close_requests(&agent), 20);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agent_is_told_who_its_server_is_and_how_many_there_are() {
    within(async {
        let Some(site) = Site::start(Make::Culvert, Frontend::Grpc, &["--server-count=3"]).await
        else {
            return;
        };
        let token = site.certificates.folder().join("token");
        std::fs::write(&token, "a.b.c").unwrap();
        let token = format!("--service-account-token-path={}", token.display());
        let agent = site.start_agent(Make::Konnectivity, "agent", &[&token]).await;
        site.until_joined(1).await;
        assert_eq!(agent.metric(OPEN_SERVERS).await, 1.0);
        until("3 servers are known", async || agent.metric(KNOWN_SERVERS).await == 3.0).await;
        let named = async || agent.log().contains("serverID=\"the-server\"");
        until("the server's name is logged", named).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agent_is_chosen_for_the_host_that_it_stands_for() {
    within(async {
        let flags = ["--proxy-strategies=destHost"];
        let Some(site) = Site::start(Make::Culvert, Frontend::Connect, &flags).await else {
            return;
        };
        let target = targets::echo().await.unwrap();
        let elsewhere = ["--agent-identifiers=ipv4=127.0.0.2&host=elsewhere"];
        let _elsewhere = site.start_agent(Make::Konnectivity, "elsewhere", &elsewhere).await;
        let here = ["--agent-identifiers=ipv4=127.0.0.1&default-route=true"];
        let here = site.start_agent(Make::Konnectivity, "here", &here).await;
        until("a dial works", async || site.touch(&target).await.is_ok()).await;
        let _open = site.dial(target.address()).await.unwrap();
        assert_eq!(here.metric(OPEN_TARGETS).await, 1.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agent_without_a_certificate_is_refused() {
    within(async {
        let Some(site) = Site::start(Make::Culvert, Frontend::Grpc, &[]).await else { return };
        let stranger = site.start_agent_unproven(Make::Konnectivity, "stranger", Vec::new());
        let refused = async || stranger.log().contains("certificate required");
        until("the stranger is told why", refused).await;
        assert_eq!(stranger.metric(OPEN_SERVERS).await, 0.0);
        assert_eq!(site.ready_backends().await, 0.0);
        assert!(site.server.log().contains("an agent did not join"), "{}", site.server.log());
        let _known = site.start_agent(Make::Konnectivity, "known", &[]).await;
        site.until_joined(1).await;
        assert_eq!(stranger.metric(OPEN_SERVERS).await, 0.0);
    })
    .await;
}

/// A Konnectivity agent that misses a server dials again and again, and leaves as soon as it hears that
/// it is at one that it knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_konnectivity_agents_search_for_more_servers_costs_no_dial() {
    within(async {
        let Some(site) = Site::start(Make::Culvert, Frontend::Connect, &["--server-count=3"]).await
        else {
            return;
        };
        let flags = ["--sync-interval=10ms", "--sync-interval-cap=10ms"];
        let agent = site.start_agent(Make::Konnectivity, "agent", &flags).await;
        site.until_joined(1).await;
        let (target, mut open) = site.open_echo().await;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            site.touch(&target).await.unwrap();
        }
        echo(&mut open, b"undisturbed").await.unwrap();
        let searches = agent.log().matches("duplicate").count();
        assert!(searches > 10, "{searches} searches");
    })
    .await;
}

/// A server that gives up an agent within seconds of its last sign of life.
const IMPATIENT: [&str; 2] = ["--tunnel-keep-alive-interval=300ms", "--tunnel-idle-timeout=1s"];
/// Within which it has: those and what a loaded machine adds. With the default flags it is half a
/// minute.
const GIVEN_UP: Duration = Duration::from_secs(8);

/// The frontend's connection is cut off, and does not end as if everything had been said.
async fn is_cut_off(frontend: Frontend, mut connection: Connection) {
    let end = timeout(GIVEN_UP, connection.read_to_end()).await.expect("the connection hangs");
    match frontend {
        Frontend::Grpc => drop(end.unwrap_err()),
        // A Unix socket knows no reset: both directions are over, unlike after an end.
        Frontend::Connect => {
            assert_eq!(end.unwrap(), b"");
            let error = connection.write(b"more").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }
}

/// SIGSTOP: the kernel keeps the connection, and nobody answers on it.
#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_agent_is_given_up_and_its_dials_are_made_again_at_another() {
    /// A dial that takes longer waits for the agent that is frozen.
    const AT_ONCE: Duration = Duration::from_millis(300);
    for frontend in FRONTENDS {
        within(async {
            let Some(site) = Site::start(Make::Culvert, frontend, &IMPATIENT).await else { return };
            let frozen = site.start_agent(Make::Konnectivity, "frozen", &[]).await;
            site.until_joined(1).await;
            let (target, open) = site.open_echo().await;
            let mut other = site.start_agent(Make::Konnectivity, "other", &[]).await;
            site.until_joined(2).await;
            frozen.freeze().await;
            let begun = Instant::now();
            let waiting = loop {
                let mut dial = Box::pin(site.dial(target.address()));
                match timeout(AT_ONCE, &mut dial).await {
                    Ok(dialed) => drop(dialed.unwrap()),
                    Err(_) => break dial,
                }
            };
            echo(&mut waiting.await.unwrap(), b"made again").await.unwrap();
            is_cut_off(frontend, open).await;
            assert!(begun.elapsed() < GIVEN_UP, "{:?}", begun.elapsed());
            site.until_joined(1).await;
            site.until_dials_work(&target).await;
            frozen.signal(Signal::SIGCONT);
            site.until_joined(2).await;
            other.kill().await;
            site.until_joined(1).await;
            site.until_dials_work(&target).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dials_of_the_only_agent_fail_while_it_is_frozen_and_work_when_it_goes_on() {
    /// As [`IMPATIENT`], with Konnectivity's own flag.
    const KONNECTIVITYS_FLAG: [&str; 3] =
        ["--keepalive-time=300ms", "--tunnel-keep-alive-interval=0", "--tunnel-idle-timeout=1s"];
    for (frontend, flags) in FRONTENDS.into_iter().zip([&IMPATIENT[..], &KONNECTIVITYS_FLAG]) {
        within(async {
            let Some(site) = Site::start(Make::Culvert, frontend, flags).await else { return };
            let agent = site.start_agent(Make::Konnectivity, "agent", &[]).await;
            site.until_joined(1).await;
            let (target, open) = site.open_echo().await;
            agent.freeze().await;
            let begun = Instant::now();
            let failed = site.dial(target.address()).await.unwrap_err().to_string();
            assert!(begun.elapsed() < GIVEN_UP, "{:?}", begun.elapsed());
            assert!(failed.contains("agent agent was lost while dialing"), "{failed}");
            is_cut_off(frontend, open).await;
            let begun = Instant::now();
            let failed = site.dial(target.address()).await.unwrap_err().to_string();
            // An agent that has just left is waited for.
            assert!(begun.elapsed() < RETURN_LIMIT + UNDISTURBED, "{:?}", begun.elapsed());
            assert!(failed.contains("No agent available"), "{failed}");
            agent.signal(Signal::SIGCONT);
            site.until_joined(1).await;
            site.until_dials_work(&target).await;
        })
        .await;
    }
}
