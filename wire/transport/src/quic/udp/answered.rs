//! Whether anything has arrived on a socket.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::Relaxed},
};

/// Whether a server has answered over QUIC, if only to ask for a proof of this side's address: UDP
/// gets there and back, and the handshake may wait for its turn. Clones share the answer.
///
/// A peer that can forge the server's address can make it true.
#[derive(Clone, Debug, Default)]
pub struct Answered(Arc<AtomicBool>);

impl Answered {
    /// Whether a packet has arrived.
    pub fn get(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Records that a packet has arrived.
    pub fn set(&self) {
        if !self.get() {
            self.0.store(true, Relaxed);
        }
    }
}
