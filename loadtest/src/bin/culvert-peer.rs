//! One side of the tunnel as a process of its own: `culvert-peer server FLAGS…` or
//! `culvert-peer agent FLAGS…`, the same as `culvert-server` and `culvert-agent`.
//!
//! Tests and measurements start it to kill, stop and weigh one side without the other.

use std::{ffi::OsString, process::ExitCode};

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let side = args.next().unwrap_or_default();
    let name = OsString::from(format!("culvert-{}", side.to_string_lossy()));
    let args = std::iter::once(name).chain(args);
    match side.to_str() {
        Some("server") => culvert_server::cli::main(args),
        Some("agent") => culvert_agent::cli::main(args),
        _ => {
            eprintln!("culvert-peer: say which side to run: server or agent");
            ExitCode::FAILURE
        }
    }
}
