//! Servers that are killed, restart or drain, with an agent as a process.

use std::{
    io::ErrorKind,
    time::{Duration, Instant},
};

use culvert_loadtest::{
    carrier::Serving,
    frontend::Protocol,
    process::{Process, Signal},
};
use rstest::rstest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::support::{
    Carrier::{self, Quic, Tcp},
    LOG_AS_JSON,
    deployment::{Deployment, Implementation::Culvert},
    echo, within,
};

/// Time within which the loss of a process is noticed: below the idle time-out of a tunnel, 25 s,
/// by which it would be noticed in any case. On an idle machine it takes milliseconds.
const AT_ONCE: Duration = Duration::from_secs(15);

/// A server, and an agent that has joined it over one carrier.
struct Pair {
    deployment: Deployment,
    agent: Process,
}

impl Pair {
    async fn start(carrier: Carrier, server_flags: &[&str]) -> Self {
        let flags = [&LOG_AS_JSON, server_flags].concat();
        let mut deployment = Deployment::start(Culvert, Protocol::Connect, &flags).await;
        let transport = format!("--transport={carrier}");
        let flags = [&LOG_AS_JSON[..], &[&transport]].concat();
        let mut agent = deployment.start_agent(Culvert, "agent", &flags).await;
        agent.until_logged("server connected").await.unwrap();
        deployment.server().until_logged("agent connected").await.unwrap();
        let readiness = agent.get("/readyz?verbose").await.unwrap().body;
        let serving = Serving::from_readiness(&readiness).expect("the agent has a tunnel");
        assert_eq!(serving.carrier, carrier, "{readiness}");
        Self { deployment, agent }
    }
}

#[rstest]
#[tokio::test]
async fn a_server_that_is_killed_ends_the_targets_and_the_agent_comes_back(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        // The agent cannot know that the server will not return, unless it is told not to wait.
        let flags = ["--resume-timeout=0"];
        let Pair { mut deployment, mut agent } = Pair::start(carrier, &flags).await;
        let (_frontend, mut socket, _target) = deployment.both_ends().await;
        deployment.server().kill().await.unwrap();
        let killed = Instant::now();
        // Over QUIC the next packet is answered by ICMP; over TCP the kernel has sent a reset.
        let _ = socket.write_all(b"?").await;
        socket.read_u8().await.unwrap_err();
        assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
        agent.until_logged("server gone").await.unwrap();

        // The socket that a crash leaves behind does not prevent the next start.
        assert!(deployment.socket().exists());
        deployment.server().restart().await.unwrap();
        deployment.server().until_logged("agent connected").await.unwrap();
        deployment.open_echo().await;
    })
    .await;
}

/// The kernel answers with ICMP only while no process listens. A server that listens again by the
/// time of the next packet has to report itself that it does not know the tunnel. Over QUIC alone:
/// the kernel knows every connection of TCP, and resets it whether a process listens or not.
#[tokio::test]
async fn a_server_that_restarts_before_the_next_packet_resets_its_old_tunnels() {
    within(async {
        let Pair { mut deployment, mut agent } = Pair::start(Quic, &[]).await;
        let (_frontend, mut socket, _target) = deployment.both_ends().await;
        agent.freeze().await.unwrap();
        deployment.server().restart().await.unwrap();
        deployment.server().until_logged("culvert-server runs").await.unwrap();
        agent.signal(Signal::Thaw).await.unwrap();
        let thawed = Instant::now();
        // The agent may have noticed already, by a ping that was not answered.
        let _ = socket.write_all(b"?").await;
        let gone = agent.until_logged("server gone").await.unwrap();
        assert!(thawed.elapsed() < AT_ONCE, "{:?}", thawed.elapsed());
        assert!(gone["reason"].as_str().unwrap().contains("restarted"), "{gone}");
        deployment.server().until_logged("agent connected").await.unwrap();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_server_without_grace_ends_at_once_after_sigterm_and_removes_its_socket(
    #[values(Quic, Tcp)] carrier: Carrier,
) {
    within(async {
        let Pair { mut deployment, mut agent } =
            Pair::start(carrier, &["--graceful-shutdown-timeout=0s"]).await;
        let (mut frontend, mut socket, _target) = deployment.both_ends().await;
        let terminated = Instant::now();
        deployment.server().signal(Signal::Terminate).await.unwrap();
        assert_eq!(deployment.server().ended().await.unwrap().code(), Some(0));
        assert!(terminated.elapsed() < AT_ONCE, "{:?}", terminated.elapsed());
        assert!(!deployment.socket().exists());
        let gone = agent.until_logged("server gone").await.unwrap();
        assert!(gone["reason"].as_str().unwrap().contains("the server stops"), "{gone}");
        assert_eq!(frontend.read_to_end().await.unwrap(), b"");
        // The target sees a reset, not an end.
        socket.read_u8().await.unwrap_err();
    })
    .await;
}

#[rstest]
#[tokio::test]
async fn a_server_drains_after_sigterm_within_its_grace(#[values(Quic, Tcp)] carrier: Carrier) {
    within(async {
        let Pair { mut deployment, mut agent } =
            Pair::start(carrier, &["--graceful-shutdown-timeout=60s"]).await;
        let (_target, mut frontend) = deployment.open_echo().await;
        deployment.server().signal(Signal::Terminate).await.unwrap();
        agent.until_logged("the server drains").await.unwrap();
        assert!(!deployment.socket().exists(), "the frontend is still open");
        let readiness = deployment.server().get("/readyz").await.unwrap();
        assert_eq!((readiness.status, &*readiness.body), (500, "the server drains"));
        assert_eq!(deployment.server().get("/healthz").await.unwrap().status, 200);
        let refused = TcpStream::connect(deployment.tunnel()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "over TCP");
        let flags = LOG_AS_JSON.map(str::to_owned);
        let mut late = deployment.spawn_agent(Culvert, "late", true, flags).await;
        late.until_logged("no tunnel to the server, will try again").await.unwrap();
        echo(&mut frontend, b"old streams go on").await.unwrap();
        frontend.close().await.unwrap();
        assert_eq!(deployment.server().ended().await.unwrap().code(), Some(0));
    })
    .await;
}
