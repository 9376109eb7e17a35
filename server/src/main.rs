//! `culvert-server`; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    culvert_server::cli::main(std::env::args_os())
}
