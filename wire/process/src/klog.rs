//! The flags of klog. Konnectivity's binaries have them, so manifests pass them.
//!
//! Only the verbosity has an effect. Culvert logs to standard error and leaves files, rotation and
//! headers to the log collector.

use clap::Args;

use super::faults::Faults;

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

    /// Log to standard error. Accepted and ignored: the log always goes there
    #[arg(long, default_value_t = true)]
    pub(crate) logtostderr: bool,

    /// Log to files and to standard error. Accepted and ignored
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

    /// File to log to. Accepted and ignored: the log goes to standard error
    #[arg(long, value_name = "FILE", default_value = "")]
    pub(crate) log_file: String,

    /// Size at which a new log file begins, in MiB. Accepted and ignored
    #[arg(long, value_name = "MIB", default_value_t = 1800)]
    pub(crate) log_file_max_size: u64,

    /// Directory of log files. Accepted and ignored: the log goes to standard error
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
    /// Adds a warning for each flag that would send the log elsewhere.
    pub(crate) fn check(&self, faults: &mut Faults) {
        const ELSEWHERE: &str = "has no effect, the log goes to standard error";
        if !self.log_file.is_empty() {
            faults.warn("log-file", ELSEWHERE);
        }
        if !self.log_dir.is_empty() {
            faults.warn("log-dir", ELSEWHERE);
        }
        if !self.vmodule.is_empty() {
            faults.warn("vmodule", "has no effect, set RUST_LOG instead");
        }
    }
}
