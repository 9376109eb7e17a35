//! SIGTERM and SIGINT: the first asks for a graceful stop, the second for the end. SIGHUP has the
//! files read again.

use std::io;

use nix::sys::signal::{SigSet, Signal as Number};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::reload::Reloads;

/// SIGTERM and SIGINT, caught from the moment this value exists.
///
/// Dropping it does not restore the default action: later signals are ignored.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Catches both signals. Panics outside a tokio runtime.
    ///
    /// # Errors
    /// If the kernel refuses the handler.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Name of the next signal.
    ///
    /// # Cancel safety
    /// Cancel safe: a signal not returned is returned by the next call.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Ends the process with this exit code at the next signal; never returns.
    ///
    /// Race it against the graceful stop that the first signal began.
    ///
    /// # Cancel safety
    /// Cancel safe: it only waits.
    pub async fn exit_at_next(mut self, code: i32) -> std::convert::Infallible {
        let name = self.next().await;
        tracing::warn!(signal = name, "stop requested again, exiting at once");
        crate::logging::flush();
        std::process::exit(code)
    }
}

/// Has SIGHUP wait for [`ReloadSignal::catch`] in this thread; until then it would end the process.
/// Threads that this one starts never get it.
pub(crate) fn hold_reload_signal() {
    only_hangup().thread_block().expect("the kernel knows how to block a signal");
}

fn only_hangup() -> SigSet {
    SigSet::from_iter([Number::SIGHUP])
}

/// SIGHUP, caught from the moment this value exists: it ends the process no more, not even after
/// the value is dropped.
#[derive(Debug)]
pub struct ReloadSignal(Signal);

impl ReloadSignal {
    /// Catches the signal, and one that waited in this thread. Panics outside a tokio runtime.
    ///
    /// # Errors
    /// If the kernel refuses the handler.
    pub fn catch() -> io::Result<Self> {
        let signal = signal(SignalKind::hangup())?;
        only_hangup().thread_unblock()?;
        Ok(Self(signal))
    }

    /// Looks at the files at each signal; never returns.
    ///
    /// # Cancel safety
    /// Cancel safe: a look that has begun is completed.
    pub async fn serve(mut self, reloads: Reloads) -> std::convert::Infallible {
        loop {
            match self.0.recv().await {
                Some(()) => reloads.look_on_request().await,
                // Only when the runtime ends.
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sighup_before_it_is_caught_is_not_lost_and_does_not_end_the_process() {
        hold_reload_signal();
        nix::sys::signal::raise(Number::SIGHUP).unwrap(); // to this thread
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let received = runtime.block_on(async { ReloadSignal::catch().unwrap().0.recv().await });
        assert_eq!(received, Some(()));
    }

    #[tokio::test]
    async fn a_signal_to_this_process_is_returned_by_name() {
        let mut signals = StopSignals::catch().unwrap();
        let own_pid = std::process::id().to_string();
        for (option, name) in [("-TERM", "SIGTERM"), ("-INT", "SIGINT")] {
            let sent = tokio::process::Command::new("kill").args([option, &own_pid]).status().await;
            assert!(sent.unwrap().success());
            assert_eq!(signals.next().await, name);
        }
    }
}
