//! One set of files that belong together, and the value that was made of them.

use std::{fmt, io, path::PathBuf};

use culvert_transport::tls::Current;
use metrics::{Counter, Gauge};
use tracing::{info, warn};

use super::{Files, LoadError, certificates::date, expiry::Expiries};

/// Loads a set anew; the result replaces the current value when it is called.
type Load = Box<dyn Fn(&mut Files) -> Result<Box<dyn FnOnce()>, LoadError> + Send>;

/// What is recorded about the looks at one set.
pub(super) struct Counts {
    /// Changed sets that were taken.
    pub(super) ok: Counter,
    /// Changed sets that were reported, because they cannot be used.
    pub(super) failed: Counter,
    /// Number of sets of this name of which this was the last report.
    pub(super) failing: Gauge,
}

/// A set of files, and what became of the last look at them.
pub(super) struct Set {
    file: PathBuf,
    load: Load,
    /// What the current value was made of.
    current: Files,
    /// What the last attempt that failed was made of.
    failed: Option<Failed>,
    expiries: Expiries,
    counts: Counts,
    /// Whether the set is one of those that [`Counts::failing`] counts.
    is_failing: bool,
}

/// A changed set that cannot be used.
struct Failed {
    files: Files,
    is_reported: bool,
}

impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Set").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Set {
    /// Reads the files for the first time, and makes a value of them.
    pub(super) fn load<T: Send + Sync + 'static>(
        file: PathBuf,
        load: impl Fn(&mut Files) -> Result<T, LoadError> + Send + 'static,
        counts: Counts,
        now: i64,
    ) -> Result<(Self, Current<T>), LoadError> {
        let mut files = Files::default();
        let (replace, value) = Current::replaceable(load(&mut files)?);
        let replace = std::sync::Arc::new(replace);
        let load: Load = Box::new(move |files| {
            let (value, replace) = (load(files)?, replace.clone());
            Ok(Box::new(move || replace.with(value)))
        });
        // One that has expired is reported with those that expire soon.
        if let Some(early) = files.presented().filter(|validity| now < validity.not_before) {
            let fault = early.fault(now);
            warn!(fault, "a certificate is not valid yet");
        }
        let expiries = files.expiries();
        counts.failing.increment(0.0);
        let is_failing = false;
        let set = Self { file, load, current: files, failed: None, expiries, counts, is_failing };
        set.log_warnings();
        Ok((set, value))
    }

    pub(super) fn expiries(&self) -> Expiries {
        self.expiries.clone()
    }

    /// Takes the files over if they have changed and can be used; whether they need no other look
    /// soon. With `on_request` a failure is reported at once, and again.
    ///
    /// # Errors
    /// When no descriptor is left to look at them.
    pub(super) fn look(&mut self, now: i64, on_request: bool) -> io::Result<bool> {
        if self.current.are_unchanged()? {
            // Also after a failure: what was bad is gone, and the value in use is that of the files.
            self.failed = None;
            self.set_failing(false);
            return Ok(true);
        }
        let mut files = Files::default();
        match (self.load)(&mut files).and_then(|replace| self.accept(&files, now).map(|()| replace))
        {
            Ok(replace) => {
                self.expiries.replace(files.certificates(), files.token_life());
                (self.current, self.failed) = (files, None);
                self.counts.ok.increment(1);
                self.set_failing(false);
                self.log_reload();
                // Last, so that a task that waits for it finds it counted.
                replace();
                Ok(true)
            }
            Err(error) => match files.shortage() {
                Some(shortage) => Err(shortage),
                None => Ok(self.fail(files, &error, on_request)),
            },
        }
    }

    /// Refuses a certificate outside its dates while the one in use is within its own.
    fn accept(&self, files: &Files, now: i64) -> Result<(), LoadError> {
        let in_use_is_valid =
            self.current.presented().is_some_and(|in_use| in_use.fault(now).is_none());
        match files.presented().and_then(|presented| presented.fault(now)) {
            Some(fault) if in_use_is_valid => Err(LoadError::new(fault)),
            _ => Ok(()),
        }
    }

    /// Records a failure, and reports it once for each contents that stay.
    fn fail(&mut self, files: Files, error: &LoadError, on_request: bool) -> bool {
        let before = self.failed.take().filter(|failed| failed.files.found_the_same(&files));
        let was_reported = before.as_ref().is_some_and(|failed| failed.is_reported);
        let report = on_request || (before.is_some() && !was_reported);
        if report {
            let file = self.file.display();
            warn!(%file, %error, "a changed file cannot be used, the last good one stays in use");
            if !was_reported {
                self.counts.failed.increment(1);
            }
            self.set_failing(true);
        }
        let is_reported = was_reported || report;
        self.failed = Some(Failed { files, is_reported });
        is_reported
    }

    /// Two sets may have one name, such as a CA of agents and of frontends.
    fn set_failing(&mut self, is_failing: bool) {
        match (std::mem::replace(&mut self.is_failing, is_failing), is_failing) {
            (false, true) => self.counts.failing.increment(1.0),
            (true, false) => self.counts.failing.decrement(1.0),
            _ => {}
        }
    }

    /// Why certificates of the set do not fit their use.
    pub(super) fn unfit(&self) -> &[String] {
        self.current.unfit()
    }

    fn log_reload(&self) {
        let file = self.file.display();
        match self.current.presented() {
            Some(presented) => {
                let (subject, not_after) = (&presented.subject, date(presented.not_after));
                info!(%file, subject, not_after, "a changed file was read again");
            }
            None => info!(%file, "a changed file was read again"),
        }
        self.log_warnings();
    }

    fn log_warnings(&self) {
        for fault in self.current.warnings() {
            warn!(fault, "a part of a file is left out");
        }
        for fault in self.current.unfit() {
            warn!(fault, "a certificate does not fit its use");
        }
    }
}
