//! What an operator may see: the commands, and what the agent answers to them.
//!
//! ```text
//!  commands   culvert-agent status, streams: the operator's side
//!  answers    the agent's side
//!  status     the agent's state, which crosses the socket as JSON
//! ```

pub(crate) mod answers;
mod commands;
mod status;

pub(crate) use self::commands::{commands, run};
