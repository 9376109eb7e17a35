//! The limit of file descriptors. Every frontend and every target takes one, and container runtimes
//! start processes with a soft limit of 1024.

use std::{fs::File, io};

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, rlim_t, setrlimit},
};
use tracing::{info, warn};

/// Number of descriptors that a [`Reserve`] holds. A connection that is accepted with one of them
/// ends after its answer.
const RESERVE: usize = 4;

/// The limit of file descriptors, as it was found and as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DescriptorLimit {
    /// Soft limit at the start of the process.
    found: rlim_t,
    /// Soft limit now.
    soft: rlim_t,
    /// Hard limit.
    hard: rlim_t,
}

/// Raises the soft limit to the hard one, as Go's runtime does.
///
/// # Errors
/// With the kernel's error. The limit is what it was.
pub(crate) fn raise_limit() -> Result<DescriptorLimit, Errno> {
    let (found, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(DescriptorLimit { found, soft, hard })
}

/// Number of descriptors that this process may have open; no limit if the kernel does not say.
pub fn limit() -> u64 {
    getrlimit(Resource::RLIMIT_NOFILE).map_or(u64::MAX, |(soft, _)| soft)
}

/// Logs the limit, and whether it is too low for the `needed` descriptors.
pub(crate) fn report(limit: Result<DescriptorLimit, Errno>, needed: u64) {
    match limit {
        Ok(DescriptorLimit { found, soft, hard }) if soft < needed => warn!(
            found,
            soft,
            hard,
            needed,
            "the limit of open files is below what the limits of connections need"
        ),
        Ok(DescriptorLimit { found, soft, hard }) => {
            info!(found, soft, hard, "the limit of open files");
        }
        Err(error) => warn!(%error, "the limit of open files cannot be raised"),
    }
}

/// Descriptors kept for a listener that must accept when the process has no others.
#[derive(Debug, Default)]
pub(crate) struct Reserve(Vec<File>);

impl Reserve {
    /// A reserve that is full, unless descriptors are short already.
    pub(crate) fn new() -> Self {
        let mut reserve = Self::default();
        reserve.refill();
        reserve
    }

    /// Frees one descriptor; whether there was one.
    pub(crate) fn release(&mut self) -> bool {
        self.0.pop().is_some()
    }

    /// Takes the descriptors that are missing; whether it is full.
    pub(crate) fn refill(&mut self) -> bool {
        while self.0.len() < RESERVE {
            match File::open("/dev/null") {
                Ok(spare) => self.0.push(spare),
                Err(_) => return false,
            }
        }
        true
    }
}

/// Whether an error is the lack of descriptors, in the process or on the machine.
pub fn is_shortage(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let limit = raise_limit().unwrap();
        assert_eq!(limit.soft, limit.hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (limit.hard, limit.hard));
    }

    #[test]
    fn a_reserve_is_used_up_and_filled_again() {
        let mut reserve = Reserve::new();
        for _ in 0..RESERVE {
            assert!(reserve.release());
        }
        assert!(!reserve.release());
        assert!(reserve.refill() && reserve.release());
    }
}
