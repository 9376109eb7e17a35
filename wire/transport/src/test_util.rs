//! Tunnels for the tests of this crate and of those that use it: within one process, over a line
//! that can fail, and over networks that are not the system's.

mod line;
mod pair;
mod simulated;

pub use self::{
    line::{Line, Side},
    pair::Pair,
    simulated::{adopt, quic_transport},
};
