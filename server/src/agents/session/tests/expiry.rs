//! The expiry of an agent's proof of identity, and its renewal.

use std::sync::atomic::{AtomicUsize, Ordering};

use culvert_process::kubernetes::Timestamp;
use culvert_wire::control::Secret;
use http::StatusCode;
use parking_lot::Mutex;
use serde_json::json;

use super::{
    super::{recheck::REVOKED_AFTER, renewal::*},
    *,
};
use crate::{
    agents::admission::ReviewPace,
    config::ExpireAgents,
    metrics::ServerMetrics,
    testing::{account, client, jwt},
};

/// An agent with a token that expires in this time, and its review.
struct Expiring {
    served: Served,
    control: ControlStream,
    expiry: Duration,
    /// The answers to reviews from now on.
    answer: Arc<Mutex<Result<TokenReviewStatus, StatusCode>>>,
    /// Number of reviews so far.
    reviews: Arc<AtomicUsize>,
}

const LIFE: Duration = Duration::from_secs(600);

/// The token of this name, which expires in this time by the calendar, which does not pause.
fn expiring(name: &str, life: Duration) -> Secret {
    let expiry = Timestamp::now() + life;
    jwt(&json!({ "sub": name, "exp": expiry.as_second() }))
}

impl Expiring {
    async fn join(features: Features, rule: ExpireAgents) -> Self {
        Self::join_as(features, rule, accepted()).await
    }

    async fn join_as(features: Features, rule: ExpireAgents, status: TokenReviewStatus) -> Self {
        Self::join_with(features, rule, status, None, LIFE, ReviewPace::default()).await
    }

    async fn join_with(
        features: Features,
        rule: ExpireAgents,
        status: TokenReviewStatus,
        recheck_interval: Option<Duration>,
        life: Duration,
        pace: ReviewPace,
    ) -> Self {
        let answer = Arc::new(Mutex::new(Ok(status)));
        let (answers, reviews) = (answer.clone(), Arc::<AtomicUsize>::default());
        let count = reviews.clone();
        let client = client(move |_| {
            count.fetch_add(1, Ordering::Relaxed);
            let answer = answers.lock().clone();
            async move { answer }
        });
        let metrics = Arc::new(ServerMetrics::new().unwrap());
        let authenticator = Authenticator::by_token(client, account(), pace, metrics);
        let context = context_with(authenticator);
        let context = AgentContext {
            expire_agents: rule,
            recheck_interval,
            ..Arc::into_inner(context).unwrap()
        };
        let served = Served::new(Arc::new(context)).await;
        let mut control = ControlStream::new(served.tunnel.clone(), served.open().await);
        let token = Some(expiring("first", life));
        let hello = Hello { token, features, ..hello("a", &[]) };
        control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
        control.next().await.unwrap();
        served.context.backends.until(1).await;
        // The token has whole seconds.
        let at = served.context.backends.all()[0].expiry().borrow().unwrap().at;
        let expiry = at - served.arrived;
        assert!(expiry <= life && expiry >= life - Duration::from_secs(2), "{expiry:?}");
        Self { served, control, expiry, answer, reviews }
    }

    async fn renew(&mut self, name: &str, life: Duration) {
        let token = expiring(name, life);
        self.control.send(&ControlMessage::Renewal(Renewal { token })).await.unwrap();
    }

    fn renewals(&self, result: &str) -> f64 {
        let name = format!("culvert_server_proof_renewals_total{{result=\"{result}\"}}");
        metric(&self.served.context.metrics, &self.served.context.backends, &name)
    }

    /// How long after the expiry of the first token the server drains the agent, or closes it if it
    /// has no streams; `None` if it does neither within three hours.
    async fn drained(&mut self) -> Option<Duration> {
        let drained = async {
            let message = self.control.next().await;
            assert!(matches!(message, Ok(ControlMessage::Drain(_)) | Err(_)), "{message:?}");
            self.served.arrived.elapsed() - self.expiry
        };
        timeout(Duration::from_secs(3 * 3600), drained).await.ok()
    }

    /// Asserts that the agent is closed when its streams have had their time.
    async fn assert_closed(&self, after: Duration) {
        let begun = Instant::now();
        assert_eq!(self.served.closed().await, CloseCode::UNAUTHENTICATED);
        assert_eq!(begun.elapsed().as_secs(), after.as_secs());
    }
}

fn is_about(found: Option<Duration>, expected: Duration) -> bool {
    found.is_some_and(|found| found.as_secs().abs_diff(expected.as_secs()) <= 2)
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_renew_its_token_drains_and_is_closed() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    let backend = agent.served.context.backends.all()[0].clone();
    let permit = backend.permit().unwrap();
    let drained = agent.drained().await;
    assert!(is_about(drained, GRACE), "{drained:?}");
    assert!(backend.is_draining());
    agent.assert_closed(Dismissal::Expired.grace()).await;
    drop(permit);
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_without_streams_is_closed_once_it_has_expired() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    assert!(agent.drained().await.is_some());
    agent.assert_closed(Duration::ZERO).await;
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_renews_its_token_stays_until_the_new_one_expires() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    sleep(LIFE / 2).await;
    agent.renew("second", LIFE * 2).await;
    let drained = agent.drained().await;
    assert_eq!(agent.renewals("accepted"), 1.0);
    // The calendar does not pause with the test: the new token counts from its arrival.
    assert!(is_about(drained, LIFE * 3 / 2 + GRACE), "{drained:?}");
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_not_reviewed_extends_the_old_one_for_an_hour() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    *agent.answer.lock() = Err(StatusCode::SERVICE_UNAVAILABLE);
    sleep(LIFE / 2).await;
    agent.renew("second", LIFE * 100).await;
    let drained = agent.drained().await;
    assert!(is_about(drained, EXTENSION), "{drained:?}");
    assert!(agent.renewals("failed") > 100.0, "it is tried again");
    assert_eq!(agent.renewals("accepted"), 0.0);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_waits_behind_others_for_its_review_extends_nothing() {
    let (features, rule, status) = (Features::RENEWAL, ExpireAgents::Renewing, accepted());
    // The first review uses up what may be reviewed.
    let pace = ReviewPace { per_second: 1e-6, burst: 1 };
    let mut agent = Expiring::join_with(features, rule, status, None, LIFE, pace).await;
    sleep(LIFE / 2).await;
    agent.renew("second", LIFE * 100).await;
    let drained = agent.drained().await;
    assert!(is_about(drained, GRACE), "{drained:?}");
    assert!(agent.renewals("failed") > 10.0, "it is tried again");
}

#[tokio::test(start_paused = true)]
async fn a_token_is_reviewed_again_until_kube_apiserver_answers() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    *agent.answer.lock() = Err(StatusCode::SERVICE_UNAVAILABLE);
    agent.renew("second", LIFE * 1000).await;
    sleep(LIFE * 2).await;
    *agent.answer.lock() = Ok(accepted());
    assert_eq!(agent.drained().await, None);
    assert_eq!(agent.renewals("accepted"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn a_refused_token_renews_nothing() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    *agent.answer.lock() = Ok(TokenReviewStatus::default());
    agent.renew("second", LIFE * 1000).await;
    let drained = agent.drained().await;
    assert!(is_about(drained, GRACE), "{drained:?}");
    assert!(agent.renewals("refused") >= 5.0, "it is tried again");
    assert_eq!(agent.renewals("accepted"), 0.0);
}

/// What kube-apiserver answers about a token that it cannot check, or that is not valid.
fn not_accepted() -> TokenReviewStatus {
    TokenReviewStatus {
        error: Some("[invalid bearer token, service account keys are not loaded]".into()),
        ..TokenReviewStatus::default()
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_is_accepted_only_later_renews_the_proof() {
    for status in [not_accepted(), TokenReviewStatus::default()] {
        let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
        *agent.answer.lock() = Ok(status);
        agent.renew("second", LIFE * 1000).await;
        sleep(LIFE - Duration::from_secs(10)).await;
        *agent.answer.lock() = Ok(accepted());
        assert_eq!(agent.drained().await, None);
        assert_eq!(agent.renewals("accepted"), 1.0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_that_can_never_be_accepted_is_not_tried_again() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    let mut other = accepted();
    other.user.as_mut().unwrap().username = Some("system:serviceaccount:kube-system:x".into());
    *agent.answer.lock() = Ok(other);
    agent.renew("second", LIFE * 1000).await;
    let drained = agent.drained().await;
    assert!(is_about(drained, GRACE), "{drained:?}");
    assert_eq!(agent.renewals("refused"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_sends_token_after_token_causes_few_reviews() {
    for status in [accepted(), not_accepted()] {
        let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
        *agent.answer.lock() = Ok(status);
        let before = agent.reviews.load(Ordering::Relaxed);
        for number in 0..400 {
            agent.renew(&number.to_string(), LIFE).await;
            sleep(Duration::from_millis(100)).await;
        }
        sleep(MIN_REVIEW_INTERVAL).await;
        let reviews = agent.reviews.load(Ordering::Relaxed) - before;
        assert!((4..=6).contains(&reviews), "{reviews} reviews in 50 s");
        let counted: f64 = RENEWAL_RESULTS.into_iter().map(|result| agent.renewals(result)).sum();
        assert!(counted >= 400.0, "each token is counted: {counted}");
        assert!(agent.renewals("superseded") >= 394.0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_token_of_another_node_renews_nothing() {
    let on_node = |name: &str| {
        let mut status = accepted();
        let key = "authentication.kubernetes.io/node-name".to_owned();
        status.user.as_mut().unwrap().extra = Some([(key, vec![name.to_owned()])].into());
        status
    };
    let (features, rule) = (Features::RENEWAL, ExpireAgents::Renewing);
    let mut agent = Expiring::join_as(features, rule, on_node("node-1")).await;
    *agent.answer.lock() = Ok(on_node("node-2"));
    agent.renew("second", LIFE * 1000).await;
    let drained = agent.drained().await;
    assert!(is_about(drained, GRACE), "{drained:?}");
    assert_eq!(agent.renewals("refused"), 1.0);
}

#[tokio::test(start_paused = true)]
async fn the_rule_says_which_agents_expire() {
    for (features, rule, ends) in [
        (Features::NONE, ExpireAgents::Renewing, false),
        (Features::NONE, ExpireAgents::All, true),
        (Features::RENEWAL, ExpireAgents::None, false),
    ] {
        let mut agent = Expiring::join(features, rule).await;
        assert_eq!(agent.drained().await.is_some(), ends, "{rule:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_newer_tunnel_of_the_same_process_renews_the_proof_of_the_older_one() {
    let mut agent = Expiring::join(Features::RENEWAL, ExpireAgents::Renewing).await;
    let Pair { agent: tunnel, server, .. } = pair().await;
    let attempt = Attempt::of_stranger(&agent.served.context.unadmitted).await;
    agent.served.context.tasks.spawn(serve(server, None, attempt, agent.served.context.clone()));
    let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await.unwrap());
    let token = Some(expiring("second", LIFE * 1000));
    let hello = Hello { token, features: Features::RENEWAL, ..hello("a", &[]) };
    control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
    control.next().await.unwrap();
    assert_eq!(agent.drained().await, None);
}

impl Expiring {
    /// The same with reviews of the token at this interval.
    async fn join_rechecked(interval: Duration, life: Duration) -> Self {
        let (features, rule, status) = (Features::RENEWAL, ExpireAgents::Renewing, accepted());
        let pace = ReviewPace::default();
        Self::join_with(features, rule, status, Some(interval), life, pace).await
    }
}

const RECHECK: Duration = Duration::from_secs(100);

#[tokio::test(start_paused = true)]
async fn an_agent_whose_service_account_was_deleted_drains_and_is_closed() {
    let mut agent = Expiring::join_rechecked(RECHECK, LIFE * 100).await;
    sleep(RECHECK * 10).await;
    let reviews = agent.reviews.load(Ordering::Relaxed);
    assert!((7..=20).contains(&reviews), "{reviews}");
    *agent.answer.lock() = Ok(not_accepted());
    let begun = Instant::now();
    let permit = agent.served.context.backends.all()[0].permit();
    let message = agent.control.next().await;
    assert!(matches!(message, Ok(ControlMessage::Drain(_))), "{message:?}");
    let took = begun.elapsed();
    assert!(took >= REVOKED_AFTER && took <= RECHECK * 2 + REVOKED_AFTER * 2, "{took:?}");
    agent.assert_closed(Dismissal::Revoked.grace()).await;
    drop(permit);
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_token_is_refused_for_less_than_a_minute_stays() {
    let mut agent = Expiring::join_rechecked(RECHECK, LIFE * 100).await;
    *agent.answer.lock() = Ok(not_accepted());
    let name = "culvert_server_token_rechecks_total{result=\"refused\"}";
    let rechecked = |agent: &Expiring| {
        metric(&agent.served.context.metrics, &agent.served.context.backends, name)
    };
    while rechecked(&agent) == 0.0 {
        sleep(Duration::from_secs(1)).await;
    }
    *agent.answer.lock() = Ok(accepted());
    assert_eq!(agent.drained().await, None);
}

#[tokio::test(start_paused = true)]
async fn agents_stay_while_kube_apiserver_is_away() {
    let mut agent = Expiring::join_rechecked(RECHECK, LIFE * 100).await;
    *agent.answer.lock() = Err(StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(agent.drained().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_token_that_has_expired_is_not_reviewed_again() {
    let mut agent = Expiring::join_rechecked(RECHECK, LIFE).await;
    sleep(LIFE - Duration::from_secs(5)).await;
    let reviews = agent.reviews.load(Ordering::Relaxed);
    *agent.answer.lock() = Ok(not_accepted());
    let drained = agent.drained().await;
    assert!(is_about(drained, GRACE), "{drained:?}");
    assert!(agent.reviews.load(Ordering::Relaxed) <= reviews + 1);
}

#[tokio::test(start_paused = true)]
async fn tokens_that_are_refused_do_not_keep_the_accepted_one_from_its_review() {
    let mut agent = Expiring::join_rechecked(RECHECK, LIFE * 100).await;
    *agent.answer.lock() = Ok(not_accepted());
    let begun = Instant::now();
    let mut number = 0;
    let drained = loop {
        agent.renew(&number.to_string(), LIFE * 100).await;
        number += 1;
        match timeout(Duration::from_secs(1), agent.control.next()).await {
            Ok(message) => break message,
            Err(_) => assert!(begun.elapsed() < RECHECK * 10, "the agent stays"),
        }
    };
    assert!(matches!(drained, Ok(ControlMessage::Drain(_)) | Err(_)), "{drained:?}");
}

#[tokio::test(start_paused = true)]
async fn the_token_by_which_another_tunnel_renewed_the_proof_is_reviewed_too() {
    let mut agent = Expiring::join_rechecked(RECHECK, LIFE).await;
    let Pair { agent: tunnel, server, .. } = pair().await;
    let attempt = Attempt::of_stranger(&agent.served.context.unadmitted).await;
    agent.served.context.tasks.spawn(serve(server, None, attempt, agent.served.context.clone()));
    let mut control = ControlStream::new(tunnel.clone(), tunnel.open().await.unwrap());
    let token = Some(expiring("second", LIFE * 1000));
    let hello = Hello { token, features: Features::RENEWAL, ..hello("a", &[]) };
    control.send(&ControlMessage::Hello(Box::new(hello))).await.unwrap();
    control.next().await.unwrap();
    assert!(timeout(LIFE * 2, agent.control.next()).await.is_err());
    tunnel.close(CloseCode::DONE, "");
    agent.served.context.backends.until(1).await;
    *agent.answer.lock() = Ok(not_accepted());
    let drained = timeout(RECHECK * 10, agent.control.next()).await;
    assert!(drained.is_ok(), "it stays");
}
