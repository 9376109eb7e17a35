//! Agents and servers of both makes, every one with every other, through both frontends: what
//! mixes while a cluster is upgraded. The programs are real; where there is no Go to build Konnectivity's
//! these say so and are skipped.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::{
    at_once, echo,
    mixed::{ESTABLISHED, Feat, Make, Met, Mix, OPEN_TARGETS, until, with_each},
    noise,
};
use culvert_loadtest::{
    frontend::{Connection, connect::ConnectError},
    peer::Frontend,
    targets::{self, Target},
};
use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

/// Bytes of a large transfer, each way.
const BULK: usize = 64 << 20;
/// Within which the end of one side is noticed by the other.
const NOTICE: Duration = Duration::from_secs(10);

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
    with_each(Mix::all(), async |Met { site, .. }| {
        let (mut frontend, mut socket, _target) = site.both_ends().await;
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

/// As `kubectl logs -f`, ended by Ctrl-C.
#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_followed_until_the_frontend_has_seen_enough() {
    with_each(Mix::all(), async |Met { site, .. }| {
        let (mut frontend, mut socket, _target) = site.both_ends().await;
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

/// As `kubectl cp` there and back.
#[tokio::test(flavor = "multi_thread")]
async fn large_transfers_arrive_unchanged_both_ways() {
    let bytes = Arc::new(noise(11, BULK));
    let bytes = bytes.clone();
    with_each(Mix::all(), async |Met { site, .. }| {
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

#[tokio::test(flavor = "multi_thread")]
async fn the_konnectivity_client_transfers_both_ways_at_once() {
    let mixes = Mix::all().into_iter().filter(|mix| mix.frontend == Frontend::Grpc);
    with_each(mixes, async |Met { site, .. }| {
        let target = targets::echo().await.unwrap();
        let flags = ["--bytes", "16777216"];
        let (answer, code) = site.konnectivity_client("echo", target.address(), &flags).await;
        assert_eq!(code, Some(0), "{answer}");
        assert_eq!(answer["sent_sha256"], answer["received_sha256"], "{answer}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_dial_is_told_in_the_agents_words() {
    with_each(Mix::all(), async |Met { mix, site, .. }| {
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

#[tokio::test(flavor = "multi_thread")]
async fn many_dials_at_once_leave_nothing() {
    const DIALERS: usize = 16;
    const DIALS: usize = 12;
    with_each(Mix::all(), async |Met { site, agent, .. }| {
        let shared = Arc::new((site, targets::echo().await.unwrap()));
        at_once(DIALERS, || {
            let shared = shared.clone();
            async move {
                for _ in 0..DIALS {
                    shared.0.touch(&shared.1).await.unwrap();
                }
            }
        })
        .await;
        until("the agent has none", async || agent.metric(OPEN_TARGETS).await == 0.0).await;
        let server = &shared.0.server;
        until("the server has none", async || server.metric(ESTABLISHED).await == 0.0).await;
    })
    .await;
}

/// As an SSH server: the banner comes before anybody asked.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_speaks_first_is_heard() {
    const DIALS: u64 = 50;
    /// Whoever has heard nothing for so long will hear nothing any more.
    const PAUSE: Duration = Duration::from_millis(500);
    with_each(Mix::all(), async |Met { mix, site, .. }| {
        let target = targets::banner("ready\n").await.unwrap();
        let heard = match mix.frontend {
            Frontend::Grpc => {
                let count = DIALS.to_string();
                let flags = ["--count", &count, "--expect", "ready", "--timeout", "10s"];
                let (answer, _) =
                    site.konnectivity_client("banner", target.address(), &flags).await;
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
                    heard += u64::from(matches!(banner, Ok(Ok(banner)) if banner == b"ready\n"));
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

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_before_a_close_arrives() {
    let bytes = noise(12, 1 << 20);
    with_each(Mix::all(), async |Met { mix, site, .. }| {
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

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_ends_its_connections_and_is_replaced() {
    with_each(Mix::all(), async |Met { mix, site, mut agent }| {
        let (target, open) = site.open_echo().await;
        agent.kill().await;
        ends(open).await;
        let _agent = site.start_agent(mix.agent, "agent", &[]).await;
        site.until_dials_work(&target).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_finds_a_server_that_was_killed_and_started_again() {
    with_each(Mix::all(), async |Met { mix, mut site, .. }| {
        let (target, open) = site.open_echo().await;
        site.server.kill().await;
        ends(open).await;
        site.start_server(mix.server, &[]).await;
        site.until_joined(1).await;
        site.until_dials_work(&target).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draining_agent_keeps_what_it_has_and_the_other_one_gets_what_comes() {
    const DIALS: u32 = 10;
    with_each(Mix::all(), async |Met { mix, site, agent: mut old }| {
        let (target, mut open) = site.open_echo().await;
        let new = site.start_agent(mix.agent, "other", &[]).await;
        site.until_joined(2).await;
        old.signal(Signal::SIGTERM);
        // A Konnectivity agent says so only when it hears from the server next.
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

/// Konnectivity has nobody else to ask then either.
#[tokio::test(flavor = "multi_thread")]
async fn the_only_agent_serves_while_it_drains() {
    with_each(Mix::all(), async |Met { site, agent, .. }| {
        let (target, mut open) = site.open_echo().await;
        agent.signal(Signal::SIGTERM);
        for _ in 0..20 {
            site.touch(&target).await.unwrap();
        }
        echo(&mut open, b"still there").await.unwrap();
    })
    .await;
}
