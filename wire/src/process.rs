//! What every Culvert process has around the tunnel, so that server and agent say it once.
//!
//! Nothing in here knows a tunnel. [`go_flags`], [`go_duration`] and [`klog`] keep Konnectivity's
//! command lines working; [`faults`] collects what is wrong with one; [`tunnel_flags`] are the
//! options both sides share; [`logging`], [`metrics`], [`admin`] and [`signals`] are what an
//! operator sees of a running process.
//!
//! Start with [`go_flags::try_parse_from`], with which each process begins.

pub mod admin;
pub mod byte_size;
pub mod faults;
pub mod go_duration;
pub mod go_flags;
pub mod invocation;
pub mod klog;
#[cfg(feature = "kubernetes")]
pub mod kubernetes;
pub mod listen;
pub mod logging;
pub mod metrics;
pub mod signals;
pub mod tunnel_flags;
