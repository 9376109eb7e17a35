//! Whether an agent is who it says: its token, where one is asked for, reviewed by kube-apiserver.
//!
//! The rules are Konnectivity's (`pkg/server/server.go`, `validateAuthToken`): kube-apiserver must vouch for
//! the token and for the audience, and it must be that of one service account. Certificates are
//! checked before, by the handshake. A token is reviewed when its agent joins; one that expires
//! later ends nothing.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use culvert_process::kubernetes::{self, ClientError, KubernetesConfig};
use culvert_wire::control::Secret;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, api::PostParams};
use tokio::{sync::Semaphore, time::timeout};
use tracing::warn;

use crate::config::TokenConfig;

/// Reviews in progress at once: a restart of everything asks about thousands of tokens, and
/// kube-apiserver has other things to do.
const MAX_REVIEWS: usize = 64;
/// Time to wait for a place among them. An agent waits for its welcome no longer than 10 s, this and the
/// review itself included; and one that comes again later is better than a review that nobody waits for.
const PLACE_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for kube-apiserver to review a token.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a good verdict is remembered. An agent that looks for a missing server meets those that it
/// has many times in a few seconds.
const VERDICT_LIFE: Duration = Duration::from_secs(10);
/// TokenCache that are remembered at most.
const MAX_CACHED_TOKENS: usize = 16 * 1024;
/// How often the client may be made anew because of failures.
const RENEW_INTERVAL: Duration = Duration::from_secs(60);

/// Checks the agents of one server.
#[derive(Debug)]
pub(crate) struct Authenticator(Option<Reviewer>);

/// An agent passed the authenticator that its server has. Nobody else can make one.
#[derive(Debug)]
pub(crate) struct Authenticated(());

/// Why an agent was not authenticated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It sent no token.
    #[error("no token, and this server asks for one: see the agent's --service-account-token-path")]
    NoToken,
    /// What it sent is no token; the words are Konnectivity's.
    #[error("{0}")]
    NotAToken(String),
    /// kube-apiserver did not say whether the token is good.
    #[error("the token could not be reviewed: {0}")]
    NotReviewed(String),
    /// The token is not good, or not the one that is asked for.
    #[error("the token was refused: {0}")]
    Refused(String),
}

impl Refusal {
    /// The agent's time to join was over before the review was.
    pub(super) fn too_late() -> Self {
        Self::NotReviewed("the agent's time to join was over".into())
    }

    /// A short word for metric labels.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::NoToken | Self::NotAToken(_) | Self::Refused(_) => "unauthenticated",
            Self::NotReviewed(_) => "token_not_reviewed",
        }
    }

    /// What a Konnectivity server answers in this case.
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
    /// Asks for no token: certificates are all there is, or nothing at all.
    pub(crate) fn open() -> Self {
        Self(None)
    }

    /// Asks for a token like this, and kube-apiserver whether it is good.
    ///
    /// # Errors
    /// When kube-apiserver cannot be asked.
    pub(crate) fn by_token(
        kubernetes: &KubernetesConfig,
        expected: TokenConfig,
    ) -> Result<Self, ClientError> {
        let api = Api::all(kubernetes.client()?);
        Ok(Self(Some(Reviewer {
            kubernetes: kubernetes.clone(),
            api: Mutex::new((api, Instant::now())),
            expected,
            places: Semaphore::new(MAX_REVIEWS),
            verdicts: Mutex::default(),
        })))
    }

    /// Whether agents need a token.
    pub(crate) fn asks_for_tokens(&self) -> bool {
        self.0.is_some()
    }

    /// Admits the agent with this token.
    ///
    /// # Errors
    /// When it is refused, or kube-apiserver does not answer within 8 s, the wait for a place included.
    ///
    /// # Cancel safety
    /// Cancel safe: it only asks.
    pub(crate) async fn admit(&self, token: Option<&Secret>) -> Result<Authenticated, Refusal> {
        if let Some(reviewer) = &self.0 {
            reviewer.check(token.ok_or(Refusal::NoToken)?).await?;
        }
        Ok(Authenticated(()))
    }
}

#[derive(Debug)]
struct Reviewer {
    kubernetes: KubernetesConfig,
    /// The client, and when it was made.
    api: Mutex<(Api<TokenReview>, Instant)>,
    expected: TokenConfig,
    places: Semaphore,
    verdicts: Mutex<TokenCache>,
}

impl Reviewer {
    async fn check(&self, token: &Secret) -> Result<(), Refusal> {
        let name = name(token);
        if lock(&self.verdicts).is_good(&name, Instant::now()) {
            return Ok(());
        }
        let Ok(Ok(place)) = timeout(PLACE_TIMEOUT, self.places.acquire()).await else {
            let reason = format!("{MAX_REVIEWS} others are under way");
            return Err(Refusal::NotReviewed(reason));
        };
        let status = self.review(token).await?;
        drop(place);
        judge(status, &self.expected)?;
        lock(&self.verdicts).note_good(name, Instant::now());
        Ok(())
    }

    async fn review(&self, token: &Secret) -> Result<TokenReviewStatus, Refusal> {
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: token.expose().into(),
                audiences: Some(vec![self.expected.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let (params, api) = (PostParams::default(), lock(&self.api).0.clone());
        match timeout(REVIEW_TIMEOUT, api.create(&params, &review)).await {
            Ok(Ok(review)) => Ok(review.status.unwrap_or_default()),
            Ok(Err(error)) => {
                self.renew(Instant::now());
                Err(Refusal::NotReviewed(kubernetes::reason(&error)))
            }
            Err(_) => Err(Refusal::NotReviewed(format!("no answer within {REVIEW_TIMEOUT:?}"))),
        }
    }

    /// Reads the kubeconfig again, because a certificate in it may have been replaced.
    fn renew(&self, now: Instant) {
        let mut api = lock(&self.api);
        if now.saturating_duration_since(api.1) < RENEW_INTERVAL {
            return;
        }
        api.1 = now;
        match self.kubernetes.client() {
            Ok(client) => api.0 = Api::all(client),
            Err(error) => warn!(%error, "the kubeconfig cannot be read again"),
        }
    }
}

/// What a token is remembered by.
type TokenName = [u8; SHA256_OUTPUT_LEN];

fn name(token: &Secret) -> TokenName {
    let mut name = [0; SHA256_OUTPUT_LEN];
    name.copy_from_slice(digest(&SHA256, token.expose().as_bytes()).as_ref());
    name
}

/// Tokens that were found good a moment ago, and until when that holds.
#[derive(Debug, Default)]
struct TokenCache(HashMap<TokenName, Instant>);

impl TokenCache {
    fn is_good(&self, name: &TokenName, now: Instant) -> bool {
        self.0.get(name).is_some_and(|until| *until > now)
    }

    fn note_good(&mut self, name: TokenName, now: Instant) {
        if self.0.len() >= MAX_CACHED_TOKENS {
            self.0.retain(|_, until| *until > now);
        }
        if self.0.len() < MAX_CACHED_TOKENS {
            self.0.insert(name, now + VERDICT_LIFE);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is complete before it could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        judge(status, &expected).map_err(|refusal| refusal.konnectivity_message())
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
    fn every_other_token_is_refused_konnectivity_message() {
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

    #[test]
    fn good_verdicts_are_remembered_for_a_moment_and_never_too_many() {
        let (mut verdicts, now) = (TokenCache::default(), Instant::now());
        let token = |text: &str| name(&Secret::new(text).unwrap());
        verdicts.note_good(token("good"), now);
        assert!(verdicts.is_good(&token("good"), now));
        assert!(!verdicts.is_good(&token("other"), now));
        assert!(!verdicts.is_good(&token("good"), now + VERDICT_LIFE));
        for number in 0..2 * MAX_CACHED_TOKENS {
            verdicts.note_good(token(&number.to_string()), now);
        }
        assert_eq!(verdicts.0.len(), MAX_CACHED_TOKENS);
        verdicts.note_good(token("later"), now + VERDICT_LIFE);
        assert_eq!(verdicts.0.len(), 1, "what is over makes room");
    }
}
