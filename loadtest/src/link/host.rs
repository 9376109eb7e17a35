//! A host of its own: a network namespace without a name, gone with the last process in it.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd as _, AsRawFd as _},
    path::PathBuf,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};
use tokio::runtime::{Builder, Runtime};

use super::{LinkError, loopback};

/// A network namespace with its loopback device up. It lives as long as this value or a process
/// that was started in it.
#[derive(Debug)]
pub struct Host {
    namespace: File,
}

impl Host {
    /// Makes one.
    ///
    /// # Errors
    /// When the process may not.
    pub fn new() -> Result<Self, LinkError> {
        // A thread's namespace is its own, so this one's is left alone.
        let namespace = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|error| LinkError::NotPermitted(error.into()))?;
            loopback::up().map_err(LinkError::Device)?;
            // TCP begins without metrics of earlier connections.
            let _ = fs::write("/proc/sys/net/ipv4/tcp_no_metrics_save", "1");
            File::open("/proc/thread-self/ns/net").map_err(LinkError::Device)
        })?;
        Ok(Self { namespace })
    }

    /// Moves the calling thread there.
    ///
    /// # Errors
    /// When the process may not.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(self.namespace.as_fd(), CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs `work` there.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or the work fails.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_a_thread(|| {
            self.enter()?;
            work()
        })
    }

    /// A runtime whose tasks, and the processes they start, are there. Tasks have to be spawned on
    /// it: `block_on` polls on the caller's thread.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn runtime(&self, workers: usize) -> io::Result<Runtime> {
        let namespace = self.namespace.try_clone()?;
        Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .on_thread_start(move || {
                setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)
                    .expect("a namespace that this process has made can be entered");
            })
            .build()
    }

    /// A path by which another process of the same user enters it while this value lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd()).into()
    }

    /// Makes TCP connections opened there use this congestion control, such as `cubic` or `bbr`.
    ///
    /// # Errors
    /// When the kernel does not have it.
    pub fn set_congestion_control(&self, name: &str) -> io::Result<()> {
        self.run(|| fs::write("/proc/sys/net/ipv4/tcp_congestion_control", name))
    }
}

fn on_a_thread<T: Send, E: Send>(work: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E> {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
