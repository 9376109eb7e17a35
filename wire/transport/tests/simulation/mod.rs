//! A network in memory and in virtual time: real quinn, real TLS, sockets that are queues.
//!
//! ```text
//!  agents ──▶ pipe: policer, buffer, rate, loss, delay ──▶ servers
//!         ◀── pipe of the other direction ◀──
//! ```
//!
//! All flows of a direction share one pipe. The clock is tokio's, paused: it jumps to the next
//! event, so a minute takes as long as its packets do. Random numbers are seeded.

mod exchange;
mod flow;
mod forged_icmp;
mod pipe;
mod resume;
mod socket;
mod standing_queue;

pub(crate) use flow::{Flow, Simulation};
pub(crate) use pipe::{Bursts, Policer, Settings};
pub(crate) use resume::Reconnecting;
