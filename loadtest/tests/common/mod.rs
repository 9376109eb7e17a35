//! What every test of the whole tunnel uses.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod agent;
pub(crate) mod kube_api;
pub(crate) mod mixed;
pub(crate) mod path;
pub(crate) mod server;

use std::{fs, future::Future, io, time::Duration};

use culvert_loadtest::frontend::Connection;
use tokio::{task::JoinSet, time::timeout};

/// Long enough for a loaded machine, short enough to name the test that hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs a test, and fails it when it hangs.
pub(crate) async fn within<T>(test: impl Future<Output = T>) -> T {
    timeout(PATIENCE, test).await.expect("the test hangs")
}

/// `count` bytes that differ from their neighbours, the same for the same seed.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<u8> {
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; count];
    random.fill(&mut bytes);
    bytes
}

/// Does so many of these at once, and waits until all are done.
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

/// Waits until something has become true that nobody announces.
pub(crate) async fn eventually(what: &str, mut is_true: impl FnMut() -> bool) {
    let looking = async {
        let mut looks = tokio::time::interval(Duration::from_millis(2));
        while !is_true() {
            looks.tick().await;
        }
    };
    timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// Waits until a process that was sent SIGSTOP has stopped.
pub(crate) async fn until_stopped(process: u32) {
    let status = format!("/proc/{process}/status");
    eventually("the process has stopped", || {
        fs::read_to_string(&status).unwrap().contains("State:\tT")
    })
    .await;
}

/// Writes to an echo and reads the same again.
pub(crate) async fn echo(connection: &mut Connection, bytes: &[u8]) -> io::Result<()> {
    connection.write(bytes).await?;
    match connection.read_count(bytes.len()).await? {
        same if same == bytes => Ok(()),
        other => Err(io::Error::other(format!("{} bytes, or others", other.len()))),
    }
}

/// The value of one line of a scrape; 0 when it is not there.
pub(crate) fn metric(scrape: &str, line: &str) -> f64 {
    let value = scrape.lines().find_map(|found| found.strip_prefix(line)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().expect("a number"))
}
