//! The end of an agent's proof of identity, and its renewal before.
//!
//! A token has an expiry, and so has a certificate. An agent renews its token with a message, and
//! its certificate with another tunnel. When it does neither, its tunnel drains and is closed. A
//! token that kube-apiserver does not review extends the old proof for a while, for an agent must
//! not be lost because kube-apiserver is.
//!
//! A token that was accepted is reviewed again from time to time: its service account or its pod
//! may have been deleted.

use std::{future, pin::Pin, time::Duration};

use culvert_process::rate_limited;
use culvert_wire::control::Secret;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tracing::debug;

use super::recheck::Recheck;
use crate::{
    agents::{
        AgentContext,
        admission::{Authenticated, Proof, Refusal},
        identity::Expiry,
    },
    backends::{Backend, Dismissal, registry::Candidate as _},
    config::ExpireAgents,
};

/// Time from the expiry of a proof to the end of its tunnel: the clocks of two hosts differ, and
/// kube-apiserver accepts a token for as long.
pub(super) const GRACE: Duration = Duration::from_secs(60);
/// The same when kube-apiserver has not reviewed the agent's new token.
pub(super) const EXTENSION: Duration = Duration::from_secs(3600);
/// Minimum time between two reviews of new tokens of one tunnel. An agent has a new token once in
/// many minutes.
pub(super) const MIN_REVIEW_INTERVAL: Duration = Duration::from_secs(10);
/// Mean time to the next review of a token that was not reviewed.
const RETRY_INTERVAL: Duration = Duration::from_secs(20);
/// Mean time to the next review of a token that was refused once; twice as long after each further
/// time, up to half a minute: within the grace of a proof that has expired it is tried once more.
const REFUSED_INTERVAL: Duration = Duration::from_secs(10);
const MAX_REFUSED_INTERVAL: Duration = Duration::from_secs(30);

/// Minimum time between two log lines about one agent's tokens.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Results of a renewal, as metric labels.
pub(crate) const RENEWAL_RESULTS: [&str; 4] = ["accepted", "refused", "failed", "superseded"];

/// Keeps the proof of one agent up to date. At most one review is in progress.
pub(super) struct ProofKeeper<'a> {
    backend: &'a Backend,
    context: &'a AgentContext,
    /// The expiry of the proof, which other tunnels of the process renew as well.
    expiry: watch::Receiver<Option<Expiry>>,
    /// The agent's newest token, until it is accepted or never can be.
    new: Option<NewToken>,
    review: Option<Review<'a>>,
    /// When the next review of a new token may begin.
    next_review: Instant,
    /// Whether the review of the newest token has failed so far.
    is_unreviewed: bool,
    recheck: Recheck,
}

/// A token that is to be reviewed.
struct NewToken {
    token: Secret,
    /// When it is reviewed next.
    at: Instant,
    /// Number of times that it was refused.
    refusals: u32,
}

type Review<'a> = Pin<Box<dyn Future<Output = Reviewed> + Send + 'a>>;

/// The end of a review.
enum Reviewed {
    New(NewToken, Result<Authenticated, Refusal>),
    Again(Result<(), Refusal>),
}

impl<'a> ProofKeeper<'a> {
    /// Keeps the proof of an agent that was admitted.
    pub(super) fn new(backend: &'a Backend, context: &'a AgentContext) -> Self {
        let now = Instant::now();
        Self {
            backend,
            context,
            expiry: backend.expiry(),
            new: None,
            review: None,
            next_review: now,
            is_unreviewed: false,
            recheck: Recheck::new(context.recheck_interval, backend.token(), now),
        }
    }

    /// Has the agent's new token reviewed, once the last one of this tunnel was reviewed and some
    /// time has passed. It replaces one that still waits.
    pub(super) fn renew(&mut self, token: Secret) {
        self.is_unreviewed = false;
        let new = NewToken { token, at: Instant::now(), refusals: 0 };
        if self.new.replace(new).is_some() {
            self.context.metrics.proof_renewed("superseded");
        }
    }

    /// Completes when the agent is to be sent away: its proof has expired and was not renewed, or
    /// does not hold any more.
    ///
    /// # Cancel safety
    /// Cancel safe: the next call goes on.
    pub(super) async fn ended(&mut self) -> Dismissal {
        loop {
            let end = self
                .expiry
                .borrow()
                .filter(|_| self.ends_expired())
                .map(|expiry| expiry.at + if self.is_unreviewed { EXTENSION } else { GRACE });
            let begin = self.next_begin();
            tokio::select! {
                reviewed = reviewed(&mut self.review) => {
                    self.conclude(reviewed);
                    if self.recheck.is_revoked() {
                        return Dismissal::Revoked;
                    }
                }
                Ok(()) = self.expiry.changed() => self.use_renewed(),
                () = until(begin) => self.begin_review(),
                () = until(end) => return Dismissal::Expired,
            }
        }
    }

    /// Has the token that renewed the proof reviewed from now on: another tunnel of the process may
    /// have brought it, and be gone when it is revoked.
    fn use_renewed(&mut self) {
        if let Some(token) = self.backend.token() {
            self.recheck.replace(Some(token), Instant::now());
        }
    }

    /// Whether the agent loses its tunnel when its proof has expired.
    fn ends_expired(&self) -> bool {
        match self.context.expire_agents {
            ExpireAgents::Renewing => self.backend.renews(),
            ExpireAgents::All => true,
            ExpireAgents::None => false,
        }
    }

    /// When the next review begins; `None` while one is in progress, and if there is none to begin.
    fn next_begin(&self) -> Option<Instant> {
        if self.review.is_some() {
            return None;
        }
        self.next_of_new().into_iter().chain(self.recheck.at()).min()
    }

    /// When the review of a new token may begin; `None` without one.
    fn next_of_new(&self) -> Option<Instant> {
        self.new.as_ref().map(|new| new.at.max(self.next_review))
    }

    /// Whether the review that is due first is of the accepted token. An agent that sends token after
    /// token must not put that off.
    fn is_recheck_first(&self) -> bool {
        match (self.recheck.at(), self.next_of_new()) {
            (Some(recheck), Some(new)) => recheck <= new,
            (recheck, _) => recheck.is_some(),
        }
    }

    fn begin_review(&mut self) {
        let authenticator = &self.context.authenticator;
        if self.is_recheck_first() {
            let Some(token) = self.recheck.begin(Instant::now()) else { return };
            let again = async move { Reviewed::Again(authenticator.check_again(&token).await) };
            self.review = Some(Box::pin(again));
        } else if let Some(new) = self.new.take() {
            let tunnel = self.backend.tunnel.clone();
            self.next_review = Instant::now() + MIN_REVIEW_INTERVAL;
            self.review = Some(Box::pin(async move {
                let certificates = tunnel.peer_certificates();
                let remote = tunnel.remote_address().ip();
                let certificates = certificates.as_deref();
                let token = Some(&new.token);
                let proof = Proof { certificates, token, remote, is_admitted: true };
                let result = authenticator.admit(proof).await;
                Reviewed::New(new, result)
            }));
        }
    }

    fn conclude(&mut self, reviewed: Reviewed) {
        self.review = None;
        match reviewed {
            Reviewed::New(new, result) => {
                let result = self.conclude_new(new, result);
                self.context.metrics.proof_renewed(result);
            }
            Reviewed::Again(result) => {
                if let Err(reason) = &result {
                    rate_limited!(
                        LOG_INTERVAL, per agent_id = self.backend.agent_id(), WARN, %reason,
                        "a connected agent's token is not accepted any more"
                    );
                }
                let result = self.recheck.conclude(&result, Instant::now());
                self.context.metrics.token_rechecked(result);
            }
        }
    }

    /// Uses the verdict about a new token. Returns it as a metric label.
    fn conclude_new(
        &mut self,
        new: NewToken,
        result: Result<Authenticated, Refusal>,
    ) -> &'static str {
        let refusal = match result {
            Ok(authenticated) => return self.accept(authenticated),
            Err(refusal) => refusal,
        };
        self.log(&refusal.to_string());
        match refusal {
            Refusal::NotReviewed(_) => {
                // The newest token counts, and was not reviewed either.
                self.is_unreviewed = true;
                self.try_again(new, RETRY_INTERVAL);
                "failed"
            }
            // Whether kube-apiserver answers is not known: what held before still holds.
            Refusal::NoTurn(_) => {
                self.try_again(new, RETRY_INTERVAL);
                "failed"
            }
            Refusal::Refused(_) => {
                self.is_unreviewed = false;
                let interval = REFUSED_INTERVAL * 2_u32.pow(new.refusals.min(8));
                let new = NewToken { refusals: new.refusals + 1, ..new };
                self.try_again(new, interval.min(MAX_REFUSED_INTERVAL));
                "refused"
            }
            _ => {
                self.is_unreviewed = false;
                "refused"
            }
        }
    }

    fn accept(&mut self, mut authenticated: Authenticated) -> &'static str {
        let identity = authenticated.identity().clone();
        let token = authenticated.take_token();
        if !self.context.backends.renew(self.backend, &identity, token.as_ref()) {
            self.log("it is the proof of another identity");
            return "refused";
        }
        self.is_unreviewed = false;
        let agent_id = self.backend.agent_id();
        debug!(%agent_id, %identity, "an agent has renewed its proof of identity");
        self.recheck.replace(token, Instant::now());
        "accepted"
    }

    /// Has the token reviewed again after about this time, unless the agent has sent a newer one.
    fn try_again(&mut self, new: NewToken, mean: Duration) {
        let at = Instant::now() + mean.mul_f64(0.5 + fastrand::f64());
        self.new.get_or_insert(NewToken { at, ..new });
    }

    fn log(&self, reason: &str) {
        rate_limited!(
            LOG_INTERVAL, per agent_id = self.backend.agent_id(), WARN, reason,
            "an agent's new token is not accepted"
        );
    }
}

async fn reviewed(review: &mut Option<Review<'_>>) -> Reviewed {
    match review {
        Some(review) => review.as_mut().await,
        None => future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => future::pending().await,
    }
}
