//! Tests of a server and an agent together, in one program: linking is most of the work of a test
//! build. Tests that count what their process holds, or measure time, have programs of their own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod addresses;
mod agent_lifecycle;
mod backpressure;
mod configuration;
mod conformance;
mod connect_bytes;
mod demo;
mod deploy;
mod dial;
mod docs;
mod docs_monitoring;
mod ejection;
mod expiry;
mod grpc_packets;
mod half_close;
mod hello;
mod identity;
mod images;
mod interop;
mod keepalive;
mod konnectivity_agent;
mod konnectivity_metrics;
mod konnectivity_suite;
mod leases;
mod limits;
mod logging;
mod malformed;
mod matrix;
mod memory;
mod no_route;
mod operable;
mod operator;
mod optimistic;
mod precheck;
mod recipes;
mod replicas;
mod reset;
mod resume;
mod rotation;
mod server_first;
mod server_lifecycle;
mod soak;
mod strangers;
#[path = "../support/mod.rs"]
mod support;
mod swap;
mod tokens;
mod transports;
mod udp_sockets;
mod upgrade;
mod write_then_close;
