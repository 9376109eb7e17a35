//! The process around a server: flags, logs, runtime, signals, exit code.

use std::{ffi::OsString, process::ExitCode};

use culvert_process::{go_flags, invocation::Invocation, logging, signals::StopSignals};
use tracing::{info, warn};

use crate::{Config, Server, config::Flags};

/// Runs a server with these arguments, the program's name first, until it is told to stop.
///
/// `--help`, `--version` and `--completion` are answered, and unusable arguments refused with
/// code 1, without running anything.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<_> = args.into_iter().collect();
    let invocation = Invocation::from_argv0(args.first().map(OsString::as_os_str));
    let flags: Flags = match go_flags::try_parse_from(args) {
        Ok(flags) => flags,
        Err(exit) => return exit.print(),
    };
    let config = match Config::from_flags(flags, invocation) {
        Ok(config) => config,
        Err(faults) => return fail(&faults),
    };
    if let Err(error) = logging::init(config.log) {
        return fail(&error);
    }
    config.warnings.iter().for_each(|warning| warn!("{warning}"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let result =
        runtime.map_err(anyhow::Error::from).and_then(|runtime| runtime.block_on(run(config)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&format!("{error:#}")),
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut signals = StopSignals::catch()?;
    let server = Server::bind(&config)?;
    info!(
        version = env!("CARGO_PKG_VERSION"), server_id = %config.server_id,
        frontend = ?server.frontend_address()?, tunnels = %server.tunnel_address()?,
        health = %server.health_address(), admin = %server.admin_address(), "culvert-server runs",
    );
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = server.run(async { drop(stopped.await) });
    let signalled = async {
        let signal = signals.next().await;
        info!(signal, "told to stop");
        drop(stop);
        signals.exit_at_next().await
    };
    tokio::select! {
        () = running => {}
        never = signalled => match never {},
    }
    info!("culvert-server ends");
    Ok(())
}

fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("culvert-server: {error}");
    ExitCode::FAILURE
}
