//! The flags of klog. Konnectivity's binaries have them, so manifests pass them.
//!
//! Those of the verbosity and of the log's files have an effect. Headers are Culvert's own, and one
//! file has all severities.

use std::{ffi::OsStr, path::PathBuf};

use clap::Args;

use super::{
    faults::Faults,
    logging::{self, LogFileConfig},
};

/// The flags of klog, with klog's names (hyphens for underscores) and Konnectivity's defaults.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logging")]
pub(crate) struct KlogFlags {
    /// Verbosity of the log: 0 to 4 is info, 5 to 9 is debug, 10 and more is trace, down to
    /// packets. The environment variable RUST_LOG takes precedence
    #[arg(short = 'v', long = "v", value_name = "LEVEL", default_value_t = 4)]
    pub(crate) v: i32,

    /// Verbosity of single source files. Accepted and ignored: RUST_LOG sets it per module
    #[arg(long, value_name = "PATTERN=LEVEL,…", default_value = "")]
    pub(crate) vmodule: String,

    /// Log to standard error, and not to --log-file or --log-dir
    #[arg(long, default_value_t = true)]
    pub(crate) logtostderr: bool,

    /// With --log-file or --log-dir, log to standard error as well
    #[arg(long)]
    pub(crate) alsologtostderr: bool,

    /// Severity from which lines of log files also go to standard error. Accepted and ignored
    #[arg(long, value_name = "SEVERITY", default_value = "")]
    pub(crate) alsologtostderrthreshold: String,

    /// Severity from which lines go to standard error. Accepted and ignored
    #[arg(long, value_name = "SEVERITY", default_value = "2")]
    pub(crate) stderrthreshold: String,

    /// Let --logtostderr override --stderrthreshold. Accepted and ignored
    #[arg(long, default_value_t = true)]
    pub(crate) legacy_stderr_threshold_behavior: bool,

    /// File to log to, with --logtostderr=false. It is opened again when another program renames it
    #[arg(long, value_name = "FILE", default_value = "")]
    pub(crate) log_file: String,

    /// Size at which the log file is renamed to its name with .1 and a new one begins, in MiB; 0 is
    /// without limit
    #[arg(long, value_name = "MIB", default_value_t = 1800)]
    pub(crate) log_file_max_size: u64,

    /// Directory of the log file, with --logtostderr=false and without --log-file; its name is that
    /// of the program with .log
    #[arg(long, value_name = "DIR", default_value = "")]
    pub(crate) log_dir: String,

    /// Add the source file's directory to the header of log lines. Accepted and ignored
    #[arg(long)]
    pub(crate) add_dir_header: bool,

    /// Leave out the header of log lines. Accepted and ignored
    #[arg(long)]
    pub(crate) skip_headers: bool,

    /// Leave out the header of log files. Accepted and ignored
    #[arg(long)]
    pub(crate) skip_log_headers: bool,

    /// Write a line only to the log file of its own severity. Accepted and ignored
    #[arg(long)]
    pub(crate) one_output: bool,

    /// Source line at which a stack trace is logged. Accepted and ignored
    #[arg(long, value_name = "FILE:LINE", default_value = ":0")]
    pub(crate) log_backtrace_at: String,
}

impl KlogFlags {
    /// The file that the log goes to; `None` is standard error. Adds a warning for each flag without
    /// effect, and a fault for a file that cannot be opened.
    pub(crate) fn check(&self, faults: &mut Faults) -> Option<LogFileConfig> {
        if !self.vmodule.is_empty() {
            faults.warn("vmodule", "has no effect, set RUST_LOG instead");
        }
        if self.logtostderr {
            const UNUSED: &str = "has no effect without --logtostderr=false";
            for (flag, value) in [("log-file", &self.log_file), ("log-dir", &self.log_dir)] {
                if !value.is_empty() {
                    faults.warn(flag, UNUSED);
                }
            }
            return None;
        }
        let (flag, path) = match (self.log_file.as_str(), self.log_dir.as_str()) {
            ("", "") => {
                let text = "the log goes to standard error, as no --log-file or --log-dir is given";
                faults.warn("logtostderr", text);
                return None;
            }
            ("", folder) => ("log-dir", PathBuf::from(folder).join(file_name())),
            (file, _) => ("log-file", PathBuf::from(file)),
        };
        if let Err(error) = logging::open(&path) {
            let text = format!("cannot be opened for appending: {}: {error}", path.display());
            faults.add(flag, text);
        }
        let max_size = self.log_file_max_size.saturating_mul(1 << 20);
        Some(LogFileConfig { path, max_size, also_stderr: self.alsologtostderr })
    }
}

/// The name of a log file in a directory.
fn file_name() -> String {
    let program = std::env::args_os().next().map(PathBuf::from);
    let name = program.as_deref().and_then(|path| path.file_name()).and_then(OsStr::to_str);
    format!("{}.log", name.unwrap_or("culvert"))
}
