//! Which carrier a tunnel gets, and what is remembered of that.

mod memory;
mod race;

pub use memory::QuicMemory;
pub use race::{Race, race};
