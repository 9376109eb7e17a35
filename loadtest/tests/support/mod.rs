//! Shared parts of the end-to-end tests.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod agent;
pub(crate) mod deployment;
pub(crate) mod konnectivity;
pub(crate) mod kube_api;
pub(crate) mod network;
pub(crate) mod proxy;
pub(crate) mod repository;
pub(crate) mod server;
pub(crate) mod shaped_path;
pub(crate) mod sides;
pub(crate) mod silent_target;

use std::{
    future::Future,
    io::{self, Write as _},
    path::PathBuf,
    time::Duration,
};

use culvert_loadtest::{
    frontend::{Connection, FrontendKind},
    process::{Launch, Process},
    rig::{Rig, Running},
    targets,
};
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

pub(crate) use culvert_loadtest::carrier::Carrier;

/// Time for a whole test. A test that needs longer hangs.
const TEST_TIMEOUT: Duration = Duration::from_secs(300);
/// Interval between two looks at something that sends no event.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);
/// Flags of a Culvert process whose log [`Process::until_logged`] reads.
pub(crate) const LOG_AS_JSON: [&str; 2] = ["--log-format=json", "-v=5"];

/// Runs a test, and fails it when it hangs.
pub(crate) async fn within<T>(test: impl Future<Output = T>) -> T {
    timeout(TEST_TIMEOUT, test).await.expect("the test hangs")
}

/// A rig with this frontend and this carrier.
pub(crate) fn rig(frontend: FrontendKind, carrier: Carrier) -> Rig {
    Rig::new().frontend(frontend).carrier(carrier)
}

/// A new server, agent and target, and both ends of a connection between them.
pub(crate) async fn connected(
    frontend: FrontendKind,
    carrier: Carrier,
) -> (Running, Connection, TcpStream) {
    let rig = rig(frontend, carrier).start().await.unwrap();
    let (target, mut accepted) = targets::handed_over().await.unwrap();
    let frontend = rig.dial(target.address()).await.unwrap();
    (rig, frontend, accepted.recv().await.unwrap())
}

/// `count` random bytes, the same for the same seed.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<u8> {
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; count];
    random.fill(&mut bytes);
    bytes
}

/// Runs `count` of these at the same time, and waits until all are done.
pub(crate) async fn at_once<F>(count: usize, work: impl Fn() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut working = JoinSet::new();
    for _ in 0..count {
        working.spawn(work());
    }
    working.join_all().await;
}

/// Waits until a condition holds of which no event is sent.
pub(crate) async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let looking = async {
        let mut looks = interval(LOOK_INTERVAL);
        // A look that takes longer than the interval leaves time for what it waits for.
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while !holds().await {
            looks.tick().await;
        }
    };
    timeout(TEST_TIMEOUT, looking).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Writes to an echo and reads the same again.
pub(crate) async fn echo(connection: &mut Connection, bytes: &[u8]) -> io::Result<()> {
    connection.write(bytes).await?;
    match connection.read_count(bytes.len()).await? {
        same if same == bytes => Ok(()),
        other => Err(io::Error::other(format!("{} bytes came back, or others", other.len()))),
    }
}

/// Starts Culvert's server or agent as a process.
pub(crate) fn start_culvert(
    side: &str,
    args: impl IntoIterator<Item = String>,
    log: PathBuf,
    health_port: u16,
) -> Process {
    start_culvert_under(&[], side, args, log, health_port)
}

/// The same, as the last arguments of the command `tracer`, which has to replace itself by it.
pub(crate) fn start_culvert_under(
    tracer: &[String],
    side: &str,
    args: impl IntoIterator<Item = String>,
    log: PathBuf,
    health_port: u16,
) -> Process {
    let culvert = [env!("CARGO_BIN_EXE_culvert-loadtest").to_owned(), side.to_owned()];
    let mut words = tracer.iter().cloned().chain(culvert).chain(args);
    let program = words.next().expect("there is a program").into();
    let args = words.collect();
    Process::start(Launch { program, args, log, health_port, namespace: None }).unwrap()
}

/// Whether a program is installed. A test that needs it is skipped otherwise, and its name printed.
pub(crate) fn has_program(name: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(name).exists()));
    if !found {
        print_skipped(&format!("{name} is not installed"));
    }
    found
}

/// Whether the tests that need something are skipped, as this environment variable says. The name
/// of a skipped test is printed, although libtest reports it as `ok`.
pub(crate) fn skips(variable: &str) -> bool {
    let skips = std::env::var(variable).is_ok_and(|value| value == "1");
    if skips {
        print_skipped(&format!("{variable}=1"));
    }
    skips
}

/// Prints the name of a test that is skipped, and why.
pub(crate) fn print_skipped(why: &str) {
    // libtest captures the output of `eprintln!` alone, and names a test's thread by the test.
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    let _ = writeln!(io::stderr(), "skipped: {test} ({why})");
}
