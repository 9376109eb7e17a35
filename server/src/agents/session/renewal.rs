//! The end of an agent's proof of identity, and its renewal before.
//!
//! A token has an expiry, and so has a certificate. An agent renews its token with a message, and
//! its certificate with another tunnel. When it does neither, its tunnel drains and is closed. A
//! token that kube-apiserver does not review extends the old proof for a while, for an agent must
//! not be lost because kube-apiserver is.

use std::{future, pin::Pin, time::Duration};

use culvert_process::rate_limited;
use culvert_wire::control::Secret;
use tokio::time::{sleep, sleep_until};
use tracing::debug;

use crate::{
    agents::{
        AgentContext,
        admission::{Authenticated, Authenticator, Proof, Refusal},
    },
    backends::{Backend, registry::Candidate as _},
    config::ExpireAgents,
};

/// Time from the expiry of a proof to the end of its tunnel: the clocks of two hosts differ, and
/// kube-apiserver accepts a token for as long.
pub(super) const GRACE: Duration = Duration::from_secs(60);
/// The same when kube-apiserver has not reviewed the agent's new token.
pub(super) const EXTENSION: Duration = Duration::from_secs(3600);
/// Mean time to the next review of a token that was not reviewed.
const RETRY_INTERVAL: Duration = Duration::from_secs(20);

/// Results of a renewal, as metric labels.
pub(crate) const RENEWAL_RESULTS: [&str; 3] = ["accepted", "refused", "failed"];

type Review<'a> = Pin<Box<dyn Future<Output = Result<Authenticated, Refusal>> + Send + 'a>>;

/// Keeps the proof of one agent up to date.
pub(super) struct ProofKeeper<'a> {
    backend: &'a Backend,
    context: &'a AgentContext,
    /// The agent's newest token, until it was reviewed.
    token: Option<Secret>,
    review: Option<Review<'a>>,
    /// Whether the review of the newest token has failed so far.
    is_unreviewed: bool,
}

impl<'a> ProofKeeper<'a> {
    pub(super) fn new(backend: &'a Backend, context: &'a AgentContext) -> Self {
        Self { backend, context, token: None, review: None, is_unreviewed: false }
    }

    /// Has the agent's new token reviewed. It replaces one that was not reviewed yet.
    pub(super) fn renew(&mut self, token: Secret) {
        self.is_unreviewed = false;
        self.begin_review(token, Duration::ZERO);
    }

    fn begin_review(&mut self, token: Secret, delay: Duration) {
        let (tunnel, authenticator) = (self.backend.tunnel.clone(), &self.context.authenticator);
        self.token = Some(token.clone());
        self.review = Some(Box::pin(async move {
            sleep(delay).await;
            let certificates = tunnel.peer_certificates();
            let remote = tunnel.remote_address().ip();
            let certificates = certificates.as_deref();
            review(authenticator, Proof { certificates, token: Some(&token), remote }).await
        }));
    }

    /// Completes when the proof has expired and was not renewed.
    ///
    /// # Cancel safety
    /// Cancel safe: the next call goes on.
    pub(super) async fn expired(&mut self) {
        let mut expiry = self.backend.expiry();
        loop {
            let end = expiry
                .borrow_and_update()
                .filter(|_| self.ends_expired())
                .map(|expiry| expiry.at + if self.is_unreviewed { EXTENSION } else { GRACE });
            tokio::select! {
                reviewed = reviewed(&mut self.review) => self.conclude(reviewed),
                Ok(()) = expiry.changed() => {}
                () = async {
                    match end {
                        Some(end) => sleep_until(end).await,
                        None => future::pending().await,
                    }
                } => return,
            }
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

    fn conclude(&mut self, reviewed: Result<Authenticated, Refusal>) {
        self.review = None;
        let token = self.token.take();
        let agent_id = self.backend.agent_id();
        let result = match reviewed {
            Ok(authenticated) => {
                let renewed = self.context.backends.renew(self.backend, authenticated.identity());
                let identity = authenticated.identity();
                if renewed {
                    self.is_unreviewed = false;
                    debug!(%agent_id, %identity, "an agent has renewed its proof of identity");
                    "accepted"
                } else {
                    self.log("it is the proof of another identity");
                    "refused"
                }
            }
            Err(Refusal::NotReviewed(reason)) => {
                self.is_unreviewed = true;
                self.log(&reason);
                if let Some(token) = token {
                    let delay = RETRY_INTERVAL.mul_f64(0.5 + fastrand::f64());
                    self.begin_review(token, delay);
                }
                "failed"
            }
            Err(refusal) => {
                self.is_unreviewed = false;
                self.log(&refusal.to_string());
                "refused"
            }
        };
        self.context.metrics.proof_renewed(result);
    }

    fn log(&self, reason: &str) {
        rate_limited!(
            Duration::from_secs(60), per agent_id = self.backend.agent_id(), WARN, reason,
            "an agent's new token is not accepted"
        );
    }
}

async fn review(authenticator: &Authenticator, proof: Proof<'_>) -> Result<Authenticated, Refusal> {
    authenticator.admit(proof).await
}

async fn reviewed(review: &mut Option<Review<'_>>) -> Result<Authenticated, Refusal> {
    match review {
        Some(review) => review.as_mut().await,
        None => future::pending().await,
    }
}
