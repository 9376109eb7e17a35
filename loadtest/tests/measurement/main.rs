//! Tests of the emulated link, the load and the comparisons. A program of their own, because many
//! of them need network namespaces and most of a processor.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod compare;
mod fairness;
mod idle_udp_dropped;
mod link;
mod load;
#[path = "../support/mod.rs"]
mod support;
