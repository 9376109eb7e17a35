//! The node side of Culvert: keeps tunnels to the servers up and dials targets for them.
//!
//! The life of one stream, in order:
//! 1. [`connector`] keeps a tunnel to every server, whatever happens to the network;
//! 2. [`tunnels`] serves each tunnel, from hello to loss, and accepts the server's streams;
//! 3. [`egress`] reads the dial request of each stream, dials the target and replies;
//! 4. the target and the stream are spliced until both directions have ended.

pub mod agent;
pub mod cli;
pub mod config;
pub mod connector;
pub mod egress;
mod konnectivity;
pub mod leases;
pub mod metrics;
pub mod tunnels;

pub use agent::{Agent, StartError};
pub use config::Config;
