//! Flags of the admin port and of operators that server and agent share.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use crate::faults::Faults;

/// Shared flags, to be flattened into those of a process.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Health and administration")]
pub struct AdminFlags {
    /// Path of a Unix socket for the commands of operators, to which its owner alone may connect;
    /// empty means none
    #[arg(long, value_name = "PATH", default_value = "")]
    pub operator_socket: String,

    /// Address to listen on for administration; empty means every interface
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    pub admin_bind_address: String,

    /// Serve profiles in pprof's format on the admin port: of processor time at
    /// /debug/pprof/profile, and in builds with heap profiles of memory at /debug/pprof/heap
    #[arg(long)]
    pub enable_profiling: bool,

    /// Let Go's profiler record lock contention; requires --enable-profiling. Accepted and ignored
    #[arg(long)]
    pub enable_contention_profiling: bool,
}

impl AdminFlags {
    /// The path of the operators' socket, if there is to be one.
    pub fn operator_socket(&self) -> Option<PathBuf> {
        (!self.operator_socket.is_empty()).then(|| PathBuf::from(&self.operator_socket))
    }

    /// The address to listen on. Faults of the flags go to `faults`.
    pub fn check(&self, port: u16, faults: &mut Faults) -> SocketAddr {
        faults.require(
            self.enable_profiling || !self.enable_contention_profiling,
            "enable-contention-profiling",
            "needs --enable-profiling",
        );
        if self.enable_contention_profiling {
            faults.warn("enable-contention-profiling", "has no effect, locks are not profiled");
        }
        faults.bind_address("admin-bind-address", &self.admin_bind_address, port)
    }
}
