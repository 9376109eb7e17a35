//! What stands on top of server and agent: the demo, measurements, and the parts that every test
//! of the whole tunnel is made of.
//!
//! - [`demo`] shows the tunnel at work in one command;
//! - [`rig`] runs a server and agents in this process, on loopback, with [`certificates`] made on
//!   the spot;
//! - [`targets`] are what can be dialed: echo, sink, source and the ill-behaved ones;
//! - [`frontend`] comes in as kube-apiserver does, by gRPC or HTTP CONNECT.

pub mod carrier;
pub mod certificates;
pub mod compare;
pub mod demo;
pub mod fleet;
pub mod frontend;
pub mod konnectivity_client;
pub mod link;
pub mod load;
mod page;
pub mod peer;
pub mod process;
pub mod report;
pub mod rig;
pub mod scenario;
pub mod targets;
