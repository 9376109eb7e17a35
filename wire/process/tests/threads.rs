//! A program whose threads cannot all be started. A process of its own, because it ends.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    env,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use culvert_process::{
    cli::{BoxError, ProcessConfig, Program, main},
    faults::ConfigErrors,
    invocation::Invocation,
    signals::ReloadSignal,
};
use tokio::{process::Command, runtime::Builder, time::timeout};
use tokio_util::sync::CancellationToken;

/// Set in the process whose threads cannot be started.
const CHILD: &str = "CULVERT_TEST_WITHOUT_THREADS";

#[derive(Debug, clap::Parser)]
#[command(name = "sample", version = "1")]
struct Flags;

struct Sample;

struct SampleConfig;

impl ProcessConfig for SampleConfig {
    type Flags = Flags;

    fn from_flags(_: Flags, _: Invocation) -> Result<Self, ConfigErrors> {
        Ok(Self)
    }
}

impl Program for Sample {
    const NAME: &'static str = "sample";
    type Config = SampleConfig;

    /// Of its two workers the second cannot be started, for which tokio panics.
    fn runtime() -> Builder {
        let mut builder = Builder::new_multi_thread();
        let workers = AtomicU32::new(0);
        builder.worker_threads(2).thread_name_fn(move || {
            assert_eq!(workers.fetch_add(1, Ordering::Relaxed), 0, "no thread is left");
            "worker".into()
        });
        builder
    }

    async fn run(_: SampleConfig, _: CancellationToken, _: ReloadSignal) -> Result<(), BoxError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_process_whose_threads_cannot_be_started_ends_with_the_reason() {
    let mut child = Command::new(env::current_exe().unwrap());
    child.args(["--exact", "child", "--nocapture"]).env(CHILD, "1").kill_on_drop(true);
    // Before, it waited for ever for the thread that was started.
    let ended = timeout(Duration::from_secs(60), child.output()).await.expect("it ends").unwrap();
    let log = String::from_utf8(ended.stderr).unwrap();
    assert_eq!(ended.status.code(), Some(1), "{log}");
    assert!(log.contains("sample: cannot start: "), "{log}");
    assert!(log.contains("no thread is left"), "{log}");
    assert!(!log.contains("internal error"), "{log}");
}

/// The process of the test above; nothing otherwise.
#[test]
fn child() {
    if env::var_os(CHILD).is_some() {
        main::<Sample>(["sample".into()]);
        panic!("it did not end");
    }
}
