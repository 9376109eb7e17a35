//! Tunnels for the tests of this crate and of those that use it: within one process, over a line
//! that can fail, and over networks that are not the system's.

mod line;
mod pair;
mod simulated;

pub use self::{
    line::{Line, Side},
    pair::Pair,
    simulated::{adopt, quic_client, quic_server, quic_transport, report_unreachable},
};

/// Size of what a function returns, in bytes: of an async function, of its future. It is not called.
pub fn size_of_returned<A, R>(_: impl FnOnce(A) -> R) -> usize {
    size_of::<R>()
}

/// Spawns a task that ends at the latest with the test's runtime.
#[expect(clippy::disallowed_methods, reason = "the test's runtime owns the task")]
pub fn detached<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) {
    drop(tokio::spawn(work));
}
