//! What an operator may see and do: the commands, and the socket by which they reach the server.
//!
//! ```text
//!  commands   culvert-server agents, culvert-server evict: the operator's side
//!  socket     the server's side: HTTP on a Unix socket that its owner alone may connect to
//!  agents     the list of agents, which crosses the socket as JSON
//! ```
//!
//! The admin port is no place for this: it serves metrics, and may be open to a whole network.

mod agents;
mod commands;
pub(crate) mod socket;

pub(crate) use self::commands::{commands, run};
