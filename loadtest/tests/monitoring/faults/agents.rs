//! Processes that lack what they need, or end.

use std::{fs, io::pipe};

use culvert_loadtest::process::free_port;
use tokio::{net::TcpListener, process::Command};

use super::{Bench, Fault};
use crate::{
    prometheus::Target,
    site::Site,
    support::{eventually, sides::Sides},
};

/// The agent keeps some descriptors for its health port. A dial that gets none fails.
pub(crate) async fn few_descriptors(bench: Bench) -> Fault {
    const HOST: &str = "127.0.0.77";
    let flag = format!("--agent-identifiers=ipv4={HOST}");
    let agent = bench.common.agent("few_descriptors", &[flag]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move {
        let target = TcpListener::bind((HOST, 0)).await.unwrap();
        let address = target.local_addr().unwrap();
        let id = agent.process.id().unwrap();
        let open = fs::read_dir(format!("/proc/{id}/fd")).unwrap().count();
        let limit = format!("--nofile={0}:{0}", open + 3);
        let pid = format!("--pid={id}");
        let done = Command::new("prlimit").args([pid, limit]).status().await.unwrap();
        assert!(done.success());
        let held = bench.common.dial_times(12, address).await;
        assert!(held.len() < 12);
        drop(held);
        (agent, target)
    })
}

pub(crate) async fn admin_port_taken(bench: Bench) -> Fault {
    let port = free_port().unwrap();
    let other = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
    let flag = format!("--admin-server-port={port}");
    let agent = bench.common.agent("admin_port_taken", &[flag]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move { (agent, other) })
}

/// The reader of an agent's log has ended, and the agent has something to log.
pub(crate) async fn log_reader_gone(_: Bench) -> Fault {
    let sides = Sides { agent_flags: vec!["--transport=quic".into()], ..Sides::new() };
    let server = sides.server(std::process::Stdio::null()).await;
    let (reader, log) = pipe().unwrap();
    let agent = sides.agent(log);
    sides.until_joined().await;
    let scraped = Target { program: "culvert-agent", health: sides.agent_health };
    Fault::of(vec![scraped], async move {
        drop(reader);
        sides.dial(20).await;
        (sides, server, agent)
    })
}

/// Each start is scraped, and each process has a tunnel then.
pub(crate) async fn restarts(bench: Bench) -> Fault {
    let mut agent = bench.common.agent("restarts", &[]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move {
        let prometheus = bench.prometheus.borrow().clone().unwrap();
        let started = async || {
            let expr = "process_start_time_seconds{job=\"restarts/culvert-agent\"} and \
                        konnectivity_network_proxy_agent_open_server_connections == 1";
            prometheus.query(expr).await.first().map(|(_, value)| *value)
        };
        for _ in 0..3 {
            let before = started().await;
            agent.process.restart().await.unwrap();
            let scraped = async || started().await.is_some_and(|now| Some(now) != before);
            eventually("the new process is scraped", scraped).await;
        }
        agent
    })
}

pub(crate) async fn receiving_refused(bench: Bench) -> Fault {
    let record = bench.common.file("receiving_refused.strace");
    let command = [
        "strace".into(),
        "-D".into(),
        "-f".into(),
        "--seccomp-bpf".into(),
        "--trace=recvmmsg,recvmsg".into(),
        "--inject=recvmmsg,recvmsg:error=ENOSYS".into(),
        "-o".into(),
        record.display().to_string(),
    ];
    let site = Site { transport: "auto", ..bench.common };
    let agent = site.agent_under(&command, "receiving_refused", &[]).await;
    agent.until_connected().await;
    Fault::of(vec![agent.target.clone()], async move { agent })
}
