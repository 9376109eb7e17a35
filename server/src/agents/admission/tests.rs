use std::{collections::HashSet, time::Duration};

use culvert_process::{
    metrics::Metrics,
    reload::{Files, LifeMetrics, ReloadMetrics, Reloads},
};
use http::StatusCode;
use k8s_openapi::api::authentication::v1::{TokenReviewSpec, TokenReviewStatus};
use serde_json::json;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    reviews::{BEGIN_TIMEOUT, MAX_REVIEWS, REVIEW_TIMEOUT},
    verdicts::{ACCEPTED_LIFE, FIRST_REFUSED_LIFE, REFUSED_LIFE},
    *,
};
use crate::testing::{
    REMOTE, accepted, account, authenticator, by_token, certificate, client, jwt, token,
};

const MOMENT: Duration = Duration::from_millis(1);
const NOTHING: Proof<'_> =
    Proof { certificates: None, token: None, remote: REMOTE, is_admitted: false };

/// The proof with this token.
fn by(token: &Secret) -> Proof<'_> {
    Proof { token: Some(token), ..NOTHING }
}

/// Tokens that were sent for review.
type Reviewed = Arc<Mutex<Vec<String>>>;

/// A client that answers each review with this status after this time.
fn scripted(
    status: Result<TokenReviewStatus, StatusCode>,
    after: Duration,
) -> (CurrentClient, Reviewed) {
    let reviewed = Reviewed::default();
    let record = reviewed.clone();
    let client = client(move |spec: TokenReviewSpec| {
        assert_eq!(spec.audiences, Some(vec![account().audience]));
        record.lock().push(spec.token);
        let status = status.clone();
        async move {
            sleep(after).await;
            status
        }
    });
    (client, reviewed)
}

/// An authenticator that answers each review with this status after this time.
fn reviewing(
    status: Result<TokenReviewStatus, StatusCode>,
    after: Duration,
) -> (Arc<Authenticator>, Reviewed) {
    let (client, reviewed) = scripted(status, after);
    (Arc::new(by_token(client)), reviewed)
}

/// The refusal of this token, and how long that took.
async fn refused(authenticator: &Authenticator, token: &Secret) -> (Refusal, Duration) {
    let begun = Instant::now();
    let refusal = authenticator.admit(by(token)).await.unwrap_err();
    (refusal, begun.elapsed())
}

#[tokio::test]
async fn an_agent_whose_certificate_does_not_say_who_it_is_is_refused() {
    // The handshake reads no alternative names of a client.
    let mut params = rcgen::CertificateParams::new([]).unwrap();
    let names = rcgen::CustomExtension::from_oid_content(&[2, 5, 29, 17], b"\x05\x00".to_vec());
    params.custom_extensions.push(names);
    let unreadable = params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().into();
    let admitted = |chain: Vec<_>| async move {
        let proof = Proof { certificates: Some(&chain), ..NOTHING };
        Authenticator::open().admit(proof).await.map(|authenticated| authenticated.identity.clone())
    };
    assert_eq!(admitted(vec![unreadable]).await, Err(Refusal::CertificateUnreadable));
    assert!(admitted(vec![certificate("a", &[])]).await.unwrap().certificate.is_some());
    assert!(admitted(vec![]).await.unwrap().certificate.is_none());
}

#[tokio::test(start_paused = true)]
async fn an_accepted_token_is_reviewed_once_in_a_while() {
    let (authenticator, reviewed) = reviewing(Ok(accepted()), Duration::from_secs(4));
    let token = token("good");
    let admit = async || authenticator.admit(by(&token)).await.unwrap();
    admit().await;
    sleep(ACCEPTED_LIFE - MOMENT).await;
    admit().await;
    assert_eq!(*reviewed.lock(), [token.expose()]);
    sleep(MOMENT).await;
    admit().await;
    assert_eq!(reviewed.lock().len(), 2);
}

/// How often a token is reviewed within this time, when its agent shows it again and again.
async fn reviews_within(time: Duration, status: TokenReviewStatus) -> usize {
    let (authenticator, reviewed) = reviewing(Ok(status), Duration::ZERO);
    let begun = Instant::now();
    while begun.elapsed() < time {
        refused(&authenticator, &token("bad")).await;
        sleep(Duration::from_millis(100)).await;
    }
    reviewed.lock().len()
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_is_reviewed_again_soon_and_then_once_a_minute() {
    let (seconds, refused) = (Duration::from_secs, TokenReviewStatus::default);
    assert_eq!(reviews_within(seconds(2), refused()).await, 1);
    assert_eq!(reviews_within(seconds(60), refused()).await, 5);
    assert_eq!(reviews_within(seconds(3600), refused()).await, 64);
}

#[tokio::test(start_paused = true)]
async fn a_token_of_another_account_is_reviewed_once_a_minute() {
    let mut other = accepted();
    other.user.as_mut().unwrap().username = Some("system:serviceaccount:kube-system:x".into());
    assert_eq!(reviews_within(REFUSED_LIFE, other).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_accepted_a_moment_later_admits_its_agent_within_seconds() {
    let answer = Arc::new(Mutex::new(TokenReviewStatus {
        error: Some("the server is starting".into()),
        ..TokenReviewStatus::default()
    }));
    let answers = answer.clone();
    let authenticator = authenticator(move |_| {
        let answer = answers.lock().clone();
        async move { Ok(answer) }
    });
    let (refusal, _) = refused(&authenticator, &token("early")).await;
    assert!(matches!(refusal, Refusal::Refused(_)), "{refusal:?}");
    *answer.lock() = accepted();
    sleep(FIRST_REFUSED_LIFE).await;
    authenticator.admit(by(&token("early"))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_agent_without_a_token_is_refused_without_a_review() {
    let (authenticator, reviewed) = reviewing(Ok(accepted()), Duration::ZERO);
    assert!(authenticator.needs_tokens());
    assert_eq!(authenticator.admit(NOTHING).await.unwrap_err(), Refusal::NoToken);
    assert_eq!(*reviewed.lock(), [""; 0]);
    assert!(!Authenticator::open().needs_tokens());
    Authenticator::open().admit(NOTHING).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_token_that_cannot_be_valid_is_refused_without_a_review() {
    let (authenticator, reviewed) = reviewing(Ok(accepted()), Duration::ZERO);
    for token in [
        Secret::new("opaque").unwrap(),
        jwt(&json!({ "exp": 1 })),
        jwt(&json!({ "nbf": 1e12 })),
        jwt(&json!({ "aud": ["https://kubernetes.default.svc"] })),
    ] {
        let (refusal, _) = refused(&authenticator, &token).await;
        assert_eq!(refusal.label(), "unauthenticated");
        let text = refusal.konnectivity_message();
        assert!(text.contains("err:lookup failed: "), "{text}");
    }
    assert_eq!(*reviewed.lock(), [""; 0]);
    // As those of Secrets are.
    authenticator.admit(by(&jwt(&json!({})))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_review_that_takes_too_long_is_given_up() {
    let (authenticator, _) = reviewing(Ok(accepted()), REVIEW_TIMEOUT * 2);
    let (refusal, took) = refused(&authenticator, &token("good")).await;
    let text = "kube-apiserver at kubernetes:6443 did not answer within 5s";
    assert_eq!(refusal, Refusal::NotReviewed(text.into()));
    assert_eq!((refusal.label(), took), ("token_not_reviewed", REVIEW_TIMEOUT));
}

#[tokio::test(start_paused = true)]
async fn a_review_that_fails_is_not_a_refusal_of_the_token() {
    let (authenticator, reviewed) = reviewing(Err(StatusCode::FORBIDDEN), Duration::ZERO);
    for _ in 0..2 {
        let (refusal, _) = refused(&authenticator, &token("good")).await;
        assert!(matches!(refusal, Refusal::NotReviewed(_)), "{refusal:?}");
    }
    assert_eq!(reviewed.lock().len(), 2, "it is not remembered");
}

#[tokio::test(start_paused = true)]
async fn more_tokens_than_may_be_reviewed_at_once_wait_for_a_moment() {
    let (authenticator, reviewed) = reviewing(Ok(accepted()), REVIEW_TIMEOUT * 2);
    let mut reviews = JoinSet::new();
    for number in 0..=MAX_REVIEWS {
        let authenticator = authenticator.clone();
        let token = token(&number.to_string());
        reviews.spawn(async move { refused(&authenticator, &token).await });
    }
    let (first, took) = reviews.join_next().await.unwrap().unwrap();
    let reason = "no turn within 3s, others are reviewed";
    assert_eq!(first, Refusal::NoTurn(reason.into()));
    assert_eq!((took, reviewed.lock().len()), (BEGIN_TIMEOUT, MAX_REVIEWS));
    while let Some(review) = reviews.join_next().await {
        assert_eq!(review.unwrap().1, REVIEW_TIMEOUT);
    }
}

#[tokio::test(start_paused = true)]
async fn agents_with_the_same_token_share_its_review() {
    let (authenticator, reviewed) = reviewing(Ok(accepted()), Duration::from_secs(1));
    let mut joins = JoinSet::new();
    for _ in 0..100 {
        let authenticator = authenticator.clone();
        joins.spawn(async move { authenticator.admit(by(&token("good"))).await });
    }
    while let Some(joined) = joins.join_next().await {
        joined.unwrap().unwrap();
    }
    assert_eq!(reviewed.lock().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_review_goes_on_when_its_agent_leaves_and_keeps_its_permit() {
    let life = REVIEW_TIMEOUT - MOMENT;
    let (authenticator, reviewed) = reviewing(Ok(accepted()), life);
    // Each peer leaves at once, again and again.
    for number in 0..1000 {
        let token = token(&number.to_string());
        let left = timeout(MOMENT, authenticator.admit(by(&token))).await;
        left.unwrap_err();
    }
    assert_eq!(reviewed.lock().len(), MAX_REVIEWS);
    let (refusal, _) = refused(&authenticator, &token("honest")).await;
    assert_eq!(refusal.label(), "token_not_reviewed");
    // Those that have left before their turn came are not reviewed.
    sleep(life).await;
    assert_eq!(reviewed.lock().len(), MAX_REVIEWS);
    // The review of the first one was not in vain.
    authenticator.admit(by(&token("0"))).await.unwrap();
    assert_eq!(reviewed.lock().len(), MAX_REVIEWS);
}

#[tokio::test(start_paused = true)]
async fn reviews_keep_their_pace() {
    let (client, reviewed) = scripted(Ok(accepted()), Duration::ZERO);
    let pace = ReviewPace { per_second: 10.0, burst: 5 };
    let metrics = Arc::new(ServerMetrics::new().unwrap());
    let authenticator = Arc::new(Authenticator::by_token(client, account(), pace, metrics));
    let mut joins = JoinSet::new();
    for number in 0..20 {
        let authenticator = authenticator.clone();
        let token = token(&number.to_string());
        joins.spawn(async move { authenticator.admit(by(&token)).await });
    }
    sleep(MOMENT).await;
    assert_eq!(reviewed.lock().len(), 5);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(reviewed.lock().len(), 15);
    while let Some(joined) = joins.join_next().await {
        joined.unwrap().unwrap();
    }
}

/// Answers reviews one by one, as the test permits.
fn one_by_one() -> (Arc<Authenticator>, Reviewed, Arc<Semaphore>) {
    let (reviewed, permits) = (Reviewed::default(), Arc::new(Semaphore::new(0)));
    let (record, answers) = (reviewed.clone(), permits.clone());
    let authenticator = authenticator(move |spec: TokenReviewSpec| {
        record.lock().push(spec.token);
        let answers = answers.clone();
        async move {
            answers.acquire().await.unwrap().forget();
            Ok(accepted())
        }
    });
    (Arc::new(authenticator), reviewed, permits)
}

/// Requests reviews that wait behind those that have begun; until all are known.
async fn request(
    authenticator: &Arc<Authenticator>,
    joins: &mut JoinSet<Result<Authenticated, Refusal>>,
    remote: IpAddr,
    tokens: impl IntoIterator<Item = Secret>,
) {
    for token in tokens {
        let authenticator = authenticator.clone();
        joins.spawn(async move { authenticator.admit(Proof { remote, ..by(&token) }).await });
    }
    sleep(MOMENT).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_with_many_tokens_does_not_delay_those_of_others() {
    let (authenticator, reviewed, permits) = one_by_one();
    let mut joins = JoinSet::new();
    let many = (0..1000).map(|number| token(&number.to_string()));
    request(&authenticator, &mut joins, REMOTE, many).await;
    let other = "10.0.0.2".parse().unwrap();
    request(&authenticator, &mut joins, other, [token("honest")]).await;
    assert_eq!(reviewed.lock().len(), MAX_REVIEWS);
    permits.add_permits(2);
    sleep(MOMENT).await;
    assert!(reviewed.lock()[MAX_REVIEWS..].contains(&token("honest").expose().into()));
}

/// kube-apiserver may have several issuers, so another one's tokens are reviewed too.
#[tokio::test(start_paused = true)]
async fn tokens_of_issuers_that_are_not_known_take_turns_with_all_addresses_together() {
    let (authenticator, reviewed, permits) = one_by_one();
    let mut joins = JoinSet::new();
    permits.add_permits(1);
    let of = |issuer: &str, name: usize| jwt(&json!({ "iss": issuer, "sub": name.to_string() }));
    request(&authenticator, &mut joins, REMOTE, [of("known", 0)]).await;
    joins.join_next().await.unwrap().unwrap().unwrap();
    request(&authenticator, &mut joins, REMOTE, (1..=MAX_REVIEWS).map(|n| of("known", n))).await;
    let begun = reviewed.lock().len();
    for host in 1..=100 {
        let remote = IpAddr::from([10, 0, 0, host]);
        request(&authenticator, &mut joins, remote, [of("other", host.into())]).await;
    }
    let honest: Vec<_> = (1000..1010).map(|n| of("known", n)).collect();
    request(&authenticator, &mut joins, REMOTE, honest.clone()).await;
    permits.add_permits(20);
    sleep(MOMENT).await;
    let next: HashSet<_> = reviewed.lock()[begun..].iter().cloned().collect();
    assert_eq!(next.len(), 20);
    assert!(honest.iter().all(|token| next.contains(token.expose())));
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
        let life = LifeMetrics { expiry: "expiry", lifetime: "lifetime" };
        let names = ReloadMetrics {
            reloads: "reloads",
            failing: "failing",
            certificate: life,
            token: life,
        };
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
        let authenticator = by_token(client.with_files(reloads.clone()));
        let _keep = culvert_transport::task::owned(async move { reloads.keep().await });
        std::fs::write(&file, "new").unwrap();
        refused(&authenticator, &token("good")).await;
        let refused_at = Instant::now();
        contents.replaced().await;
        assert!(refused_at.elapsed() <= Duration::from_secs(1), "{:?}", refused_at.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn the_identity_has_each_proof_that_was_shown() {
    let chain = [certificate("agent", &[]), certificate("ca", &[])];
    let shown = Proof { certificates: Some(&chain), ..NOTHING };
    let identity = |authenticated: Authenticated| authenticated.identity().to_string();
    let open = Authenticator::open();
    assert_eq!(identity(open.admit(NOTHING).await.unwrap()), "anonymous");
    let by_certificate = open.admit(shown).await.unwrap();
    assert_eq!(identity(by_certificate), "certificate \"CN=agent\"");
    let (authenticator, _) = reviewing(Ok(accepted()), Duration::ZERO);
    let token = token("good");
    let both = authenticator.admit(Proof { token: Some(&token), ..shown }).await.unwrap();
    let account = "service account kube-system/konnectivity-agent";
    assert_eq!(identity(both), format!("{account}, certificate \"CN=agent\""));
}
