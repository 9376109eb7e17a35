//! What every Culvert process has around its tunnels, so that server and agent say it once.
//!
//! [`go_flags`], [`go_duration`] and [`klog`] keep Konnectivity's command lines working; [`faults`]
//! collects what is wrong with one; [`tunnel_flags`] are the options that both sides share, checked
//! into the transport's settings; [`logging`], [`metrics`], [`admin`] and [`signals`] are what an
//! operator sees of a running process; [`kubernetes`] is kube-apiserver's client.
//!
//! Start with [`go_flags::try_parse_from`], with which each process begins.

pub mod accept;
pub mod admin;
pub mod byte_size;
pub mod faults;
pub mod go_duration;
pub mod go_flags;
pub mod invocation;
pub mod klog;
pub mod kubernetes;
pub mod listen;
pub mod logging;
pub mod metrics;
pub mod signals;
pub mod tunnel_flags;
