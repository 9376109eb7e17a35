//! Agents for tests: tunnels within this process, so that tests work in paused time.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};

use culvert_process::kubernetes::CurrentClient;
use culvert_transport::{
    Carrier, RecvHalf, SendHalf, Settings, Tunnel, budget::MemoryBudget, qmux::Peer,
    test_util::Pair,
};
use culvert_wire::{
    AgentId, InstanceId, Target,
    bounded::Text,
    control::{Hello, Secret},
    dial::{DialFailure, DialReply, DialRequest, DialTiming},
    extension::Extensions,
    frame::{self, Message},
    identifiers::{Identifier, Identifiers},
    version::{Features, REVISION},
};

use http::{Request, Response, StatusCode};
use http_body_util::BodyExt as _;
use k8s_openapi::api::authentication::v1::{
    TokenReview, TokenReviewSpec, TokenReviewStatus, UserInfo,
};
use kube::client::Body;
use rustls::pki_types::CertificateDer;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::service_fn;

use crate::{
    agents::{
        AgentContext, UnadmittedTable,
        admission::{Authenticator, ReviewPace},
        identity::{Certificate, Claims, Identity},
        sessions::Sessions,
    },
    backends::{Backend, Backends, Registration, Strategy},
    config::{AgentIdentity, ClaimRules, ExpireAgents, ServerSetConfig, TokenConfig},
    metrics::ServerMetrics,
    server_set::ServerSet,
};

/// Both ends of a new tunnel, which lives however long it is idle.
pub(crate) async fn pair() -> Pair {
    let settings = Settings::default();
    Pair::without_idle_timeout(Peer::local(Carrier::Tcp), &settings, &settings).await.unwrap()
}

pub(crate) fn target(address: &str) -> Target {
    address.parse().unwrap()
}

/// The introduction of the agent of this name, which stands for these hosts.
pub(crate) fn hello(name: &str, hosts: &[&str]) -> Hello {
    let identifiers: Vec<_> =
        hosts.iter().map(|host| Identifier::new("host", host).unwrap()).collect();
    Hello {
        revision: REVISION,
        features: Features::default(),
        agent_id: name.parse::<AgentId>().unwrap(),
        instance: InstanceId([7; 16]),
        identifiers: Identifiers::try_from(identifiers).unwrap(),
        token: None,
        software: Text::truncated("test".into()),
        extensions: Extensions::default(),
    }
}

/// What the agents of a server share that admits every agent and has no backends yet.
pub(crate) fn context() -> Arc<AgentContext> {
    context_with(Authenticator::open())
}

/// The same with this authenticator.
pub(crate) fn context_with(authenticator: Authenticator) -> Arc<AgentContext> {
    Arc::new(new_context(authenticator))
}

/// The same with room for so many peers that are not admitted.
pub(crate) fn context_with_room_for(peers: usize) -> Arc<AgentContext> {
    let mut context = new_context(Authenticator::open());
    context.unadmitted = Arc::new(UnadmittedTable::with_limit(peers, context.metrics.clone()));
    Arc::new(context)
}

fn new_context(authenticator: Authenticator) -> AgentContext {
    let metrics = Arc::new(ServerMetrics::new().unwrap());
    AgentContext {
        backends: Backends::new(&[Strategy::Default]),
        authenticator,
        unadmitted: Arc::new(UnadmittedTable::new(u64::MAX, metrics.clone())),
        metrics,
        server_id: "server".parse().unwrap(),
        server_count: 3,
        server_set: Arc::new(ServerSet::new(
            "server".parse().unwrap(),
            8132,
            &ServerSetConfig::default(),
            3,
            false,
        )),
        max_streams: 10,
        memory: MemoryBudget::new(0),
        hedge_rate: 1000,
        expire_agents: ExpireAgents::Renewing,
        recheck_interval: None,
        sessions: Sessions::new(Duration::from_secs(30), Arc::default()),
        drain_timeout: Duration::from_secs(30),
        draining: CancellationToken::new(),
        closing: CancellationToken::new(),
        settings: Settings::default(),
        konnectivity_keep_alive_interval: None,
        tasks: TaskTracker::new(),
    }
}

/// An authenticator whose reviews are answered by `review`, after any time it takes.
pub(crate) fn authenticator<F>(
    review: impl Fn(TokenReviewSpec) -> F + Clone + Send + 'static,
) -> Authenticator
where
    F: Future<Output = Result<TokenReviewStatus, StatusCode>> + Send + 'static,
{
    by_token(client(review))
}

/// An authenticator that has this client review tokens.
pub(crate) fn by_token(client: CurrentClient) -> Authenticator {
    let metrics = Arc::new(ServerMetrics::new().unwrap());
    Authenticator::by_token(client, account(), ReviewPace::default(), metrics)
}

/// A token with these claims, without a valid signature.
pub(crate) fn jwt(claims: &serde_json::Value) -> Secret {
    let encode = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
    let (header, claims) = (encode(r#"{"alg":"RS256","kid":"key"}"#), encode(&claims.to_string()));
    Secret::new(&format!("{header}.{claims}.{}", encode("signature"))).unwrap()
}

/// The token of an agent, different for each name.
pub(crate) fn token(name: &str) -> Secret {
    jwt(&serde_json::json!({ "sub": name }))
}

/// A certificate with this common name, if it is not empty, and these alternative names.
pub(crate) fn certificate(name: &str, names: &[&str]) -> CertificateDer<'static> {
    let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let mut params = rcgen::CertificateParams::new(names).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    if !name.is_empty() {
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
    }
    params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().into()
}

/// The identity of an agent with a certificate of this name.
pub(crate) fn identity(name: &str) -> Identity {
    let certificate = Certificate::of(&certificate(name, &[]));
    Identity { certificate, ..Identity::default() }
}

/// An address of an agent.
pub(crate) const REMOTE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A client whose reviews are answered by `review`, after any time it takes.
pub(crate) fn client<F>(
    review: impl Fn(TokenReviewSpec) -> F + Clone + Send + 'static,
) -> CurrentClient
where
    F: Future<Output = Result<TokenReviewStatus, StatusCode>> + Send + 'static,
{
    let service = service_fn(move |request: Request<Body>| {
        let review = review.clone();
        async move {
            let body = request.into_body().collect().await?.to_bytes();
            let TokenReview { metadata, spec, .. } = serde_json::from_slice(&body)?;
            let (status, body) = match review(spec.clone()).await {
                Ok(status) => {
                    let review = TokenReview { metadata, spec, status: Some(status) };
                    (StatusCode::CREATED, serde_json::to_vec(&review)?)
                }
                Err(status) => (status, Vec::new()),
            };
            let answer = Response::builder().status(status).body(Body::from(body))?;
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(answer)
        }
    });
    CurrentClient::fixed(kube::Client::new(service, "default"), "kubernetes:6443")
}

/// The account that agents' tokens must belong to.
pub(crate) fn account() -> TokenConfig {
    TokenConfig {
        namespace: "kube-system".into(),
        service_account: "konnectivity-agent".into(),
        audience: "system:konnectivity-server".into(),
    }
}

/// The review of a token that is accepted.
pub(crate) fn accepted() -> TokenReviewStatus {
    let username = "system:serviceaccount:kube-system:konnectivity-agent";
    TokenReviewStatus {
        authenticated: Some(true),
        audiences: Some(vec![account().audience]),
        user: Some(UserInfo { username: Some(username.into()), ..UserInfo::default() }),
        ..TokenReviewStatus::default()
    }
}

/// An agent's end of a tunnel whose other end is registered.
pub(crate) struct TestAgent {
    pub(crate) tunnel: Tunnel,
    pub(crate) backend: Arc<Backend>,
    pub(crate) registration: Registration,
}

impl TestAgent {
    /// An agent of this name, which may carry ten streams.
    pub(crate) async fn join(backends: &Backends, name: &str) -> Self {
        Self::join_for(backends, name, &[]).await
    }

    /// An agent of this name that stands for these hosts.
    pub(crate) async fn join_for(backends: &Backends, name: &str, hosts: &[&str]) -> Self {
        Self::with(backends, hello(name, hosts), Identity::default(), pair().await)
    }

    /// An agent of this name on this tunnel.
    pub(crate) fn join_on(backends: &Backends, name: &str, pair: Pair) -> Self {
        Self::join_on_for(backends, name, &[], pair)
    }

    /// An agent of this name on this tunnel, which stands for these hosts.
    pub(crate) fn join_on_for(backends: &Backends, name: &str, hosts: &[&str], pair: Pair) -> Self {
        Self::with(backends, hello(name, hosts), Identity::default(), pair)
    }

    /// An agent of this name, in a process of its own.
    pub(crate) async fn join_as(backends: &Backends, name: &str, instance: u8) -> Self {
        let hello = Hello { instance: InstanceId([instance; 16]), ..hello(name, &[]) };
        Self::with(backends, hello, Identity::default(), pair().await)
    }

    /// An agent of this name, whose software this is.
    pub(crate) async fn join_with(backends: &Backends, name: &str, software: Text<64>) -> Self {
        let hello = Hello { software, ..hello(name, &[]) };
        Self::with(backends, hello, Identity::default(), pair().await)
    }

    /// An agent of this identity that stands for these hosts.
    pub(crate) async fn join_by(
        backends: &Backends,
        identity: Identity,
        name: &str,
        hosts: &[&str],
    ) -> Self {
        Self::with(backends, hello(name, hosts), identity, pair().await)
    }

    /// An agent with a certificate of this name, which is its id by this rule, in a process of its
    /// own.
    pub(crate) async fn join_by_rule(
        backends: &Backends,
        rule: AgentIdentity,
        name: &str,
        instance: u8,
    ) -> Self {
        let hello = Hello { instance: InstanceId([instance; 16]), ..hello(name, &[]) };
        Self::with_rule(backends, hello, identity(name), pair().await, rule)
    }

    fn with(backends: &Backends, hello: Hello, identity: Identity, pair: Pair) -> Self {
        Self::with_rule(backends, hello, identity, pair, AgentIdentity::Any)
    }

    fn with_rule(
        backends: &Backends,
        hello: Hello,
        identity: Identity,
        pair: Pair,
        rule: AgentIdentity,
    ) -> Self {
        let Pair { agent: tunnel, server, .. } = pair;
        let rules = ClaimRules { identity: rule, allowed: Vec::new() };
        let agent_id = hello.agent_id.clone();
        let identifiers = &hello.identifiers;
        let claims = Claims::new(identity.into(), &rules, None, agent_id, identifiers).unwrap();
        let backend = Arc::new(Backend::new(server, hello, claims, 10));
        let registration = backends.register(backend.clone()).unwrap();
        Self { tunnel, backend, registration }
    }

    /// The next dial that the server asks this agent for.
    pub(crate) async fn asked(&self) -> Asked {
        let (send, mut recv) = self.tunnel.accept().await.unwrap();
        let frame = recv.read_frame(DialRequest::MAX_LEN).await.unwrap();
        Asked { request: frame.message().unwrap(), send, recv }
    }
}

/// A dial that an agent was asked for.
pub(crate) struct Asked {
    pub(crate) request: DialRequest,
    pub(crate) send: SendHalf,
    pub(crate) recv: RecvHalf,
}

impl Asked {
    /// Replies, with the stream left open.
    pub(crate) async fn reply(&mut self, outcome: Result<(), DialFailure>) {
        let timing = DialTiming { connect_micros: 7, ..DialTiming::default() };
        let reply = DialReply { outcome, timing, extensions: Extensions::default() };
        self.send.write_chunk(frame::encode(&reply).unwrap()).await.unwrap();
    }
}

/// The value of a metric, which is named with its labels as in a scrape; 0 if it is not there.
pub(crate) fn metric(metrics: &ServerMetrics, backends: &Backends, name: &str) -> f64 {
    let scrape = metrics.render(backends);
    let value = scrape.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map_or(0.0, |value| value.parse().unwrap())
}
