//! Processes whose UDP sockets misbehave: system calls that a sandbox refuses, by strace, and batches
//! that vanish on the path, by nft in a network namespace. Without the program a test is skipped.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use culvert_loadtest::{
    carrier::{Carrier, Serving},
    frontend::{FrontendKind, Protocol},
    link::Host,
    process::Process,
    rig::Running,
    targets,
};
use rstest::rstest;

use crate::support::{
    deployment::{Deployment, Implementation},
    eventually, has_program,
    network::namespace,
    rig, within,
};

/// Time within which a tunnel is expected where calls are refused, under strace on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// Calls that fail in a process, and the record of those that did.
struct Sandbox {
    record: PathBuf,
    command: Vec<String>,
}

impl Sandbox {
    /// Refuses these calls, such as `recvmmsg,recvmsg`, with this errno.
    fn new(deployment: &Deployment, calls: &str, errno: &str) -> Self {
        Self::after(0, deployment, calls, errno)
    }

    /// Refuses them after this many that succeed, of each.
    fn after(count: usize, deployment: &Deployment, calls: &str, errno: &str) -> Self {
        let record = deployment.certificates.folder().join("strace");
        let command = [
            "strace".into(),
            // The process is the child, and strace is its grandchild.
            "-D".into(),
            "-f".into(),
            "--seccomp-bpf".into(),
            format!("--trace={calls}"),
            format!("--inject={calls}:error={errno}:when={}+", count + 1),
            "-o".into(),
            record.display().to_string(),
        ];
        Self { record, command: command.into() }
    }

    /// Number of calls that were refused.
    fn refused(&self) -> usize {
        fs::read_to_string(&self.record).unwrap().matches("INJECTED").count()
    }
}

/// The carrier of the agent's tunnel; `None` while it has none.
async fn carrier(agent: &Process) -> Option<Carrier> {
    let page = agent.get("/readyz?verbose").await.ok()?.body;
    Serving::from_readiness(&page).map(|serving| serving.carrier)
}

async fn until_joined_over(agent: &Process, expected: Carrier) {
    let begun = Instant::now();
    eventually(&format!("a tunnel over {expected}"), async || {
        carrier(agent).await == Some(expected)
    })
    .await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

/// The carrier that remains to an agent, or to a server, where these calls are refused.
#[rstest]
#[case("recvmmsg", Carrier::Quic)]
#[case("recvmmsg,recvmsg", Carrier::Tcp)]
#[tokio::test]
async fn an_agent_joins_within_seconds_where_receiving_is_refused(
    #[case] calls: &str,
    #[values("ENOSYS", "EPERM")] errno: &str,
    #[case] remains: Carrier,
) {
    if !has_program("strace") {
        return;
    }
    within(async {
        let deployment = Deployment::start(Implementation::Culvert, Protocol::Connect, &[]).await;
        let sandbox = Sandbox::new(&deployment, calls, errno);
        let agent = deployment
            .spawn_agent_under(&sandbox.command, Implementation::Culvert, "agent", true, [])
            .await;
        until_joined_over(&agent, remains).await;
        assert_eq!(agent.get("/healthz").await.unwrap().status, 200);
        let (_target, _connection) = deployment.open_echo().await;
        let refused = sandbox.refused();
        assert!((1..100).contains(&refused), "{refused} calls");
        if remains == Carrier::Quic {
            let series = "culvert_agent_udp_fallbacks_total{reason=\"recvmmsg_refused\"}";
            assert!(agent.metric(series).await.unwrap() >= 1.0);
        }
    })
    .await;
}

/// A sandbox that is closed while a tunnel lives.
#[tokio::test]
async fn an_agent_moves_to_tcp_when_receiving_is_refused_later() {
    if !has_program("strace") {
        return;
    }
    within(async {
        let deployment = Deployment::start(Implementation::Culvert, Protocol::Connect, &[]).await;
        let sandbox = Sandbox::after(60, &deployment, "recvmmsg,recvmsg", "EPERM");
        let agent = deployment
            .spawn_agent_under(&sandbox.command, Implementation::Culvert, "agent", true, [])
            .await;
        until_joined_over(&agent, Carrier::Quic).await;
        let target = targets::echo().await.unwrap();
        // Each dial takes packets, until they are no longer received.
        eventually("a tunnel over TCP", async || {
            let _ = deployment.touch(&target).await;
            carrier(&agent).await == Some(Carrier::Tcp)
        })
        .await;
        deployment.until_dials_work(&target).await;
        assert!(sandbox.refused() < 200, "{} calls", sandbox.refused());
    })
    .await;
}

#[rstest]
#[case("recvmmsg", Carrier::Quic)]
#[case("recvmmsg,recvmsg", Carrier::Tcp)]
#[tokio::test]
async fn a_server_serves_agents_where_receiving_is_refused(
    #[case] calls: &str,
    #[case] remains: Carrier,
) {
    if !has_program("strace") {
        return;
    }
    within(async {
        let mut deployment = Deployment::without_server(Protocol::Connect);
        let sandbox = Sandbox::new(&deployment, calls, "ENOSYS");
        deployment.start_server_under(&sandbox.command, Implementation::Culvert, &[]).await;
        let agent = deployment.spawn_agent(Implementation::Culvert, "agent", true, []).await;
        until_joined_over(&agent, remains).await;
        let (_target, _connection) = deployment.open_echo().await;
        if remains == Carrier::Tcp {
            let broken =
                async || deployment.server_metric("culvert_server_udp_broken").await == 1.0;
            eventually("the server reports it", broken).await;
            assert!(deployment.server_log().contains("UDP is broken"));
        }
        assert_eq!(deployment.server().get("/healthz").await.unwrap().status, 200);
        let refused = sandbox.refused();
        assert!((1..100).contains(&refused), "{refused} calls");
    })
    .await;
}

/// Downloads through a tunnel on a loopback device that drops the server's batches on arrival; the
/// time, and the server's metrics.
async fn download_without_batches(running: &Running) -> Duration {
    const SIZE: u64 = 20 << 20;
    let source = targets::source(SIZE).await.unwrap();
    let mut connection = running.dial(source.address()).await.unwrap();
    let begun = Instant::now();
    let bytes = connection.read_to_end().await.unwrap();
    assert_eq!(bytes.len() as u64, SIZE);
    begun.elapsed()
}

/// A host whose loopback device drops UDP batches to `port` and from it when they arrive.
fn host_without_batches() -> Option<Host> {
    if !has_program("nft") {
        return None;
    }
    let host = namespace()?;
    host.run(|| {
        // A segmented batch is one packet for the input hook, larger than the path's MTU.
        let rules = "add table inet t; \
                     add chain inet t in { type filter hook input priority 0; }; \
                     add rule inet t in meta l4proto udp meta length > 1500 counter drop";
        let status = Command::new("nft").arg(rules).status()?;
        assert!(status.success(), "nft: {status}");
        Ok(())
    })
    .unwrap();
    Some(host)
}

#[rstest]
#[case("auto", 1.0)]
#[case("off", 0.0)]
#[test]
fn a_download_passes_where_batches_vanish(#[case] gso: &'static str, #[case] found: f64) {
    let Some(host) = host_without_batches() else { return };
    let runtime = host.runtime(2).unwrap();
    let download = runtime.spawn(within(async move {
        let flags = [format!("--gso={gso}"), "--mtu-cap=1400".into()];
        let rig =
            flags.into_iter().fold(rig(FrontendKind::ConnectUnix, Carrier::Quic), |rig, flag| {
                rig.server_flag(flag.clone()).agent_flag(flag)
            });
        let running = rig.start().await.unwrap();
        let took = download_without_batches(&running).await;
        println!("--gso={gso}: {took:?}");
        assert!(took < Duration::from_secs(30), "{took:?}");
        let agent = &running.agents()[0];
        let lost = agent.metric("culvert_agent_udp_fallbacks_total{reason=\"gso_lost\"}");
        assert_eq!(lost, found);
    }));
    runtime.block_on(download).unwrap();
}
