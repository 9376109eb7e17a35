//! Agents and servers that go away, in order or not, and come back.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod common;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use culvert_agent::{Agent, config::Transport};
use culvert_loadtest::{
    certificates::Certificates,
    frontend::{
        Connection, Door,
        connect::{self, ConnectError},
    },
    process::{Process, free_port},
    rig::Running,
    targets,
};
use tokio::io::AsyncReadExt;

use common::{agent, echo, eventually, metric, until_stopped, within};

/// What a loaded test machine may add to "at once".
const AT_ONCE: Duration = Duration::from_secs(3);

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_culvert-loadtest"))
}

fn transport_flag(transport: Transport) -> String {
    format!("--transport={}", format!("{transport:?}").to_lowercase())
}

/// An agent as a process, joined to the rig's server.
async fn agent_process(rig: &Running, flags: &[&str]) -> Process {
    let (certificates, tunnel) = (rig.certificates(), rig.server.tunnel);
    let pair = certificates.agent();
    let mut all = vec![
        "--agent-id=process".to_owned(),
        transport_flag(rig.transport()),
        format!("--proxy-server-host={}", tunnel.ip()),
        format!("--proxy-server-port={}", tunnel.port()),
        format!("--ca-cert={}", certificates.ca().display()),
        format!("--agent-cert={}", pair.certificate.display()),
        format!("--agent-key={}", pair.key.display()),
        "--sync-interval=100ms".to_owned(),
        "--sync-interval-cap=500ms".to_owned(),
        format!("--health-server-port={}", free_port().unwrap()),
        format!("--admin-server-port={}", free_port().unwrap()),
    ];
    all.extend(flags.iter().map(|flag| (*flag).to_owned()));
    let mut peer = Process::start(program(), "agent", &all).unwrap();
    peer.until_logged("server connected").await.unwrap();
    peer
}

fn tunnels_lost(rig: &Running) -> String {
    let scrape = rig.server.metrics.render(&rig.server.backends);
    scrape.lines().filter(|line| line.contains("tunnels_lost_total{")).collect()
}

#[tokio::test]
async fn an_agent_killed_while_streaming_ends_its_frontends_at_once() {
    for door in Door::CONNECT_TLS.into_iter().chain(Door::GRPC_UNIX) {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let peer = agent_process(&rig, &[]).await;
            rig.until_joined(1).await.unwrap();
            let target = targets::echo().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            echo(&mut frontend, b"alive").await.unwrap();
            peer.signal("KILL").await.unwrap();
            let killed = Instant::now();
            // The next packet for the agent finds nobody, and over TCP the kernel tells it before. The
            // idle time-out is 25 s away.
            let _ = frontend.write(b"anyone?").await;
            frontend.read_to_end().await.unwrap_err();
            assert!(killed.elapsed() < AT_ONCE, "{door:?}: {:?}", killed.elapsed());
            rig.until_joined(0).await.unwrap();
            println!("{}", tunnels_lost(&rig));
        })
        .await;
    }
}

#[tokio::test]
async fn an_agent_killed_while_dialing_fails_the_dial_at_once() {
    for door in Door::CONNECT_UNIX.into_iter().chain(Door::GRPC_UNIX) {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let peer = agent_process(&rig, &[]).await;
            rig.until_joined(1).await.unwrap();
            peer.signal("KILL").await.unwrap();
            let killed = Instant::now();
            let refused = door.dial(&rig, "127.0.0.1:9").await.unwrap_err();
            assert!(killed.elapsed() < AT_ONCE, "{door:?}: {:?}", killed.elapsed());
            let refused = refused.to_string();
            if rig.transport() == Transport::Tcp && refused.contains("No agent available") {
                // TCP tells of a process that was killed by itself, and may be quicker than the dial.
                return;
            }
            assert!(refused.contains("agent process was lost while dialing"), "{refused}");
            if !door.is_grpc() {
                assert!(refused.starts_with("HTTP/1.1 502 Bad Gateway\r\n"));
                assert!(refused.contains("Backend context error: "));
            }
        })
        .await;
    }
}

fn of_server(rig: &Running, name: &str) -> f64 {
    metric(&rig.server.metrics.render(&rig.server.backends), name)
}

#[tokio::test]
async fn a_dial_waits_a_moment_for_an_agent_that_has_just_left() {
    for door in [Door::ConnectUnix, Door::GrpcUnix] {
        within(async {
            let mut rig = door.rig().start().await.unwrap();
            let target = targets::echo().await.unwrap();
            let again = Agent::bind(&rig.agent_config("again")).unwrap();
            rig.abort_agent(0);
            rig.until_joined(0).await.unwrap();
            let comes_back = async {
                eventually("the dial waits", || {
                    let pending = "konnectivity_network_proxy_server_pending_backend_dials";
                    of_server(&rig, pending) == 1.0
                })
                .await;
                again.run(std::future::pending()).await;
            };
            tokio::select! {
                dialed = door.dial(&rig, target.address()) => drop(dialed.unwrap()),
                () = comes_back => panic!("nobody told the agent to end"),
            }
            assert_eq!(of_server(&rig, "culvert_server_dials_waited_total{result=\"came\"}"), 1.0);
        })
        .await;
    }
}

#[tokio::test]
async fn whoever_waits_for_an_agent_in_vain_is_told_and_whoever_comes_later_does_not_wait() {
    within(async {
        let door = Door::ConnectUnix;
        let mut rig = door.rig().start().await.unwrap();
        rig.drain_agent(0).await.unwrap();
        rig.until_joined(0).await.unwrap();
        for _ in 0..3 {
            let refused = door.dial(&rig, "127.0.0.1:9").await.unwrap_err().to_string();
            assert!(refused.contains("No agent available"), "{refused}");
        }
        assert_eq!(of_server(&rig, "culvert_server_dials_waited_total{result=\"failed\"}"), 1.0);
    })
    .await;
}

/// SIGSTOP: the process is there and says nothing. Konnectivity dials it for ever.
#[tokio::test]
async fn a_frozen_agent_fails_its_dials_and_leaves_readiness() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let peer = agent_process(&rig, &[]).await;
            rig.until_joined(1).await.unwrap();
            peer.signal("STOP").await.unwrap();
            until_stopped(peer.id().unwrap()).await;
            let frozen = Instant::now();
            let refused = door.dial(&rig, "127.0.0.1:9").await.unwrap_err();
            assert!(frozen.elapsed() < Duration::from_secs(4), "{:?}", frozen.elapsed());
            assert!(refused.to_string().contains("no answer to a ping"), "{refused}");
            rig.until_joined(0).await.unwrap();
            // It comes back by itself once it can.
            peer.signal("CONT").await.unwrap();
            rig.until_joined(1).await.unwrap();
        })
        .await;
    }
}

#[tokio::test]
async fn an_agent_that_misbehaves_costs_its_own_tunnel() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let target = targets::echo().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
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
}

#[tokio::test]
async fn an_agent_told_to_stop_drains_and_exits_0() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().start().await.unwrap();
            let mut peer = agent_process(&rig, &["--drain-timeout=20s"]).await;
            rig.until_joined(2).await.unwrap();
            let target = targets::echo().await.unwrap();
            // Dials are spread at random: have one on each agent.
            let mut open = Vec::new();
            while !has_stream(&rig, "process") {
                open.push(door.dial(&rig, target.address()).await.unwrap());
            }
            peer.signal("TERM").await.unwrap();
            peer.until_logged("draining").await.unwrap();
            eventually("new dials go to the other agent alone", || {
                let scrape = rig.server.metrics.render(&rig.server.backends);
                metric(&scrape, "culvert_server_tunnels") > 1.5
            })
            .await;
            for connection in &mut open {
                echo(connection, b"old streams go on").await.unwrap();
            }
            drop(open);
            let status = peer.ended().await.unwrap();
            assert_eq!(status.code(), Some(0));
            rig.until_joined(1).await.unwrap();
            assert!(tunnels_lost(&rig).contains("reason=\"done\""), "{}", tunnels_lost(&rig));
        })
        .await;
    }
}

fn has_stream(rig: &Running, agent: &str) -> bool {
    let scrape = rig.server.metrics.render(&rig.server.backends);
    let open = format!("culvert_server_tunnel_open_streams{{agent_id=\"{agent}\"}}");
    metric(&scrape, &open) > 0.5
}

#[tokio::test]
async fn an_agent_whose_streams_do_not_end_leaves_when_its_time_is_over() {
    for door in Door::CONNECT_TLS {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let mut peer = agent_process(&rig, &["--drain-timeout=300ms"]).await;
            rig.until_joined(1).await.unwrap();
            let target = targets::echo().await.unwrap();
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            echo(&mut frontend, b"alive").await.unwrap();
            peer.signal("TERM").await.unwrap();
            // A cut is a cut: the frontend must not take it for an end.
            frontend.read_to_end().await.unwrap_err();
            assert_eq!(peer.ended().await.unwrap().code(), Some(0));
        })
        .await;
    }
}

#[tokio::test]
async fn a_second_signal_ends_an_agent_at_once() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let mut peer = agent_process(&rig, &["--drain-timeout=60s"]).await;
            rig.until_joined(1).await.unwrap();
            let target = targets::echo().await.unwrap();
            let _open = door.dial(&rig, target.address()).await.unwrap();
            peer.signal("TERM").await.unwrap();
            peer.until_logged("draining").await.unwrap();
            peer.signal("TERM").await.unwrap();
            assert_eq!(peer.ended().await.unwrap().code(), Some(1));
        })
        .await;
    }
}

/// A server as a process with this door, and where its frontend and tunnel are.
struct ServerProcess {
    door: Door,
    peer: Process,
    certificates: Certificates,
    tunnel_port: u16,
    flags: Vec<String>,
}

impl ServerProcess {
    async fn start(door: Door, flags: &[&str]) -> Self {
        let certificates = Certificates::generate().unwrap();
        let pair = certificates.server();
        let tunnel_port = free_port().unwrap();
        let mut all = vec![
            "--server-port=0".to_owned(),
            "--mode=http-connect".to_owned(),
            format!("--uds-name={}", certificates.folder().join("f.sock").display()),
            "--agent-bind-address=127.0.0.1".to_owned(),
            format!("--agent-port={tunnel_port}"),
            format!("--cluster-cert={}", pair.certificate.display()),
            format!("--cluster-key={}", pair.key.display()),
            format!("--cluster-ca-cert={}", certificates.ca().display()),
            "--health-bind-address=127.0.0.1".to_owned(),
            format!("--health-port={}", free_port().unwrap()),
            format!("--admin-port={}", free_port().unwrap()),
        ];
        all.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let mut peer = Process::start(program(), "server", &all).unwrap();
        peer.until_logged("culvert-server runs").await.unwrap();
        Self { door, peer, certificates, tunnel_port, flags: all }
    }

    /// An agent that has joined.
    async fn joined_by_agent(&mut self) -> Process {
        let pair = self.certificates.agent();
        let flags = [
            transport_flag(self.door.transport()),
            "--proxy-server-host=127.0.0.1".to_owned(),
            format!("--proxy-server-port={}", self.tunnel_port),
            // On a machine with much else to do TCP may be first otherwise.
            "--transport=quic".to_owned(),
            format!("--ca-cert={}", self.certificates.ca().display()),
            format!("--agent-cert={}", pair.certificate.display()),
            format!("--agent-key={}", pair.key.display()),
            "--sync-interval=100ms".to_owned(),
            "--sync-interval-cap=500ms".to_owned(),
            format!("--health-server-port={}", free_port().unwrap()),
            format!("--admin-server-port={}", free_port().unwrap()),
        ];
        let mut peer = Process::start(program(), "agent", &flags).unwrap();
        peer.until_logged("server connected").await.unwrap();
        self.peer.until_logged("agent connected").await.unwrap();
        peer
    }

    fn uds(&self) -> std::path::PathBuf {
        self.certificates.folder().join("f.sock")
    }

    async fn dial(&self, target: &targets::Target) -> Result<tokio::net::UnixStream, ConnectError> {
        connect::dial(&self.uds(), target.address()).await
    }
}

#[tokio::test]
async fn a_server_killed_ends_the_targets_and_the_agent_comes_back() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let mut server = ServerProcess::start(door, &[]).await;
            let mut agent = server.joined_by_agent().await;
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let _frontend = server.dial(&target).await.unwrap();
            let mut socket = accepted.recv().await.unwrap();

            server.peer.signal("KILL").await.unwrap();
            server.peer.ended().await.unwrap();
            let killed = Instant::now();
            // The agent's next packet finds nobody: let the target say something. Over TCP the agent
            // may have heard it from the kernel already.
            let _ = tokio::io::AsyncWriteExt::write_all(&mut socket, b"?").await;
            socket.read_u8().await.unwrap_err();
            assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
            agent.until_logged("server gone").await.unwrap();

            // What a crash leaves behind must not be in the way.
            assert!(server.uds().exists());
            server.peer = Process::start(program(), "server", &server.flags).unwrap();
            server.peer.until_logged("agent connected").await.unwrap();
            let echo = targets::echo().await.unwrap();
            server.dial(&echo).await.unwrap();
        })
        .await;
    }
}

/// The kernel's word that nobody listens comes only while nobody does. A server that is back by the
/// time of the next packet has to say itself that it knows nothing of the tunnel. Over QUIC alone:
/// the kernel knows every connection of TCP, and says so whoever listens.
#[tokio::test]
async fn a_server_that_is_back_before_the_next_packet_says_that_it_has_forgotten() {
    within(async {
        let mut server = ServerProcess::start(Door::ConnectUnix, &[]).await;
        let mut agent = server.joined_by_agent().await;
        let (target, mut accepted) = targets::handed_over().await.unwrap();
        let _frontend = server.dial(&target).await.unwrap();
        let mut socket = accepted.recv().await.unwrap();

        agent.signal("STOP").await.unwrap();
        server.peer.signal("KILL").await.unwrap();
        server.peer.ended().await.unwrap();
        server.peer = Process::start(program(), "server", &server.flags).unwrap();
        server.peer.until_logged("culvert-server runs").await.unwrap();
        agent.signal("CONT").await.unwrap();
        let back = Instant::now();
        // The agent may have found out already, having asked a server that was silent.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut socket, b"?").await;
        let gone = agent.until_logged("server gone").await.unwrap();
        assert!(back.elapsed() < AT_ONCE, "{:?}", back.elapsed());
        assert!(gone["reason"].as_str().unwrap().contains("restarted"), "{gone}");
        server.peer.until_logged("agent connected").await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_server_told_to_stop_without_grace_leaves_at_once_and_removes_its_socket() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let mut server = ServerProcess::start(door, &[]).await;
            let mut agent = server.joined_by_agent().await;
            let (target, mut accepted) = targets::handed_over().await.unwrap();
            let mut frontend = server.dial(&target).await.unwrap();
            let mut socket = accepted.recv().await.unwrap();
            let told = Instant::now();
            server.peer.signal("TERM").await.unwrap();
            assert_eq!(server.peer.ended().await.unwrap().code(), Some(0));
            assert!(told.elapsed() < AT_ONCE, "{:?}", told.elapsed());
            assert!(!server.uds().exists());
            let gone = agent.until_logged("server gone").await.unwrap();
            assert!(gone["reason"].as_str().unwrap().contains("the server stops"));
            assert_eq!(frontend.read(&mut [0]).await.unwrap(), 0);
            // The target sees a reset, never an end.
            socket.read_u8().await.unwrap_err();
        })
        .await;
    }
}

#[tokio::test]
async fn a_server_told_to_stop_drains_within_its_grace() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let mut server = ServerProcess::start(door, &["--graceful-shutdown-timeout=20s"]).await;
            let mut agent = server.joined_by_agent().await;
            let target = targets::echo().await.unwrap();
            let mut frontend = Connection::Unix(server.dial(&target).await.unwrap());
            echo(&mut frontend, b"before").await.unwrap();
            server.peer.signal("TERM").await.unwrap();
            agent.until_logged("the server drains").await.unwrap();
            assert!(!server.uds().exists(), "no new frontends");
            echo(&mut frontend, b"old streams go on").await.unwrap();
            frontend.close().await.unwrap();
            assert_eq!(server.peer.ended().await.unwrap().code(), Some(0));
        })
        .await;
    }
}

/// A new process of the same name takes over; what its predecessor left is found out and removed.
#[tokio::test]
async fn an_agent_that_restarts_takes_over_from_itself() {
    for door in Door::CONNECT_UNIX {
        within(async {
            let rig = door.rig().agents(0).start().await.unwrap();
            let (_old_tunnel, _old_control) = agent::joined(&rig, "process").await;
            let _peer = agent_process(&rig, &[]).await;
            let target = targets::echo().await.unwrap();
            // The older tunnel would never answer; the newer one is asked.
            let mut frontend = door.dial(&rig, target.address()).await.unwrap();
            echo(&mut frontend, b"new").await.unwrap();
            eventually("the silent predecessor is gone", || {
                let scrape = rig.server.metrics.render(&rig.server.backends);
                metric(&scrape, "culvert_server_tunnels") < 1.5
            })
            .await;
            echo(&mut frontend, b"still here").await.unwrap();
        })
        .await;
    }
}
