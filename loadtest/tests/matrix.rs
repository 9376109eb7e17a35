//! Agents and servers of both makes, every one with every other, through both frontends: what
//! mixes while a cluster is upgraded. The programs are real; where there is no Go to build stock's
//! these say so and are skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use common::{
    mixed::{
        Daemon, ESTABLISHED, Feat, KNOWN_SERVERS, Make, Mix, OPEN_SERVERS, OPEN_TARGETS, Site,
        until,
    },
    noise, within,
};
use culvert_loadtest::{
    frontend::{Connection, connect::ConnectError},
    peer::Frontend,
    targets::{self, Target},
};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc::UnboundedReceiver,
    task::JoinSet,
    time::timeout,
};

/// Bytes of a large transfer, each way.
const BULK: usize = 64 << 20;
/// Within which the end of one side is noticed by the other.
const NOTICE: Duration = Duration::from_secs(10);
/// What a connection may wait while another one of its agent misbehaves, on a loaded machine.
const UNDISTURBED: Duration = Duration::from_secs(1);
const FRONTENDS: [Frontend; 2] = [Frontend::Grpc, Frontend::Connect];

/// Both ends of a connection through the tunnel.
async fn both_ends(
    site: &Site,
    target: &Target,
    accepted: &mut UnboundedReceiver<TcpStream>,
) -> (Connection, TcpStream) {
    let frontend = site.dial(target.address()).await.unwrap();
    (frontend, accepted.recv().await.unwrap())
}

async fn echo(connection: &mut Connection, bytes: &[u8]) -> io::Result<()> {
    connection.write(bytes).await?;
    match connection.read_count(bytes.len()).await? {
        same if same == bytes => Ok(()),
        other => Err(io::Error::other(format!("{} bytes, or others", other.len()))),
    }
}

/// Dials an echo, uses it once and lets it go.
async fn touch(site: &Site, target: &Target) -> Result<(), ConnectError> {
    let mut connection = site.dial(target.address()).await?;
    echo(&mut connection, b"touched").await?;
    connection.close().await?;
    Ok(())
}

async fn dials_work_again(site: &Site, target: &Target) {
    until("a dial works", async || touch(site, target).await.is_ok()).await;
    for _ in 0..20 {
        touch(site, target).await.unwrap();
    }
}

/// The connection ends, in whatever way.
async fn ends(mut connection: Connection) {
    let ended = timeout(NOTICE, async {
        // A tunnel over UDP learns from the next packet that nobody is there.
        let _ = connection.write(b"anyone?").await;
        let _ = connection.read_to_end().await;
    });
    ended.await.expect("the connection hangs");
}

/// As `kubectl exec`: whoever has something to say says it and is answered.
#[tokio::test(flavor = "multi_thread")]
async fn keystrokes_cross_both_ways() {
    for mix in Mix::all() {
        within(async {
            let Some((site, _agent)) = Site::start_mix(mix).await else { return };
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (mut frontend, mut socket) = both_ends(&site, &target, &mut accepted).await;
            for round in 0..200_u8 {
                let (mut heard, key) = ([0; 3], [round, round, b'\n']);
                frontend.write(&key).await.unwrap();
                socket.read_exact(&mut heard).await.unwrap();
                assert_eq!(heard, key);
                socket.write_all(&[b'>', round]).await.unwrap();
                assert_eq!(frontend.read_count(2).await.unwrap(), [b'>', round]);
            }
        })
        .await;
    }
}

/// As `kubectl logs -f`, ended by Ctrl-C.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_followed_until_the_frontend_has_seen_enough() {
    for mix in Mix::all() {
        within(async {
            let Some((site, _agent)) = Site::start_mix(mix).await else { return };
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let (mut frontend, mut socket) = both_ends(&site, &target, &mut accepted).await;
            frontend.write(b"GET /logs").await.unwrap();
            socket.read_exact(&mut [0; 9]).await.unwrap();
            for line in 0..50 {
                let line = format!("line {line}\n");
                socket.write_all(line.as_bytes()).await.unwrap();
                assert_eq!(frontend.read_count(line.len()).await.unwrap(), line.as_bytes());
            }
            frontend.close().await.unwrap();
            let noticed = timeout(NOTICE, socket.read_to_end(&mut Vec::new())).await;
            // A close and a reset tell the target the same.
            let _ = noticed.expect("the target does not notice that nobody reads");
        })
        .await;
    }
}

/// As `kubectl cp` there and back.
#[tokio::test(flavor = "multi_thread")]
async fn large_transfers_arrive_unchanged_both_ways() {
    let bytes = Arc::new(noise(11, BULK));
    for mix in Mix::all() {
        let bytes = bytes.clone();
        within(async {
            let Some((site, _agent)) = Site::start_mix(mix).await else { return };
            let kept = bytes.clone();
            let target = Target::start(move |mut socket| {
                let bytes = kept.clone();
                async move {
                    let mut received = vec![0; bytes.len()];
                    socket.read_exact(&mut received).await?;
                    let answer = if received == *bytes { bytes.as_slice() } else { b"other bytes" };
                    socket.write_all(answer).await?;
                    socket.shutdown().await
                }
            });
            let target = target.await.unwrap();
            let begun = Instant::now();
            let mut frontend = site.dial(target.address()).await.unwrap();
            frontend.write(&bytes).await.unwrap();
            let up = begun.elapsed();
            let answer = frontend.read_count(bytes.len()).await.unwrap();
            println!("{up:?} up, {:?} in all", begun.elapsed());
            assert!(answer == *bytes, "{} bytes came back", answer.len());
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stock_client_transfers_both_ways_at_once() {
    for mix in Mix::all().into_iter().filter(|mix| mix.frontend == Frontend::Grpc) {
        within(async {
            let Some((site, _agent)) = Site::start_mix(mix).await else { return };
            let target = targets::echo().await.unwrap();
            let flags = ["--bytes", "16777216"];
            let (answer, code) = site.stock_client("echo", target.address(), &flags).await;
            assert_eq!(code, Some(0), "{answer}");
            assert_eq!(answer["sent_sha256"], answer["received_sha256"], "{answer}");
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_dial_is_told_in_the_agents_words() {
    for mix in Mix::all() {
        within(async {
            let Some((site, _agent)) = Site::start_mix(mix).await else { return };
            let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let refused = site.dial(closed).await.unwrap_err().to_string();
            let reason = format!("dial tcp {closed}: connect: connection refused");
            assert!(refused.ends_with(&reason), "{refused}");
            if mix.frontend == Frontend::Connect {
                assert!(refused.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{refused}");
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_dials_at_once_leave_nothing() {
    const DIALERS: usize = 16;
    const DIALS: usize = 12;
    for mix in Mix::all() {
        within(async {
            let Some((site, agent)) = Site::start_mix(mix).await else { return };
            let shared = Arc::new((site, targets::echo().await.unwrap()));
            let mut dialers = JoinSet::new();
            for _ in 0..DIALERS {
                let shared = shared.clone();
                dialers.spawn(async move {
                    for _ in 0..DIALS {
                        touch(&shared.0, &shared.1).await.unwrap();
                    }
                });
            }
            dialers.join_all().await;
            until("the agent has none", async || agent.metric(OPEN_TARGETS).await == 0.0).await;
            let server = &shared.0.server;
            until("the server has none", async || server.metric(ESTABLISHED).await == 0.0).await;
        })
        .await;
    }
}

/// As an SSH server: the banner comes before anybody asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_speaks_first_is_heard() {
    const DIALS: u64 = 50;
    /// Whoever has heard nothing for so long will hear nothing any more.
    const PAUSE: Duration = Duration::from_millis(500);
    for mix in Mix::all() {
        within(async {
            let Some((site, _agent)) = Site::start_mix(mix).await else { return };
            let target = targets::banner("ready\n").await.unwrap();
            let heard = match mix.frontend {
                Frontend::Grpc => {
                    let count = DIALS.to_string();
                    let flags = ["--count", &count, "--expect", "ready", "--timeout", "10s"];
                    let (answer, _) = site.stock_client("banner", target.address(), &flags).await;
                    println!("{answer}");
                    answer["right"].as_u64().unwrap()
                }
                Frontend::Connect => {
                    let mut heard = 0;
                    for _ in 0..DIALS {
                        let hear = async {
                            site.dial(target.address())
                                .await?
                                .read_count(6)
                                .await
                                .map_err(ConnectError::from)
                        };
                        let banner = timeout(PAUSE, hear).await;
                        heard +=
                            u64::from(matches!(banner, Ok(Ok(banner)) if banner == b"ready\n"));
                    }
                    heard
                }
            };
            match mix.excuse(Feat::ServerFirst) {
                None => assert_eq!(heard, DIALS),
                Some(excuse) => println!("{heard} of {DIALS} are heard: {excuse}"),
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_before_a_close_arrives() {
    let bytes = noise(12, 1 << 20);
    for mix in Mix::all() {
        within(async {
            let Some((site, _agent)) = Site::start_mix(mix).await else { return };
            let (target, mut records) = targets::recorder("").await.unwrap();
            let mut frontend = site.dial(target.address()).await.unwrap();
            frontend.write(&bytes).await.unwrap();
            frontend.close().await.unwrap();
            let record = timeout(NOTICE, records.recv()).await.expect("no end").unwrap();
            match mix.excuse(Feat::WrittenThenClosed) {
                None => assert!(record.bytes == bytes, "{} bytes arrived", record.bytes.len()),
                Some(excuse) => println!("{} bytes arrive: {excuse}", record.bytes.len()),
            }
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_ends_its_connections_and_is_replaced() {
    for mix in Mix::all() {
        within(async {
            let Some((site, mut agent)) = Site::start_mix(mix).await else { return };
            let target = targets::echo().await.unwrap();
            let mut open = site.dial(target.address()).await.unwrap();
            echo(&mut open, b"alive").await.unwrap();
            agent.kill().await;
            ends(open).await;
            let _agent = site.start_agent(mix.agent, "agent", &[]).await;
            dials_work_again(&site, &target).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_finds_a_server_that_was_killed_and_started_again() {
    for mix in Mix::all() {
        within(async {
            let Some((mut site, _agent)) = Site::start_mix(mix).await else { return };
            let target = targets::echo().await.unwrap();
            let mut open = site.dial(target.address()).await.unwrap();
            echo(&mut open, b"alive").await.unwrap();
            site.server.kill().await;
            ends(open).await;
            site.start_server(mix.server, &[]).await;
            site.until_joined(1).await;
            dials_work_again(&site, &target).await;
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_agent_keeps_what_it_has_and_the_other_one_gets_what_comes() {
    const DIALS: u32 = 10;
    for mix in Mix::all() {
        within(async {
            let Some((site, mut old)) = Site::start_mix(mix).await else { return };
            let target = targets::echo().await.unwrap();
            let mut open = site.dial(target.address()).await.unwrap();
            echo(&mut open, b"before").await.unwrap();
            let new = site.start_agent(mix.agent, "other", &[]).await;
            site.until_joined(2).await;
            old.signal(Signal::SIGTERM);
            // A stock agent says so only when it hears from the server next.
            let all_go_to_the_new_one = async || {
                until("none is left", async || new.metric(OPEN_TARGETS).await == 0.0).await;
                let mut held = Vec::new();
                for _ in 0..DIALS {
                    held.push(site.dial(target.address()).await.unwrap());
                }
                new.metric(OPEN_TARGETS).await == f64::from(DIALS)
            };
            until("new dials go to the other agent", all_go_to_the_new_one).await;
            echo(&mut open, b"after").await.unwrap();
            open.close().await.unwrap();
            if mix.agent == Make::Culvert {
                assert!(old.ended().await.success());
            }
        })
        .await;
    }
}

/// Stock has nobody else to ask then either.
#[tokio::test(flavor = "multi_thread")]
async fn the_only_agent_serves_while_it_drains() {
    for mix in Mix::all() {
        within(async {
            let Some((site, agent)) = Site::start_mix(mix).await else { return };
            let target = targets::echo().await.unwrap();
            let mut open = site.dial(target.address()).await.unwrap();
            agent.signal(Signal::SIGTERM);
            for _ in 0..20 {
                touch(&site, &target).await.unwrap();
            }
            echo(&mut open, b"still there").await.unwrap();
        })
        .await;
    }
}

/// A stock agent at our server.
fn stock_agent(frontend: Frontend) -> Mix {
    Mix { agent: Make::Stock, server: Make::Culvert, frontend }
}

/// How often a stock agent was told to close a connection.
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

/// One stream carries all connections of a stock agent, so it must not wait for one of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_is_cut_off_and_delays_nobody() {
    for frontend in FRONTENDS {
        within(async {
            let Some((site, agent)) = Site::start_mix(stock_agent(frontend)).await else { return };
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
            match frontend {
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
}

/// Whoever gives up may do so while the answer is on its way.
#[tokio::test(flavor = "multi_thread")]
async fn dials_that_are_given_up_leave_nothing() {
    const DIALERS: usize = 8;
    const DIALS: usize = 500;
    for frontend in FRONTENDS {
        within(async {
            let Some((site, agent)) = Site::start_mix(stock_agent(frontend)).await else { return };
            let shared = Arc::new((site, targets::echo().await.unwrap()));
            let mut dialers = JoinSet::new();
            for _ in 0..DIALERS {
                let shared = shared.clone();
                dialers.spawn(async move {
                    for _ in 0..DIALS {
                        let patience = Duration::from_millis(fastrand::u64(0..6));
                        let _ = timeout(patience, shared.0.dial(shared.1.address())).await;
                    }
                });
            }
            dialers.join_all().await;
            until("the agent has none", async || agent.metric(OPEN_TARGETS).await == 0.0).await;
            println!("{} connections were closed", close_requests(&agent));
        })
        .await;
    }
}

/// `kubectl logs -f` of busy containers, ended by Ctrl-C: what is under way then has no reader.
#[tokio::test(flavor = "multi_thread")]
async fn closing_busy_connections_delays_nobody() {
    for frontend in FRONTENDS {
        within(async {
            let Some((site, agent)) = Site::start_mix(stock_agent(frontend)).await else { return };
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
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_agent_is_told_who_its_server_is_and_how_many_there_are() {
    within(async {
        let Some(site) = Site::start(Make::Culvert, Frontend::Grpc, &["--server-count=3"]).await
        else {
            return;
        };
        let token = site.certificates.folder().join("token");
        std::fs::write(&token, "a.b.c").unwrap();
        let token = format!("--service-account-token-path={}", token.display());
        let agent = site.start_agent(Make::Stock, "agent", &[&token]).await;
        site.until_joined(1).await;
        assert_eq!(agent.metric(OPEN_SERVERS).await, 1.0);
        until("3 servers are known", async || agent.metric(KNOWN_SERVERS).await == 3.0).await;
        let named = async || agent.log().contains("serverID=\"the-server\"");
        until("the server's name is logged", named).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_agent_is_chosen_for_the_host_that_it_stands_for() {
    within(async {
        let flags = ["--proxy-strategies=destHost"];
        let Some(site) = Site::start(Make::Culvert, Frontend::Connect, &flags).await else {
            return;
        };
        let target = targets::echo().await.unwrap();
        let elsewhere = ["--agent-identifiers=ipv4=127.0.0.2&host=elsewhere"];
        let _elsewhere = site.start_agent(Make::Stock, "elsewhere", &elsewhere).await;
        let here = ["--agent-identifiers=ipv4=127.0.0.1&default-route=true"];
        let here = site.start_agent(Make::Stock, "here", &here).await;
        until("a dial works", async || touch(&site, &target).await.is_ok()).await;
        let _open = site.dial(target.address()).await.unwrap();
        assert_eq!(here.metric(OPEN_TARGETS).await, 1.0);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stock_agent_without_a_certificate_is_refused() {
    within(async {
        let Some(site) = Site::start(Make::Culvert, Frontend::Grpc, &[]).await else { return };
        let stranger = site.start_agent_unproven(Make::Stock, "stranger", Vec::new());
        let refused = async || stranger.log().contains("certificate required");
        until("the stranger is told why", refused).await;
        assert_eq!(stranger.metric(OPEN_SERVERS).await, 0.0);
        assert_eq!(site.ready_backends().await, 0.0);
        assert!(site.server.log().contains("an agent did not join"), "{}", site.server.log());
        let _known = site.start_agent(Make::Stock, "known", &[]).await;
        site.until_joined(1).await;
        assert_eq!(stranger.metric(OPEN_SERVERS).await, 0.0);
    })
    .await;
}

/// A stock agent that misses a server dials again and again, and leaves as soon as it hears that
/// it is at one that it knows.
#[tokio::test(flavor = "multi_thread")]
async fn a_stock_agents_search_for_more_servers_costs_no_dial() {
    within(async {
        let Some(site) = Site::start(Make::Culvert, Frontend::Connect, &["--server-count=3"]).await
        else {
            return;
        };
        let flags = ["--sync-interval=10ms", "--sync-interval-cap=10ms"];
        let agent = site.start_agent(Make::Stock, "agent", &flags).await;
        site.until_joined(1).await;
        let target = targets::echo().await.unwrap();
        let mut open = site.dial(target.address()).await.unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(3) {
            touch(&site, &target).await.unwrap();
        }
        echo(&mut open, b"undisturbed").await.unwrap();
        let searches = agent.log().matches("duplicate").count();
        assert!(searches > 10, "{searches} searches");
    })
    .await;
}
