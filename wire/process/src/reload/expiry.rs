//! Warnings of certificates that expire.

use std::sync::Arc;

use parking_lot::Mutex;
use tracing::warn;

use super::certificates::{Validity, date};

const DAY: i64 = 24 * 60 * 60;

/// The certificates of one set. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Expiries(Arc<Mutex<Vec<Expiry>>>);

#[derive(Debug)]
struct Expiry {
    validity: Validity,
    /// Number of thresholds that a warning was given for.
    warned: usize,
}

/// Times before the expiry at which a warning is given, the longest first: two weeks and two days,
/// but not more than a quarter and a twelfth of the certificate's life, and the expiry itself.
fn thresholds(validity: &Validity) -> [i64; 3] {
    let life = validity.not_after.saturating_sub(validity.not_before);
    [(14 * DAY).min(life / 4), (2 * DAY).min(life / 12), 0]
}

impl Expiries {
    pub(super) fn new(validities: Vec<Validity>) -> Self {
        let expiry = |validity| Expiry { validity, warned: 0 };
        Self(Arc::new(Mutex::new(validities.into_iter().map(expiry).collect())))
    }

    /// Takes over the certificates of a new set. Those that were in the old one keep their
    /// warnings.
    pub(super) fn replace(&self, validities: &[Validity]) {
        let mut expiries = self.0.lock();
        let warned = |validity: &Validity| {
            let same = expiries.iter().find(|expiry| expiry.validity == *validity);
            same.map_or(0, |expiry| expiry.warned)
        };
        let expiry =
            |validity: &Validity| Expiry { validity: validity.clone(), warned: warned(validity) };
        let replaced = validities.iter().map(expiry).collect();
        *expiries = replaced;
    }

    /// When the next certificate expires, in seconds since 1970: the first of those that have not,
    /// the last one if all have; `None` without certificates.
    pub(super) fn next(&self, now: i64) -> Option<i64> {
        let expiries = self.0.lock();
        let all = || expiries.iter().map(|expiry| expiry.validity.not_after);
        all().filter(|not_after| *not_after >= now).min().or_else(|| all().max())
    }

    /// The certificates that have come closer to their expiry than a threshold since the last call.
    pub(super) fn due(&self, now: i64) -> Vec<Validity> {
        let mut due = Vec::new();
        for expiry in &mut *self.0.lock() {
            let left = expiry.validity.not_after.saturating_sub(now);
            let passed =
                thresholds(&expiry.validity).iter().filter(|threshold| left < **threshold).count();
            if passed > expiry.warned {
                expiry.warned = passed;
                due.push(expiry.validity.clone());
            }
        }
        due
    }

    /// Logs a warning for each certificate that is due.
    pub(super) fn warn(&self, now: i64) {
        for validity in self.due(now) {
            let Validity { file, subject, not_after, .. } = &validity;
            let (not_after, hours_left) = (date(*not_after), (*not_after - now).div_euclid(3600));
            if hours_left < 0 {
                warn!(file, subject, not_after, "a certificate has expired");
            } else {
                warn!(file, subject, not_after, hours_left, "a certificate expires soon");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(subject: &str, not_before: i64, not_after: i64) -> Validity {
        Validity { file: "crt".into(), subject: subject.into(), not_before, not_after }
    }

    /// Subjects of the warnings at this time.
    fn due(expiries: &Expiries, now: i64) -> Vec<String> {
        expiries.due(now).into_iter().map(|validity| validity.subject).collect()
    }

    #[test]
    fn each_threshold_gives_one_warning() {
        let year = certificate("year", 0, 365 * DAY);
        let expiries = Expiries::new(vec![year.clone()]);
        for (before, warnings) in [
            (15 * DAY, 0),
            (14 * DAY, 0),
            (14 * DAY - 1, 1),
            (3 * DAY, 0),
            (2 * DAY - 1, 1),
            (1, 0),
            (0, 0),
            (-1, 1),
            (-DAY, 0),
        ] {
            assert_eq!(due(&expiries, 365 * DAY - before).len(), warnings, "{before}");
        }
        // Read again, it is the same certificate.
        expiries.replace(&[year, certificate("new", 0, 730 * DAY)]);
        assert_eq!(due(&expiries, 366 * DAY), Vec::<String>::new());
        assert_eq!(due(&expiries, 729 * DAY), ["new"]);
    }

    #[test]
    fn a_process_that_starts_late_gives_one_warning() {
        let expiries = Expiries::new(vec![certificate("year", 0, 365 * DAY)]);
        assert_eq!(due(&expiries, 364 * DAY), ["year"]);
        assert_eq!(due(&expiries, 364 * DAY), Vec::<String>::new());
    }

    #[test]
    fn a_certificate_that_lives_for_a_day_gives_no_warning_while_it_is_renewed_in_time() {
        let expiries = Expiries::new(vec![certificate("day", 0, DAY)]);
        assert_eq!(due(&expiries, DAY * 2 / 3), Vec::<String>::new());
        assert_eq!(due(&expiries, DAY * 7 / 8), ["day"]);
    }

    #[test]
    fn the_next_expiry_is_the_first_that_is_to_come() {
        let expiries = Expiries::new(vec![
            certificate("old", 0, 10),
            certificate("new", 0, 30),
            certificate("newer", 0, 40),
        ]);
        assert_eq!(expiries.next(5), Some(10));
        assert_eq!(expiries.next(11), Some(30));
        assert_eq!(expiries.next(50), Some(40));
        assert_eq!(Expiries::default().next(0), None);
    }
}
