//! Keys of a terminal, one by one.

use std::{
    io::{IsTerminal as _, Read as _, stdin},
    process::{Command, Stdio},
    thread,
};

use parking_lot::Mutex;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::scratch::before_a_signal_ends_the_process;

/// The state of the terminal before it was changed, while it is.
static BEFORE: Mutex<Option<String>> = parking_lot::const_mutex(None);

/// What a key is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// Blocks UDP, or lets it pass again.
    Udp,
    /// Loses more packets, or as many as before.
    Loss,
    /// Takes the link down, or up again.
    Link,
    /// Kills the agents and starts them again.
    Agent,
    Quit,
}

impl Key {
    fn of(byte: u8) -> Option<Self> {
        Some(match byte {
            b'u' => Self::Udp,
            b'l' => Self::Loss,
            b'd' => Self::Link,
            b'k' => Self::Agent,
            b'q' | 3 | 4 => Self::Quit, // Ctrl-C and Ctrl-D too
            _ => return None,
        })
    }
}

/// The terminal of standard input, without lines and echo until this is dropped or a signal ends
/// the process.
#[derive(Debug)]
pub(super) struct Keys {
    are_read: bool,
    pressed: UnboundedReceiver<Key>,
}

impl Keys {
    /// Reads keys from now on, if standard input is a terminal.
    pub(super) fn read() -> Self {
        let (sender, pressed) = unbounded_channel();
        let before = stdin().is_terminal().then(|| stty(&["-g"])).flatten();
        let are_read = before.is_some();
        if are_read {
            *BEFORE.lock() = before;
            before_a_signal_ends_the_process(restore);
            stty(&["-icanon", "-echo", "-isig", "min", "1"]);
            // Blocked in a read, it ends with the process.
            let reading = move || {
                for byte in stdin().lock().bytes() {
                    let Ok(byte) = byte else { return };
                    if Key::of(byte).is_some_and(|key| sender.send(key).is_err()) {
                        return;
                    }
                }
            };
            let _ = thread::Builder::new().name("keys".into()).spawn(reading);
        }
        Self { are_read, pressed }
    }

    /// Whether keys have an effect.
    pub(super) fn are_read(&self) -> bool {
        self.are_read
    }

    /// The next key; pending for ever where there is no terminal.
    ///
    /// # Cancel safety
    /// Cancel safe: no key is lost.
    pub(super) async fn next(&mut self) -> Option<Key> {
        match self.pressed.recv().await {
            None => std::future::pending().await,
            key => key,
        }
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal lines and echo again, if they were taken from it.
fn restore() {
    if let Some(before) = BEFORE.lock().take() {
        stty(&[&before]);
    }
}

/// Changes the terminal, or asks for its state; `None` when that fails.
fn stty(args: &[&str]) -> Option<String> {
    let ended = Command::new("stty").args(args).stdin(Stdio::inherit()).output().ok()?;
    let text = String::from_utf8(ended.stdout).ok()?;
    ended.status.success().then(|| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_have_one_meaning_and_others_none() {
        let keys = b"uldkq".map(Key::of);
        let all = [Key::Udp, Key::Loss, Key::Link, Key::Agent, Key::Quit];
        assert_eq!(keys, all.map(Some));
        assert_eq!((Key::of(3), Key::of(b'x')), (Some(Key::Quit), None));
    }
}
