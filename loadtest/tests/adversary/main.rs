//! Peers that attack, written by hand: each test asserts bounds of what an attack costs the server
//! (memory, descriptors, requests to kube-apiserver, log), and that an honest agent joins meanwhile.
//!
//! A binary of its own: the tests measure a server, and run one after the other.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod agents;
mod flood;
mod forge;
mod frontends;
mod http2;
mod initial;
mod memory;
mod qmux;
mod quic;
mod strangers;
#[path = "../support/mod.rs"]
mod support;
mod victim;
