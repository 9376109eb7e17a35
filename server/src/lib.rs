//! The control-plane side of Culvert: accepts frontends, opens streams to agents.
//!
//! The life of one dial, in order:
//! 1. [`frontend`] accepts kube-apiserver's request, by gRPC or HTTP CONNECT;
//! 2. [`backends`] chooses a backend for the target, by the configured strategies;
//! 3. `dial` opens a stream on the backend's tunnel and waits for the agent's answer;
//! 4. the frontend and the stream are spliced until both directions have ended.
//!
//! `agents` accepts the tunnels that backends are. `operator` lists and ends them on request.

mod agents;
pub mod backends;
pub mod cli;
pub mod config;
mod dial;
mod files;
mod filtered;
pub mod frontend;
mod http2;
mod leases;
pub mod metrics;
mod operator;
mod precheck;
mod readiness;
mod reset_key;
mod server;
mod server_set;
#[cfg(test)]
mod testing;

pub use agents::listener::ListenerError;
pub use config::Config;
#[cfg(fuzzing)]
pub use http2::fuzz as fuzz_http2;
pub use server::{Server, StartError};
