//! Agents that authenticate with a service-account token, of Culvert and Konnectivity, and a
//! kube-apiserver that reviews tokens.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use bytes::Bytes;
use culvert_konnectivity::{CONNECT, header};
use culvert_loadtest::{carrier::Serving, frontend::Protocol, process::Process, targets};
use http::Request;
use http_body_util::Empty;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rstest::rstest;
use serde_json::json;
use tokio::time::timeout;

use crate::support::{
    Carrier,
    deployment::{
        Deployment,
        Implementation::{self, Culvert, Konnectivity},
        can_run,
    },
    echo, eventually,
    kube_api::{ACCOUNT, AUDIENCE, KubeApi, jwt},
    proxy::proxy,
    within,
};

/// Maximum number of reviews at a time.
const MAX_REVIEWS: u32 = 64;

/// The token of this name.
fn token(name: &str) -> String {
    jwt(&json!({ "sub": name }))
}

/// A server that demands tokens, and the kube-apiserver that reviews them.
pub(crate) struct Guarded {
    pub(crate) deployment: Deployment,
    pub(crate) api: KubeApi,
}

impl Guarded {
    pub(crate) async fn start(implementation: Implementation) -> Self {
        Self::start_with(implementation, &[]).await
    }

    /// The same with more flags.
    pub(crate) async fn start_with(implementation: Implementation, more: &[&str]) -> Self {
        let mut deployment = Deployment::without_server(Protocol::Connect);
        let api = KubeApi::start(&deployment.certificates).await;
        let flags = api.token_flags();
        let flags = flags.iter().map(String::as_str).chain(more.iter().copied());
        deployment.start_server(implementation, &flags.collect::<Vec<_>>()).await;
        Self { deployment, api }
    }

    /// Has the review of the token of this name succeed.
    fn accept(&self, name: &str, user: &str) {
        self.api.accept(&token(name), user, AUDIENCE);
    }

    /// Starts an agent with the token of this name; the file that it reads the token from.
    pub(crate) async fn start_agent(
        &self,
        implementation: Implementation,
        name: &str,
        token: &str,
    ) -> (Process, PathBuf) {
        self.start_agent_with(implementation, name, &self::token(token)).await
    }

    /// The same with exactly this token.
    pub(crate) async fn start_agent_with(
        &self,
        implementation: Implementation,
        name: &str,
        token: &str,
    ) -> (Process, PathBuf) {
        let file = self.deployment.certificates.folder().join(format!("{name}.token"));
        std::fs::write(&file, token).unwrap();
        let flag = format!("--service-account-token-path={}", file.display());
        let agent = self.deployment.spawn_agent_without_certificate(implementation, name, [flag]);
        (agent.await, file)
    }
}

impl Guarded {
    /// Waits until server and agent have logged this reason for a refusal. An agent of ours is sent
    /// a fixed sentence by a server of ours; a Konnectivity agent sees only that there is no answer.
    async fn until_refused(&self, implementation: Implementation, agent: &Process, reason: &str) {
        let agent_logs = match implementation {
            Culvert => [reason, "see the server's log"],
            Konnectivity => ["expected one server ID in the context, got []"; 2],
        };
        // Both implementations escape quotes.
        let contains = |log: String, text: &str| log.replace('\\', "").contains(text);
        let agent_log = async || agent_logs.iter().any(|text| contains(agent.log(), text));
        eventually("the agent logs it", agent_log).await;
        let server_log = async || contains(self.deployment.server_log(), reason);
        eventually("the server logs it", server_log).await;
        assert_eq!(self.deployment.ready_backends().await, 0.0);
    }
}

/// Runs a test with a server that demands tokens, unless it needs Go and such tests are skipped.
async fn with_guarded(
    agent: Implementation,
    server: Implementation,
    test: impl AsyncFnOnce(Guarded),
) {
    if can_run(&[agent, server]).await {
        within(async { test(Guarded::start(server).await).await }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_reviewed_through_the_proxy_of_the_kubeconfig() {
    within(async {
        let mut deployment = Deployment::without_server(Protocol::Connect);
        let api = KubeApi::start(&deployment.certificates).await;
        let mut proxy = proxy(Ok(api.address())).await;
        api.go_through(proxy.address);
        let flags = api.token_flags();
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        deployment.start_server(Culvert, &flags).await;
        let guarded = Guarded { deployment, api };
        guarded.accept("good", ACCOUNT);
        let _agent = guarded.start_agent(Culvert, "agent", "good").await;
        guarded.deployment.until_joined(1).await;
        assert_eq!(proxy.requests.recv().await.unwrap(), "CONNECT 192.0.2.1:6443 HTTP/1.1");
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_an_accepted_token_serves(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    with_guarded(agent, server, async |guarded| {
        guarded.accept("good", ACCOUNT);
        let _agent = guarded.start_agent(agent, "agent", "good").await;
        guarded.deployment.until_joined(1).await;
        let target = targets::echo().await.unwrap();
        let mut connection = guarded.deployment.dial(target.address()).await.unwrap();
        echo(&mut connection, b"through").await.unwrap();
        let reviews = guarded.api.reviews();
        assert!(!reviews.is_empty());
        for review in reviews {
            assert_eq!(review["token"], token("good"));
            assert_eq!(review["audiences"][0], AUDIENCE);
        }
    })
    .await;
}

#[rstest]
#[case::unknown_token("", "service account jwt not valid")]
#[case::other_namespace(
    "system:serviceaccount:default:konnectivity-agent",
    "incoming request from \"default\" namespace. Expected \"kube-system\""
)]
#[case::other_account(
    "system:serviceaccount:kube-system:default",
    "incoming request from \"default\" service account. Expected \"konnectivity-agent\""
)]
#[case::node("system:node:one", "unexpected username format")]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_with_a_refused_token_logs_why_and_joins_once_it_has_an_accepted_one(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
    #[case] user: &str,
    #[case] reason: &str,
) {
    with_guarded(agent, server, async |guarded| {
        guarded.accept("good", ACCOUNT);
        if !user.is_empty() {
            guarded.accept("bad", user);
        }
        let (process, file) = guarded.start_agent(agent, "agent", "bad").await;
        guarded.until_refused(agent, &process, reason).await;
        std::fs::write(file, token("good")).unwrap();
        guarded.deployment.until_joined(1).await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_once_tokens_can_be_reviewed(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    const REASON: &str = "tokenreviews is forbidden";
    with_guarded(agent, server, async |guarded| {
        guarded.api.refuse(Some(REASON));
        guarded.accept("good", ACCOUNT);
        let (process, _) = guarded.start_agent(agent, "agent", "good").await;
        guarded.until_refused(agent, &process, REASON).await;
        guarded.api.refuse(None);
        guarded.deployment.until_joined(1).await;
    })
    .await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_a_token_logs_that_it_needs_one(
    #[values(Culvert, Konnectivity)] agent: Implementation,
    #[values(Culvert, Konnectivity)] server: Implementation,
) {
    with_guarded(agent, server, async |guarded| {
        let process = guarded.deployment.spawn_agent_without_certificate(agent, "agent", []).await;
        let reason = match server {
            Culvert => "--service-account-token-path",
            Konnectivity => "Authentication context was not found in metadata",
        };
        guarded.until_refused(agent, &process, reason).await;
        assert_eq!(guarded.api.reviews().len(), 0);
    })
    .await;
}

/// A review that takes a second is no failure of QUIC, and its result is used again.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_review_keeps_an_agent_on_quic_and_its_result_is_cached() {
    within(async {
        let guarded = Guarded::start(Culvert).await;
        guarded.accept("good", ACCOUNT);
        guarded.api.delay_answers(Duration::from_secs(1));
        let (agent, _) = guarded.start_agent(Culvert, "agent", "good").await;
        guarded.deployment.until_joined(1).await;
        agent.until_ok("/readyz").await.unwrap();
        let readiness = agent.get("/readyz?verbose").await.unwrap().body;
        assert_eq!(Serving::from_readiness(&readiness).unwrap().carrier, Carrier::Quic);
        let _other = guarded.start_agent(Culvert, "other", "good").await;
        guarded.deployment.until_joined(2).await;
        assert_eq!(guarded.api.reviews().len(), 1);
    })
    .await;
}

/// A token that cannot be a service account's costs kube-apiserver nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_cannot_be_valid_is_refused_without_a_review() {
    within(async {
        let guarded = Guarded::start(Culvert).await;
        let (agent, file) = guarded.start_agent(Culvert, "agent", "bad").await;
        for (token, reason) in [
            ("opaque".to_owned(), "it is no token of a service account"),
            (jwt(&json!({ "exp": 1 })), "the token has expired"),
            (jwt(&json!({ "aud": "other" })), "the token is not meant for"),
        ] {
            std::fs::write(&file, token).unwrap();
            guarded.until_refused(Culvert, &agent, reason).await;
        }
        let reviews = guarded.api.reviews();
        assert!(reviews.iter().all(|review| review["token"] == token("bad")), "{reviews:?}");
    })
    .await;
}

/// A stranger that begins calls and resets them, each with another token; as many on each connection
/// as the server allows.
#[tokio::test(flavor = "multi_thread")]
async fn calls_that_are_reset_cause_no_more_reviews_than_calls_that_wait() {
    const ANSWER_TIME: Duration = Duration::from_secs(4);
    const CONNECTIONS: usize = 100;
    const CALLS: usize = 4;
    within(async {
        let guarded = Guarded::start(Culvert).await;
        guarded.accept("good", ACCOUNT);
        guarded.api.delay_answers(ANSWER_TIME);
        let begun = Instant::now();
        for connection_number in 0..CONNECTIONS {
            let stream = guarded.deployment.connect_as_konnectivity_agent().await;
            let io = TokioIo::new(stream);
            let (mut calls, connection) =
                http2::handshake::<_, _, Empty<Bytes>>(TokioExecutor::new(), io).await.unwrap();
            let _driver = culvert_transport::task::owned(connection);
            for call_number in 0..CALLS {
                let token = token(&format!("{connection_number}-{call_number}"));
                let call = Request::post(format!("https://server{CONNECT}"))
                    .header("content-type", "application/grpc")
                    .header(header::AGENT_ID, "stranger")
                    .header(header::AUTHORIZATION, format!("Bearer {token}"))
                    .body(Empty::new())
                    .unwrap();
                calls.ready().await.unwrap();
                let _ = timeout(Duration::from_millis(2), calls.send_request(call)).await;
            }
        }
        let _agent = guarded.start_agent(Culvert, "agent", "good").await;
        guarded.deployment.until_joined(1).await;
        let rounds = begun.elapsed().as_secs_f64() / ANSWER_TIME.as_secs_f64();
        let reviews = guarded.api.reviews().len();
        println!("{reviews} reviews in {rounds} rounds");
        let reviews = u32::try_from(reviews).unwrap();
        let bound = f64::from(MAX_REVIEWS) * (rounds + 1.0);
        assert!(f64::from(reviews) <= bound, "{reviews} reviews in {rounds} rounds");
        assert!(reviews > 1, "the calls caused none");
    })
    .await;
}
