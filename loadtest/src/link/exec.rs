//! Starting a program on a host, so that it ends with the process that started it.

use std::{
    ffi::OsString,
    fs::File,
    io,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::{Command, ExitCode},
};

use nix::{
    sched::{CloneFlags, setns},
    sys::{prctl::set_pdeathsig, signal::Signal},
    unistd::getppid,
};

/// Becomes the program: `NAMESPACE PROGRAM ARGS…`. Returns only when that fails.
pub fn main(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(namespace), Some(program)) = (args.next(), args.next()) else {
        eprintln!("culvert-loadtest: exec needs a namespace's path and a program");
        return ExitCode::FAILURE;
    };
    let parent = getppid();
    let entered = || -> io::Result<()> {
        setns(File::open(&namespace)?.as_fd(), CloneFlags::CLONE_NEWNET)?;
        set_pdeathsig(Signal::SIGKILL)?;
        // It may have ended before that.
        if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    let error = match entered() {
        Ok(()) => Command::new(&program).args(args).exec(),
        Err(error) => error,
    };
    eprintln!("culvert-loadtest: cannot start {}: {error}", program.to_string_lossy());
    ExitCode::FAILURE
}
