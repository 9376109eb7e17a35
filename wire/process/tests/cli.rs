//! A program from its arguments to its exit code. A process of its own, because of the signals.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{ffi::OsString, process::ExitCode};

use culvert_process::{
    cli::{BoxError, ProcessConfig, Program, main},
    faults::{ConfigErrors, Faults},
    invocation::Invocation,
    signals::ReloadSignal,
};
use tokio::runtime::Builder;
use tokio_util::sync::CancellationToken;

#[derive(Debug, clap::Parser)]
#[command(name = "sample", version = "1")]
struct Flags {
    #[arg(long, default_value_t = 0)]
    code: i64,
}

/// Fails unless `--code=0`; its configuration is refused when negative.
struct Sample;

/// Exit code that the flag asks for.
struct SampleConfig(i64);

impl ProcessConfig for SampleConfig {
    type Flags = Flags;

    fn from_flags(flags: Flags, _: Invocation) -> Result<Self, ConfigErrors> {
        let mut faults = Faults::new();
        faults.require(flags.code >= 0, "code", "must not be negative");
        faults.finish().map(|_| Self(flags.code))
    }
}

impl Program for Sample {
    const NAME: &'static str = "sample";
    type Config = SampleConfig;

    fn runtime() -> Builder {
        Builder::new_current_thread()
    }

    async fn run(
        SampleConfig(code): SampleConfig,
        stop: CancellationToken,
        _reload: ReloadSignal,
    ) -> Result<(), BoxError> {
        let pid = std::process::id().to_string();
        let sent = tokio::process::Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.await?.success());
        stop.cancelled().await;
        if code == 0 { Ok(()) } else { Err("failed".into()) }
    }
}

fn code_of(args: &[&str]) -> String {
    let args = ["sample"].iter().chain(args).map(OsString::from);
    format!("{:?}", main::<Sample>(args))
}

/// One test, because a process has one log and one set of signal handlers.
#[test]
fn the_exit_code_says_how_the_process_ended() {
    let (success, failure) =
        (format!("{:?}", ExitCode::SUCCESS), format!("{:?}", ExitCode::FAILURE));
    assert_eq!(code_of(&["--version"]), success);
    assert_eq!(code_of(&["--no-such-flag"]), failure);
    assert_eq!(code_of(&["--code=-1"]), failure);
    assert_eq!(code_of(&["--code=0", "word", "--", "--x"]), success, "stopped by SIGTERM");
    assert_eq!(code_of(&["--code=1"]), failure, "a second log is refused");
}
