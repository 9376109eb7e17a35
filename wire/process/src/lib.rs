//! The parts of a process around its tunnels, shared by server and agent.
//!
//! - Command line: [`cli`] runs a program from its arguments to its exit code. [`command_line`]
//!   reads them and the configuration file. [`go_flags`],
//!   [`go_duration`], `byte_size` and `klog` read flags as Konnectivity reads them, [`faults`]
//!   collects what is wrong with them, [`tunnel_flags`], [`admin_flags`], [`kubernetes_flags`] and
//!   [`channel_flags`] are those that both sides share, and [`invocation`] chooses default ports.
//! - Operation: [`logging`], [`metrics`], [`admin`], [`heap_profiles`], [`signals`] and [`supervision`].
//! - Sockets: [`listen`] opens listeners as Go does, [`unix_socket`] makes Unix sockets, and
//!   [`accept`] is the one accept loop.
//! - [`precheck`] checks with the flags of a process whether it would work.
//! - Operators: [`operator`] has the socket by which commands reach a running process, their side
//!   of it, and what they print. [`version`] says what was built.
//! - Files: [`reload`] reads certificates, keys, tokens and kubeconfigs, and reads them again.
//! - [`kubernetes`] sets up kube-apiserver's client.
//!
//! Start with [`cli::main`], with which each process begins.

pub mod accept;
pub mod admin;
pub mod admin_flags;
mod byte_size;
pub mod channel_flags;
pub mod cli;
pub mod command_line;
mod completions;
pub mod descriptors;
mod error;
pub mod faults;
pub mod go_duration;
pub mod go_flags;
pub mod heap_profiles;
pub mod invocation;
mod klog;
pub mod kubernetes;
pub mod kubernetes_flags;
pub mod listen;
pub mod logging;
mod memory_limit;
pub mod metrics;
pub mod operator;
pub mod precheck;
pub mod reload;
pub mod signals;
pub mod supervision;
#[cfg(feature = "test-util")]
#[doc(hidden)]
pub mod test_util;
pub mod threads;
pub mod tls_flags;
pub mod tunnel_flags;
pub mod unix_socket;
pub mod version;
