//! The control-plane side of Culvert: takes frontends in, sends streams out to agents.
//!
//! The life of one dial, in order:
//! 1. [`frontend`] accepts kube-apiserver's request, by gRPC or HTTP CONNECT;
//! 2. [`registry`] finds a backend for the target, by the configured strategies;
//! 3. [`dial`] opens a stream on the backend's [`tunnel`] and waits for the agent's answer;
//! 4. the frontend and the stream are spliced until both directions have ended.

mod arrival;
pub mod backend;
pub mod cli;
pub mod config;
pub mod dial;
pub mod frontend;
mod http2_frames;
pub mod identity;
pub mod leases;
pub mod metrics;
pub mod reached;
pub mod registry;
pub mod server;
pub mod stock_agent;
pub mod tunnel;
pub mod tunnel_port;

pub use config::Config;
pub use server::{Server, StartError};
