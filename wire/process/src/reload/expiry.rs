//! Certificates and tokens that expire: the values of their metrics, and warnings.

use std::sync::Arc;

use parking_lot::Mutex;
use tracing::warn;

use super::certificates::{Validity, date};
use crate::operator::proofs::TokenText;

const DAY: i64 = 24 * 60 * 60;

/// The certificates and the token of one set. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Expiries {
    certificates: Arc<Mutex<Vec<Expiry>>>,
    token: Arc<Mutex<Option<Life>>>,
}

#[derive(Debug)]
struct Expiry {
    validity: Validity,
    /// Number of thresholds that a warning was given for.
    warned: usize,
}

/// The dates of what expires, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Life {
    /// When it begins, if that is known.
    pub(super) from: Option<i64>,
    /// When it expires.
    pub(super) until: i64,
}

impl Life {
    /// The dates of a token; `None` if it is no JSON Web Token or does not expire.
    pub(super) fn of_token(token: &str) -> Option<Self> {
        let text = TokenText::of(token)?;
        let from = text.issued.map(|at| at.as_second());
        Some(Self { from, until: text.expires?.as_second() })
    }

    /// Time until the expiry, and from the begin to the expiry, in seconds. What is not known is no
    /// number.
    #[expect(clippy::cast_precision_loss, reason = "no date is 2^52 seconds away")]
    pub(super) fn seconds(life: Option<Self>, now: i64) -> [f64; 2] {
        let left = life.map(|life| life.until.saturating_sub(now));
        let all = life.and_then(|life| Some(life.until.saturating_sub(life.from?)));
        [left, all].map(|seconds| seconds.map_or(f64::NAN, |seconds| seconds as f64))
    }
}

impl From<&Validity> for Life {
    fn from(validity: &Validity) -> Self {
        Self { from: Some(validity.not_before), until: validity.not_after }
    }
}

/// Times before the expiry at which a warning is given, the longest first: two weeks and two days,
/// but not more than a quarter and a twelfth of the certificate's life, and the expiry itself.
fn thresholds(validity: &Validity) -> [i64; 3] {
    let life = validity.not_after.saturating_sub(validity.not_before);
    [(14 * DAY).min(life / 4), (2 * DAY).min(life / 12), 0]
}

impl Expiries {
    pub(super) fn new(validities: &[Validity], token: Option<Life>) -> Self {
        let expiries = Self::default();
        expiries.replace(validities, token);
        expiries
    }

    /// Takes over the certificates and the token of a new set. Certificates that were in the old
    /// one keep their warnings.
    pub(super) fn replace(&self, validities: &[Validity], token: Option<Life>) {
        *self.token.lock() = token;
        let mut expiries = self.certificates.lock();
        let warned = |validity: &Validity| {
            let same = expiries.iter().find(|expiry| expiry.validity == *validity);
            same.map_or(0, |expiry| expiry.warned)
        };
        let expiry =
            |validity: &Validity| Expiry { validity: validity.clone(), warned: warned(validity) };
        let replaced = validities.iter().map(expiry).collect();
        *expiries = replaced;
    }

    /// The certificate that expires next: the process's own, or a CA before it. Of CAs it is the
    /// first that has not expired, and the last one if all have, because a peer needs one of them.
    /// `None` without certificates.
    pub(super) fn next(&self, now: i64) -> Option<Life> {
        let expiries = self.certificates.lock();
        let lives = |is_own: bool| {
            let validities = expiries.iter().map(|expiry| &expiry.validity);
            validities.filter(move |validity| validity.is_own == is_own).map(Life::from)
        };
        let authority = lives(false).filter(|life| life.until >= now).min_by_key(|life| life.until);
        let authority = authority.or_else(|| lives(false).max_by_key(|life| life.until));
        lives(true).chain(authority).min_by_key(|life| life.until)
    }

    /// The dates of the token; `None` if there is none, or it has none.
    pub(super) fn token(&self) -> Option<Life> {
        *self.token.lock()
    }

    /// The certificates that have come closer to their expiry than a threshold since the last call.
    pub(super) fn due(&self, now: i64) -> Vec<Validity> {
        let mut due = Vec::new();
        for expiry in &mut *self.certificates.lock() {
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
        let (file, subject) = ("crt".into(), subject.into());
        Validity { file, subject, not_before, not_after, is_own: false }
    }

    /// Subjects of the warnings at this time.
    fn due(expiries: &Expiries, now: i64) -> Vec<String> {
        expiries.due(now).into_iter().map(|validity| validity.subject).collect()
    }

    #[test]
    fn each_threshold_gives_one_warning() {
        let year = certificate("year", 0, 365 * DAY);
        let expiries = Expiries::new(std::slice::from_ref(&year), None);
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
        expiries.replace(&[year, certificate("new", 0, 730 * DAY)], None);
        assert_eq!(due(&expiries, 366 * DAY), Vec::<String>::new());
        assert_eq!(due(&expiries, 729 * DAY), ["new"]);
    }

    #[test]
    fn a_process_that_starts_late_gives_one_warning() {
        let expiries = Expiries::new(&[certificate("year", 0, 365 * DAY)], None);
        assert_eq!(due(&expiries, 364 * DAY), ["year"]);
        assert_eq!(due(&expiries, 364 * DAY), Vec::<String>::new());
    }

    #[test]
    fn a_certificate_that_lives_for_a_day_gives_no_warning_while_it_is_renewed_in_time() {
        let expiries = Expiries::new(&[certificate("day", 0, DAY)], None);
        assert_eq!(due(&expiries, DAY * 2 / 3), Vec::<String>::new());
        assert_eq!(due(&expiries, DAY * 7 / 8), ["day"]);
    }

    #[test]
    fn the_next_expiry_is_the_first_that_is_to_come() {
        let certificates = [("old", 10), ("new", 30), ("newer", 40)];
        let certificates = certificates.map(|(subject, until)| certificate(subject, 0, until));
        let expiries = Expiries::new(&certificates, None);
        let next = |now| expiries.next(now).unwrap().until;
        assert_eq!([next(5), next(11), next(50)], [10, 30, 40]);
        assert_eq!(Expiries::default().next(0), None);
    }
}
