//! Processes at the limits of descriptors and threads, and beside others that have their ports.

use std::{
    ffi::OsString,
    fs::{self, Permissions},
    io::{Read as _, pipe},
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Stdio,
    time::{Duration, Instant},
};

use culvert_loadtest::{http, targets};
use tokio::{net::UnixStream, process::Command};

use crate::support::{
    echo, eventually,
    sides::{Sides, answers, events, stop},
    within,
};

/// Time after which a server closes frontends that send nothing.
const IDLE_FRONTEND: Duration = Duration::from_secs(10);

/// Soft and hard limit of descriptors for processes.
fn descriptors(soft: u32, hard: u32) -> Vec<OsString> {
    vec!["prlimit".into(), format!("--nofile={soft}:{hard}").into()]
}

/// The beginning of a command that runs `prlimit` as a user with no other process; `None` where the
/// test may not change the user.
fn other_user() -> Option<Vec<OsString>> {
    if fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("SKIPPED: only root can change the user of a process");
        return None;
    }
    let user = fastrand::u32(100_000_000..200_000_000).to_string();
    let command = ["setpriv", "--clear-groups", "--reuid", &user, "--regid", &user, "prlimit"];
    Some(command.map(OsString::from).to_vec())
}

/// Lets every user read the files of a folder.
fn make_readable(folder: &Path) {
    fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    for file in fs::read_dir(folder).unwrap() {
        fs::set_permissions(file.unwrap().path(), Permissions::from_mode(0o644)).unwrap();
    }
}

async fn metric(health_port: u16, series: &str) -> Option<f64> {
    let scrape = http::get((Ipv4Addr::LOCALHOST, health_port), "/metrics").await.ok()?.body;
    http::metric(&scrape, series)
}

#[tokio::test]
async fn the_soft_limit_of_descriptors_is_raised_and_reported() {
    const CONNECTIONS: usize = 150;
    within(async {
        let sides = Sides { wrapper: descriptors(100, 600), ..Sides::new() };
        let (log, write) = pipe().unwrap();
        let mut server = sides.server(write).await;
        let mut agent = sides.agent(Stdio::null());
        sides.until_joined().await;
        let target = targets::echo().await.unwrap();
        let mut open = Vec::new();
        for _ in 0..CONNECTIONS {
            open.push(sides.connect(target.address()).await.unwrap());
        }
        for connection in &mut open {
            echo(connection, b"alive").await.unwrap();
        }
        assert_eq!(metric(sides.ports.health, "process_max_fds").await, Some(600.0));
        assert_eq!(metric(sides.agent_health, "process_max_fds").await, Some(600.0));
        drop(open);
        stop(&mut agent).await;
        stop(&mut server).await;
        let events = events(log).await;
        let message = "the limit of open files is below what the limits of connections need";
        let event = events.iter().find(|event| event["message"] == message).unwrap();
        assert_eq!(
            (&event["found"], &event["soft"], &event["hard"]),
            (&100.into(), &600.into(), &600.into())
        );
        assert_eq!(event["level"], "WARN");
    })
    .await;
}

#[tokio::test]
async fn a_server_without_descriptors_answers_probes_and_takes_agents_over_quic() {
    within(async {
        let mut sides = Sides::new();
        sides.wrapper = descriptors(70, 70);
        let mut server = sides.server(Stdio::null()).await;
        let begun = Instant::now();
        let mut idle = Vec::new();
        for _ in 0..150 {
            idle.push(UnixStream::connect(sides.socket()).await.unwrap());
        }
        // Without a free descriptor the number of open ones cannot be read.
        let health = sides.ports.health;
        let is_short = async || metric(health, "process_open_fds").await.is_none();
        eventually("descriptors are short", &is_short).await;
        for _ in 0..10 {
            assert!(answers(health).await);
        }
        eventually("descriptors are still short", is_short).await;
        assert!(begun.elapsed() < IDLE_FRONTEND, "{:?}", begun.elapsed());
        sides.wrapper.clear();
        let mut agent = sides.agent(Stdio::null());
        let joined = async || metric(health, "culvert_server_tunnels").await == Some(1.0);
        eventually("the agent joins", joined).await;
        drop(idle);
        sides.until_joined().await;
        stop(&mut agent).await;
        stop(&mut server).await;
    })
    .await;
}

#[tokio::test]
async fn an_agent_without_descriptors_answers_probes_and_dials_again_later() {
    within(async {
        let mut sides = Sides::new();
        let mut server = sides.server(Stdio::null()).await;
        sides.wrapper = descriptors(60, 60);
        let mut agent = sides.agent(Stdio::null());
        sides.until_joined().await;
        let target = targets::echo().await.unwrap();
        let mut open = Vec::new();
        let failed = loop {
            match sides.connect(target.address()).await {
                Ok(connection) => open.push(connection),
                Err(failed) => break failed.to_string(),
            }
        };
        assert!(failed.contains("too many open files"), "{failed}");
        for _ in 0..10 {
            assert!(answers(sides.agent_health).await);
        }
        drop(open);
        sides.until_joined().await;
        stop(&mut agent).await;
        stop(&mut server).await;
    })
    .await;
}

/// As on a node of the control plane with the network of the host.
#[tokio::test]
async fn a_server_and_an_agent_with_the_same_ports_for_probes_both_serve() {
    const UNAVAILABLE: &str = "culvert_listener_unavailable";
    within(async {
        let mut sides = Sides::new();
        let mut server = sides.server(Stdio::null()).await;
        (sides.agent_admin, sides.agent_health) = (sides.ports.admin, sides.ports.health);
        let (log, write) = pipe().unwrap();
        let agent = sides.agent(write);
        sides.until_joined().await;
        sides.dial(100).await;
        stop(&mut server).await;
        // The agent listens once the ports are free.
        let series = format!("{UNAVAILABLE}{{listener=\"health\"}}");
        let is_served = async || metric(sides.agent_health, &series).await == Some(0.0);
        eventually("the agent has the port", is_served).await;
        // The other way round: the server runs without its ports.
        let (mut child, mut second) = (agent, sides.start_server(Stdio::null()));
        sides.until_joined().await;
        stop(&mut child).await;
        stop(&mut second).await;
        let events = events(log).await;
        for port in ["admin", "health"] {
            let logged = |message| {
                let mut events = events.iter();
                events.any(|event| event["message"] == message && event["listener"] == port)
            };
            assert!(logged("a port is not available, will try again"), "{port}");
            assert!(logged("a port is available again"), "{port}");
        }
    })
    .await;
}

/// The number of threads of a user is limited, as by a container's limit of processes. One thread
/// writes the log; look-ups of names get none.
#[tokio::test]
async fn an_agent_that_can_start_no_thread_waits_and_logs_the_reason() {
    let Some(user) = other_user() else { return };
    within(async {
        let mut sides = Sides::new();
        sides.host = Some("localhost");
        make_readable(sides.certificates.folder());
        sides.wrapper = [user.clone(), vec!["--nproc=2:100".into()]].concat();
        let (log, write) = pipe().unwrap();
        let mut agent = sides.agent(write);
        eventually("the agent answers", async || answers(sides.agent_health).await).await;
        let attempts = "culvert_agent_connect_attempts_total{result=\"unresolvable\"}";
        let tried = async || metric(sides.agent_health, attempts).await >= Some(3.0);
        eventually("it has tried three times", tried).await;
        assert_eq!(
            metric(sides.agent_health, "culvert_agent_connect_attempts_total{result=\"panicked\"}")
                .await,
            Some(0.0)
        );
        let pid = agent.id().unwrap().to_string();
        // Its own user may raise the soft limit.
        let mut raise = Command::new(&user[0]);
        raise.args(&user[1..]).args(["--pid", &pid, "--nproc=100:100"]);
        assert!(raise.status().await.unwrap().success());
        sides.wrapper.clear();
        let mut server = sides.server(Stdio::null()).await;
        sides.until_joined().await;
        stop(&mut agent).await;
        stop(&mut server).await;
        let events = events(log).await;
        let message = "no tunnel to the server, will try again";
        let failure = events.iter().find(|event| event["message"] == message).unwrap();
        let error = failure["error"].as_str().unwrap();
        assert!(error.contains("cannot resolve localhost: "), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_server_that_can_start_no_thread_ends_with_the_reason() {
    let Some(user) = other_user() else { return };
    within(async {
        let mut sides = Sides::new();
        make_readable(sides.certificates.folder());
        for (threads, reason) in [
            (1, "the thread that writes the log cannot be started: "),
            (2, "cannot start: OS can't spawn worker thread: "),
        ] {
            let limit = format!("--nproc={threads}:{threads}");
            sides.wrapper = [user.clone(), vec![limit.into()]].concat();
            let (mut log, write) = pipe().unwrap();
            let ended = sides.start_server(write).wait().await.unwrap();
            assert_eq!(ended.code(), Some(1));
            let mut text = String::new();
            log.read_to_string(&mut text).unwrap();
            let expected = format!("culvert-server: {reason}");
            let last = text.lines().last().unwrap_or_default();
            assert!(last.starts_with(&expected), "{text}");
        }
    })
    .await;
}
