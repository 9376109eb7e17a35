//! `culvert-agent`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    culvert_agent::cli::main(std::env::args_os())
}
