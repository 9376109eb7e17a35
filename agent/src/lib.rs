//! The node side of Culvert: keeps tunnels to the servers and dials targets for them.
//!
//! The life of one stream, in order:
//! 1. `connector` keeps a tunnel to every server, whatever happens to the network;
//! 2. `tunnels` serves each tunnel, from hello to its end, and accepts the server's streams;
//! 3. `egress` reads the dial request of each stream, dials the target and replies;
//! 4. target and stream are spliced until both directions have ended.
//!
//! Where a server is Konnectivity's, `konnectivity` makes a tunnel of its gRPC stream first.

mod agent;
pub mod cli;
pub mod config;
mod connector;
mod egress;
mod files;
mod konnectivity;
mod leases;
mod lookups;
mod metrics;
mod operator;
mod precheck;
mod race;
mod readiness;
#[cfg(test)]
mod test_support;
mod tunnels;

pub use agent::{Agent, StartError};
pub use config::Config;
pub use metrics::AgentMetrics;
pub use tunnels::ServerTunnels;
