//! What an operator may see and do: the commands, and what the server answers to them.
//!
//! ```text
//!  commands   culvert-server agents, streams, top, drain, evict: the operator's side
//!  answers    the server's side
//!  agents     the list of agents, which crosses the socket as JSON
//! ```
//!
//! The admin port is no place for this: it serves metrics, and may be open to a whole network.

mod agents;
pub(crate) mod answers;
mod commands;

pub(crate) use self::commands::{commands, run};
