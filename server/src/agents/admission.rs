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
//! Certificates were checked before, by the handshake. A token is reviewed when its agent joins.
//! The result says who the agent is: [`Authenticated`].

mod queue;
mod reviews;
mod status;
mod token;
mod verdicts;

use std::{net::IpAddr, sync::Arc};

use culvert_process::kubernetes::{CurrentClient, KubernetesConfig, Timestamp};
use culvert_transport::task::Owned;
use culvert_wire::{AgentId, control::Secret, identifiers::Identifiers};
use parking_lot::Mutex;
use rustls::pki_types::CertificateDer;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use self::{
    queue::Turn,
    reviews::{Request, Reviews},
    token::{Claims, token_digest},
    verdicts::Verdict,
};
use super::{
    identity::{
        Certificate, ClaimFault, Claims as AgentClaims, Expiry, Identity, ServiceAccount,
        nodes::{Addresses, Nodes},
    },
    unadmitted::Source,
};
use crate::{
    config::{AgentIdentity, ClaimRules, TokenConfig},
    metrics::ServerMetrics,
};

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
pub(crate) struct Authenticator {
    /// `None` where agents need no token.
    reviewer: Option<Reviewer>,
    rules: Arc<ClaimRules>,
    /// Addresses of nodes; `None` where no rule needs them.
    nodes: Option<Nodes>,
}

/// What a peer shows to prove who it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Proof<'a> {
    /// Its certificate chain, leaf first, which the handshake verified.
    pub(crate) certificates: Option<&'a [CertificateDer<'static>]>,
    /// Its token.
    pub(crate) token: Option<&'a Secret>,
    /// Its address.
    pub(crate) remote: IpAddr,
    /// Whether it was admitted before, on the same tunnel: refusals that are remembered do not count
    /// then.
    pub(crate) is_admitted: bool,
}

/// Who an authenticated agent is. Only an [`Authenticator`] makes one.
#[derive(Debug)]
pub(crate) struct Authenticated {
    identity: Arc<Identity>,
    token: Option<AcceptedToken>,
    rules: Arc<ClaimRules>,
    /// Addresses of the agent's node, once they were looked up.
    addresses: Option<Addresses>,
}

impl Authenticated {
    /// What the agent may say about itself.
    ///
    /// # Errors
    /// When it may not have the id.
    pub(crate) fn claims(
        &self,
        agent_id: AgentId,
        announced: &Identifiers,
    ) -> Result<AgentClaims, ClaimFault> {
        let (identity, addresses) = (self.identity.clone(), self.addresses.as_ref());
        AgentClaims::new(identity, &self.rules, addresses, agent_id, announced)
    }

    /// Who the agent is.
    pub(crate) fn identity(&self) -> &Arc<Identity> {
        &self.identity
    }

    /// The token that proved it; `None` where agents need none, and after the first call.
    pub(crate) fn take_token(&mut self) -> Option<AcceptedToken> {
        self.token.take()
    }
}

/// A token that kube-apiserver has accepted.
#[derive(Clone, Debug)]
pub(crate) struct AcceptedToken {
    /// The token.
    pub(crate) token: Secret,
    /// When the proof expires; `None` for one that does not.
    expiry: Option<Expiry>,
}

impl AcceptedToken {
    /// Whether the proof has expired.
    pub(crate) fn is_expired(&self, now: Instant) -> bool {
        self.expiry.is_some_and(|expiry| expiry.at <= now)
    }
}

/// Why an agent was not authenticated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The agent sent no token.
    #[error("no token, and this server asks for one: see the agent's --service-account-token-path")]
    NoToken,
    /// The agent's certificate was verified, and does not say who it is.
    #[error("the names or the dates of its certificate cannot be read")]
    CertificateUnreadable,
    /// What the agent sent is no token; the text is Konnectivity's.
    #[error("{0}")]
    NotAToken(String),
    /// kube-apiserver did not review the token.
    #[error("the token could not be reviewed: {0}")]
    NotReviewed(String),
    /// Too many other tokens waited for a review, of this source or in all. kube-apiserver may well
    /// answer.
    #[error("the token could not be reviewed: {0}")]
    NoTurn(String),
    /// The addresses of the agent's node could not be looked up.
    #[error("the addresses of the agent's node could not be looked up: {0}")]
    NodeUnknown(String),
    /// The token is invalid and stays so, or belongs to another account.
    #[error("the token was refused: {0}")]
    Invalid(String),
    /// The token is not accepted now, which may change: kube-apiserver has just started, or clocks
    /// differ.
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
            Self::CertificateUnreadable
            | Self::NoToken
            | Self::NotAToken(_)
            | Self::Invalid(_)
            | Self::Refused(_) => "unauthenticated",
            Self::NotReviewed(_) | Self::NoTurn(_) => "token_not_reviewed",
            Self::NodeUnknown(_) => "node_not_looked_up",
        }
    }

    /// The text with which a Konnectivity server answers in this case.
    pub(crate) fn konnectivity_message(&self) -> String {
        let inner = match self {
            Self::NoToken => return "Authentication context was not found in metadata".into(),
            Self::NotAToken(reason) => return reason.clone(),
            Self::CertificateUnreadable => return self.to_string(),
            Self::NotReviewed(reason) | Self::NoTurn(reason) | Self::NodeUnknown(reason) => {
                format!("Failed to authenticate request. err:{reason}")
            }
            Self::Invalid(reason) | Self::Refused(reason) => format!("lookup failed: {reason}"),
        };
        format!("Failed to validate authentication token, err:{inner}")
    }
}

impl Authenticator {
    /// Admits every agent: a certificate is all that it needs, if that.
    pub(crate) fn open() -> Self {
        Self { reviewer: None, rules: any(), nodes: None }
    }

    /// Has the ids and identifiers of agents follow these rules, with the addresses of nodes where a
    /// rule needs them.
    #[must_use]
    pub(crate) fn with_rules(self, rules: ClaimRules, nodes: Option<Nodes>) -> Self {
        Self { rules: Arc::new(rules), nodes, ..self }
    }

    /// Looks up the addresses of the agent's node, if a rule needs them for what it announces.
    ///
    /// # Errors
    /// When they cannot be looked up.
    ///
    /// # Cancel safety
    /// Cancel safe: the lookup is given up.
    pub(crate) async fn look_up_node(
        &self,
        authenticated: &mut Authenticated,
        announced: &Identifiers,
    ) -> Result<(), Refusal> {
        let identity = authenticated.identity.clone();
        let announced = identity.undecided_addresses(announced);
        if let (Some(nodes), Some(node)) = (&self.nodes, identity.node())
            && !announced.is_empty()
        {
            let addresses = nodes.addresses(node, &announced).await;
            authenticated.addresses = Some(addresses.map_err(Refusal::NodeUnknown)?);
        }
        Ok(())
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
        let reviewer = Some(Reviewer { audience, requests, task });
        Self { reviewer, rules: any(), nodes: None }
    }

    /// The task that reviews tokens, to be supervised; `None` when agents need no token, or the
    /// task was taken before.
    pub(crate) fn take_task(&self) -> Option<Owned<()>> {
        self.reviewer.as_ref()?.task.lock().take()
    }

    /// Whether agents need a token.
    pub(super) fn needs_tokens(&self) -> bool {
        self.reviewer.is_some()
    }

    /// Admits the agent with this proof.
    ///
    /// # Errors
    /// When the certificate cannot be read, and when the token is refused, or not reviewed within
    /// 8 s.
    ///
    /// # Cancel safety
    /// Cancel safe: a review that has begun goes on, and its result is remembered.
    pub(crate) async fn admit(&self, proof: Proof<'_>) -> Result<Authenticated, Refusal> {
        let leaf = proof.certificates.and_then(<[_]>::first);
        let certificate =
            leaf.map(|leaf| Certificate::of(leaf).ok_or(Refusal::CertificateUnreadable));
        let certificate = certificate.transpose()?;
        let account = match &self.reviewer {
            None => None,
            Some(reviewer) => {
                let token = proof.token.ok_or(Refusal::NoToken)?;
                let turn = Turn::Of(Source::of(proof.remote));
                Some(reviewer.check(token, turn, proof.is_admitted).await?)
            }
        };
        let identity = Arc::new(Identity { certificate, account });
        let token = proof.token.filter(|_| self.needs_tokens()).map(|token| {
            let expiry = identity.expires(Instant::now());
            AcceptedToken { token: token.clone(), expiry }
        });
        Ok(Authenticated { identity, token, rules: self.rules.clone(), addresses: None })
    }

    /// Has the token of a connected agent reviewed again. All of these together have the turns of
    /// one address, so they do not delay agents that join.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    ///
    /// # Cancel safety
    /// As [`admit`](Self::admit).
    pub(crate) async fn check_again(&self, token: &Secret) -> Result<(), Refusal> {
        match &self.reviewer {
            Some(reviewer) => reviewer.check(token, Turn::Again, true).await.map(drop),
            None => Ok(()),
        }
    }
}

/// The rules by which agents may have any id and identifiers.
fn any() -> Arc<ClaimRules> {
    Arc::new(ClaimRules { identity: AgentIdentity::Any, allowed: Vec::new() })
}

#[derive(Debug)]
struct Reviewer {
    audience: String,
    requests: mpsc::Sender<Request>,
    task: Mutex<Option<Owned<()>>>,
}

impl Reviewer {
    async fn check(&self, token: &Secret, turn: Turn, is_admitted: bool) -> Verdict {
        let claims = Claims::of(token)?;
        claims.check(&self.audience, Timestamp::now())?;
        let (answer, verdict) = oneshot::channel();
        let digest = token_digest(token);
        let request = Request { digest, token: token.clone(), claims, turn, is_admitted, answer };
        let ended = || Refusal::NotReviewed("the server stops".into());
        self.requests.send(request).await.map_err(|_| ended())?;
        verdict.await.map_err(|_| ended())?
    }
}

#[cfg(test)]
mod tests;
