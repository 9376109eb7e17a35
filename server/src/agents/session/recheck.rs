//! Reviews of a token that was accepted before: its service account or its pod may be gone.

use std::time::Duration;

use culvert_wire::control::Secret;
use tokio::time::Instant;

use crate::agents::admission::{AcceptedToken, Refusal};

/// Time for which kube-apiserver has to refuse a token, again and again, before its agent is sent
/// away: a kube-apiserver that has just started may refuse tokens that are valid.
pub(super) const REVOKED_AFTER: Duration = Duration::from_secs(60);
/// Mean time to the next review of a token that was refused.
const REFUSED_INTERVAL: Duration = Duration::from_secs(20);

/// Results of such a review, as metric labels.
pub(crate) const RECHECK_RESULTS: [&str; 3] = ["accepted", "refused", "failed"];

/// When the token of one tunnel is reviewed again, and what came of it.
#[derive(Debug)]
pub(super) struct Recheck {
    /// Mean time between two reviews; `None` for no reviews.
    interval: Option<Duration>,
    token: Option<AcceptedToken>,
    at: Instant,
    /// When the token was refused first, of the refusals since it was accepted.
    refused_since: Option<Instant>,
    is_revoked: bool,
}

impl Recheck {
    pub(super) fn new(
        interval: Option<Duration>,
        token: Option<AcceptedToken>,
        now: Instant,
    ) -> Self {
        let mut recheck =
            Self { interval, token: None, at: now, refused_since: None, is_revoked: false };
        recheck.replace(token, now);
        recheck
    }

    /// Reviews this token from now on, which was accepted just now.
    pub(super) fn replace(&mut self, token: Option<AcceptedToken>, now: Instant) {
        self.token = token;
        self.refused_since = None;
        self.schedule(now, self.interval);
    }

    /// When the token is reviewed next; `None` for never.
    pub(super) fn at(&self) -> Option<Instant> {
        self.interval.and(self.token.as_ref()).map(|_| self.at)
    }

    /// The token that is to be reviewed; `None` if it has expired, which ends the reviews: what
    /// becomes of its agent is then decided by the expiry.
    pub(super) fn begin(&mut self, now: Instant) -> Option<Secret> {
        self.token.take_if(|token| token.is_expired(now));
        self.token.as_ref().map(|accepted| accepted.token.clone())
    }

    /// Uses the verdict. Returns it as a metric label.
    pub(super) fn conclude(&mut self, result: &Result<(), Refusal>, now: Instant) -> &'static str {
        match result {
            Ok(()) => {
                self.refused_since = None;
                self.schedule(now, self.interval);
                "accepted"
            }
            Err(Refusal::NotReviewed(_) | Refusal::NoTurn(_)) => {
                let is_refused = self.refused_since.is_some();
                let interval = if is_refused { Some(REFUSED_INTERVAL) } else { self.interval };
                self.schedule(now, interval);
                "failed"
            }
            Err(_) => {
                let since = *self.refused_since.get_or_insert(now);
                let is_expired = self.token.as_ref().is_none_or(|token| token.is_expired(now));
                self.is_revoked = !is_expired && now - since >= REVOKED_AFTER;
                self.schedule(now, Some(REFUSED_INTERVAL));
                "refused"
            }
        }
    }

    /// Whether the token was refused for so long that its agent is to be sent away.
    pub(super) fn is_revoked(&self) -> bool {
        self.is_revoked
    }

    /// Has the token reviewed after about this time; agents that came together part.
    fn schedule(&mut self, now: Instant, mean: Option<Duration>) {
        if let Some(mean) = mean {
            self.at = now + mean.mul_f64(0.5 + fastrand::f64());
        }
    }
}
