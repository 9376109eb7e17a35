//! SIGTERM and SIGINT: the first asks for a graceful stop, the second for the end.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit code of a process that was told to stop twice, as Konnectivity has it.
const IMPATIENT_EXIT_CODE: i32 = 1;

/// The two stop signals, caught from the moment this value exists.
///
/// Dropping it does not bring the default action back: later signals are then ignored.
#[derive(Debug)]
pub struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    /// Takes both signals over from the default action. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the kernel refuses the handler.
    pub fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The name of the next of the two to arrive.
    ///
    /// # Cancel safety
    /// Cancel safe: a signal not returned is returned by the next call.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Ends the process with code 1 when another of the two arrives; never returns.
    ///
    /// To be raced against the graceful stop that the first one began.
    pub async fn exit_at_next(mut self) -> std::convert::Infallible {
        let name = self.next().await;
        tracing::warn!(signal = name, "told to stop again, leaving at once");
        std::process::exit(IMPATIENT_EXIT_CODE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
