//! The window of a connection: how much its peer may send ahead of the readers of all its streams.
//!
//! Nobody can read bytes that wait behind a gap. This window bounds them. It is wide, because a connection that has used it up stands still, and when room is
//! made, the writer that came last goes on first. What is known to wait for a reader that stalls is
//! counted elsewhere, and widens the window for as long as it waits.

use std::sync::Arc;

use parking_lot::Mutex;
use quinn::VarInt;

use super::inspection::Inbound;

/// The window of a connection.
#[derive(Debug)]
pub(super) struct ReceiveWindow {
    connection: quinn::Connection,
    /// Number of bytes beside those that are counted elsewhere; `None` without a limit.
    own: Option<u64>,
    /// Has to know how many bytes are counted elsewhere.
    inbound: Arc<Inbound>,
    /// Number of bytes that are counted elsewhere.
    widened: Mutex<u64>,
}

impl ReceiveWindow {
    /// The window of a connection that was made with it, or with a smaller one.
    pub(super) fn new(
        connection: quinn::Connection,
        own: Option<u64>,
        inbound: Arc<Inbound>,
    ) -> Arc<Self> {
        Arc::new(Self { connection, own, inbound, widened: Mutex::new(0) })
    }

    /// Opens the window, if it was smaller.
    pub(super) fn open(&self) {
        self.set(&self.widened.lock());
    }

    /// Widens the window by `bytes` until the result is dropped.
    pub(super) fn widen(self: &Arc<Self>, bytes: u64) -> Widened {
        self.change(|widened| *widened += bytes);
        Widened { window: self.clone(), bytes }
    }

    fn change(&self, change: impl FnOnce(&mut u64)) {
        if self.own.is_some() {
            let mut widened = self.widened.lock();
            change(&mut widened);
            self.set(&widened);
        }
    }

    /// Takes the lock's content, so that no older size follows a newer one.
    fn set(&self, widened: &u64) {
        let size = self.own.map_or(u64::MAX, |own| own.saturating_add(*widened));
        self.connection.set_receive_window(VarInt::from_u64(size).unwrap_or(VarInt::MAX));
        if let Some(unread) = self.inbound.unread() {
            unread.set_counted(*widened);
        }
    }
}

/// A part of a connection's window, for bytes that are counted elsewhere. Dropping it narrows the
/// window, by as much as is read from then on.
#[derive(Debug)]
pub(crate) struct Widened {
    window: Arc<ReceiveWindow>,
    bytes: u64,
}

impl Drop for Widened {
    fn drop(&mut self) {
        self.window.change(|widened| *widened -= self.bytes);
    }
}
