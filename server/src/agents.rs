//! Agents: their connections, from the accept to the loss of the tunnel.
//!
//! ```text
//!  listener            one port number, over UDP and over TCP; an accept loop each
//!  unadmitted          a peer between its accept and its admission: the one table of all of them,
//!     │                the handshake, the deadline
//!     ├─ join          the introduction of an agent of ours: hello, admission, welcome
//!     │   session      its tunnel as a backend, until it is lost
//!     └─ konnectivity  an agent of Konnectivity's, bridged to a tunnel within this process
//!  admission           whether an agent is who it says it is
//!  identity            who that is
//!  context             what they share
//! ```

pub(crate) mod admission;
mod context;
mod first_bytes;
pub(crate) mod identity;
mod join;
mod konnectivity;
pub(crate) mod listener;
pub(crate) mod session;
pub(crate) mod sessions;
mod unadmitted;

pub(crate) use context::AgentContext;
pub(crate) use join::JOIN_FAILURE_REASONS;
pub(crate) use unadmitted::UnadmittedTable;
