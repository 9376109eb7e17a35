//! Streams that outlive their tunnels.
//!
//! A stream belongs to a [`Session`], which is one agent process and one server process, and is on one
//! of its tunnels. Each side retains what it has sent until the peer has reported it as received. When
//! the tunnel is lost, the server goes on with the stream over another tunnel of the session: each
//! side says how much it has received, and the other sends again from there on.
//!
//! ```text
//!  session     the tunnels and streams of two processes; what is resumed, and over which tunnel
//!  link        one stream: what it has sent and received, and the tunnel that it is on
//!  retained    the bytes that may have to be sent again
//!  fault       why a stream was not resumed
//!
//!  SendHalf ──retain──▶ Link ◀──received── RecvHalf       while the tunnel lives
//!  SendHalf ◀──next_send── Link ──next_recv──▶ RecvHalf   after Link::attach, on the next tunnel
//! ```
//!
//! The halves of a stream notice a lost tunnel by themselves and wait for what the link gets for them.
//! A stream leaves a tunnel only after that was closed on this side, so that no half waits on it.
//= docs/protocol.md#14-resumption

mod fault;
pub(crate) mod link;
mod retained;
mod session;
#[cfg(test)]
mod tests;

pub use self::{
    fault::ResumeFault,
    link::Use,
    session::{KeptStream, LeaveOnDrop, Observer, Resumption, Session, SessionTunnel},
};
