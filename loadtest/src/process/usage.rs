//! Processor time and memory of a process, from `/proc`.

use std::{fs, io};

use nix::unistd::{SysconfVar, sysconf};

use super::Process;

impl Process {
    /// Processor time used so far, in seconds, with that of the processes that this one replaced.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn cpu_seconds(&self) -> io::Result<f64> {
        Ok(self.cpu_seconds_before + self.cpu_seconds_since_start()?)
    }

    /// Processor time used since the process was last started, in seconds.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn cpu_seconds_since_start(&self) -> io::Result<f64> {
        let stat = self.proc_file("stat")?;
        // The name in parentheses may hold anything; the times are fields 14 and 15.
        let (_, fields) = stat.rsplit_once(')').unwrap_or_default();
        let ticks: u64 =
            fields.split_whitespace().skip(11).take(2).flat_map(str::parse::<u64>).sum();
        let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
        Ok(ticks as f64 / per_second as f64)
    }

    /// Resident memory, in bytes.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn memory(&self) -> io::Result<u64> {
        self.kibibytes("VmRSS:")
    }

    /// Highest resident memory so far, in bytes.
    ///
    /// # Errors
    /// When the process has ended.
    pub fn peak_memory(&self) -> io::Result<u64> {
        self.kibibytes("VmHWM:")
    }

    fn kibibytes(&self, field: &str) -> io::Result<u64> {
        let status = self.status()?;
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
        let kibibytes = line.split_whitespace().next().unwrap_or_default().parse::<u64>();
        Ok(kibibytes.map_err(io::Error::other)? * 1024)
    }

    pub(super) fn status(&self) -> io::Result<String> {
        self.proc_file("status")
    }

    fn proc_file(&self, name: &str) -> io::Result<String> {
        fs::read_to_string(format!("/proc/{}/{name}", self.id()?))
    }
}
