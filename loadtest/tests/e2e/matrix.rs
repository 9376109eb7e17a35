//! Agents and servers of Culvert and Konnectivity in every combination, through both frontends: the
//! combinations that occur while a cluster is upgraded.

use std::{sync::Arc, time::Duration};

use culvert_loadtest::{
    frontend::{
        Connection,
        Protocol::{self, Connect, Grpc},
        connect::ConnectError,
    },
    process::Signal,
    targets::{self, Target},
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use crate::support::{
    at_once,
    deployment::{
        Capability, Combination, ESTABLISHED,
        Implementation::{self, Culvert, Konnectivity},
        Joined, OPEN_TARGETS, can_run, with_joined,
    },
    echo, eventually, noise,
};

/// Bytes of a large transfer in each direction.
const BULK: usize = 64 << 20;
/// Time for one side to notice the end of the other: beyond the idle time-out of a tunnel, 25 s.
const NOTICE: Duration = Duration::from_secs(60);

/// Waits for the end of a connection, by a FIN or a reset.
async fn ends(mut connection: Connection) {
    let ended = timeout(NOTICE, async {
        // Over QUIC the next packet is answered by ICMP.
        let _ = connection.write(b"?").await;
        let _ = connection.read_to_end().await;
    });
    ended.await.expect("the connection hangs");
}

/// As `kubectl exec`: a key goes one way, its echo the other.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn keystrokes_cross_both_ways(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    with_joined(Combination { agent, server, frontend }, async |Joined { deployment, .. }| {
        let (mut frontend, mut socket, _target) = deployment.both_ends().await;
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
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_followed_until_the_frontend_has_seen_enough(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    with_joined(Combination { agent, server, frontend }, async |Joined { deployment, .. }| {
        let (mut frontend, mut socket, _target) = deployment.both_ends().await;
        frontend.write(b"GET /logs").await.unwrap();
        socket.read_exact(&mut [0; 9]).await.unwrap();
        for line in 0..50 {
            let line = format!("line {line}\n");
            socket.write_all(line.as_bytes()).await.unwrap();
            assert_eq!(frontend.read_count(line.len()).await.unwrap(), line.as_bytes());
        }
        frontend.close().await.unwrap();
        let noticed = timeout(NOTICE, socket.read_to_end(&mut Vec::new())).await;
        // A FIN and a reset are both an end.
        let _ = noticed.expect("the target does not notice that the client has gone");
    })
    .await;
}

/// As `kubectl cp` there and back.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn large_transfers_arrive_unchanged_both_ways(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    let bytes = Arc::new(noise(11, BULK));
    with_joined(Combination { agent, server, frontend }, async |Joined { deployment, .. }| {
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
        let mut frontend = deployment.dial(target.address()).await.unwrap();
        frontend.write(&bytes).await.unwrap();
        let answer = frontend.read_count(bytes.len()).await.unwrap();
        assert!(answer == *bytes, "{} bytes came back", answer.len());
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_konnectivity_client_transfers_both_ways_at_once(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    if !can_run(&[Konnectivity]).await {
        return;
    }
    with_joined(
        Combination { agent, server, frontend: Grpc },
        async |Joined { deployment, .. }| {
            let target = targets::echo().await.unwrap();
            let flags = ["--bytes", "16777216"];
            let (answer, code) = deployment.run_client("echo", target.address(), &flags).await;
            assert_eq!(code, Some(0), "{answer}");
            assert_eq!(answer["sent_sha256"], answer["received_sha256"], "{answer}");
        },
    )
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_dial_is_reported_with_the_agents_text(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    with_joined(Combination { agent, server, frontend }, async |Joined { deployment, .. }| {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let refused = deployment.dial(closed).await.unwrap_err().to_string();
        let reason = format!("dial tcp {closed}: connect: connection refused");
        assert!(refused.ends_with(&reason), "{refused}");
        if frontend == Connect {
            assert!(refused.starts_with("HTTP/1.1 502 Bad Gateway\r\n"), "{refused}");
        }
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn many_dials_at_once_leave_nothing(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    const DIALERS: usize = 16;
    const DIALS: usize = 12;
    with_joined(
        Combination { agent, server, frontend },
        async |Joined { deployment, agent, .. }| {
            let shared = Arc::new((deployment, targets::echo().await.unwrap()));
            at_once(DIALERS, || {
                let shared = shared.clone();
                async move {
                    for _ in 0..DIALS {
                        shared.0.touch(&shared.1).await.unwrap();
                    }
                }
            })
            .await;
            eventually("the agent has none", async || {
                agent.metric(OPEN_TARGETS).await.unwrap() == 0.0
            })
            .await;
            let deployment = &shared.0;
            let none = async || deployment.server_metric(ESTABLISHED).await == 0.0;
            eventually("the server has none", none).await;
        },
    )
    .await;
}

/// Makes attempts: all succeed where the combination has the capability. Where it lacks it, one
/// fails, or the reason does not hold any more.
async fn attempt(
    combination: Combination,
    capability: Capability,
    attempts: usize,
    mut succeeds: impl AsyncFnMut() -> bool,
) {
    let lacks = combination.lacks(capability);
    for attempt in 0..attempts {
        if !succeeds().await {
            println!("attempt {attempt} fails");
            assert!(lacks.is_some(), "attempt {attempt} fails");
            return;
        }
    }
    assert_eq!(lacks, None, "all {attempts} attempts succeed");
}

/// As an SSH server: the banner comes before the client has written. A client that has not received
/// it within 10 s never will.
#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_banner_of_a_target_that_writes_first_arrives(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    const PATIENCE: Duration = Duration::from_secs(10);
    if frontend == Grpc && !can_run(&[Konnectivity]).await {
        return; // kube-apiserver's client library needs Go too
    }
    let combination = Combination { agent, server, frontend };
    with_joined(combination, async |Joined { deployment, .. }| {
        let target = targets::banner("ready\n").await.unwrap();
        match frontend {
            Grpc => {
                let flags = ["--count", "10", "--expect", "ready", "--timeout", "10s"];
                attempt(combination, Capability::ServerFirst, 20, async || {
                    let (answer, _) =
                        deployment.run_client("banner", target.address(), &flags).await;
                    answer["right"] == 10
                })
                .await;
            }
            Connect => {
                attempt(combination, Capability::ServerFirst, 200, async || {
                    let read = async {
                        let mut connection = deployment.dial(target.address()).await?;
                        Ok::<_, ConnectError>(connection.read_count(6).await?)
                    };
                    let banner = timeout(PATIENCE, read).await;
                    matches!(banner, Ok(Ok(banner)) if banner == b"ready\n")
                })
                .await;
            }
        }
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn bytes_written_before_a_close_arrive(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    let bytes = noise(12, 1 << 20);
    let combination = Combination { agent, server, frontend };
    with_joined(combination, async |Joined { deployment, .. }| {
        let (target, mut records) = targets::recorder("").await.unwrap();
        attempt(combination, Capability::WriteThenClose, 10, async || {
            let mut frontend = deployment.dial(target.address()).await.unwrap();
            frontend.write(&bytes).await.unwrap();
            frontend.close().await.unwrap();
            let record = timeout(NOTICE, records.recv()).await.expect("no end").unwrap();
            record.bytes == bytes
        })
        .await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_killed_ends_its_connections_and_is_replaced(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    with_joined(
        Combination { agent, server, frontend },
        async |Joined { combination, deployment, mut agent }| {
            let (target, open) = deployment.open_echo().await;
            agent.kill().await.unwrap();
            ends(open).await;
            let _agent = deployment.start_agent(combination.agent, "agent", &[]).await;
            deployment.until_dials_work(&target).await;
        },
    )
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_finds_a_server_that_was_killed_and_started_again(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    with_joined(
        Combination { agent, server, frontend },
        async |Joined { combination, mut deployment, .. }| {
            let (target, open) = deployment.open_echo().await;
            deployment.server().kill().await.unwrap();
            ends(open).await;
            deployment.start_server(combination.server, &[]).await;
            deployment.until_joined(1).await;
            deployment.until_dials_work(&target).await;
        },
    )
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_draining_agent_keeps_its_streams_and_the_other_one_gets_new_dials(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    const DIALS: u32 = 10;
    with_joined(
        Combination { agent, server, frontend },
        async |Joined { combination, deployment, agent: mut old }| {
            let (target, mut open) = deployment.open_echo().await;
            let new = deployment.start_agent(combination.agent, "other", &[]).await;
            deployment.until_joined(2).await;
            old.signal(Signal::Terminate).await.unwrap();
            // A Konnectivity agent announces it only with its next packet.
            let all_go_to_the_new_one = async || {
                eventually("none is left", async || new.metric(OPEN_TARGETS).await.unwrap() == 0.0)
                    .await;
                let mut held = Vec::new();
                for _ in 0..DIALS {
                    held.push(deployment.dial(target.address()).await.unwrap());
                }
                new.metric(OPEN_TARGETS).await.unwrap() == f64::from(DIALS)
            };
            eventually("new dials go to the other agent", all_go_to_the_new_one).await;
            echo(&mut open, b"after").await.unwrap();
            open.close().await.unwrap();
            if combination.agent == Culvert {
                assert!(old.ended().await.unwrap().success());
            }
        },
    )
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn the_only_agent_serves_dials_while_it_drains(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[values(Grpc, Connect)] frontend: Protocol,
) {
    with_joined(
        Combination { agent, server, frontend },
        async |Joined { deployment, mut agent, .. }| {
            let (target, mut open) = deployment.open_echo().await;
            agent.signal(Signal::Terminate).await.unwrap();
            for _ in 0..20 {
                deployment.touch(&target).await.unwrap();
            }
            echo(&mut open, b"still there").await.unwrap();
        },
    )
    .await;
}
