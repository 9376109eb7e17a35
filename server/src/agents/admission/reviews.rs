//! Reviews of tokens by kube-apiserver: one task that begins them, owns them and remembers them.
//!
//! A review that has begun goes on to its end, whether or not an agent still waits for it. So what
//! a peer can make this server ask is limited by the answers of kube-apiserver, however often the
//! peer connects and leaves. Agents that present the same token share one review.

use std::{
    collections::{HashMap, VecDeque},
    future,
    sync::Arc,
    time::Duration,
};

use culvert_process::{
    kubernetes::{self, CurrentClient},
    supervision::propagate_panic,
};
use culvert_wire::control::Secret;
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::{Api, api::PostParams};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use super::{
    Refusal, ReviewPace,
    queue::{FairQueue, Pace, Turn},
    status::check_status,
    token::{Claims, TokenDigest},
    verdicts::{Verdict, Verdicts},
};
use crate::{config::TokenConfig, metrics::ServerMetrics};

/// Maximum number of reviews in progress. After a restart of everything thousands of tokens are to
/// be reviewed, and kube-apiserver has other work.
pub(super) const MAX_REVIEWS: usize = 64;
/// Time to wait for a review to begin. Together with the review itself it is shorter than the time
/// that an agent has to join, so an agent that is refused for it sees the reason and tries again.
pub(super) const BEGIN_TIMEOUT: Duration = Duration::from_secs(3);
/// Time for kube-apiserver to review a token.
pub(super) const REVIEW_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of tokens that wait for their review.
const MAX_WAITING: usize = 4096;
/// Maximum number of issuers that are known. kube-apiserver has one, or a few while they change.
const MAX_ISSUERS: usize = 8;

/// A request for a review.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) digest: TokenDigest,
    pub(super) token: Secret,
    pub(super) claims: Claims,
    /// Whose turn it is, if the issuer of the token is known.
    pub(super) turn: Turn,
    /// Whether refusals that are remembered do not count.
    pub(super) is_admitted: bool,
    /// For the verdict; closed when the agent has left.
    pub(super) answer: oneshot::Sender<Verdict>,
}

/// A token that waits for its review.
#[derive(Debug)]
struct Waiting {
    token: Secret,
    claims: Claims,
    turn: Turn,
    deadline: Instant,
    answers: Vec<oneshot::Sender<Verdict>>,
}

/// The outcome of a review.
type Reviewed = (TokenDigest, Claims, Result<TokenReviewStatus, Refusal>);

/// The task's state.
pub(super) struct Reviews {
    client: CurrentClient,
    expected: TokenConfig,
    pace: Pace,
    metrics: Arc<ServerMetrics>,
    verdicts: Verdicts,
    /// Issuers of the tokens that were accepted.
    issuers: Vec<String>,
    waiting: HashMap<TokenDigest, Waiting>,
    /// The order in which they are reviewed.
    queue: FairQueue<Turn, TokenDigest>,
    /// When they are refused for want of a turn, the earliest first. Those that left are skipped.
    deadlines: VecDeque<(Instant, TokenDigest)>,
    /// Agents that wait for the end of a review, by token.
    begun: HashMap<TokenDigest, Vec<oneshot::Sender<Verdict>>>,
    tasks: JoinSet<Reviewed>,
}

impl Reviews {
    pub(super) fn new(
        client: CurrentClient,
        expected: TokenConfig,
        pace: ReviewPace,
        metrics: Arc<ServerMetrics>,
    ) -> Self {
        Self {
            client,
            expected,
            pace: Pace::new(pace.per_second, pace.burst, Instant::now()),
            metrics,
            verdicts: Verdicts::default(),
            issuers: Vec::new(),
            waiting: HashMap::new(),
            queue: FairQueue::new(MAX_WAITING),
            deadlines: VecDeque::new(),
            begun: HashMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Reviews what is requested, until no one can request more.
    ///
    /// # Panics
    /// With the panic of a review.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            let next_turn = self.begin_those_that_may();
            let next_deadline = self.deadlines.front().map(|(at, _)| *at);
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.enter(request),
                    None => return,
                },
                Some(ended) = self.tasks.join_next() => match ended {
                    Ok(reviewed) => self.conclude(reviewed),
                    Err(error) => propagate_panic(Err(error)),
                },
                () = until(next_turn) => {}
                () = until(next_deadline) => self.refuse_overdue(Instant::now()),
            }
        }
    }

    fn enter(&mut self, request: Request) {
        let Request { digest, token, claims, turn, is_admitted, answer } = request;
        let now = Instant::now();
        let verdict = self.verdicts.get(&digest, now);
        if let Some(verdict) = verdict.filter(|verdict| verdict.is_ok() || !is_admitted) {
            let _ = answer.send(verdict);
        } else if let Some(answers) = self.begun.get_mut(&digest) {
            add(answers, answer);
        } else if let Some(waiting) = self.waiting.get_mut(&digest) {
            add(&mut waiting.answers, answer);
        } else {
            let is_known = self.knows_issuer_of(&claims);
            let turn = if is_known { turn } else { Turn::OtherIssuer };
            let deadline = now + BEGIN_TIMEOUT;
            let waiting = Waiting { token, claims, turn, deadline, answers: vec![answer] };
            self.waiting.insert(digest, waiting);
            self.add_deadline(deadline, digest);
            if let Some(dropped) = self.queue.push(turn, digest) {
                self.refuse(&dropped);
            }
        }
    }

    fn add_deadline(&mut self, deadline: Instant, digest: TokenDigest) {
        if self.deadlines.len() >= 2 * MAX_WAITING {
            let waiting = &self.waiting;
            self.deadlines.retain(|(at, digest)| is_due(waiting, digest, *at));
        }
        self.deadlines.push_back((deadline, digest));
    }

    /// Whether the token may be of kube-apiserver's issuer. kube-apiserver may have another issuer
    /// from now on, so a token of one that is not known is reviewed as well, in its turn.
    fn knows_issuer_of(&self, claims: &Claims) -> bool {
        let is_known = |issuer: &str| self.issuers.iter().any(|known| known == issuer);
        self.issuers.is_empty() || claims.issuer().is_some_and(is_known)
    }

    /// Begins as many reviews as permits and pace allow. Returns when there is the next turn, if
    /// it is time that is to be waited for.
    fn begin_those_that_may(&mut self) -> Option<Instant> {
        while self.tasks.len() < MAX_REVIEWS && !self.queue.is_empty() {
            let now = Instant::now();
            let wait = self.pace.wait(now);
            if !wait.is_zero() {
                return Some(now + wait);
            }
            let digest = self.queue.pop()?;
            let Some(waiting) = self.waiting.remove(&digest) else { continue };
            // Every agent that presented the token may have left meanwhile.
            if waiting.answers.iter().all(oneshot::Sender::is_closed) {
                continue;
            }
            self.pace.take(now);
            self.begun.insert(digest, waiting.answers);
            let (client, audience) = (self.client.clone(), self.expected.audience.clone());
            self.tasks.spawn(async move {
                let status = review(&client, waiting.token, audience).await;
                (digest, waiting.claims, status)
            });
        }
        None
    }

    fn conclude(&mut self, (digest, claims, status): Reviewed) {
        let verdict = status.and_then(|status| check_status(status, &claims, &self.expected));
        self.metrics.token_reviewed(match &verdict {
            Ok(_) => "accepted",
            Err(Refusal::NotReviewed(_)) => "failed",
            Err(_) => "refused",
        });
        if verdict.is_ok()
            && let Some(issuer) = claims.issuer()
            && !self.issuers.iter().any(|known| known == issuer)
            && self.issuers.len() < MAX_ISSUERS
        {
            self.issuers.push(issuer.into());
        }
        self.verdicts.insert(digest, &verdict, Instant::now());
        for answer in self.begun.remove(&digest).unwrap_or_default() {
            let _ = answer.send(verdict.clone());
        }
    }

    fn refuse_overdue(&mut self, now: Instant) {
        while let Some((at, digest)) = self.deadlines.pop_front_if(|(at, _)| *at <= now) {
            if is_due(&self.waiting, &digest, at) {
                // The oldest of its source, for all wait equally long.
                self.queue.pop_from(self.waiting[&digest].turn);
                self.refuse(&digest);
            }
        }
    }

    fn refuse(&mut self, digest: &TokenDigest) {
        let reason = format!("no turn within {BEGIN_TIMEOUT:?}, others are reviewed");
        let answers = self.waiting.remove(digest).map(|waiting| waiting.answers);
        for answer in answers.unwrap_or_default() {
            let _ = answer.send(Err(Refusal::NoTurn(reason.clone())));
        }
    }
}

/// Whether the token still waits for its turn until then.
fn is_due(
    waiting: &HashMap<TokenDigest, Waiting>,
    digest: &TokenDigest,
    deadline: Instant,
) -> bool {
    waiting.get(digest).is_some_and(|waiting| waiting.deadline == deadline)
}

/// Adds an agent to those that wait, without those that have left.
fn add(answers: &mut Vec<oneshot::Sender<Verdict>>, answer: oneshot::Sender<Verdict>) {
    if answers.len() == answers.capacity() {
        answers.retain(|answer| !answer.is_closed());
    }
    answers.push(answer);
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => future::pending().await,
    }
}

async fn review(
    client: &CurrentClient,
    token: Secret,
    audience: String,
) -> Result<TokenReviewStatus, Refusal> {
    let review = TokenReview {
        spec: TokenReviewSpec { token: token.expose().into(), audiences: Some(vec![audience]) },
        ..TokenReview::default()
    };
    let (params, api) = (PostParams::default(), Api::all(client.get()));
    let failure = match timeout(REVIEW_TIMEOUT, api.create(&params, &review)).await {
        Ok(Ok(review)) => return Ok(review.status.unwrap_or_default()),
        Ok(Err(error)) => kubernetes::reason(&error),
        Err(_) => client.no_answer_within(REVIEW_TIMEOUT),
    };
    client.failed();
    Err(Refusal::NotReviewed(failure))
}
