//! Whether an agent is who it says: its token, where one is asked for, reviewed by kube-apiserver.
//!
//! The rules are stock's (`pkg/server/server.go`, `validateAuthToken`): kube-apiserver must vouch for
//! the token and for the audience, and it must be that of one service account. Certificates are
//! checked before, by the handshake. A token is reviewed when its agent joins; one that expires
//! later ends nothing.

use std::time::Duration;

use culvert_wire::{
    control::Secret,
    process::kubernetes::{self, Client},
};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, api::PostParams};
use tokio::time::timeout;

use crate::config::TokenConfig;

/// Time for kube-apiserver to review a token: an agent waits for its welcome no longer than 10 s.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(8);

/// Checks the agents of one server.
#[derive(Debug)]
pub struct Gate(Option<Reviewer>);

/// An agent passed the gate that its server has. Nobody else can make one.
#[derive(Debug)]
pub struct Admitted(());

/// Why an agent was not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It sent no token.
    #[error("no token, and this server asks for one: see the agent's --service-account-token-path")]
    NoToken,
    /// kube-apiserver did not say whether the token is good.
    #[error("the token could not be reviewed: {0}")]
    NotReviewed(String),
    /// The token is not good, or not the one that is asked for.
    #[error("the token was refused: {0}")]
    Refused(String),
}

impl Refusal {
    /// A short word for metric labels.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NoToken | Self::Refused(_) => "unauthenticated",
            Self::NotReviewed(_) => "token_not_reviewed",
        }
    }

    /// What a stock server answers in this case.
    pub fn in_stocks_words(&self) -> String {
        let inner = match self {
            Self::NoToken => return "Authentication context was not found in metadata".into(),
            Self::NotReviewed(reason) => format!("Failed to authenticate request. err:{reason}"),
            Self::Refused(reason) => format!("lookup failed: {reason}"),
        };
        format!("Failed to validate authentication token, err:{inner}")
    }
}

impl Gate {
    /// Asks for no token: certificates are all there is, or nothing at all.
    pub fn open() -> Self {
        Self(None)
    }

    /// Asks for a token like this, and `client` whether it is good.
    pub fn by_token(client: Client, expected: TokenConfig) -> Self {
        Self(Some(Reviewer { reviews: Api::all(client), expected }))
    }

    /// Whether agents need a token.
    pub fn asks_for_tokens(&self) -> bool {
        self.0.is_some()
    }

    /// Admits the agent with this token.
    ///
    /// # Errors
    /// When it is refused, or kube-apiserver does not answer within 8 s.
    ///
    /// # Cancel safety
    /// Cancel safe: it only asks.
    pub async fn admit(&self, token: Option<&Secret>) -> Result<Admitted, Refusal> {
        if let Some(reviewer) = &self.0 {
            reviewer.check(token.ok_or(Refusal::NoToken)?).await?;
        }
        Ok(Admitted(()))
    }
}

#[derive(Debug)]
struct Reviewer {
    reviews: Api<TokenReview>,
    expected: TokenConfig,
}

impl Reviewer {
    async fn check(&self, token: &Secret) -> Result<(), Refusal> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.expose().into(),
                audiences: Some(vec![self.expected.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        match timeout(REVIEW_TIMEOUT, self.reviews.create(&params, &review)).await {
            Ok(Ok(review)) => judge(review.status.unwrap_or_default(), &self.expected),
            Ok(Err(error)) => Err(Refusal::NotReviewed(kubernetes::reason(&error))),
            Err(_) => Err(Refusal::NotReviewed(format!("no answer within {REVIEW_TIMEOUT:?}"))),
        }
    }
}

/// Whether kube-apiserver vouches for the token, and it is the one that is asked for.
fn judge(status: TokenReviewStatus, expected: &TokenConfig) -> Result<(), Refusal> {
    let refused = |reason: String| Err(Refusal::Refused(reason));
    if let Some(error) = status.error.filter(|error| !error.is_empty()) {
        return refused(error);
    }
    if status.authenticated != Some(true) {
        return refused("service account jwt not valid".into());
    }
    // One that knows of no audiences answers with none, and vouches for its own alone.
    let vouched = status.audiences.is_some_and(|audiences| audiences.contains(&expected.audience));
    if !vouched {
        return refused(format!("the token is not meant for {:?}", expected.audience));
    }
    let user = status.user.and_then(|user| user.username).unwrap_or_default();
    let parts: Vec<_> = user.split(':').collect();
    let [system, kind, namespace, account] = parts[..] else {
        return refused("unexpected username format".into());
    };
    if (system, kind) != ("system", "serviceaccount") {
        return refused("username returned is not a service account".into());
    }
    let expect = |what, found: &str, expected: &str| match found == expected {
        true => Ok(()),
        false => refused(format!("incoming request from {found:?} {what}. Expected {expected:?}")),
    };
    expect("namespace", namespace, &expected.namespace)?;
    expect("service account", account, &expected.service_account)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    const AUDIENCE: &str = "system:konnectivity-server";

    fn verdict(change: impl FnOnce(&mut TokenReviewStatus)) -> Result<(), String> {
        let expected = TokenConfig {
            namespace: "kube-system".into(),
            service_account: "konnectivity-agent".into(),
            audience: AUDIENCE.into(),
        };
        let mut status = TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec![AUDIENCE.into()]),
            user: user("system:serviceaccount:kube-system:konnectivity-agent"),
            ..TokenReviewStatus::default()
        };
        change(&mut status);
        judge(status, &expected).map_err(|refusal| refusal.in_stocks_words())
    }

    fn user(name: &str) -> Option<UserInfo> {
        Some(UserInfo { username: Some(name.into()), ..UserInfo::default() })
    }

    #[test]
    fn the_token_that_is_asked_for_is_accepted() {
        assert_eq!(verdict(|_| {}), Ok(()));
        assert_eq!(verdict(|status| status.error = Some(String::new())), Ok(()));
    }

    #[test]
    fn every_other_token_is_refused_in_stocks_words() {
        let refused = |expected: &str, change: fn(&mut TokenReviewStatus)| {
            let text =
                format!("Failed to validate authentication token, err:lookup failed: {expected}");
            assert_eq!(verdict(change), Err(text));
        };
        refused("token has expired", |status| status.error = Some("token has expired".into()));
        refused("service account jwt not valid", |status| status.authenticated = Some(false));
        refused("service account jwt not valid", |status| *status = TokenReviewStatus::default());
        refused("unexpected username format", |status| status.user = None);
        refused("unexpected username format", |status| status.user = user("admin"));
        refused("unexpected username format", |status| status.user = user("a:b:c:d:e"));
        refused("username returned is not a service account", |status| {
            status.user = user("system:node:kube-system:konnectivity-agent");
        });
        refused("incoming request from \"ns\" namespace. Expected \"kube-system\"", |status| {
            status.user = user("system:serviceaccount:ns:konnectivity-agent");
        });
        refused(
            "incoming request from \"x\" service account. Expected \"konnectivity-agent\"",
            |status| {
                status.user = user("system:serviceaccount:kube-system:x");
            },
        );
    }

    #[test]
    fn a_token_that_is_meant_for_others_is_refused() {
        let meant = format!(
            "Failed to validate authentication token, err:lookup failed: the token is not meant for {AUDIENCE:?}"
        );
        assert_eq!(verdict(|status| status.audiences = None), Err(meant.clone()));
        let other = |status: &mut TokenReviewStatus| status.audiences = Some(vec!["other".into()]);
        assert_eq!(verdict(other), Err(meant));
    }
}
