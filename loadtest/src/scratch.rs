//! The folder of a run's files: programs, certificates with their keys, sockets and logs.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process, thread,
};

use anyhow::Context as _;
use parking_lot::Mutex;
use tempfile::TempDir;
use tokio::{
    runtime::Builder,
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// Attempts to remove the folder, in which processes that are ending may still write.
const ATTEMPTS: usize = 5;

/// What else is put in order when a signal ends the process.
static CLEANUPS: Mutex<Vec<fn()>> = parking_lot::const_mutex(Vec::new());

/// Has this called before a signal of [`Scratch::new`] ends the process.
pub fn before_a_signal_ends_the_process(cleanup: fn()) {
    CLEANUPS.lock().push(cleanup);
}

/// A folder that the process's user alone may read, and in which all temporary files of the process
/// are from now on. It is removed when this is dropped, and when a signal ends the process.
#[derive(Debug)]
pub struct Scratch {
    folder: TempDir,
}

impl Scratch {
    /// Makes the folder, once in a process. These signals end the process.
    ///
    /// # Errors
    /// When the folder cannot be made or a signal cannot be caught.
    pub fn new(signals: &[SignalKind]) -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("culvert-loadtest-")
            .permissions(Permissions::from_mode(0o700))
            .tempdir()
            .context("cannot make a folder for temporary files")?;
        remove_at(signals, folder.path())?;
        let _ = tempfile::env::override_temp_dir(folder.path());
        Ok(Self { folder })
    }

    /// The signals that end a process which handles none itself.
    pub fn all_signals() -> [SignalKind; 4] {
        [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup(), SignalKind::quit()]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove(self.folder.path());
    }
}

/// Waits for the signals on a thread of its own: the others may be busy or about to block.
fn remove_at(signals: &[SignalKind], folder: &Path) -> io::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (sender, mut first) = mpsc::channel(1);
    {
        let _entered = runtime.enter();
        for kind in signals {
            let (mut caught, sender, number) =
                (signal(*kind)?, sender.clone(), kind.as_raw_value());
            drop(runtime.spawn(async move {
                caught.recv().await;
                let _ = sender.send(number).await;
            }));
        }
    }
    drop(sender);
    let folder: PathBuf = folder.into();
    thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(number) = runtime.block_on(first.recv()) {
            remove(&folder);
            CLEANUPS.lock().drain(..).for_each(|cleanup| cleanup());
            // The processes that were started end with this one.
            process::exit(128 + number);
        }
    })?;
    Ok(())
}

fn remove(folder: &Path) {
    for _ in 0..ATTEMPTS {
        match fs::remove_dir_all(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {}
            _ => return,
        }
    }
}
