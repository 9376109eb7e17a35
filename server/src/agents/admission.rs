//! Authentication of agents by their tokens, which kube-apiserver reviews.
//!
//! ```text
//!  token      what a token says by itself: malformed and expired ones are refused here
//!  reviews    the task that has kube-apiserver review tokens, and remembers its verdicts
//!  queue      whose token is next, and how often
//!  verdicts   what was found out lately
//!  status     the verdict of kube-apiserver
//! ```
//!
//! Certificates were checked before, by the handshake. A token is reviewed when its agent joins;
//! that it expires later has no effect.

mod queue;
mod reviews;
mod status;
mod token;
mod verdicts;

use std::{net::IpAddr, sync::Arc};

use culvert_process::kubernetes::{CurrentClient, KubernetesConfig, Timestamp};
use culvert_transport::task::Owned;
use culvert_wire::control::Secret;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use self::{
    queue::Source,
    reviews::{Request, Reviews},
    token::{Claims, token_digest},
    verdicts::Verdict,
};
use super::identity::ServiceAccount;
use crate::{config::TokenConfig, metrics::ServerMetrics};

/// Maximum number of requests that the task of reviews has not seen yet.
const MAX_UNSEEN: usize = 64;
/// Reviews without `--kubeconfig-qps`: the tokens of 3000 agents take half a minute, and
/// kube-apiserver does not notice them beside its other work.
const DEFAULT_PACE: ReviewPace = ReviewPace { per_second: 100.0, burst: 500 };
/// Burst size where only the rate is given, in requests; client-go's default.
const DEFAULT_BURST: u32 = 10;

/// Results of a review, as metric labels.
pub(crate) const REVIEW_RESULTS: [&str; 3] = ["accepted", "refused", "failed"];

/// How many tokens are reviewed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ReviewPace {
    /// Maximum rate, in reviews per second.
    pub(crate) per_second: f32,
    /// Number of reviews that may exceed it at once.
    pub(crate) burst: u32,
}

impl Default for ReviewPace {
    fn default() -> Self {
        DEFAULT_PACE
    }
}

impl From<&KubernetesConfig> for ReviewPace {
    fn from(config: &KubernetesConfig) -> Self {
        match config.qps {
            None => DEFAULT_PACE,
            Some(per_second) => Self { per_second, burst: config.burst.unwrap_or(DEFAULT_BURST) },
        }
    }
}

/// Authenticates the agents of one server.
#[derive(Debug)]
pub(crate) struct Authenticator(Option<Reviewer>);

/// Proof that an agent was authenticated. Only an [`Authenticator`] makes one.
#[derive(Debug)]
pub(crate) struct Authenticated(());

/// Why an agent was not authenticated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The agent sent no token.
    #[error("no token, and this server asks for one: see the agent's --service-account-token-path")]
    NoToken,
    /// What the agent sent is no token; the text is Konnectivity's.
    #[error("{0}")]
    NotAToken(String),
    /// kube-apiserver did not review the token.
    #[error("the token could not be reviewed: {0}")]
    NotReviewed(String),
    /// The token is invalid, or belongs to another account.
    #[error("the token was refused: {0}")]
    Refused(String),
}

impl Refusal {
    /// The agent's time to join was over before the review was.
    pub(super) fn too_late() -> Self {
        Self::NotReviewed("the agent's time to join was over".into())
    }

    /// The reason as a metric label.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::NoToken | Self::NotAToken(_) | Self::Refused(_) => "unauthenticated",
            Self::NotReviewed(_) => "token_not_reviewed",
        }
    }

    /// The text with which a Konnectivity server answers in this case.
    pub(crate) fn konnectivity_message(&self) -> String {
        let inner = match self {
            Self::NoToken => return "Authentication context was not found in metadata".into(),
            Self::NotAToken(reason) => return reason.clone(),
            Self::NotReviewed(reason) => format!("Failed to authenticate request. err:{reason}"),
            Self::Refused(reason) => format!("lookup failed: {reason}"),
        };
        format!("Failed to validate authentication token, err:{inner}")
    }
}

impl Authenticator {
    /// Admits every agent: a certificate is all that it needs, if that.
    pub(crate) fn open() -> Self {
        Self(None)
    }

    /// Admits agents with a token of this account, which kube-apiserver reviews at this pace. Panics
    /// outside a tokio runtime.
    pub(crate) fn by_token(
        client: CurrentClient,
        expected: TokenConfig,
        pace: ReviewPace,
        metrics: Arc<ServerMetrics>,
    ) -> Self {
        let audience = expected.audience.clone();
        let (requests, unseen) = mpsc::channel(MAX_UNSEEN);
        let reviews = Reviews::new(client, expected, pace, metrics);
        let task = Mutex::new(Some(culvert_transport::task::owned(reviews.run(unseen))));
        Self(Some(Reviewer { audience, requests, task }))
    }

    /// The task that reviews tokens, to be supervised; `None` when agents need no token, or the
    /// task was taken before.
    pub(crate) fn take_task(&self) -> Option<Owned<()>> {
        self.0.as_ref()?.task.lock().take()
    }

    /// Whether agents need a token.
    pub(super) fn needs_tokens(&self) -> bool {
        self.0.is_some()
    }

    /// Admits the agent at `remote` with this token.
    ///
    /// # Errors
    /// When the token is refused, or not reviewed within 8 s.
    ///
    /// # Cancel safety
    /// Cancel safe: a review that has begun goes on, and its result is remembered.
    pub(crate) async fn admit(
        &self,
        token: Option<&Secret>,
        remote: IpAddr,
    ) -> Result<Authenticated, Refusal> {
        if let Some(reviewer) = &self.0 {
            reviewer.check(token.ok_or(Refusal::NoToken)?, remote).await?;
        }
        Ok(Authenticated(()))
    }
}

#[derive(Debug)]
struct Reviewer {
    audience: String,
    requests: mpsc::Sender<Request>,
    task: Mutex<Option<Owned<()>>>,
}

impl Reviewer {
    async fn check(&self, token: &Secret, remote: IpAddr) -> Verdict {
        let claims = Claims::of(token)?;
        claims.check(&self.audience, Timestamp::now())?;
        let (answer, verdict) = oneshot::channel();
        let digest = token_digest(token);
        let source = Source::of(remote);
        let request = Request { digest, token: token.clone(), claims, source, answer };
        let ended = || Refusal::NotReviewed("the server stops".into());
        self.requests.send(request).await.map_err(|_| ended())?;
        verdict.await.map_err(|_| ended())?
    }
}

#[cfg(test)]
mod tests;
