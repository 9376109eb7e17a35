//! The node side of Culvert: keeps a tunnel up and dials targets for it.
//!
//! The life of one stream, in order:
//! 1. [`connector`] keeps a tunnel to every server, whatever happens to the network: [`plan`] says what
//!    is next, [`attempt`] does it over one [`transport`] or the other, [`servers`] has what came of it;
//! 2. [`tunnel`] introduces the agent and accepts the server's streams;
//! 3. [`egress`] reads what each stream wants dialed, dials it and answers;
//! 4. the target and the stream are spliced until both directions have ended.

pub mod agent;
pub mod attempt;
pub mod backoff;
pub mod cli;
pub mod config;
pub mod connector;
pub mod egress;
pub mod leases;
pub mod metrics;
pub mod plan;
pub mod servers;
pub mod silence;
mod stock_server;
pub mod transport;
pub mod tunnel;

pub use agent::{Agent, StartError};
pub use config::Config;
