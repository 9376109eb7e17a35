//! Demo, measurements, and the parts of every test that needs a server and an agent.
//!
//! - [`demo`] shows a tunnel at work with one command;
//! - [`compare`] runs a [`scenario`] through Culvert, Konnectivity and plain TCP;
//! - [`soak`] runs servers and agents for minutes, disturbs them, and looks for leaks;
//! - [`rig`] runs a server and agents inside this process, [`process`] as processes, both with the
//!   same [`flags`] and with [`certificates`] of their own;
//! - [`targets`] are TCP servers to dial;
//! - [`frontend`] is a client of a server's frontend, as kube-apiserver is, by gRPC or HTTP
//!   CONNECT.

pub mod balancer;
pub mod carrier;
pub mod certificates;
pub mod compare;
pub mod demo;
pub mod flags;
pub mod fleet;
pub mod frontend;
mod go;
pub mod http;
pub mod konnectivity_client;
pub mod link;
pub mod load;
pub mod peer;
pub mod process;
pub mod report;
pub mod rig;
pub mod scenario;
pub mod scratch;
pub mod soak;
mod tables;
pub mod targets;
