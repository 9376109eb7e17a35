//! The course of a process: flags, log, runtime, work, stop signals, exit code.

use std::{
    error::Error,
    ffi::OsString,
    fmt, panic,
    process::{self, ExitCode},
    time::Duration,
};

use clap::{Command, Parser};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    command_line::{self, CommandLine},
    completions, descriptors,
    error::with_causes,
    faults::ConfigErrors,
    heap_profiles::{self, HeapProfileError},
    invocation::Invocation,
    logging::{self, LogConfig, LogFormat},
    signals::{ReloadSignal, StopSignals, hold_reload_signal},
};

/// Maximum time that the end of the process waits for blocking work, such as a lookup of a name.
const BLOCKING_WORK_TIMEOUT: Duration = Duration::from_secs(1);

/// Any error that ends a process.
pub type BoxError = Box<dyn Error + Send + Sync>;

/// Checked configuration of a process.
pub trait ProcessConfig: Sized {
    /// Command line.
    type Flags: Parser;

    /// The configuration that `flags` describe, with the default ports of `invocation`.
    ///
    /// # Errors
    /// With every fault of the flags.
    fn from_flags(flags: Self::Flags, invocation: Invocation) -> Result<Self, ConfigErrors>;

    /// Log settings.
    fn log(&self) -> LogConfig {
        LogConfig { format: LogFormat::Text, verbosity: 0, file: None }
    }

    /// Warnings for the operator, to be logged at start.
    fn warnings(&self) -> &[String] {
        &[]
    }

    /// Whether the process lets operators take profiles of it.
    fn profiling(&self) -> bool {
        false
    }

    /// Number of file descriptors that the process needs to reach the limits of its connections.
    fn descriptors(&self) -> u64 {
        0
    }
}

/// A program that [`main`] runs.
pub trait Program {
    /// Name of the program, the prefix of its messages on standard error.
    const NAME: &'static str;
    /// Checked configuration.
    type Config: ProcessConfig;
    /// Exit code after a second signal to stop; by default that of Konnectivity's server.
    const SECOND_SIGNAL_EXIT_CODE: i32 = 1;

    /// Commands that the program runs in place of its work, for help and completion scripts.
    fn commands() -> Vec<Command> {
        Vec::new()
    }

    /// The kind of runtime that the program runs on: one thread per core by default.
    fn runtime() -> Builder {
        Builder::new_multi_thread()
    }

    /// Does the program's work. After `stop` is cancelled it winds down and completes. At `reload`
    /// it reads its files again.
    ///
    /// # Errors
    /// With what keeps the program from working.
    fn run(
        config: Self::Config,
        stop: CancellationToken,
        reload: ReloadSignal,
    ) -> impl Future<Output = Result<(), BoxError>>;
}

/// The command of a program, from which help and completion scripts are made.
pub fn command<P: Program>() -> Command {
    command_line::command::<<P::Config as ProcessConfig>::Flags>()
        .disable_help_subcommand(true)
        .subcommands(P::commands())
        .subcommand(completions::command())
}

/// Runs a program with these arguments, the program's own path first.
///
/// The first SIGTERM or SIGINT cancels the program's `stop` token, the second ends the process with
/// the program's code for that.
/// SIGHUP has the program read its files again.
/// `--help`, `--version` and `completions` print their text and nothing runs. The exit code is 0,
/// or 1 for unusable arguments and for a program that failed.
///
/// # Panics
/// When the program panics, after the log was written.
pub fn main<P: Program>(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    hold_reload_signal(); // before any thread is started
    let limit = descriptors::raise_limit();
    let args: Vec<_> = args.into_iter().collect();
    let invocation = Invocation::from_argv0(args.first().map(OsString::as_os_str));
    let mut command = command::<P>();
    if let Some(exit) = completions::run(&mut command, &args) {
        return exit.print();
    }
    let line = match CommandLine::read(&mut command, args) {
        Ok(line) => line,
        Err(exit) => return exit.print(),
    };
    let sources = line.sources();
    let config = line.configuration(|flags| P::Config::from_flags(flags, invocation));
    let (config, words) = match config {
        Ok(config) => config,
        Err(faults) => return fail::<P>(&faults),
    };
    if let Err(error) = logging::init(&config.log()) {
        return fail::<P>(&error);
    }
    scopeguard::defer!(logging::flush()); // after a panic too
    words.iter().for_each(|word| {
        warn!("{word:?} belongs to no flag and is ignored; a BOOL takes its value after =");
    });
    config.warnings().iter().for_each(|warning| warn!("{}", sources.locate(warning)));
    descriptors::report(limit, config.descriptors());
    if config.profiling() {
        sample_allocations();
    }
    let result = runtime::<P>().and_then(|runtime| {
        // Dropped, it would wait for blocking work without a limit.
        let runtime = scopeguard::guard(runtime, |runtime| {
            runtime.shutdown_timeout(BLOCKING_WORK_TIMEOUT);
        });
        runtime.block_on(run_until_signalled::<P>(config))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail::<P>(&sources.locate(&with_causes(&*error))),
    }
}

/// Has the allocator sample for the heap profiles of the admin port, in builds that have them.
fn sample_allocations() {
    match heap_profiles::activate() {
        Ok(()) => info!("allocations are sampled"),
        Err(HeapProfileError::NotBuilt) => {} // the answer of the admin port says so
        Err(error) => warn!(%error, "allocations are not sampled"),
    }
}

/// The program's runtime. The process ends with code 1 when a thread of it cannot be started: tokio
/// panics then, and the end of the panic would wait for the threads that were started, for ever.
///
/// # Errors
/// When the kernel refuses something else that it needs.
fn runtime<P: Program>() -> Result<Runtime, BoxError> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|panic| {
        let reason = logging::panic_text(panic.payload());
        let _ = fail::<P>(&format_args!("cannot start: {reason}"));
        logging::flush();
        process::exit(1);
    }));
    let built = P::runtime().enable_all().build();
    panic::set_hook(hook);
    Ok(built.map_err(|error| format!("cannot start: {error}"))?)
}

async fn run_until_signalled<P: Program>(config: P::Config) -> Result<(), BoxError> {
    let reload = ReloadSignal::catch()?;
    let mut signals = StopSignals::catch()?;
    let stop = CancellationToken::new();
    let signalled = async {
        let signal = signals.next().await;
        info!(signal, "stop requested");
        stop.cancel();
        signals.exit_at_next(P::SECOND_SIGNAL_EXIT_CODE).await
    };
    tokio::select! {
        result = P::run(config, stop.clone(), reload) => result,
        never = signalled => match never {},
    }
}

fn fail<P: Program>(error: &dyn fmt::Display) -> ExitCode {
    logging::print(format_args!("{}: {error}\n", P::NAME));
    ExitCode::FAILURE
}
