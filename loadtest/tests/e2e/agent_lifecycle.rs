//! Agents that are killed, freeze, misbehave, drain or come back.

use std::time::{Duration, Instant};

use culvert_agent::Agent;
use culvert_loadtest::{
    flags::{AgentFlags, SYNC_OFTEN},
    frontend::{
        Connection,
        FrontendKind::{self, ConnectTls, ConnectUnix, GrpcUnix},
        Protocol,
    },
    process::{Process, Signal, free_port},
    rig::Running,
    targets::{self, Target},
};
use rstest::rstest;

use crate::support::{
    Carrier::{self, Quic, Tcp},
    LOG_AS_JSON, agent, echo, eventually, rig,
    silent_target::SilentTarget,
    start_culvert, within,
};

/// Time within which the loss of a process is noticed: below the idle time-out of a tunnel, 25 s,
/// by which it would be noticed in any case. On an idle machine it takes milliseconds.
const AT_ONCE: Duration = Duration::from_secs(15);

/// An agent as a process, joined to the rig's server over the rig's carrier.
async fn agent_process(rig: &Running, flags: &[&str]) -> Process {
    let health_port = free_port().unwrap();
    let carrier = rig.carrier().unwrap();
    let args = AgentFlags {
        certificates: rig.certificates(),
        shows_certificate: true,
        id: Some("process"),
        server: rig.server.tunnel,
        admin_port: free_port().unwrap(),
        health_port,
    };
    let more = SYNC_OFTEN.iter().chain(&LOG_AS_JSON).chain(flags).map(|flag| (*flag).to_owned());
    let more = more.chain([format!("--transport={carrier}")]);
    let log = rig.certificates().folder().join("process.log");
    let mut process = start_culvert("agent", args.args().into_iter().chain(more), log, health_port);
    process.until_logged("server connected").await.unwrap();
    assert!(rig.server.tunnels(carrier) > 0);
    process
}

/// The same, killed while its one stream is open: that stream's frontend, which has written since, its
/// target, and when the agent was killed.
async fn killed_while_streaming(rig: &Running) -> (Connection, Target, Instant) {
    let mut process = agent_process(rig, &[]).await;
    rig.until_joined(1).await.unwrap();
    let target = targets::echo().await.unwrap();
    let mut frontend = rig.dial(target.address()).await.unwrap();
    echo(&mut frontend, b"alive").await.unwrap();
    process.signal(Signal::Kill).await.unwrap();
    let killed = Instant::now();
    // Over QUIC the next packet is answered by ICMP; over TCP the kernel has sent a reset.
    let _ = frontend.write(b"?").await;
    (frontend, target, killed)
}

fn tunnels_lost(rig: &Running) -> String {
    rig.server.scrape().lines().filter(|line| line.contains("tunnels_lost_total{")).collect()
}

/// The server cannot know that the agent will not return, unless it is told not to wait.
#[rstest]
#[tokio::test]
async fn an_agent_that_is_killed_while_streaming_ends_its_frontends_at_once(
    #[values(ConnectTls, GrpcUnix)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).agents(0).server_flag("--resume-timeout=0");
        let rig = rig.start().await.unwrap();
        let (mut frontend, _target, killed) = killed_while_streaming(&rig).await;
        frontend.read_to_end().await.unwrap_err();
        assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
        rig.until_joined(0).await.unwrap();
        println!("{}", tunnels_lost(&rig));
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_that_is_started_again_ends_the_frontends_of_its_older_process_at_once(
    #[values(ConnectTls, GrpcUnix)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).agents(0).start().await.unwrap();
        let (mut frontend, _target, killed) = killed_while_streaming(&rig).await;
        let _again = agent_process(&rig, &[]).await;
        frontend.read_to_end().await.unwrap_err();
        assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
        println!("{}", tunnels_lost(&rig));
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_dial_whose_agent_is_killed_and_does_not_return_fails_at_its_deadline(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(frontend, carrier).agents(0).server_flag("--backend-dial-timeout=6s");
        let rig = rig.start().await.unwrap();
        let mut process = agent_process(&rig, &[]).await;
        rig.until_joined(1).await.unwrap();
        let target = SilentTarget::start();
        let kill = async {
            eventually("the agent connects", async || target.attempts() == 1).await;
            process.signal(Signal::Kill).await.unwrap();
            Instant::now()
        };
        let (dialed, killed) = tokio::join!(rig.dial(target.address()), kill);
        let refused = dialed.unwrap_err().to_string();
        assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
        assert!(refused.contains("agent process was lost while dialing"), "{refused}");
        assert!(refused.contains("; no other tunnel within "), "{refused}");
        if frontend.protocol() == Protocol::Connect {
            assert!(refused.starts_with("HTTP/1.1 502 Bad Gateway\r\n"));
            assert!(refused.contains("Backend context error: "));
        }
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_dial_waits_for_an_agent_that_has_just_left(
    #[values(ConnectUnix, GrpcUnix)] frontend: FrontendKind,
) {
    within(async {
        let mut rig = rig(frontend, Quic).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let again = Agent::bind(&rig.agent_config("again").unwrap()).unwrap();
        rig.abort_agent(0);
        rig.until_joined(0).await.unwrap();
        let comes_back = async {
            eventually("the dial waits", async || rig.server.pending_dials() == 1.0).await;
            again.run(std::future::pending()).await;
        };
        tokio::select! {
            dialed = rig.dial(target.address()) => drop(dialed.unwrap()),
            () = comes_back => panic!("the agent ended without a signal"),
        }
        let waited = rig.server.metric("culvert_server_dials_waited_total{result=\"came\"}");
        assert_eq!(waited, 1.0);
    })
    .await;
}

#[tokio::test]
async fn a_dial_fails_when_no_agent_comes_back_and_later_dials_do_not_wait() {
    within(async {
        let mut rig = rig(ConnectUnix, Quic).start().await.unwrap();
        rig.drain_agent(0).await.unwrap();
        rig.until_joined(0).await.unwrap();
        for _ in 0..3 {
            let refused = rig.dial("127.0.0.1:9").await.unwrap_err().to_string();
            assert!(refused.contains("No agent available"), "{refused}");
        }
        let waited = rig.server.metric("culvert_server_dials_waited_total{result=\"failed\"}");
        assert_eq!(waited, 1.0);
    })
    .await;
}

/// SIGSTOP: the process exists and sends nothing. Konnectivity dials it for ever.
#[rstest]
#[tokio::test]
async fn dials_of_a_frozen_agent_fail_at_their_deadline_and_it_is_not_ready(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
        let mut process = agent_process(&rig, &[]).await;
        rig.until_joined(1).await.unwrap();
        process.freeze().await.unwrap();
        let frozen = Instant::now();
        let refused = rig.dial("127.0.0.1:9").await.unwrap_err();
        assert!(frozen.elapsed() < AT_ONCE, "{:?}", frozen.elapsed());
        assert!(refused.to_string().contains("no answer to a ping"), "{refused}");
        rig.until_joined(0).await.unwrap();
        // It comes back by itself once it runs again.
        process.signal(Signal::Thaw).await.unwrap();
        rig.until_joined(1).await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_that_violates_the_protocol_loses_its_own_tunnel(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(ConnectUnix, carrier).start().await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        let (tunnel, mut control) = agent::joined(&rig, "mad").await;
        rig.until_joined(2).await.unwrap();
        control.send(&agent::hello("mad")).await.unwrap();
        let lost = tunnel.closed().await.to_string();
        assert!(lost.contains("protocol_violation"), "{lost}");
        rig.until_joined(1).await.unwrap();
        echo(&mut frontend, b"still here").await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_drains_after_sigterm_and_exits_with_0(#[values(Quic, Tcp)] carrier: Carrier) {
    const DIALS: u32 = 20;
    within(async {
        let mut rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
        let mut process = agent_process(&rig, &["--drain-timeout=60s"]).await;
        rig.until_joined(1).await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut open = vec![rig.dial(target.address()).await.unwrap()];
        rig.add_agent("agent-0").unwrap();
        rig.until_joined(2).await.unwrap();
        process.signal(Signal::Terminate).await.unwrap();
        process.until_logged("draining").await.unwrap();
        // The server learns of it a moment later.
        let streams = |agent| rig.server.open_streams(agent);
        eventually("all new dials go to the other agent", async || {
            let (draining, other) = (streams("process"), streams("agent-0"));
            for _ in 0..DIALS {
                open.push(rig.dial(target.address()).await.unwrap());
            }
            streams("process") == draining && streams("agent-0") == other + f64::from(DIALS)
        })
        .await;
        assert_eq!(rig.server.tunnels(carrier), 2);
        for connection in &mut open {
            echo(connection, b"old streams go on").await.unwrap();
        }
        drop(open);
        assert_eq!(process.ended().await.unwrap().code(), Some(0));
        eventually("its tunnel is gone", async || rig.server.tunnels(carrier) == 1).await;
        assert!(tunnels_lost(&rig).contains("reason=\"done\""), "{}", tunnels_lost(&rig));
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn an_agent_ends_at_its_drain_timeout_while_streams_are_open(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let rig = rig(ConnectTls, carrier).agents(0).start().await.unwrap();
        let mut process = agent_process(&rig, &["--drain-timeout=300ms"]).await;
        rig.until_joined(1).await.unwrap();
        let target = targets::echo().await.unwrap();
        let mut frontend = rig.dial(target.address()).await.unwrap();
        echo(&mut frontend, b"alive").await.unwrap();
        process.signal(Signal::Terminate).await.unwrap();
        // The frontend sees a cut, not an end.
        frontend.read_to_end().await.unwrap_err();
        assert_eq!(process.ended().await.unwrap().code(), Some(0));
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_second_signal_ends_an_agent_at_once(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
        let mut process = agent_process(&rig, &["--drain-timeout=10m"]).await;
        rig.until_joined(1).await.unwrap();
        let target = targets::echo().await.unwrap();
        let _open = rig.dial(target.address()).await.unwrap();
        process.signal(Signal::Terminate).await.unwrap();
        process.until_logged("draining").await.unwrap();
        process.signal(Signal::Terminate).await.unwrap();
        assert_eq!(process.ended().await.unwrap().code(), Some(0));
    })
    .await;
}

/// A new process with the same name takes over; the silent tunnel of the old one is removed.
#[rstest]
#[tokio::test]
async fn an_agent_that_restarts_replaces_its_old_tunnel(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let rig = rig(ConnectUnix, carrier).agents(0).start().await.unwrap();
        let (_old_tunnel, _old_control) = agent::joined(&rig, "process").await;
        let _process = agent_process(&rig, &[]).await;
        let target = targets::echo().await.unwrap();
        // The old tunnel would never answer; the new one is used.
        let mut frontend = rig.dial(target.address()).await.unwrap();
        echo(&mut frontend, b"new").await.unwrap();
        eventually("the old tunnel is gone", async || rig.server.tunnels(carrier) == 1).await;
        echo(&mut frontend, b"still here").await.unwrap();
    })
    .await;
}

/// Agents stop in order while their servers read and write the control streams: during the
/// handshake, the hello and the welcome, and once they have joined.
#[rstest]
#[case::at_its_drain_timeout("0s", "shutdown")]
#[case::once_it_has_drained("5s", "done")]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_agent_that_stops_in_order_breaks_no_protocol_whenever_it_stops(
    #[case] drain_timeout: &str,
    #[case] reason: &str,
) {
    const AGENTS: usize = 4;
    within(async {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let rig = rig(ConnectUnix, Quic).agents(0);
        let mut rig =
            rig.agent_flag(format!("--drain-timeout={drain_timeout}")).start().await.unwrap();
        for round in 0..12 {
            for agent in 0..AGENTS {
                rig.add_agent(&format!("agent-{round}-{agent}")).unwrap();
            }
            if round % 3 == 0 {
                rig.until_joined(AGENTS).await.unwrap();
            } else {
                for _ in 0..random.u32(..2000) {
                    tokio::task::yield_now().await;
                }
            }
            for _ in 0..AGENTS {
                rig.drain_agent(0).await.unwrap();
            }
            rig.until_joined(0).await.unwrap();
        }
        let scrape = rig.server.scrape();
        let lines = scrape.lines().filter(|line| line.contains("protocol_violation"));
        let violations: Vec<_> = lines.filter(|line| !line.ends_with(" 0")).collect();
        assert!(violations.is_empty(), "{violations:?}");
        let expected = format!("reason=\"{reason}\"");
        assert!(tunnels_lost(&rig).contains(&expected), "{}", tunnels_lost(&rig));
    })
    .await;
}
