//! Authentication of agents by their tokens, which kube-apiserver reviews.
//!
//! The rules are Konnectivity's (`pkg/server/server.go`, `validateAuthToken`): kube-apiserver must
//! accept the token for the audience, and it must belong to one service account. Certificates were
//! checked before, by the handshake. A token is reviewed when its agent joins; that it expires
//! later has no effect.

use std::{collections::HashMap, time::Duration};

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use culvert_process::kubernetes::{self, CurrentClient};
use culvert_wire::control::Secret;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, api::PostParams};
use parking_lot::Mutex;
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout},
};

use crate::config::TokenConfig;

/// Maximum number of reviews in progress. After a restart of everything thousands of tokens are to
/// be reviewed, and kube-apiserver has other work.
const MAX_REVIEWS: usize = 64;
/// Time to wait for a permit to review. Together with the review itself it is shorter than the time
/// that an agent has to join, so an agent that is refused for it sees the reason and tries again.
const PERMIT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for kube-apiserver to review a token.
const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for which a token that was accepted is not reviewed again. An agent that looks for a
/// missing server connects to those that it has many times within a few seconds.
const CACHE_LIFE: Duration = Duration::from_secs(10);
/// Maximum number of tokens that are remembered as accepted.
const MAX_CACHED_TOKENS: usize = 16 * 1024;

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

    /// Admits agents with a token of this account, which kube-apiserver reviews.
    pub(crate) fn by_token(client: CurrentClient, expected: TokenConfig) -> Self {
        Self(Some(Reviewer {
            client,
            expected,
            permits: Semaphore::new(MAX_REVIEWS),
            accepted: Mutex::default(),
        }))
    }

    /// Whether agents need a token.
    pub(super) fn needs_tokens(&self) -> bool {
        self.0.is_some()
    }

    /// Admits the agent with this token.
    ///
    /// # Errors
    /// When the token is refused, or not reviewed within 8 s.
    ///
    /// # Cancel safety
    /// Cancel safe: the review is abandoned.
    pub(crate) async fn admit(&self, token: Option<&Secret>) -> Result<Authenticated, Refusal> {
        if let Some(reviewer) = &self.0 {
            reviewer.check(token.ok_or(Refusal::NoToken)?).await?;
        }
        Ok(Authenticated(()))
    }
}

#[derive(Debug)]
struct Reviewer {
    client: CurrentClient,
    expected: TokenConfig,
    permits: Semaphore,
    accepted: Mutex<TokenCache>,
}

impl Reviewer {
    async fn check(&self, token: &Secret) -> Result<(), Refusal> {
        let digest = token_digest(token);
        if self.accepted.lock().contains(&digest, Instant::now()) {
            return Ok(());
        }
        let Ok(Ok(permit)) = timeout(PERMIT_TIMEOUT, self.permits.acquire()).await else {
            let reason = format!("{MAX_REVIEWS} others are under way");
            return Err(Refusal::NotReviewed(reason));
        };
        let status = self.review(token).await?;
        drop(permit);
        check_status(status, &self.expected)?;
        self.accepted.lock().insert(digest, Instant::now());
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
        let (params, api) = (PostParams::default(), Api::all(self.client.get()));
        let failure = match timeout(REVIEW_TIMEOUT, api.create(&params, &review)).await {
            Ok(Ok(review)) => return Ok(review.status.unwrap_or_default()),
            Ok(Err(error)) => kubernetes::reason(&error),
            Err(_) => format!("no answer within {REVIEW_TIMEOUT:?}"),
        };
        self.client.failed();
        Err(Refusal::NotReviewed(failure))
    }
}

/// SHA-256 of a token, so that tokens themselves are not kept.
type TokenDigest = [u8; SHA256_OUTPUT_LEN];

fn token_digest(token: &Secret) -> TokenDigest {
    let mut bytes = [0; SHA256_OUTPUT_LEN];
    bytes.copy_from_slice(digest(&SHA256, token.expose().as_bytes()).as_ref());
    bytes
}

/// Tokens that were accepted recently, and until when that holds.
#[derive(Debug, Default)]
struct TokenCache(HashMap<TokenDigest, Instant>);

impl TokenCache {
    fn contains(&self, token: &TokenDigest, now: Instant) -> bool {
        self.0.get(token).is_some_and(|until| *until > now)
    }

    fn insert(&mut self, token: TokenDigest, now: Instant) {
        if self.0.len() >= MAX_CACHED_TOKENS {
            self.0.retain(|_, until| *until > now);
        }
        if self.0.len() < MAX_CACHED_TOKENS {
            self.0.insert(token, now + CACHE_LIFE);
        }
    }
}

/// Checks that kube-apiserver accepts the token, and that it belongs to the expected account.
fn check_status(status: TokenReviewStatus, expected: &TokenConfig) -> Result<(), Refusal> {
    let refused = |reason: String| Err(Refusal::Refused(reason));
    if let Some(error) = status.error.filter(|error| !error.is_empty()) {
        return refused(error);
    }
    if status.authenticated != Some(true) {
        return refused("service account jwt not valid".into());
    }
    // A kube-apiserver without audiences returns none, and has checked its own alone.
    let for_audience =
        status.audiences.is_some_and(|audiences| audiences.contains(&expected.audience));
    if !for_audience {
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
    use std::sync::Arc;

    use culvert_process::{
        metrics::Metrics,
        reload::{Files, ReloadMetrics, Reloads},
    };
    use http::StatusCode;
    use k8s_openapi::api::authentication::v1::UserInfo;
    use tokio::{task::JoinSet, time::sleep};

    use super::*;
    use crate::testing::{accepted, account, authenticator, client};

    const AUDIENCE: &str = "system:konnectivity-server";

    /// Tokens that were sent for review.
    type Reviewed = Arc<Mutex<Vec<String>>>;

    /// An authenticator that answers each review with this status after this time.
    fn reviewing(
        status: Result<TokenReviewStatus, StatusCode>,
        after: Duration,
    ) -> (Authenticator, Reviewed) {
        let reviewed = Reviewed::default();
        let record = reviewed.clone();
        let authenticator = authenticator(move |spec: TokenReviewSpec| {
            assert_eq!(spec.audiences, Some(vec![AUDIENCE.into()]));
            record.lock().push(spec.token);
            let status = status.clone();
            async move {
                sleep(after).await;
                status
            }
        });
        (authenticator, reviewed)
    }

    /// The refusal of this token, and how long that took.
    async fn refused(authenticator: &Authenticator, token: &str) -> (Refusal, Duration) {
        let begun = Instant::now();
        let refusal = authenticator.admit(Some(&Secret::new(token).unwrap())).await.unwrap_err();
        (refusal, begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn an_accepted_token_is_reviewed_once_in_a_while() {
        let (authenticator, reviewed) = reviewing(Ok(accepted()), Duration::from_secs(4));
        let token = Secret::new("good").unwrap();
        let admit = async || authenticator.admit(Some(&token)).await.unwrap();
        admit().await;
        sleep(CACHE_LIFE - Duration::from_millis(1)).await;
        admit().await;
        assert_eq!(*reviewed.lock(), ["good"]);
        sleep(Duration::from_millis(1)).await;
        admit().await;
        assert_eq!(*reviewed.lock(), ["good", "good"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_token_is_reviewed_each_time() {
        let (authenticator, reviewed) = reviewing(Ok(TokenReviewStatus::default()), Duration::ZERO);
        for _ in 0..2 {
            let (refusal, _) = refused(&authenticator, "bad").await;
            assert!(matches!(refusal, Refusal::Refused(_)), "{refusal:?}");
            assert_eq!(refusal.label(), "unauthenticated");
        }
        assert_eq!(*reviewed.lock(), ["bad", "bad"]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_agent_without_a_token_is_refused_without_a_review() {
        let (authenticator, reviewed) = reviewing(Ok(accepted()), Duration::ZERO);
        assert!(authenticator.needs_tokens());
        assert_eq!(authenticator.admit(None).await.unwrap_err(), Refusal::NoToken);
        assert_eq!(*reviewed.lock(), [""; 0]);
        assert!(!Authenticator::open().needs_tokens());
        Authenticator::open().admit(None).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_review_that_takes_too_long_is_given_up() {
        let (authenticator, _) = reviewing(Ok(accepted()), REVIEW_TIMEOUT * 2);
        let (refusal, took) = refused(&authenticator, "good").await;
        assert_eq!(refusal, Refusal::NotReviewed("no answer within 5s".into()));
        assert_eq!((refusal.label(), took), ("token_not_reviewed", REVIEW_TIMEOUT));
    }

    #[tokio::test(start_paused = true)]
    async fn a_review_that_fails_is_not_a_refusal_of_the_token() {
        let (authenticator, _) = reviewing(Err(StatusCode::FORBIDDEN), Duration::ZERO);
        let (refusal, _) = refused(&authenticator, "good").await;
        assert!(matches!(refusal, Refusal::NotReviewed(_)), "{refusal:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn more_tokens_than_may_be_reviewed_at_once_wait_for_a_moment() {
        let (authenticator, reviewed) = reviewing(Ok(accepted()), REVIEW_TIMEOUT * 2);
        let authenticator = Arc::new(authenticator);
        let mut reviews = JoinSet::new();
        for number in 0..=MAX_REVIEWS {
            let authenticator = authenticator.clone();
            reviews.spawn(async move { refused(&authenticator, &number.to_string()).await });
        }
        let (first, took) = reviews.join_next().await.unwrap().unwrap();
        assert_eq!(first, Refusal::NotReviewed("64 others are under way".into()));
        assert_eq!((took, reviewed.lock().len()), (PERMIT_TIMEOUT, MAX_REVIEWS));
        while let Some(review) = reviews.join_next().await {
            assert_eq!(review.unwrap().1, REVIEW_TIMEOUT);
        }
    }

    /// The files are looked at within a second after a failure, and otherwise ten seconds after the
    /// last look.
    #[tokio::test(start_paused = true)]
    async fn the_files_are_looked_at_after_a_review_that_failed_or_was_not_answered() {
        for (answer, after) in [
            (Err(StatusCode::UNAUTHORIZED), Duration::ZERO),
            (Ok(accepted()), REVIEW_TIMEOUT + Duration::from_secs(1)),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("kubeconfig");
            std::fs::write(&file, "old").unwrap();
            let names = ReloadMetrics { reloads: "reloads", expiry: "expiry" };
            let reloads = Reloads::new(&Metrics::new("1", &[]).unwrap(), names);
            let watched = file.clone();
            let mut contents =
                reloads.add(&file, move |files: &mut Files| files.read(&watched)).unwrap();
            let client = client(move |_| {
                let answer = answer.clone();
                async move {
                    sleep(after).await;
                    answer
                }
            });
            let authenticator =
                Authenticator::by_token(client.with_files(reloads.clone()), account());
            let _keep = culvert_transport::task::owned(async move { reloads.keep().await });
            std::fs::write(&file, "new").unwrap();
            refused(&authenticator, "good").await;
            let refused_at = Instant::now();
            contents.replaced().await;
            assert!(refused_at.elapsed() <= Duration::from_secs(1), "{:?}", refused_at.elapsed());
        }
    }

    fn checked(change: impl FnOnce(&mut TokenReviewStatus)) -> Result<(), String> {
        let mut status = accepted();
        change(&mut status);
        check_status(status, &account()).map_err(|refusal| refusal.konnectivity_message())
    }

    fn user(name: &str) -> Option<UserInfo> {
        Some(UserInfo { username: Some(name.into()), ..UserInfo::default() })
    }

    #[test]
    fn a_token_of_the_expected_account_is_accepted() {
        assert_eq!(checked(|_| {}), Ok(()));
        assert_eq!(checked(|status| status.error = Some(String::new())), Ok(()));
    }

    #[test]
    fn every_other_token_is_refused_in_konnectivitys_words() {
        let refused = |expected: &str, change: fn(&mut TokenReviewStatus)| {
            let text =
                format!("Failed to validate authentication token, err:lookup failed: {expected}");
            assert_eq!(checked(change), Err(text));
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
    fn a_token_for_another_audience_is_refused() {
        let meant = format!(
            "Failed to validate authentication token, err:lookup failed: \
             the token is not meant for {AUDIENCE:?}"
        );
        assert_eq!(checked(|status| status.audiences = None), Err(meant.clone()));
        let other = |status: &mut TokenReviewStatus| status.audiences = Some(vec!["other".into()]);
        assert_eq!(checked(other), Err(meant));
    }

    #[test]
    fn accepted_tokens_are_remembered_for_a_moment_and_never_too_many() {
        let (mut accepted, now) = (TokenCache::default(), Instant::now());
        let token = |text: &str| token_digest(&Secret::new(text).unwrap());
        accepted.insert(token("good"), now);
        assert!(accepted.contains(&token("good"), now));
        assert!(!accepted.contains(&token("other"), now));
        assert!(!accepted.contains(&token("good"), now + CACHE_LIFE));
        for number in 0..MAX_CACHED_TOKENS + 10 {
            accepted.insert(token(&number.to_string()), now);
        }
        assert_eq!(accepted.0.len(), 16_384);
        accepted.insert(token("later"), now + CACHE_LIFE);
        assert_eq!(accepted.0.len(), 1, "expired ones make room");
    }
}
